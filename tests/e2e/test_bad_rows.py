"""Rows that cannot be computed, through the whole service: no process restarts, no neighbour's stream pauses."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tests.models import CHAT_TEMPLATE, CONFIGS, SPECIALS, build, byte_tokenizer
from tests.stack import Stack

pytestmark = pytest.mark.timeout(600)


def client_of(stack: Stack) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0, timeout=120)


class Neighbour:
    """A stream beside what is tried. Between two looks at ``grew`` it must have been given further tokens."""

    def __init__(self, client: openai.OpenAI, tokens: int) -> None:
        self.tokens, self.finish, self._asked = 0, "", tokens
        self._moved = threading.Condition()
        self._thread = threading.Thread(target=self._read, args=(client,), daemon=True)
        self._thread.start()

    def _read(self, client: openai.OpenAI) -> None:
        extra = {"ignore_eos": True}
        stream = client.completions.create(
            model="m", prompt="neighbour", max_tokens=self._asked, temperature=0, stream=True, extra_body=extra
        )
        for chunk in stream:
            with self._moved:
                self.tokens += 1
                self.finish = chunk.choices[0].finish_reason or self.finish
                self._moved.notify_all()

    def grew(self, by: int = 3) -> None:
        with self._moved:
            until = self.tokens + by
            assert self._moved.wait_for(lambda: self.tokens >= until or self.finish, timeout=60), "the stream stands"
            assert self.finish in ("", "length")


def generation(stack: Stack) -> list[Any]:
    return sorted(stack.pids("worker").items())


# ---------------------------------------------------------------- an engine that fails on command


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    path = tmp_path_factory.mktemp("bad") / "model"
    build(CONFIGS["llama"]).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    options = {"fail_rows": {str(ord("!")): "error", str(ord("?")): "drop"}, "block_size": 4}
    args = ("--model", str(path), "--served-model-name", "m", "--engine", "simulated")
    with Stack(path.parent / "s", *args, "--engine-options", json.dumps(options)) as stack:
        yield stack


SHARED = "the same beginning for all of them, many blocks long. "


def test_non_finite_logits_end_their_choice_with_an_error_and_no_other(simulated: Stack) -> None:
    client, before = client_of(simulated), generation(simulated)
    neighbour = Neighbour(client, 450)
    neighbour.grew()
    for _ in range(3):
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model="m", prompt=SHARED + "a!b", max_tokens=5)
        assert caught.value.code == "non_finite_logits"
        neighbour.grew()
        good = client.completions.create(
            model="m", prompt=SHARED + "good", max_tokens=5, extra_body={"ignore_eos": True}
        )
        assert good.usage is not None
        assert good.usage.completion_tokens == 5
    assert generation(simulated) == before


def test_a_placement_that_cannot_be_computed_is_made_again_and_nobody_notices(simulated: Stack) -> None:
    client, before = client_of(simulated), generation(simulated)
    extra = {"ignore_eos": True, "seed": 5}
    texts = []
    for _ in range(2):
        reply = client.completions.create(model="m", prompt=SHARED + "a?b", max_tokens=9, n=3, extra_body=extra)
        texts.append([choice.text for choice in reply.choices])
        assert [choice.finish_reason for choice in reply.choices] == ["length"] * 3
    assert texts[0] == texts[1]
    assert generation(simulated) == before


def test_an_engine_process_that_ends_is_replaced_and_only_what_ended_it_fails(tmp_path: Path) -> None:
    """The neighbour is there at the deaths too. Each is then run alone, and only one of them ends the engine again."""
    path = tmp_path / "model"
    build(CONFIGS["llama"]).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    options = {"fail_rows": {str(ord("!")): "end"}, "process": True, "model": None, "block_size": 4}
    args = ("--model", str(path), "--served-model-name", "m", "--engine", "simulated")
    with Stack(tmp_path / "s", *args, "--engine-options", json.dumps(options)) as stack:
        client, before = client_of(stack), generation(stack)
        neighbour = Neighbour(client, 450)
        neighbour.grew()
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model="m", prompt="a!b", max_tokens=5)
        assert caught.value.code == "engine_failed"
        neighbour.grew()
        assert generation(stack) == before, "the worker stays: another process of its own has the engine"


# ---------------------------------------------------------------- odd models


def larger_without_bos_or_template(path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<extra>", "<more>"])
    tokenizer.bos_token = None
    tokenizer.chat_template = ""
    tokenizer.save_pretrained(path)


def byte_fallback_without_eos(path: Path) -> None:
    """Two letters have tokens; all else is spelled in bytes, and half a character has no text yet."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocabulary |= {word: 256 + k for k, word in enumerate([*SPECIALS[:5], "a", "é"])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens(SPECIALS[:5])
    bos, _, pad = SPECIALS[:3]
    wrapped = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, pad_token=pad)
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(path)


# name -> ids of the model, tokenizer
ODD = {
    "larger, no bos, empty template": (264, larger_without_bos_or_template),
    "byte fallback, no eos": (263, byte_fallback_without_eos),
}

ids = st.lists(st.integers(-2, 300) | st.just(1 << 31) | st.just(250), min_size=1, max_size=20)
texts = st.text(max_size=30) | st.sampled_from(
    ["a<extra>b", "<more>", "<|im_end|>", "\x00", "\ud7ff", "é€😀 <0xF0>", ""]
)
numbers = st.sampled_from([0, 1, -1, 0.5, 2, 1e-9, 1e30, -1e30, 1 << 62])
bodies = st.fixed_dictionaries(
    {"prompt": texts | ids},
    optional={
        "temperature": numbers, "top_p": numbers, "presence_penalty": numbers, "seed": st.integers(-5, 1 << 70),
        "logit_bias": st.dictionaries(st.integers(-3, 300).map(str), numbers, max_size=3),
        "extra_body": st.fixed_dictionaries(
            {}, optional={"top_k": numbers, "min_p": numbers, "repetition_penalty": numbers, "min_tokens": numbers,
                          "stop_token_ids": st.lists(st.integers(-3, 300), max_size=2)}
        ),
    },
)  # fmt: skip


@pytest.mark.parametrize("name", sorted(ODD))
def test_whatever_is_sent_to_an_odd_model_no_process_restarts_and_no_stream_pauses(tmp_path: Path, name: str) -> None:
    """The vocabulary is a multiple of nothing."""
    path = tmp_path / "model"
    ids, save_tokenizer = ODD[name]
    build({**CONFIGS["llama"], "vocab_size": ids}).save_pretrained(path)
    save_tokenizer(path)
    args = ("--model", str(path), "--served-model-name", "m", "--threads", "1", "--device", "cpu")
    with Stack(tmp_path / "s", *args) as stack:
        client, before = client_of(stack), generation(stack)
        neighbour = Neighbour(client, 480)

        @settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(body=bodies)
        def tries(body: dict[str, Any]) -> None:
            nonlocal neighbour
            if neighbour.finish:
                neighbour = Neighbour(client, 480)
            answer: tuple[int, str | None] = (200, None)
            try:
                client.completions.create(model="m", max_tokens=3, **body)
            except openai.APIStatusError as error:
                answer = (error.status_code, error.code)
            assert answer[0] in (200, 400), answer
            neighbour.grew(1)

        tries()
        assert generation(stack) == before
