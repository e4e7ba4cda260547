"""One engine of several ranks: processes that compute one model together, each on a part of it.

Each rank is a child like that of ProcessEngine, and executes the same plans; one of them samples and reports. What
they say to each other while they compute does not pass here (torch_engine/parallel). They share one fate: when one has
ended, or shows no sign of life, all of them are killed, since the others would wait for it in the middle of a step for
ever.
"""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from protocol.errors import EngineFailed, HeadraceError
from protocol.messages import Capacity, Plan, encode
from workers.engines.base import Place, Progress, Sampled, StepOutput
from workers.engines.link import SILENCE_S, Shown
from workers.engines.process import ProcessEngine, ProcessOutput, how
from workers.engines.remote import Door, RemoteRank, free_port

T = TypeVar("T")
log = logging.getLogger("headrace.engine")

LOOK_S = 0.1  # how often the ranks are looked at
LOADING_SILENCE_S = 120.0  # takes the place of SILENCE_S before all have loaded: imports and loads hold interpreters


@dataclass(frozen=True)
class Remote:
    """Ranks from ``local`` on come in at ``address``."""

    address: tuple[str, int]
    local: int = 1


class RankedEngine:
    """The engine ``kind`` with the fields of its configuration, as ``ranks`` processes."""

    overlaps = True

    def __init__(self, kind: str, config: Any, parts: int, stages: int = 1, remote: Remote | None = None) -> None:
        """``stages`` of the model's layers, each of ``parts`` ranks. Those that are not ``remote`` are started here."""
        self._made = kind, config, parts, stages, remote
        self._folder = tempfile.TemporaryDirectory(prefix="headrace-ranks-")
        self._door = Door(remote.address) if remote else None
        count, local = parts * stages, remote.local if remote else parts * stages
        rendezvous = str(Path(self._folder.name) / "rendezvous")
        if self._door is not None:
            rendezvous = f"tcp://{self._door.host}:{free_port(self._door.host)}"
        places = [Place(rank, count, stages, rendezvous, rank if rank < local else 0) for rank in range(count)]
        self.ranks = [(ProcessEngine if p.rank < local else RemoteRank)(kind, config, p) for p in places]
        self.stages = stages
        self.reporter = next(place.rank for place in places if place.samples)
        self._fault: HeadraceError | None = None
        self._loaded = False
        self._ending = threading.Lock()
        self._closed = threading.Event()

    @property
    def _reporting(self) -> ProcessEngine:
        return self.ranks[self.reporter]

    @property
    def eos_token_ids(self) -> Sequence[int]:
        return self._reporting.eos_token_ids

    @property
    def tokenizer(self) -> Any:
        return self._reporting.tokenizer

    @property
    def path(self) -> str:
        return self._reporting.path

    def load(self, progress: Progress) -> Capacity:
        self._admit()
        for rank in self.ranks:
            rank.start()
        threading.Thread(target=self._watch, name="ranks", daemon=True).start()
        numbers = [number for number in range(len(self.ranks)) if number != self.reporter]
        others = [threading.Thread(target=self._await, args=(number,), daemon=True) for number in numbers]
        for thread in others:
            thread.start()
        try:
            capacity = self._reporting.loaded(progress)
        except HeadraceError as error:
            raise self._end(error, self.reporter) from None
        for thread in others:
            thread.join()
        if self._fault is not None:
            raise self._fault
        self._loaded = True
        log.info("%d ranks: %s", len(self.ranks), ", ".join(rank.where for rank in self.ranks))
        return capacity

    def _admit(self) -> None:
        """Wait until all remote ranks have come."""
        awaited = {rank.place.rank: rank for rank in self.ranks if isinstance(rank, RemoteRank)}
        while awaited and self._door is not None:
            log.info("waiting for ranks %s at %s:%d", list(awaited), self._door.host, self._door.port)
            number, link = self._door.admit(set(awaited))
            awaited.pop(number).came(link)

    def execute(self, plan: Plan) -> StepOutput:
        packed = encode(plan)
        for number, rank in enumerate(self.ranks):
            self._guarded(number, rank.hand, packed)
        return RankedOutput(self, ProcessOutput(self._reporting))

    def reset(self) -> None:
        for number, rank in enumerate(self.ranks):
            self._guarded(number, rank.reset)

    def _guarded(self, number: int, call: Callable[..., T], *args: Any) -> T:
        """What ``call`` of a rank returns; its failure ends all."""
        try:
            return call(*args)
        except HeadraceError as error:
            raise self._end(error, number) from None

    def beat(self) -> int:
        """That of the rank that is least far. EngineFailed if one has ended."""
        if self._fault is not None:
            raise self._fault
        return min(rank.shown().beat for rank in self.ranks)

    def shown(self) -> list[Shown]:
        """What each rank shows."""
        return [rank.shown() for rank in self.ranks]

    def again(self) -> RankedEngine:
        """Another one in the place of this, which was killed."""
        return RankedEngine(*self._made)

    def kill(self) -> None:
        """End all ranks at once. EngineFailed if one cannot be ended."""
        self._closed.set()
        self._kill_all()
        if self._door is not None:
            self._door.close()
        self._folder.cleanup()

    def close(self) -> None:
        """The same: results that are still to come are lost, and other ranks may wait for one in the middle of a
        step."""
        self.kill()
        for rank in self.ranks:
            rank.close()

    def _await(self, number: int) -> None:
        try:
            self.ranks[number].loaded(lambda stage, fraction: None)
        except HeadraceError as error:
            self._end(error, number)

    def _end(self, error: HeadraceError, number: int) -> HeadraceError:
        """Kill all ranks since rank ``number`` failed. What is to be raised: the first fault, of which the others are
        consequences; a rank that was killed comes before what another one says of its absence."""
        if self._closed.is_set():  # by ourselves
            return error
        with self._ending:
            if self._fault is None:
                codes = [
                    (k, rank.code) for k, rank in enumerate(self.ranks) if k != number or type(error) is EngineFailed
                ]
                killed = [EngineFailed(f"rank {k} {how(code)}") for k, code in codes if code is not None and code < 0]
                self._fault = killed[0] if killed else error
                log.error("rank %d failed (%s): all ranks end", number, self._fault)
                with suppress(EngineFailed):
                    self._kill_all()
            return self._fault

    def _kill_all(self) -> None:
        """EngineFailed if one cannot be ended, once the others have been."""
        failed = None
        for rank in self.ranks:
            try:
                rank.kill()
            except EngineFailed as error:
                failed = error
        if failed is not None:
            raise failed

    def _watch(self) -> None:
        seen = [(shown.alive, time.monotonic()) for shown in self.shown()]
        while not self._closed.wait(LOOK_S):
            now = time.monotonic()
            for number, rank in enumerate(self.ranks):
                if (code := rank.code) is not None and (self._loaded or code < 0):  # else it says why
                    self._give_up(number, how(code))
                    return
                alive, since = rank.shown().alive, seen[number][1]
                if alive != seen[number][0]:
                    seen[number] = alive, now
                elif now - since > (SILENCE_S if self._loaded else LOADING_SILENCE_S):
                    self._give_up(number, f"has shown no sign of life for {now - since:.0f} s")
                    return

    def _give_up(self, number: int, why: str) -> None:
        if not self._closed.is_set():
            self._end(EngineFailed(f"rank {number} {why}"), number)


class RankedOutput:
    """The results of the rank that samples."""

    def __init__(self, engine: RankedEngine, output: StepOutput) -> None:
        self._engine, self._output = engine, output

    def wait(self) -> Sampled:
        return self._engine._guarded(self._engine.reporter, self._output.wait)
