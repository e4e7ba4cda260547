"""The workers of one term: which are registered, which died, and the plans being sent to each.

A worker is judged by its beat (see election.py). The loss of a worker always has the same steps: fence it, read the
journals of its sequences, tell the core. Plans are sent in order, one call at a time for each worker, in tasks that the
core does not wait for.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from protocol.bus import LeaderBus
from protocol.errors import Fenced
from protocol.messages import WIRE, Capacity, Plan
from protocol.records import WorkerRecord
from scheduler.core.events import Event, ReleaseWorker, WorkerDraining, WorkerLost, WorkerServing
from scheduler.core.scheduler import Core
from scheduler.election import Timing, Watch
from scheduler.metrics import Metrics
from scheduler.recovery import read_sequences

log = logging.getLogger("headrace.scheduler")

LOADING_PATIENCE = 5  # as many times the patience with a serving worker


@dataclass
class Worker:
    """What the service knows of one session; sequences and blocks are the core's."""

    wid: str
    gen: int
    watch: Watch
    fingerprint: str = ""  # of what it runs; known once it serves
    state: str = ""  # the last one that the core was told: "serving", "draining", or "" (neither yet)
    outbox: list[Plan] = field(default_factory=list)
    filled: asyncio.Event = field(default_factory=asyncio.Event)
    sender: asyncio.Task[None] | None = None
    released: bool = False
    gone: bool = False


class WorkerRegistry:
    """``apply`` hands an event to the core. ``changed`` wakes the watch at once."""

    def __init__(
        self, bus: LeaderBus, epoch: int, core: Core, timing: Timing, metrics: Metrics, group: asyncio.TaskGroup,
        apply: Callable[[Event], None],
    ) -> None:  # fmt: skip
        self._bus = bus
        self._epoch = epoch
        self._core = core
        self._timing = timing
        self._metrics = metrics
        self._group = group
        self._apply = apply
        self._workers: dict[str, Worker] = {}
        self._foreign: set[tuple[str, int]] = set()  # refused for their wire version, logged once
        self.changed = asyncio.Event()
        self.lost: dict[str, float] = {}  # workers_lost in this term, worker_lost_at (Unix seconds), once there is one
        self.max_model_len: int | None = None  # the longest sequence that any worker of this term could hold

    # -------------------------------------------------------------- plans

    def send(self, wid: str, plan: Plan) -> None:
        """Queue ``plan`` for its worker. A plan for a session that has ended is dropped."""
        worker = self._workers.get(wid)
        if worker is None or worker.gone or worker.gen != plan.gen:
            return
        plan.epoch = self._epoch
        worker.outbox.append(plan)
        worker.filled.set()
        if worker.sender is None:
            worker.sender = self._group.create_task(self._send(worker))

    async def _send(self, worker: Worker) -> None:
        """One call at a time, each with all plans queued meanwhile: a server that syncs its log takes milliseconds."""
        while not worker.gone:
            await worker.filled.wait()
            worker.filled.clear()
            plans, worker.outbox = worker.outbox, []
            if not plans:
                continue
            try:
                await self._bus.plan(self._epoch, worker.wid, worker.gen, *plans, fingerprint=worker.fingerprint)
            except Fenced as fenced:
                if fenced.cause == "epoch":
                    raise
                self.changed.set()  # a newer session, or none: the watch will see it
                return

    # -------------------------------------------------------------- who is there

    async def watch(self) -> None:
        """Look at the workers once a second, and at once when told of a change."""
        while True:
            await self.look()
            try:
                async with asyncio.timeout(self._timing.pause_s):
                    await self.changed.wait()
            except TimeoutError:
                pass
            self.changed.clear()

    async def look(self) -> None:
        """Read the registrations once; tell the core which workers are new, draining or dead."""
        started = time.monotonic()
        records = await self._bus.list_workers()
        ended = time.monotonic()
        present = {r.wid: r for r in records}
        for worker in list(self._workers.values()):
            record = present.get(worker.wid)
            if record is None or record.gen != worker.gen:
                await self._lose(worker, "left" if worker.released else "was replaced" if record else "was removed")
            elif worker.watch.seen(record.beat, started, ended):
                await self._lose(worker, "sends no heartbeat")  # or left in order, with nothing on it
                del present[worker.wid]
        for record in present.values():
            self._meet(record)

    def _meet(self, record: WorkerRecord) -> None:
        if record.wire != WIRE:
            if (record.wid, record.gen) not in self._foreign:
                self._foreign.add((record.wid, record.gen))
                log.error("worker %s speaks wire version %d, not %d: no plans for it", record.wid, record.wire, WIRE)
            return
        worker = self._workers.get(record.wid)
        if worker is None:
            # loading blocks the interpreter for seconds, and no sequence waits for this worker
            patient = dataclasses.replace(self._timing, reads=LOADING_PATIENCE * self._timing.reads)
            worker = self._workers[record.wid] = Worker(record.wid, record.gen, Watch(patient))
            log.info("worker %s registered (gen %d, %s)", record.wid, record.gen, record.state)
        if record.state == worker.state:
            return
        if record.state == "serving" and record.capacity is not None:
            log.info("worker %s serves", record.wid)
            worker.state = record.state
            worker.watch = Watch(self._timing)
            worker.fingerprint = record.capacity.fingerprint
            self.max_model_len = max(self.max_model_len or 0, _longest(record.capacity))
            self._apply(WorkerServing(record.wid, record.gen, record.capacity))
        elif record.state == "draining":
            log.info("worker %s drains", record.wid)
            if worker.state == "serving":
                worker.state = record.state
                self._apply(WorkerDraining(record.wid, record.gen))
            else:  # it never served in this term, so it holds no sequence
                worker.state = record.state
                self._group.create_task(self.release(ReleaseWorker(record.wid, record.gen)))

    @property
    def fingerprint(self) -> str:
        """What all serving workers run; "" if none serves, or they differ."""
        found = {worker.fingerprint for worker in self._workers.values() if worker.state == "serving"}
        return found.pop() if len(found) == 1 else ""

    # -------------------------------------------------------------- who left

    async def release(self, effect: ReleaseWorker) -> None:
        """Release a drained worker: its registration ends, which tells it to exit."""
        worker = self._workers.get(effect.wid)
        if worker is None or worker.gen != effect.gen:
            return
        worker.released = True
        await self._bus.retire(self._epoch, effect.wid, effect.gen)
        self.changed.set()

    async def _lose(self, worker: Worker, how: str) -> None:
        """Fence, then read the journals, then tell the core. ``how`` is for the log."""
        held = self._core.sequences_on(worker.wid)
        died = not worker.released and not (worker.state == "draining" and not held)
        worker.gone = True
        worker.outbox.clear()
        worker.filled.set()
        present = self._core.rids_in_flight(worker.wid) if died else []
        await self._bus.retire(self._epoch, worker.wid, worker.gen, present)
        journals = await read_sequences(self._bus, held)
        while late := [s for s in self._core.sequences_on(worker.wid) if s not in journals]:
            journals |= await read_sequences(self._bus, late)  # placed there meanwhile; their plans were dropped
        del self._workers[worker.wid]
        if died:
            self._metrics.worker_deaths.inc()
            self.lost = {"workers_lost": self.lost.get("workers_lost", 0) + 1, "worker_lost_at": time.time()}
            if journals:
                log.warning("worker %s (gen %d) %s: %d sequences move", worker.wid, worker.gen, how, len(journals))
            else:  # it may never have served: a start that fails is told by who started it
                log.info("worker %s (gen %d) %s, it had no sequences", worker.wid, worker.gen, how)
        else:
            log.info("worker %s left", worker.wid)
        if worker.state:
            self._apply(WorkerLost(worker.wid, worker.gen, journals, died=died))


def _longest(capacity: Capacity) -> int:
    """Tokens of the longest sequence that a worker can hold: its context, or its whole pool if that is less."""
    pool = capacity.pools[0]
    return min(capacity.max_model_len, pool.units * pool.unit_tokens)
