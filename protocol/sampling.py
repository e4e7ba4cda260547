"""SamplingParams: how tokens are drawn and when a sequence ends. One definition for HTTP, queue and wire."""

from __future__ import annotations

from typing import Any

import msgspec

from protocol.errors import InvalidRequest
from protocol.formats.spec import FormatSpec
from protocol.structures.structure import Structure

MAX_CHOICES = 8
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS = 1024
MAX_ALLOWED = 4096
MAX_TOP_LOGPROBS = 20
MAX_NAMED_LOGPROBS = 128
MAX_BAD_WORDS = 64
MAX_BAD_WORD_CHARS = 128
INT64_MAX = 2**63 - 1


class Content(msgspec.Struct, frozen=True, omit_defaults=True):
    """What tells plain content from thoughts and calls, in an answer that may hold either: stop strings are looked for
    in content alone, and a result tells the three apart."""

    format: FormatSpec
    functions: list[str]  # their calls are looked for
    thinking: bool  # the prompt has opened a thought
    schemas: list[Any] = []  # of their arguments, where a result is asked for


class SamplingParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Defaults are OpenAI's. ``check`` is the one place where ranges are enforced.

    Greedy is ``temperature == 0``. ``logprobs`` is the number of alternatives to report beside the
    sampled token's own logprob (None: report nothing; 0: only the sampled one's).
    """

    max_tokens: int | None = None  # None: as many as the context allows; 0: the prompt is computed, nothing drawn
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    n: int = 1
    stop: list[str] = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    allowed_token_ids: list[int] | None = None  # no other id is drawn
    structure: Structure | None = None  # what the text must look like
    content: Content | None = None  # how an answer is read by the worker; not for requests to set
    bad_words: list[str] = []  # the token that would complete one is not drawn
    logprob_token_ids: list[int] | None = None  # ids whose logprobs are told beside the most probable ones
    prompt_logprobs: int | None = None  # alternatives to report beside the logprob of each prompt token

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def ruled(self) -> bool:
        """Whether a grammar says what is written and where it ends."""
        return self.structure is not None and self.structure.kind is not None

    @property
    def penalized(self) -> bool:
        """Whether sampling needs the counts of earlier tokens."""
        return self.frequency_penalty != 0 or self.presence_penalty != 0 or self.repetition_penalty != 1

    def check(self, vocab_size: int | None = None) -> None:
        """Raise InvalidRequest that names the first field out of range. Types were checked by decoding."""
        _range("max_tokens", self.max_tokens, 0, INT64_MAX)
        _range("min_tokens", self.min_tokens, 0, INT64_MAX)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest("min_tokens must not exceed max_tokens", param="min_tokens")
        _range("temperature", self.temperature, 0.0, 2.0)
        _range("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _range("top_k", self.top_k, -1, INT64_MAX)
        _range("min_p", self.min_p, 0.0, 1.0)
        _range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _range("repetition_penalty", self.repetition_penalty, 0.0, 10.0, open_low=True)
        _range("seed", self.seed, -INT64_MAX - 1, INT64_MAX)
        _range("n", self.n, 1, MAX_CHOICES)
        _range("logprobs", self.logprobs, 0, MAX_TOP_LOGPROBS)
        _range("prompt_logprobs", self.prompt_logprobs, 0, MAX_TOP_LOGPROBS)
        if len(self.stop) > MAX_STOPS:
            raise InvalidRequest(f"stop takes at most {MAX_STOPS} strings", param="stop")
        for stop in self.stop:
            if not 1 <= len(stop) <= MAX_STOP_CHARS:
                raise InvalidRequest(f"a stop string must have 1 to {MAX_STOP_CHARS} characters", param="stop")
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidRequest(f"stop_token_ids takes at most {MAX_STOP_TOKEN_IDS} ids", param="stop_token_ids")
        top = INT64_MAX if vocab_size is None else vocab_size - 1
        for token in self.stop_token_ids:
            _range("stop_token_ids", token, 0, top)
        if self.logit_bias:
            if len(self.logit_bias) > MAX_LOGIT_BIAS:
                raise InvalidRequest(f"logit_bias takes at most {MAX_LOGIT_BIAS} tokens", param="logit_bias")
            for token, bias in self.logit_bias.items():
                _range("logit_bias", token, 0, top)
                _range("logit_bias", bias, -100.0, 100.0)
        if self.allowed_token_ids is not None:
            if not 1 <= len(self.allowed_token_ids) <= MAX_ALLOWED:
                raise InvalidRequest(f"allowed_token_ids takes 1 to {MAX_ALLOWED} ids", param="allowed_token_ids")
            for token in self.allowed_token_ids:
                _range("allowed_token_ids", token, 0, top)
            if self.structure is not None and self.structure.constrains:
                raise InvalidRequest("allowed_token_ids beside a structure is not supported", param="allowed_token_ids")
        if self.structure is not None:
            self.structure.check(vocab_size)
        if len(self.bad_words) > MAX_BAD_WORDS:
            raise InvalidRequest(f"bad_words takes at most {MAX_BAD_WORDS} words", param="bad_words")
        if not all(1 <= len(word) <= MAX_BAD_WORD_CHARS for word in self.bad_words):
            raise InvalidRequest(f"a bad word must have 1 to {MAX_BAD_WORD_CHARS} characters", param="bad_words")
        if self.logprob_token_ids is not None:
            if not 1 <= len(self.logprob_token_ids) <= MAX_NAMED_LOGPROBS:
                raise InvalidRequest(
                    f"logprob_token_ids takes 1 to {MAX_NAMED_LOGPROBS} ids", param="logprob_token_ids"
                )
            for token in self.logprob_token_ids:
                _range("logprob_token_ids", token, 0, top)
            if self.logprobs is None:
                raise InvalidRequest("logprob_token_ids needs logprobs", param="logprob_token_ids")


def _range(field: str, value: Any, low: float, high: float, open_low: bool = False) -> None:
    if value is None:
        return
    if not low <= value <= high or (open_low and value == low):  # a NaN is in no range
        bounds = "(" if open_low else "["
        raise InvalidRequest(f"{field} must lie in {bounds}{low}, {high}]", param=field)
