"""From plans to tensors: what the worker keeps by seat, and the flat batch of one step.

A plan never says positions. For each seat the worker keeps its known ids, how many tokens are computed and
its block table; a row takes the next ``count`` tokens from there. The id sampled last stays on the device
(``last_id``), so that a step can be built and started before the one before it has been read back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from protocol.messages import ID_BYTES, SEAT_BYTES, NewSequence, Plan
from workers.engines.checks import Failure, Limits, Refusals, refusal, scores_prompt
from workers.torch_engine.staging import to_device

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoredRow:
    """Tokens of one row whose logits are to say something of the prompt token that follows each."""

    seat: int
    first: int  # flat index of the first of these tokens
    following: np.ndarray  # int64 [m]: the prompt tokens after them


class SampledRows(Protocol):
    """What the engine itself reads of a step: its rows, and those that sample."""

    seats: np.ndarray  # int64 [R]
    sampling_seats: np.ndarray  # int64 [k]
    sampling_positions: np.ndarray  # int64 [k]: position that the sampled token will take
    scored: list[ScoredRow]  # s tokens in all, whose logits follow those that sample


@dataclass
class StepInputs:
    """The flat batch of one step: T tokens of R rows, row after row.

    Arrays are on the host, tensors on the device. ``memo`` lets an attention keep what they derive
    from these once per step and use it in every layer.
    """

    input_ids: torch.Tensor  # int64 [1, T]
    positions: torch.Tensor  # int64 [1, T]
    slots: torch.Tensor  # int64 [T]: where each token's key and value go
    logit_rows: torch.Tensor  # int64 [k + s]: flat indices of the tokens whose logits are wanted: samples, then scores
    seats: np.ndarray  # int64 [R]
    counts: np.ndarray  # int64 [R]: tokens of the row in this step
    contexts: np.ndarray  # int64 [R]: tokens of the sequence once the step is done
    row_starts: np.ndarray  # int64 [R + 1]: where each row begins in the flat batch
    block_tables: np.ndarray  # int32 [R, widest]: zero beyond a row's own blocks
    block_size: int
    sampling_seats: np.ndarray  # int64 [k]
    sampling_positions: np.ndarray  # int64 [k]: position that the sampled token will take
    scored: list[ScoredRow] = field(default_factory=list)  # s tokens in all
    memo: dict[Any, Any] = field(default_factory=dict)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` returned the first time that ``key`` was asked for in this step."""
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]


@dataclass
class HostStep:
    """The same step as arrays on the host: T tokens of R rows. ``logit_rows`` may be set to other tokens."""

    seats: np.ndarray  # int64 [R]
    counts: np.ndarray  # int64 [R]
    computed: np.ndarray  # int64 [R]: tokens of the row before this step
    contexts: np.ndarray  # int64 [R]
    row_starts: np.ndarray  # int64 [R + 1]
    positions: np.ndarray  # int64 [T]
    slots: np.ndarray  # int64 [T]
    logit_rows: Any  # int64 [k + s]
    sampling_seats: np.ndarray  # int64 [k]
    sampling_positions: np.ndarray  # int64 [k]
    scored: list[ScoredRow] = field(default_factory=list)  # s tokens in all


_NO_IDS = np.zeros(0, np.int32)


class Seats:
    """State of the running sequences by seat, in arrays so that a step is built without a loop over decodes.

    A sequence that cannot be computed is given up: its rows are left out until its seat is freed, and ``refusals`` (of
    the step that is being built) says so once.
    """

    def __init__(
        self, seats: int, max_model_len: int, block_size: int, vocab_size: int, device: torch.device, limits: Limits
    ) -> None:
        self.limits = limits
        self.refusals = Refusals()
        self._given_up: set[int] = set()
        self._scored: dict[int, int] = {}  # seat -> tokens of its prompt, whose logprobs are asked for
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.device = device
        self.max_model_len = max_model_len
        self.widest = -(-max_model_len // block_size)
        self.ids: list[np.ndarray] = []
        self.taken = np.zeros(0, bool)
        self.computed = np.zeros(0, np.int64)  # tokens whose KV is stored
        self.known = np.zeros(0, np.int64)  # ids given plus ids sampled since
        self.given = np.zeros(0, np.int64)  # ids that came with the sequence
        self.tables = np.zeros((0, self.widest), np.int32)
        self.table_sizes = np.zeros(0, np.int64)
        self.last_id = torch.zeros(0, dtype=torch.int64, device=device)
        self._steady: tuple[bytes, HostStep] | None = None  # the last plan's seats, if it was one of decodes alone
        self._grow(seats)

    def _grow(self, seats: int) -> None:
        more = seats - len(self.ids)
        self.ids.extend([_NO_IDS] * more)
        self.taken, self.computed, self.known, self.given, self.table_sizes = (
            np.pad(array, (0, more)) for array in (self.taken, self.computed, self.known, self.given, self.table_sizes)
        )
        self.tables = np.pad(self.tables, ((0, more), (0, 0)))
        self.last_id = torch.nn.functional.pad(self.last_id, (0, more))
        self._last = self.last_id.numpy() if self.device.type == "cpu" else None  # the same memory, quicker to reach

    def add(self, new: NewSequence) -> bool:
        """Take ``new`` in; whether it can be computed. Its seat must be empty."""
        self._steady = None
        self._given_up.discard(new.seat)
        if (refused := refusal(new, self.limits)) is not None:
            self.give_up(new.seat, *refused)
            return False
        if new.seat >= len(self.ids):
            self._grow(max(new.seat + 1, 2 * len(self.ids)))
        if self.taken[new.seat]:
            self.give_up(new.seat, "its seat is given twice")
            return False
        ids = np.frombuffer(new.token_ids, "<i4")
        self.taken[new.seat] = True
        self.ids[new.seat] = ids
        self.known[new.seat] = self.given[new.seat] = len(ids)
        self.computed[new.seat] = new.computed
        self.table_sizes[new.seat] = 0
        if scores_prompt(new):
            self._scored[new.seat] = new.prompt_len
        self.extend(new.seat, new.block_table)
        return True

    def give_up(self, seat: int, reason: str, failure: Failure | None = None) -> None:
        """``seat`` gets no more rows until it is freed: told once, in the step that is being built."""
        if seat in self._given_up:
            return
        log.warning("seat %d is given up: %s", seat, reason)
        self.drop(seat)
        self._given_up.add(seat)
        self.refusals.add(seat, failure)

    def take_refusals(self) -> Refusals:
        """Those since the last call."""
        taken, self.refusals = self.refusals, Refusals()
        return taken

    def extend(self, seat: int, packed: bytes) -> None:
        """Append blocks (int32 bytes) to the seat's table."""
        if seat in self._given_up:
            return
        if not 0 <= seat < len(self.ids) or not self.taken[seat]:
            self.give_up(seat, "an empty seat is given blocks")
            return
        blocks = np.frombuffer(packed[: len(packed) // ID_BYTES * ID_BYTES], "<i4")
        size = int(self.table_sizes[seat])
        if size + len(blocks) > self.widest or len(packed) % ID_BYTES:
            self.give_up(seat, "it is given more blocks than its longest context needs, or half a one")
            return
        if len(blocks) and not 0 <= blocks.min() <= blocks.max() < self.limits.blocks:
            self.give_up(seat, "it is given a block that is not in the pool")
            return
        self.tables[seat, size : size + len(blocks)] = blocks
        self.table_sizes[seat] = size + len(blocks)
        self._extended(seat, size, blocks)

    def _extended(self, seat: int, size: int, blocks: np.ndarray) -> None:
        """``blocks`` stand in the seat's table now, after the ``size`` that it had."""

    def drop(self, seat: int) -> None:
        """Empty the seat; no error if it is empty already."""
        self._steady = None
        self._given_up.discard(seat)
        self._scored.pop(seat, None)
        if 0 <= seat < len(self.ids):
            self.taken[seat] = False
            self.ids[seat] = _NO_IDS

    def clear(self) -> None:
        for seat in np.flatnonzero(self.taken):
            self.drop(int(seat))
        self._given_up.clear()
        self.refusals = Refusals()

    def build(self, plan: Plan) -> StepInputs:
        """The flat batch of ``plan``'s rows, less those that cannot be computed; counts them as computed, and the
        sampled tokens as known."""
        step = self.arrange(plan)
        widest = -(-int(step.contexts.max(initial=0)) // self.block_size)
        tables = self.tables[step.seats, :widest]
        tables[np.arange(widest) >= -(-step.contexts // self.block_size)[:, None]] = 0
        return StepInputs(
            input_ids=self._input_ids(step.seats, step.counts, step.computed, step.row_starts)[None],
            positions=self._to_device(step.positions)[None],
            slots=self._to_device(step.slots),
            logit_rows=self._to_device(step.logit_rows),
            seats=step.seats,
            counts=step.counts,
            contexts=step.contexts,
            row_starts=step.row_starts,
            block_tables=tables,
            block_size=self.block_size,
            sampling_seats=step.sampling_seats,
            sampling_positions=step.sampling_positions,
            scored=step.scored,
        )

    def arrange(self, plan: Plan) -> HostStep:
        """``build`` as far as the host goes."""
        steady, self._steady = self._steady, None
        step = self._again(steady[1]) if steady and _decodes(plan) and plan.seats == steady[0] else None
        if step is None:
            step = self._rows_of(plan)
        if _decodes(plan):
            self._steady = plan.seats, step
        return step

    def _again(self, last: HostStep) -> HostStep | None:
        """The step after ``last`` where both are decodes of the same seats: only the blocks have to be checked anew.
        None if some row has no block."""
        seats, computed = last.seats, last.contexts
        contexts = computed + 1
        if (contexts > self.table_sizes[seats] * self.block_size).any():
            return None
        slots = self.tables[seats, computed // self.block_size].astype(np.int64) * self.block_size
        slots += computed % self.block_size
        self.computed[seats] = contexts
        self.known[seats] += 1
        return HostStep(
            seats, last.counts, computed, contexts, last.row_starts, computed, slots, last.logit_rows, seats, contexts
        )

    def _rows_of(self, plan: Plan) -> HostStep:
        seats, counts, samples = self._sound(*_columns(plan))
        computed = self.computed[seats]
        contexts = computed + counts

        if plan.counts:
            row_starts = np.zeros(len(seats) + 1, np.int64)
            np.cumsum(counts, out=row_starts[1:])
            seat_of = np.repeat(seats, counts)
            positions = np.arange(row_starts[-1]) + np.repeat(computed - row_starts[:-1], counts)
        else:  # decodes alone: tokens are rows
            row_starts, seat_of, positions = np.arange(len(seats) + 1), seats, computed
        slots = self.tables[seat_of, positions // self.block_size].astype(np.int64) * self.block_size
        slots += positions % self.block_size
        self.computed[seats] = contexts
        self.known[seats[samples]] += 1
        scored = self._scored_rows(seats, counts, computed, row_starts) if self._scored else []
        wanted = [row_starts[1:][samples] - 1]
        wanted += [np.arange(row.first, row.first + len(row.following)) for row in scored]
        return HostStep(
            seats, counts, computed, contexts, row_starts, positions, slots, np.concatenate(wanted),
            seats[samples], contexts[samples], scored,
        )  # fmt: skip

    def _scored_rows(
        self, seats: np.ndarray, counts: np.ndarray, computed: np.ndarray, row_starts: np.ndarray
    ) -> list[ScoredRow]:
        """What of this step is followed by a prompt token whose logprob is asked for."""
        found = []
        for row, seat in enumerate(seats.tolist()):
            at, size = int(computed[row]), self._scored.get(seat, 0)
            if (count := min(int(counts[row]), size - 1 - at)) > 0:
                following = self.ids[seat][at + 1 : at + 1 + count].astype(np.int64)
                found.append(ScoredRow(seat, int(row_starts[row]), following))
        return found

    def note_sampled(self, seats: np.ndarray, tokens: torch.Tensor) -> None:
        """Keep the ids just drawn, int64 [k] on the device, as the next inputs of their seats."""
        if self._last is not None:
            self._last[seats] = tokens.numpy()
        else:
            self.last_id[self._to_device(seats)] = tokens

    def _sound(
        self, seats: np.ndarray, counts: np.ndarray, samples: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The rows that can be computed. One that does not fit its seat's state is a fault of ours: given up before
        anything of it is computed."""
        at = np.minimum(seats, len(self.ids) - 1)
        contexts, known = self.computed[at] + counts, self.known[at]
        faults = (
            ("a row names an empty seat", (at != seats) | ~self.taken[at]),
            ("two rows name it", _repeated(seats)),
            ("a row has no token", counts < 1),
            ("a row takes tokens that are not known yet", contexts > known),
            ("a row samples before the last known token", samples & (contexts != known)),
            ("a row takes tokens that have no block", contexts > self.table_sizes[at] * self.block_size),
        )
        wrong = np.logical_or.reduce([rows for _, rows in faults])
        if not wrong.any():
            return seats, counts, samples
        for reason, rows in faults:
            for seat in seats[rows].tolist():
                self.give_up(seat, reason)
        return seats[~wrong], counts[~wrong], samples[~wrong]

    def _input_ids(
        self, seats: np.ndarray, counts: np.ndarray, computed: np.ndarray, row_starts: np.ndarray
    ) -> torch.Tensor:
        """int64 [T]: given ids from the host, the one id of a row beyond them from the device."""
        beyond = computed >= self.given[seats]
        if beyond.all():
            return self.last_id[self._to_device(seats)] if self._last is None else torch.from_numpy(self._last[seats])
        flat = self._to_device(self._given_ids(~beyond, seats, counts, computed, row_starts))
        if beyond.any():
            flat[self._to_device(row_starts[:-1][beyond])] = self.last_id[self._to_device(seats[beyond])]
        return flat

    def _given_ids(
        self, rows: np.ndarray, seats: np.ndarray, counts: np.ndarray, computed: np.ndarray, row_starts: np.ndarray
    ) -> np.ndarray:
        """int64 [T]: the ids of the ``rows`` (bool [R]) whose tokens are known here, 0 for all others."""
        ids = np.zeros(int(row_starts[-1]), np.int64)
        for row in np.flatnonzero(rows):
            given = self.ids[seats[row]]
            ids[row_starts[row] : row_starts[row + 1]] = given[computed[row] : computed[row] + counts[row]]
        return ids

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return to_device(array, self.device)


def _columns(plan: Plan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Seats (int64), counts (int64) and samples (bool) of the rows. Where the columns are not of one length no row
    means anything: all counts are 0 then."""
    seats = np.frombuffer(plan.seats[: len(plan.seats) // SEAT_BYTES * SEAT_BYTES], "<u2").astype(np.int64)
    ones = np.ones(len(seats), np.int64)
    whole = len(plan.seats) % SEAT_BYTES == 0 and len(plan.counts) in (0, ID_BYTES * len(seats))
    if not whole or len(plan.samples) not in (0, len(seats)):
        return seats, np.zeros_like(ones), ones.astype(bool)
    counts = np.frombuffer(plan.counts, "<i4").astype(np.int64) if plan.counts else ones
    samples = np.frombuffer(plan.samples, np.uint8) if plan.samples else ones
    return seats, counts, samples.astype(bool)


def _repeated(seats: np.ndarray) -> np.ndarray:
    """bool [R]: rows whose seat another row names too."""
    if len(set(seats.tolist())) == len(seats):
        return np.zeros(len(seats), bool)
    values, counts = np.unique(seats, return_counts=True)
    return np.isin(seats, values[counts > 1])


def _decodes(plan: Plan) -> bool:
    """Whether each row takes one token and samples the next."""
    return not plan.counts and not plan.samples
