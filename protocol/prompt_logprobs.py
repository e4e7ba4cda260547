"""What the model says of a prompt's own tokens, as it stands in ``extra.plp`` of the first frame of a journal.

A map, so that readers in any language can take it apart; its numbers are packed, little-endian, since a prompt has
thousands of them. Position 0 has no logprob: nothing stands before it.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import msgspec

from protocol.errors import InvalidRequest
from protocol.messages import unpack_ids

MAX_BYTES = 4 << 20  # of one request, in all its journals
ENTRY_BYTES = 32  # counted for each logprob that is told: its numbers, and its token's bytes once


class Told(NamedTuple):
    """One token at one position. ``rank``: 1 for the most probable."""

    token: int
    raw: bytes
    logprob: float
    rank: int


class PromptLogprobs(msgspec.Struct, frozen=True):
    """``p`` prompt tokens, ``k`` alternatives at each position but the first."""

    k: int
    ids: bytes  # int32 [p]
    lp: bytes  # float32 [p - 1]: of these ids
    rank: bytes  # int32 [p - 1]
    top: bytes  # int32 [p - 1, k]: the most probable ids
    top_lp: bytes  # float32 [p - 1, k]
    tok: list[tuple[int, bytes]]  # the bytes of every id that is named above

    def asdict(self) -> dict[str, Any]:
        return msgspec.structs.asdict(self)

    def positions(self) -> Iterator[tuple[Told, list[Told]]]:
        """(the prompt's own token, the most probable ones, best first) from position 1 on."""
        raw = dict(self.tok)
        ids, ranks, top = (unpack_ids(packed) for packed in (self.ids, self.rank, self.top))
        logprobs, top_logprobs = _floats(self.lp), _floats(self.top_lp)
        for at in range(len(ids) - 1):
            own = Told(ids[at + 1], raw[ids[at + 1]], logprobs[at], ranks[at])
            first = at * self.k
            alternatives = [
                Told(top[first + i], raw[top[first + i]], top_logprobs[first + i], i + 1) for i in range(self.k)
            ]
            yield own, alternatives

    def first(self) -> Told:
        """Position 0, whose logprob means nothing."""
        token = unpack_ids(self.ids[:4])[0]
        return Told(token, dict(self.tok)[token], 0.0, 0)


def prompt_logprobs_of(extra: dict[str, Any] | None) -> PromptLogprobs | None:
    """What a frame's ``extra`` says of the prompt. msgspec.ValidationError for what no worker writes."""
    return msgspec.convert(extra["plp"], PromptLogprobs) if extra is not None and "plp" in extra else None


def check_size(prompt_tokens: Iterable[int], n: int, alternatives: int) -> None:
    """InvalidRequest if so many prompts' logprobs, for ``n`` choices each, are more than a journal is to hold."""
    entries = n * sum(prompt_tokens) * (1 + alternatives)
    if entries * ENTRY_BYTES > MAX_BYTES:
        raise InvalidRequest(
            f"logprobs of the prompt may be at most {MAX_BYTES // ENTRY_BYTES} in a request, {entries} are asked for "
            "(prompt tokens, times 1 and the alternatives, times n)",
            param="prompt_logprobs",
        )


def _floats(packed: bytes) -> array[float]:
    found = array("f")
    found.frombytes(packed)
    if sys.byteorder == "big":
        found.byteswap()
    return found
