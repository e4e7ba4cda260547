"""Control tokens: which they are, and where a text that a request gives could be read as one.

A tokenizer looks for its added tokens in any text, so `<|im_end|>` in a message would end the message's turn. The
scan below is what an ordinary request costs: no hit, and nothing else is done (scheduler/prompts/prompt_guard.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from scheduler.prompts.template_source import TemplateSource

Tokenizer = Any  # tokenizers.Tokenizer
SPACE_MARK = "\u2581"  # what SentencePiece puts in a space's place


class Found(NamedTuple):
    """What a text holds."""

    inside: bool = False  # a control token, whatever its case
    edge: bool = False  # a piece of one at its beginning or end: the text around could complete it
    alike: bool = False  # one that appears only when the tokenizer normalises the text


class ControlTokens:
    """``hard``: added tokens that are special, or mark turns. ``soft``: other added tokens that the template writes by
    itself (`<think>`, `<tool_call>`). White space is neither.

    ``written``: texts that the template is known to have written, besides its literals. ``turn``: the part of them
    between an assistant's words and a user's. ``always``: names that count as special though their flag does not say
    so (a tokenizer's eos, bos and the like).
    """

    def __init__(
        self,
        backend: Tokenizer,
        source: TemplateSource,
        *,
        written: str = "",
        turn: str = "",
        always: Iterable[str] = (),
    ) -> None:
        added = {t.content: t for t in backend.get_added_tokens_decoder().values() if t.content.strip()}
        named = set(always)
        by_template = source.literals + "\0" + written
        self.hard = frozenset(word for word, token in added.items() if token.special or word in named or word in turn)
        self.soft = frozenset(word for word in added if word in by_template) - self.hard
        self.words = self.hard | self.soft
        self.ids = {word: backend.token_to_id(word) for word in self.words}
        every = prefix_tree(self.words)
        self.find = re.compile(every).finditer
        self._all = re.compile(every, re.IGNORECASE)
        self._hard = re.compile(prefix_tree(self.hard), re.IGNORECASE) if self.soft else self._all
        self._heads = {word[:i] for word in self.words for i in range(1, len(word))}
        self._tails = {word[i:] for word in self.words for i in range(1, len(word))}
        self._longest = max(map(len, self.words), default=0)
        self._inner = "\0".join(self.words)
        self._constants = source.words
        self._normalize = backend.normalizer.normalize_str if backend.normalizer is not None else None
        self._spaced = any(SPACE_MARK in word for word in self.words)

    def pattern(self, own: bool) -> re.Pattern[str]:
        """What is looked for. ``own``: in an assistant's own content and reasoning, where soft tokens are its own."""
        return self._hard if own else self._all

    def scan(self, text: str, own: bool) -> Found:
        if not self.words:
            return Found()
        pattern = self.pattern(own)
        inside = pattern.search(text) is not None
        alike = any(pattern.search(form) is not None for form in self._forms(text))
        return Found(inside, self.edge(text), alike)

    def _forms(self, text: str) -> list[str]:
        """The text as the tokenizer's model comes to see it."""
        forms = [] if self._normalize is None else [self._normalize(text)]
        if self._spaced:
            forms += [form.replace(" ", SPACE_MARK) for form in (text, *forms)]
        return [form for form in forms if form != text]

    def edge(self, text: str) -> bool:
        """Whether a piece of a control token stands at either end. False for a word that the template knows: it may be
        looked up or compared, and must not bear a mark."""
        if text in self._constants:
            return False
        body = text.strip()
        most = min(self._longest, len(body) + 1)
        if any(body[:i] in self._tails or body[-i:] in self._heads for i in range(1, most)):
            return True
        return 0 < len(body) < self._longest and body in self._inner


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a chat's text, to which nothing is added. Unlike ``encode``, ``encode_batch_fast`` releases the
    interpreter's lock and keeps no offsets."""
    (ids,) = encode_all(tokenizer, [text])
    return ids


def encode_all(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def prefix_tree(words: Iterable[str]) -> str:
    """One expression for all words, the longest match first: a thousand reserved tokens cost no more than ten."""
    tree: dict[str, Any] = {}
    for word in words:
        node = tree
        for character in word:
            node = node.setdefault(character, {})
        node[""] = {}
    return _expression(tree) or "(?!)"


def _expression(node: dict[str, Any]) -> str:
    branches = [re.escape(character) + _expression(below) for character, below in node.items() if character]
    if not branches:
        return ""
    body = branches[0] if len(branches) == 1 and "" not in node else "(?:" + "|".join(branches) + ")"
    return body + "?" if "" in node else body
