"""One session of a worker: the time under one gen, from registration until it is fenced or leaves.

Four tasks and one callback: plans are read, executed steps become rows, one commit at a time makes them
durable, heartbeats are sent while there is progress, and a drain waits until nothing is left. Within a session an
engine run is the time under one leader: at its end all sequences are dropped, since the next leader continues from
the journals and request records.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any, Protocol

from protocol.bus import WorkerBus
from protocol.errors import Fenced
from protocol.messages import LANDED, Capacity, Hint
from workers.detokenizer import Vocabulary, WindowVocabulary
from workers.engine_thread import Device, Ticket
from workers.engines.base import Engine, Sampled
from workers.engines.ranks import RankedEngine
from workers.metrics import Metrics
from workers.outputs import Batch, Outputs

log = logging.getLogger("headrace.worker")

HEARTBEAT_S = 0.4
READ_BLOCK_MS = 5000
MAX_OPEN_STEPS = 256  # read but not committed; beyond it the reader waits
QUIET_S = 1.0  # a draining worker without sequences leaves after so long without a plan


class Host(Protocol):
    """What a session needs of the worker process (service.Worker): it outlives the session."""

    bus: WorkerBus
    name: str
    engine: Engine
    device: Device
    metrics: Metrics
    state: str  # serving or draining, written by the session
    draining: asyncio.Event

    def next_engine_run(self) -> int:
        """A number that no engine run of this process had before."""

    def progressed(self) -> None:
        """The device stands idle or moves on."""

    def watch_progress(self) -> None:
        """The device does not move on. Raises TimeoutError once that lasts too long."""


class Session:
    """The worker under one gen. ``run`` ends with Fenced("gen"), with 0 after a drain, or with a failure."""

    def __init__(self, worker: Host, gen: int, capacity: Capacity, vocabulary: Vocabulary | WindowVocabulary) -> None:
        self.worker = worker
        self.bus = worker.bus
        self.wid = worker.name
        self.gen = gen
        self.capacity = capacity
        self.vocabulary = vocabulary
        self.epoch = 0  # plans of an earlier one are skipped
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._wake = asyncio.Event()  # a step was executed
        self._room = asyncio.Event()  # the reader may take more plans
        self._planned_at = time.monotonic()
        self._said: str | None = None  # the state that the scheduler knows
        self._begin_engine_run(0)

    async def run(self) -> int:
        """The exit code. Raises what ended it otherwise."""
        drain = asyncio.ensure_future(self._drain())
        tasks = [drain, *(asyncio.ensure_future(c) for c in (self._read(), self._commit(), self._heartbeat()))]
        try:
            ends: list[asyncio.Future[Any]] = [*tasks, self.broken, self.worker.device.failed]
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for future in done - {drain}:
                future.result()
            return drain.result()
        finally:
            for task in tasks:
                task.cancel()
            self.broken.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # -------------------------------------------------------------- engine runs

    def _begin_engine_run(self, epoch: int) -> None:
        """Drop all sequences and everything under way; follow plans of ``epoch`` or later from their step 1."""
        self.epoch = epoch
        self.engine_run = self.worker.next_engine_run()
        self.queued = 0  # last step handed to the device
        self.open_steps = 0  # handed to the device, not committed
        self.outputs = Outputs(
            self.vocabulary, frozenset(self.worker.engine.eos_token_ids), self.capacity.pools[0].unit_tokens
        )
        self.worker.device.reset(self.engine_run)
        self._room.set()

    # -------------------------------------------------------------- plans in

    async def _read(self) -> None:
        after = "0-0"
        while True:
            await self._room.wait()
            for plan_id, plan in await self.bus.read_plans(self.wid, after, READ_BLOCK_MS):
                after = plan_id
                if plan.gen != self.gen or plan.epoch < self.epoch:
                    continue
                if plan.epoch > self.epoch:
                    self._begin_engine_run(plan.epoch)
                if plan.step <= self.queued:
                    continue  # sent again since the reply to the first was lost
                if plan.step != self.queued + 1:
                    log.error("step %d follows step %d: plans are missing", plan.step, self.queued)
                    raise Fenced("gen")  # a new session is the one way to a state that both sides know
                self.queued = plan.step
                self.open_steps += 1
                self._planned_at = time.monotonic()
                self.worker.device.submit(Ticket(self.engine_run, plan_id, plan))
            if self.open_steps >= MAX_OPEN_STEPS:
                self._room.clear()

    # -------------------------------------------------------------- commits out

    def executed(self, ticket: Ticket, sampled: Sampled, idle_us: int) -> None:
        """In the event loop, after each step."""
        if ticket.engine_run != self.engine_run or self.broken.done():
            return
        try:
            tokens = self.outputs.step(ticket.plan, sampled, ticket.plan_id, idle_us)
        except Exception as error:  # a callback's exception would only be logged
            self.broken.set_exception(error)
            return
        plan, metrics = ticket.plan, self.worker.metrics
        metrics.step.observe(sampled.exec_us * 1e-6)
        metrics.scheduled.observe(plan.tokens)
        metrics.tokens.inc(tokens)
        if sampled.mask_us:
            metrics.mask.observe(sampled.mask_us * 1e-6)
            metrics.mask_wait.inc(sampled.mask_wait_us * 1e-6)
        metrics.idle.inc(idle_us * 1e-6)
        self._wake.set()

    async def _commit(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while (batch := self.outputs.take()) is not None:
                await self._commit_batch(batch)

    async def _commit_batch(self, batch: Batch) -> None:
        engine_run, outputs, started = self.engine_run, self.outputs, time.perf_counter()
        hint = Hint(
            self.wid,
            self.gen,
            batch.step,
            batch.hint_rows(),
            batch.exec_us,
            batch.idle_us,
            batch.dropped,
            batch.spoiled,
        )
        if batch.dropped:
            self.worker.metrics.dropped.inc(len(batch.dropped))
            log.warning("%d sequences could not be computed here and were dropped", len(batch.dropped))
        try:
            verdicts = await self.bus.commit(
                self.wid, self.epoch, self.gen, batch.commit_rows(), hint, executed=batch.executed
            )
        except Fenced as fenced:
            if fenced.cause != "epoch":
                raise
            if engine_run == self.engine_run:
                self.worker.metrics.fenced.inc()
                log.warning("%s: dropping all sequences until the new leader plans", fenced)
                self._begin_engine_run(self.epoch + 1)
            return
        metrics = self.worker.metrics
        metrics.commit.observe(time.perf_counter() - started)
        metrics.refused.inc(len(verdicts) - verdicts.count(LANDED))
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%d rows are committed: %s", len(verdicts), verdicts)
        outputs.settle(batch, verdicts)
        if engine_run == self.engine_run:
            self.open_steps -= batch.steps
            self._room.set()

    # -------------------------------------------------------------- beats

    async def _heartbeat(self) -> None:
        """A beat every HEARTBEAT_S, as long as the device stands idle or moves on: a hung one must be seen."""
        worker, device, seen = self.worker, self.worker.device, None
        draining = asyncio.ensure_future(worker.draining.wait())
        try:
            while True:
                progress = (device.steps, worker.engine.beat())
                if not device.busy or progress != seen:
                    seen = progress
                    worker.progressed()
                    await self._beat_once()
                else:
                    worker.watch_progress()
                worker.metrics.sequences.set(self.outputs.live)
                if isinstance(worker.engine, RankedEngine):
                    worker.metrics.ranks_did([shown.steps for shown in worker.engine.shown()])
                pending = () if draining.done() else (draining,)
                if pending:
                    await asyncio.wait(pending, timeout=HEARTBEAT_S)
                else:
                    await asyncio.sleep(HEARTBEAT_S)
        finally:
            draining.cancel()

    async def _beat_once(self) -> None:
        state = self.worker.state = "draining" if self.worker.draining.is_set() else "serving"
        news = state if state != self._said else None
        epoch = await self.bus.heartbeat(self.wid, self.gen, state=news, capacity=self.capacity if news else None)
        self._said = state
        if epoch > self.epoch:
            self._begin_engine_run(epoch)

    # -------------------------------------------------------------- the end

    async def _drain(self) -> int:
        """Leave once nothing is here any more. The usual way out is earlier: the scheduler moves the sequences and
        retires this worker, whose next heartbeat is fenced."""
        await self.worker.draining.wait()
        while True:
            quiet = time.monotonic() - self._planned_at > QUIET_S
            if quiet and self._said == "draining" and not self.open_steps and not self.outputs.live:
                log.info("drained")
                return 0
            await asyncio.sleep(0.05)
