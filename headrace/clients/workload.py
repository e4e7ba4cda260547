"""What a load generator sends: a seeded description of requests, the same list every time it is built.

Prompts are token ids drawn blindly, or text. With a tokenizer, text is made of tokens of the form " word" that
survive decoding and encoding one to one, so a text prompt has exactly the length asked for. Without one it is made of
short common words, about a token each; the server's own usage figures are then the truth.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

WORDS = """
the of and to in is was for on that by this with you it not or be are from at as your all have new more an
we will home can us about if page my has no time one out up what into than them then two way who may day use
her each look write go see number could people first water call find long down did get come made part over
""".split()  # noqa: SIM905
FIRST_ID = 100  # below lie special tokens and single bytes, in most vocabularies


@dataclass(frozen=True)
class Request:
    index: int
    arrival: float  # seconds after the start of the run
    prompt: list[int] | str
    prompt_tokens: int  # as asked for
    max_tokens: int


@dataclass(frozen=True)
class Workload:
    """Lengths are inclusive ranges in tokens. ``rate`` in requests per second; infinite: all at once."""

    requests: int = 64
    prompt_len: tuple[int, int] = (32, 256)  # without the shared prefix
    output_len: tuple[int, int] = (16, 256)
    shared_prefix: int = 0  # tokens put before every prompt of a group
    prefix_groups: int = 1
    rate: float = math.inf
    seed: int = 0

    def build(self, vocabulary: Vocabulary) -> list[Request]:
        rng = random.Random(self.seed)
        prefixes = [vocabulary.draw(rng, self.shared_prefix) for _ in range(self.prefix_groups)]
        arrival, requests = 0.0, []
        for index in range(self.requests):
            drawn = prefixes[index % self.prefix_groups] + vocabulary.draw(rng, rng.randint(*self.prompt_len))
            prompt = vocabulary.prompt(drawn)
            requests.append(Request(index, arrival, prompt, len(drawn), rng.randint(*self.output_len)))
            if math.isfinite(self.rate):
                arrival += rng.expovariate(self.rate)
        return requests


class Vocabulary:
    """Where prompts are drawn from. ``text`` False: ids below ``size``. Raises ValueError if none can be drawn."""

    def __init__(self, *, text: bool = False, size: int = 1000, tokenizer: Path | None = None) -> None:
        self.text = text
        self._words: dict[int, str] = dict(enumerate(WORDS))
        self._ids: Sequence[int] = range(len(WORDS)) if text else range(min(FIRST_ID, size // 2), size)
        if tokenizer is not None:
            self._words = _whole_words(tokenizer)
            self._ids = tuple(self._words)
        if not self._ids:
            raise ValueError("no tokens to draw prompts from")

    def draw(self, rng: random.Random, length: int) -> list[int]:
        return rng.choices(self._ids, k=length)

    def prompt(self, drawn: list[int]) -> list[int] | str:
        return "".join(" " + self._words[i] for i in drawn) if self.text else drawn


def _whole_words(path: Path) -> dict[int, str]:
    """id -> word, for the tokens that are one whole word after a space. ``path``: tokenizer.json or its directory."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json" if path.is_dir() else path))
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    words = [(i, t[1:]) for t, i in vocab if t[0] in "\u0120\u2581" and t[1:].isascii() and t[1:].isalpha()]
    encoded = tokenizer.encode_batch([" " + w for _, w in words], add_special_tokens=False)
    return {i: w for (i, w), e in zip(words, encoded, strict=True) if e.ids == [i]}
