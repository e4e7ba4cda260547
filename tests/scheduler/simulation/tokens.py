"""What tokens a simulated model draws: a function of the whole prefix, the seed and the choice."""

from __future__ import annotations

import hashlib
from array import array

STOP = 13  # tokens divisible by it end a sequence
START = b"start"


def chain(parent: bytes, token: int) -> bytes:
    return hashlib.blake2b(parent + token.to_bytes(4, "little"), digest_size=8).digest()


def draw(prefix: bytes, seed: int, choice: int) -> int:
    """The next token: fixed by all tokens before it, the seed and the choice."""
    digest = hashlib.blake2b(prefix + bytes([seed, choice]), digest_size=4).digest()
    return int.from_bytes(digest, "little") % 500 + 1


def undisturbed(prompt: array[int], max_tokens: int, seed: int, choice: int) -> tuple[list[int], str]:
    prefix = START
    for token in prompt:
        prefix = chain(prefix, token)
    output: list[int] = []
    while True:
        token = draw(prefix, seed, choice)
        output.append(token)
        prefix = chain(prefix, token)
        if token % STOP == 0:
            return output, "stop"
        if len(output) == max_tokens:
            return output, "length"


def frame_bytes(token: int | None, finish: str | None) -> int:
    """Frames differ in length: a cursor is not a count."""
    return 3 + (token or 0) % 4 + (7 if finish else 0)
