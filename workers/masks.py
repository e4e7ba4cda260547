"""Masks of constrained sequences: which ids may come next, by seat, worked out beside the device.

The forward pass of step N + 1 needs the token of step N only where it was drawn; only the draw of N + 1 needs the mask.
So after each draw the tokens of constrained seats go to a thread of this module's, which advances their matchers and
fills their next masks while the next forward pass runs; the draw then takes them, and waits if they are not there.
Matchers of new sequences are compiled and brought to their place (replaying what was journaled) in another thread, so
that a large grammar does not hold up the masks of those that run. The library lets go of the interpreter meanwhile.

A matcher that fails ends its own sequence: ``StepMasks.failed`` says so, and its row is drawn without a mask.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue

import numpy as np

from protocol.errors import GrammarFailed, RequestError, StructureNotSupported
from protocol.grammar import Grammars, Matcher
from protocol.messages import NewSequence, unpack_ids

_NO_ROWS = np.zeros(0, np.int64)


@dataclass
class StepMasks:
    """The masks of one draw. Rows that have failed are not among ``rows``."""

    rows: np.ndarray  # int64 [m]: indices into the rows that sample
    bits: np.ndarray  # int32 [m, words]: bit i of word w is id 32 w + i
    failed: dict[int, tuple[str, str]]  # seat -> error code and message, for those that end here
    mask_us: int = 0  # longest time that one of these masks took
    wait_us: int = 0  # time that the draw waited for them


@dataclass(eq=False)
class _Seat:
    """One constrained sequence. Written by the threads while ``ready`` is clear, read by the device thread after."""

    row: np.ndarray  # int32 [words]
    matcher: Matcher | None = None
    failed: tuple[str, str] | None = None
    took_us: int = 0
    ready: threading.Event = field(default_factory=threading.Event)

    def fill(self) -> None:
        matcher = self.matcher
        if self.failed is None and matcher is not None and not matcher.fill(self.row):
            self.failed = _failure(matcher.failed or "no token fits")


def _failure(reason: str) -> tuple[str, str]:
    return GrammarFailed.code, f"the grammar could not be followed: {reason}"


class _Beside:
    """A thread that runs what it is given, in order."""

    def __init__(self, name: str) -> None:
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._name = name
        self._started = False

    def run(self, job: Callable[[], None]) -> None:
        if not self._started:
            self._started = True
            threading.Thread(target=self._loop, name=self._name, daemon=True).start()
        self._queue.put(job)

    def close(self) -> None:
        self._queue.put(None)

    def _loop(self) -> None:
        while (job := self._queue.get()) is not None:
            job()


class Masks:
    """All constrained seats. One thread calls (the device thread). ``make`` is called once, by ``prepare`` or for the
    first constrained sequence; what it raises ends the sequences that need it."""

    def __init__(self, make: Callable[[], Grammars]) -> None:
        self._make = make
        self._grammars: Grammars | RequestError | None = None
        self._making = threading.Lock()
        self._seats: dict[int, _Seat] = {}
        self._builder, self._filler = _Beside("grammars"), _Beside("masks")

    def prepare(self) -> None:
        """Make the grammars' tables now: it holds the interpreter for as long as a second or two."""
        with self._making:
            if self._grammars is None:
                try:
                    self._grammars = self._make()
                except StructureNotSupported as reason:
                    self._grammars = reason

    def add(self, new: NewSequence) -> None:
        """Take in a sequence; nothing happens for one that is not constrained."""
        self._seats.pop(new.seat, None)
        structure = new.sampling.structure
        if structure is None or not structure.constrains:
            return
        seat = self._seats[new.seat] = _Seat(np.zeros(0, np.int32))
        self._builder.run(lambda: self._build(seat, new))

    def drop(self, seat: int) -> None:
        """Forget a seat; no error if it is unknown."""
        self._seats.pop(seat, None)

    def clear(self) -> None:
        self._seats.clear()

    def close(self) -> None:
        self._builder.close()
        self._filler.close()

    def __bool__(self) -> bool:
        return bool(self._seats)

    def take(self, seats: np.ndarray) -> StepMasks | None:
        """The masks for a draw of the rows of ``seats``; None if none of them is constrained."""
        found = [(at, seat) for at, number in enumerate(seats.tolist()) if (seat := self._seats.get(number))]
        if not found:
            return None
        began = time.perf_counter()
        for _, seat in found:
            seat.ready.wait()
        wait_us = int((time.perf_counter() - began) * 1e6)
        failed = {int(seats[at]): seat.failed for at, seat in found if seat.failed is not None}
        masked = [(at, seat) for at, seat in found if seat.failed is None]
        rows = np.array([at for at, _ in masked], np.int64) if masked else _NO_ROWS
        bits = np.stack([seat.row for _, seat in masked]) if masked else np.zeros((0, 0), np.int32)
        return StepMasks(rows, bits, failed, max(seat.took_us for _, seat in found), wait_us)

    def drawn(self, seats: np.ndarray, tokens: Callable[[], np.ndarray]) -> None:
        """A draw for ``seats`` is on its way; ``tokens`` gives its ids, and may block until they are there."""
        found = [(at, seat) for at, number in enumerate(seats.tolist()) if (seat := self._seats.get(number))]
        found = [(at, seat) for at, seat in found if seat.failed is None]
        if not found:
            return
        for _, seat in found:
            seat.ready.clear()
        self._filler.run(lambda: _advance(found, tokens))

    # ------------------------------------------------------------------ in the threads

    def _build(self, seat: _Seat, new: NewSequence) -> None:
        began = time.perf_counter()
        try:
            self.prepare()
            grammars, sampling = self._grammars, new.sampling
            if not isinstance(grammars, Grammars):
                raise grammars or StructureNotSupported("there is no tokenizer")
            assert sampling.structure is not None
            seat.row = np.zeros(grammars.words, np.int32)
            seat.matcher = grammars.matcher(sampling.structure, sampling.stop_token_ids)
            seat.matcher.advance(unpack_ids(new.token_ids)[new.prompt_len :].tolist())
            seat.fill()
        except Exception as error:  # whatever it is, it is this sequence's
            seat.failed = _failure(str(error) if isinstance(error, RequestError) else type(error).__name__)
        seat.took_us = int((time.perf_counter() - began) * 1e6)
        seat.ready.set()


def _advance(found: list[tuple[int, _Seat]], tokens: Callable[[], np.ndarray]) -> None:
    try:
        ids = tokens().tolist()
    except Exception:  # the step's own failure, which its reader is told of
        for _, seat in found:
            seat.failed = _failure("the step before failed")
            seat.ready.set()
        return
    for at, seat in found:
        began = time.perf_counter()
        assert seat.matcher is not None
        try:
            seat.matcher.advance(ids[at : at + 1])
            seat.fill()
        except Exception as error:
            seat.failed = _failure(type(error).__name__)
        seat.took_us = int((time.perf_counter() - began) * 1e6)
        seat.ready.set()
