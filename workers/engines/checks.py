"""What a new sequence of a plan must be for an engine to compute it: a table of checks, made once per sequence.

A value that a client can cause (ids, sampling values) is answered with an error; one that only our scheduler can cause
(seats, blocks, counts) with a drop: the scheduler reads the journal and places the sequence anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import numpy as np

from protocol.errors import InvalidRequest, NonFiniteLogits, NoTokenLeft
from protocol.messages import ID_BYTES, NewSequence

Failure = tuple[str, str]  # error code, message

NON_FINITE: Failure = (NonFiniteLogits.code, "the model's output for this sequence is not a number")
NO_TOKEN_LEFT: Failure = (
    NoTokenLeft.code, "what is ruled out (by bad_words, allowed_token_ids, min_tokens, a structure) leaves no token"
)  # fmt: skip


@dataclass(frozen=True)
class Limits:
    seats: int
    vocab_size: int
    blocks: int
    block_size: int
    longest: int  # tokens of a sequence


@dataclass
class Refusals:
    """Sequences that a step could not compute. ``dropped``: their seats; ``failed``: those of them that end with an
    error, the others are placed anew."""

    dropped: list[int] = field(default_factory=list)
    failed: dict[int, Failure] = field(default_factory=dict)

    def add(self, seat: int, failure: Failure | None = None) -> None:
        self.dropped.append(seat)
        if failure is not None:
            self.failed[seat] = failure

    def __bool__(self) -> bool:
        return bool(self.dropped)


def _ids(packed: bytes) -> np.ndarray:
    return np.frombuffer(packed[: len(packed) // ID_BYTES * ID_BYTES], "<i4")


def _within(ids: np.ndarray, size: int) -> bool:
    return not len(ids) or 0 <= int(ids.min()) <= int(ids.max()) < size


def scores_prompt(new: NewSequence) -> bool:
    """Whether logprobs of its prompt are still to be journaled."""
    return new.sampling.prompt_logprobs is not None and new.cursor == 0


Check = Callable[[NewSequence, Limits], bool]

# (what must hold, check): in this order, since later ones rely on those before
OURS: tuple[tuple[str, Check], ...] = (
    ("its seat is one of this worker's", lambda new, limits: 0 <= new.seat < limits.seats),
    ("its ids and blocks are whole", lambda new, limits: not (len(new.token_ids) | len(new.block_table)) % ID_BYTES),
    ("it has a prompt", lambda new, limits: 0 < new.prompt_len <= len(new.token_ids) // ID_BYTES),
    ("it fits the context", lambda new, limits: len(new.token_ids) // ID_BYTES <= limits.longest),
    ("a token is left to compute", lambda new, limits: 0 <= new.computed < len(new.token_ids) // ID_BYTES),
    ("what is computed fills blocks", lambda new, limits: new.computed % limits.block_size == 0),
    (
        "a prompt whose own logprobs are asked for is computed from its start",
        lambda new, limits: not (new.computed and scores_prompt(new)),
    ),
    (
        "what is computed has blocks",
        lambda new, limits: new.computed <= len(new.block_table) // ID_BYTES * limits.block_size,
    ),
    (
        "it has no more blocks than its longest context needs",
        lambda new, limits: len(new.block_table) // ID_BYTES <= -(-limits.longest // limits.block_size),
    ),
    ("its blocks are in the pool", lambda new, limits: _within(_ids(new.block_table), limits.blocks)),
    (
        "no block stands twice in its table",
        lambda new, limits: len(set(_ids(new.block_table).tolist())) == len(new.block_table) // ID_BYTES,
    ),
    (
        "its choice, cursor and placement are counts",
        lambda new, limits: min(new.choice, new.cursor, new.placement) >= 0,
    ),
    ("its seed has 64 bits", lambda new, limits: -(1 << 63) <= new.seed < 1 << 63),
    ("its choice has 31 bits", lambda new, limits: new.choice < 1 << 31),
)


def refusal(new: NewSequence, limits: Limits) -> tuple[str, Failure | None] | None:
    """Why ``new`` cannot be computed, and the error that it ends with, if a client caused it; None if it can."""
    for what, holds in OURS:
        if not holds(new, limits):
            return f"not so: {what}", None
    if not _within(_ids(new.token_ids), limits.vocab_size):
        message = f"a token id lies outside the model's {limits.vocab_size}"
        return message, (InvalidRequest.code, message)
    try:
        # max_tokens has been resolved to what the context leaves, which may be less than the min_tokens asked for
        msgspec.structs.replace(new.sampling, max_tokens=None).check(limits.vocab_size)
    except InvalidRequest as error:
        return error.message, (InvalidRequest.code, error.message)
    return None
