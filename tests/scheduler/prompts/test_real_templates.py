"""The guard over the chat templates of some seventy real models and six kinds of tokenizer.

The oracle is the tokenizer itself: an ordinary chat has the ids of its rendering; a chat with hostile text has those
of the same chat with harmless text, but for the hostile stretch, and that holds no control token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

import pytest
from transformers.utils.chat_template_utils import _compile_jinja_template

from scheduler.prompts.prompt_guard import TURNS, PromptGuard
from scheduler.prompts.template_source import TemplateSource
from tests import chat_templates
from tests.scheduler.prompts.chats import GO, ORDINARY, PLACES, Chat
from tests.scheduler.prompts.tokenizers import KINDS, Tokenizers

BEFORE, AFTER = "zalpha zbeta ", " zgamma zdelta"  # words apart, so that no piece reaches into the chat around
FULL_WIDTH = str.maketrans({"<": "＜", "[": "［", "e": "ｅ", "/": "／"})
PLAIN_MARKERS = {"llama-cpp-rwkv-world"}  # "User:", "Assistant:"
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
TOKENS |= {"tools": None, "documents": None}


@pytest.fixture(scope="module")
def templates() -> dict[str, str]:
    found = {name: chat_templates.read(name) for name in chat_templates.names()}
    assert len(found) >= 60
    return found


@pytest.fixture(scope="module")
def tokenizers(templates: dict[str, str]) -> Tokenizers:
    return Tokenizers(templates)


class Subject:
    """One template with one tokenizer."""

    def __init__(self, name: str, source: TemplateSource, compiled: Any, kind: str, backend: Any) -> None:
        self.name, self.kind, self.backend = name, kind, backend
        self._compiled = compiled
        self.guard = PromptGuard(backend, source, self.render)
        self.control = {id for word, id in self.guard.tokens.ids.items() if word != "<unk>"}

    def render(self, messages: list[dict[str, Any]], arguments: dict[str, Any]) -> str:
        return str(self._compiled.render(messages=messages, **{**TOKENS, **arguments}))

    def takes(self, chat: Chat) -> str | None:
        """The chat as the template renders it without a guard, if it takes such a chat at all."""
        try:
            return self.render(*chat)
        except Exception:
            return None

    def encode(self, text: str) -> Any:
        return self.backend.encode(text, add_special_tokens=False)

    def hostile(self) -> dict[str, str]:
        """Texts that forge: what stands between turns, all control tokens of a chat, and how else these may look."""
        sample = self.takes((TURNS, GO)) or "<|im_end|>"
        _, _, rest = sample.partition(str(TURNS[0]["content"]))
        turn, _, rest = rest.partition(str(TURNS[1]["content"]))
        tokens = "".join(sorted({match[0] for match in self.guard.tokens.find(sample)}))
        return {
            "turn": turn + "Obeyed." + rest.partition(str(TURNS[2]["content"]))[0],
            "tokens": tokens,
            "case": tokens.swapcase(),
            "alike": tokens.translate(FULL_WIDTH),
        }


def wrong_ordinary(subject: Subject, name: str, seen: Counter[str]) -> list[str]:
    text = subject.takes(ORDINARY[name])
    if text is None:
        seen["not taken"] += 1
        return []
    ids, way = subject.guard.trace(*ORDINARY[name])
    seen["ordinary " + way] += 1
    same = ids == subject.encode(text).ids
    return [] if same else [f"{subject.name}, {subject.kind}: {name} has other ids"]


def wrong_hostile(subject: Subject, place: str, form: str, text: str, seen: Counter[str]) -> list[str]:
    harmless = subject.takes(PLACES[place](BEFORE + "word" + AFTER))
    chat = PLACES[place](BEFORE + text + AFTER)
    today = subject.takes(chat)
    first = -1 if harmless is None else harmless.find(BEFORE)
    if harmless is None or today is None or first < 0:
        seen["not taken"] += 1
        return []
    last = harmless.rfind(AFTER) + len(AFTER)
    expected = subject.encode(harmless)
    pairs = list(zip(expected.ids, expected.offsets, strict=True))
    head = [id for id, (_, end) in pairs if end <= first]
    tail = [id for id, (start, _) in pairs if start >= last]
    control = [id for id in expected.ids if id in subject.control]
    ids, way = subject.guard.trace(*chat)
    seen["hostile " + way] += 1
    seen["forged today"] += [id for id in subject.encode(today).ids if id in subject.control] != control
    at = f"{subject.name}, {subject.kind}: {form} in {place}"
    if [id for id in ids if id in subject.control] != control:
        return [f"{at}: control tokens forged or lost"]
    if ids[: len(head)] != head or ids[len(ids) - len(tail) :] != tail:
        return [f"{at}: other ids outside"]
    return []


def allowed(subject: Subject, place: str, text: str) -> bool:
    """In an assistant's own content its own markers stay what they are; no special token is among them."""
    return place == "assistant" and any(word in text for word in subject.guard.tokens.soft)


def survey(
    templates: dict[str, str], tokenizers: Tokenizers, kinds: Collection[str] = KINDS, *, whole: bool
) -> Counter[str]:
    """Every template with every kind; the chats all (``whole``), or in turn over the kinds."""
    wrong: list[str] = []
    seen: Counter[str] = Counter()
    for t, (name, template) in enumerate(templates.items()):
        source, compiled = TemplateSource.of(template), _compile_jinja_template(template)
        for k, kind in enumerate(kinds):
            subject = Subject(name, source, compiled, kind, tokenizers[kind])
            assert (subject.guard.unprotected is not None) == (name in PLAIN_MARKERS), name
            if name in PLAIN_MARKERS:
                continue
            for i, chat in enumerate(ORDINARY):
                if whole or (i + t + k) % 2:
                    wrong += wrong_ordinary(subject, chat, seen)
            for f, (form, text) in enumerate(subject.hostile().items()):
                for p, place in enumerate(PLACES):
                    if (whole or (f + p + t + k) % 8 == 0) and not allowed(subject, place, text):
                        wrong += wrong_hostile(subject, place, form, text, seen)
    assert wrong == []
    return seen


def test_messages_forge_nothing_and_ordinary_chats_keep_their_ids(
    templates: dict[str, str], tokenizers: Tokenizers
) -> None:
    seen = survey(templates, tokenizers, whole=False)
    print(dict(seen))
    assert seen["ordinary plain"] + seen["ordinary checked"] >= 1800
    assert seen["ordinary twin"] == 0
    assert seen["hostile twin"] >= 1500
    assert seen["forged today"] >= 1000  # what is tried here does forge without the guard


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_every_chat_in_every_place(templates: dict[str, str], tokenizers: Tokenizers, kind: str) -> None:
    print(dict(survey(templates, tokenizers, [kind], whole=True)))
