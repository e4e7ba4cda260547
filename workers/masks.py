"""Masks of constrained sequences: which ids may come next, by seat, worked out beside the device.

The forward pass of step N + 1 needs the token of step N only where it was drawn; only the draw of N + 1 needs the mask.
So after each draw the tokens of constrained seats go to a thread of this module's, which advances their matchers and
fills their next masks while the next forward pass runs; the draw then takes them, and waits if they are not there.
Matchers of new sequences are compiled and brought to their place (replaying what was journaled) in another thread, so
that a large grammar does not hold up the masks of those that run. The library lets go of the interpreter meanwhile.

A matcher that fails ends its own sequence: ``StepMasks.failed`` says so, and its row is drawn without a mask. A row
whose mask is not there in PATIENCE_S (a large grammar is being compiled, say) is given up in the step (``late``): its
token counts for nothing, and the scheduler, which finds it missing, places the sequence anew from its journal.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from queue import SimpleQueue

import numpy as np

from protocol.errors import GrammarFailed, RequestError, StructureNotSupported
from protocol.messages import NewSequence, unpack_ids
from protocol.structures.grammar import Grammars, MaskRow, Matcher

PATIENCE_S = 0.05  # that a draw has with a mask: rows that need none wait with it
ALONE_S = 0.5  # where there are no such rows: only requests that come meanwhile wait


@dataclass
class StepMasks:
    """The masks of one draw. Rows that have failed, or are late, are not among ``rows``."""

    rows: np.ndarray  # int64 [m]: indices into the rows that sample
    masks: list[MaskRow]  # [m]
    failed: dict[int, tuple[str, str]] = field(default_factory=dict)  # seat -> error code and message: they end here
    late: list[int] = field(default_factory=list)  # seats that are given up
    mask_us: int = 0  # time in which all of them were made
    wait_us: int = 0  # time that the draw waited for them

    def __post_init__(self) -> None:
        self.pointers = np.array([mask.pointer for mask in self.masks], np.uint64)

    @property
    def bits(self) -> np.ndarray:
        """int32 [m, words]: bit i of word w is id 32 w + i."""
        return np.stack([mask.bits for mask in self.masks])


@dataclass(eq=False)
class _Seat:
    """One constrained sequence. Its own thread writes it until ``built`` is set, then one job at a time does."""

    mask: MaskRow | None = None
    matcher: Matcher | None = None
    failed: tuple[str, str] | None = None
    built: threading.Event = field(default_factory=threading.Event)
    fresh: bool = True  # its mask follows the last draw, once it is built
    gone: bool = False  # nobody sits here any more


@dataclass(eq=False)
class _Draw:
    """What became of the masks after one draw."""

    known: threading.Event = field(default_factory=threading.Event)  # its tokens are on the host
    filled: threading.Event = field(default_factory=threading.Event)


def _failure(reason: str | None) -> tuple[str, str]:
    return GrammarFailed.code, f"the grammar could not be followed: {reason}"


class _Beside:
    """A thread that runs what it is given, in order."""

    def __init__(self, name: str) -> None:
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._name = name
        self._started = False
        self.began = 0.0  # when it took up what it does; 0: nothing

    def run(self, job: Callable[[], None]) -> None:
        if not self._started:
            self._started = True
            threading.Thread(target=self._loop, name=self._name, daemon=True).start()
        self._queue.put(job)

    def close(self) -> None:
        self._queue.put(None)

    def _loop(self) -> None:
        while (job := self._queue.get()) is not None:
            self.began = time.perf_counter()
            job()
            self.began = 0.0


class Masks:
    """All constrained seats. One thread calls (the device thread). ``make`` is called once, by ``prepare`` or for the
    first constrained sequence; what it raises ends the sequences that need it."""

    def __init__(self, make: Callable[[], Grammars]) -> None:
        self._make = make
        self._grammars: Grammars | RequestError | None = None
        self._making = threading.Lock()
        self._seats: dict[int, _Seat] = {}
        self._builder, self._filler = _Beside("grammars"), _Beside("masks")
        self._draw = _Draw()  # the last one
        for there in (self._draw.known, self._draw.filled):
            there.set()
        self._took_us = 0
        self._any_failed = False  # some sequence here failed: who, is looked for at each draw from then on
        self._last: tuple[bytes, np.ndarray, list[_Seat]] | None = None  # what `_constrained` said last
        self._steady: StepMasks | None = None  # the last masks, while nobody comes, goes or fails

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
        self.drop(new.seat)
        structure = new.sampling.structure
        if structure is None or not structure.constrains:
            return
        seat = self._seats[new.seat] = _Seat()
        self._last = None
        self._builder.run(lambda: self._build(seat, new))

    def drop(self, seat: int) -> None:
        """Forget a seat; no error if it is unknown."""
        if (left := self._seats.pop(seat, None)) is not None:
            left.gone = True
            self._last = None

    def clear(self) -> None:
        for seat in list(self._seats):
            self.drop(seat)
        self._last = None
        self._any_failed = False

    def close(self) -> None:
        self._builder.close()
        self._filler.close()

    def __bool__(self) -> bool:
        return bool(self._seats)

    def take(self, seats: np.ndarray) -> StepMasks | None:
        """The masks for a draw of the rows of ``seats``; None if none of them is constrained."""
        rows, found = self._constrained(seats)
        if not found:
            return None
        began, late = time.perf_counter(), list[int]()
        self._draw.known.wait()
        filled = self._draw.filled.wait(PATIENCE_S)
        if self._steady is None or self._any_failed or not filled:
            late = self._late(seats, rows, found)
            self._steady = self._gather(seats, *self._constrained(seats))
        steady = copy(self._steady)
        steady.late = late
        steady.mask_us, steady.wait_us = self._took_us, int((time.perf_counter() - began) * 1e6)
        return steady

    def _late(self, seats: np.ndarray, rows: np.ndarray, found: list[_Seat]) -> list[int]:
        """The seats whose masks are not there yet, once that has taken too long. They are forgotten."""
        late, now = [], time.perf_counter()
        others = len(found) < len(seats) or any(seat.built.is_set() for seat in found)
        until = min(now, self._builder.began or now) + (PATIENCE_S if others else ALONE_S)
        for row, seat in zip(rows.tolist(), found, strict=True):
            built = seat.built.wait(max(0.0, until - time.perf_counter()))
            if not built or not (seat.fresh or seat.failed):
                late.append(int(seats[row]))
                self.drop(late[-1])
        return late

    def _gather(self, seats: np.ndarray, rows: np.ndarray, found: list[_Seat]) -> StepMasks:
        failed = {int(seats[row]): seat.failed for row, seat in zip(rows, found, strict=True) if seat.failed}
        if failed:
            rows = np.array([row for row, seat in zip(rows, found, strict=True) if not seat.failed], np.int64)
        masks = [seat.mask for seat in found if seat.failed is None and seat.mask is not None]
        return StepMasks(rows, masks, failed)

    def drawn(self, seats: np.ndarray, tokens: Callable[[], np.ndarray]) -> None:
        """A draw for ``seats`` is on its way; ``tokens`` gives its ids, and may block until they are there.

        To be called after each `take` that found some.
        """
        rows, found = self._constrained(seats)
        for seat in found:
            seat.fresh = False
        draw = self._draw = _Draw()
        self._filler.run(lambda: self._advance(draw, rows, found, tokens))

    def _constrained(self, seats: np.ndarray) -> tuple[np.ndarray, list[_Seat]]:
        """Rows (int64 [m]) of the constrained ones among ``seats``, and what is kept of each."""
        key = seats.tobytes()
        if self._last is None or self._last[0] != key:
            found = [(row, seat) for row, number in enumerate(seats.tolist()) if (seat := self._seats.get(number))]
            self._last = key, np.array([row for row, _ in found], np.int64), [seat for _, seat in found]
            self._steady = None
        return self._last[1:]

    # ------------------------------------------------------------------ in the threads

    def _build(self, seat: _Seat, new: NewSequence) -> None:
        if seat.gone:
            return
        try:
            self.prepare()
            grammars, sampling = self._grammars, new.sampling
            if not isinstance(grammars, Grammars):
                raise grammars or StructureNotSupported("there is no tokenizer")
            assert sampling.structure is not None
            seat.mask = MaskRow(grammars.words)
            seat.matcher = grammars.matcher(sampling.structure, sampling.stop_token_ids)
            seat.matcher.advance(unpack_ids(new.token_ids)[new.prompt_len :].tolist())
            if not seat.matcher.fill(seat.mask):
                seat.failed = _failure(seat.matcher.failed)
        except Exception as error:  # whatever it is, it is this sequence's
            seat.failed = _failure(str(error) if isinstance(error, RequestError) else type(error).__name__)
        self._any_failed |= seat.failed is not None
        seat.built.set()

    def _advance(self, draw: _Draw, rows: np.ndarray, found: list[_Seat], tokens: Callable[[], np.ndarray]) -> None:
        """Bring the matchers over the ids that were drawn, and fill their next masks."""
        try:
            ids = tokens()[rows].tolist()
            draw.known.set()
            began = time.perf_counter()
            for token, seat in zip(ids, found, strict=True):
                matcher, mask = seat.matcher, seat.mask
                if seat.gone or seat.failed is not None or matcher is None or mask is None:
                    continue
                matcher.advance_one(token)
                if not matcher.fill(mask):
                    seat.failed = _failure(matcher.failed)
                    self._any_failed = True
                seat.fresh = True
            self._took_us = int((time.perf_counter() - began) * 1e6)
        except Exception as error:  # also the step's own failure, which its reader is told of
            for seat in found:
                seat.failed = seat.failed or _failure(type(error).__name__)
            self._any_failed = True
        draw.known.set()
        draw.filled.set()
