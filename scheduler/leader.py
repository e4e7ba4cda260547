"""The asyncio shell around the core: Redis in as events, effects out as Redis calls. No decision is made here.

One term is one epoch. Four loops run: new jobs, events, planning and a slow tick. Redis calls for effects run in
tasks of their own, so that the core never waits. A term ends by Fenced or by cancellation.

Over 400 lines: one class, whose tasks share the state of one term.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from protocol import records as wire
from protocol.bus import HomeBus, LeaderBus
from protocol.messages import LANDED, Hint, body_hash, encode
from protocol.telemetry.traces import Traces
from scheduler.answers import Answers, AnswerSettings
from scheduler.core.events import (
    Arrive,
    Cancel,
    ChoiceEnded,
    Effect,
    Event,
    FinishChoice,
    ReleaseWorker,
    RequestDone,
    Resync,
    Resynced,
    SendPlan,
    StepDone,
    WorkerServing,
)
from scheduler.core.scheduler import Core, CoreConfig
from scheduler.election import ServerClock, Timing
from scheduler.inbox import Inbox
from scheduler.intake import Intake
from scheduler.metrics import Health, Metrics
from scheduler.prompts.tokenizer_pool import TokenizerPool
from scheduler.recovery import READS_AT_ONCE, UNREADABLE, arrive, read_choices, read_state, terminal_row
from scheduler.shares import Shares
from scheduler.sweep import move_often, sweep_often
from scheduler.tracing import RequestTraces
from scheduler.workers import WorkerRegistry

log = logging.getLogger("headrace.scheduler")

BLOCK_MS = 5000  # blocking reads: long enough to cost nothing, short enough to notice a closed server
TICKS_PER_SECOND = 4
SERVER_LOOK_S = 5
EARLY_CANCEL_S = 60.0  # how long a cancel is kept for a request that is still being admitted
AGAIN_S = 0.05  # pause before an end is retried whose choice had another state than expected
RATE_S = 10.0  # time constant of the measured token rate


@dataclass(frozen=True)
class Process:
    """What a scheduler process has before it leads, and its term uses."""

    bus: LeaderBus
    tokenizers: TokenizerPool
    metrics: Metrics
    health: Health
    clock: ServerClock
    timing: Timing
    model: str  # served name
    tenant_weights: dict[str, float]
    max_model_len: int | None = None  # as configured; None: what the workers can hold
    inter_token_target_s: float = 0.0  # 0: the knee alone decides how much prefill a step holds
    traces: Traces | None = None  # None: none are made
    trace_content: bool = False  # prompts and answers stand in them
    answers: AnswerSettings = field(default_factory=AnswerSettings)
    fingerprint: str = ""  # of the model, where answers are cached
    weights_grace_s: float = 60.0  # how long a begun request waits for its weights beside workers with others
    home: HomeBus | None = None  # whose claims for this model the leader sweeps
    first: LeaderBus | None = None  # of the first shard, where this one is another
    drains: Callable[[], bool] = lambda: False  # whether this shard gives its pushes to the first
    several: Callable[[], bool] = lambda: False  # whether the model has more than one shard


class Term:
    """One epoch of leadership over one model."""

    def __init__(self, process: Process, epoch: int, taken_over: bool = False) -> None:
        """``taken_over``: from a leader that had gone silent."""
        self._taken_over = taken_over
        self._bus = bus = process.bus
        self._epoch = epoch
        self._model = process.model
        self._home = process.home
        self._first = process.first
        self._several = process.several
        self._tokenizers = tokenizers = process.tokenizers
        self._longest_wanted = process.max_model_len
        self._metrics = metrics = process.metrics
        self._health = process.health
        self._clock = clock = process.clock
        weights = process.tenant_weights
        self.core = Core(
            CoreConfig(
                max_model_len=tokenizers.max_model_len,
                tenant_weights=weights,
                inter_token_target_s=process.inter_token_target_s,
                weights_grace_s=process.weights_grace_s,
            )
        )
        self._group = asyncio.TaskGroup()  # entered by run: all that the term does are its tasks
        self._traces = RequestTraces(process.traces, bus, process.model, epoch, process.trace_content)
        self._answers = Answers(
            bus, epoch, metrics, process.answers, process.fingerprint, lambda: self._registry.fingerprint,
            lambda: tokenizers.max_model_len,
        )  # fmt: skip
        intake = Intake(
            bus, tokenizers, epoch, clock, metrics, self._traces, self._answers, self._admit, self._recover,
            process.home, process.drains,
        )  # fmt: skip
        self._known: set[str] = set()  # rids that the core holds
        self._inbox = Inbox(bus, epoch, intake, clock, weights, self._known)
        self._registry = WorkerRegistry(bus, epoch, self.core, process.timing, metrics, self._group, self._apply)
        self._early_cancels: dict[str, tuple[str, float]] = {}  # rid -> reason, when; the core did not know it yet
        self._finish_gate = asyncio.Semaphore(READS_AT_ONCE)
        self._planning = asyncio.Event()
        self._after = "0-0"  # last event read
        self._hint: Hint | None = None  # the commit that is being read, where there are traces
        self._shown: tuple[int, str] | None = None  # what of the published card may change: context, fingerprint

    async def run(self) -> None:
        async with self._group as group:
            await self._rebuild()
            await self._registry.look()
            self._follow_capacity()
            await self._publish_card()
            group.create_task(self._registry.watch())
            group.create_task(self._read_events())
            group.create_task(self._plan())
            group.create_task(self._inbox.run())
            group.create_task(self._tick())
            if self._first is not None:
                group.create_task(move_often(self._bus, self._first))
            if self._home is not None:
                shares = Shares(self._home, self._model, self.core, self._several)
                group.create_task(shares.exchange_often(self._apply))
                group.create_task(sweep_often(self._home, self._bus, self._bus.keys.model, self._epoch))

    # -------------------------------------------------------------- taking over

    async def _rebuild(self) -> None:
        """Read the whole state from Redis. The last event id is read first, so that later events are not missed."""
        sent = time.monotonic()
        self._clock.observe(await self._bus.server_ms(), sent, time.monotonic())
        self._after = await self._bus.last_event_id()
        gate = asyncio.Semaphore(READS_AT_ONCE)

        async def recover(rid: str) -> None:
            async with gate:
                await self._recover(rid)

        rids = list(await self._bus.scan_live())
        await asyncio.gather(*(recover(rid) for rid in rids))
        await self._recount(rids)
        if self._known:
            log.info("took over %d unfinished requests", len(self._known))

    async def _recount(self, rids: list[str]) -> None:
        """Make the tenants' sets of running requests true: an older version that ended requests left them there."""
        tenants = await self._bus.weigh_requests(rids)
        owners = [(rid, tenants[rid][0]) for rid in rids if tenants[rid][0]]
        changed = await self._bus.recount(self._epoch, owners)
        if changed:
            log.info("put %d entries of running requests right", changed)

    async def _publish_card(self) -> None:
        """Where the registry does not hold it yet. The first shard's leader speaks for the model."""
        if self._bus.keys.shard:
            return
        known = self._tokenizers
        shown = (known.max_model_len, self._registry.fingerprint)
        if shown == self._shown:
            return
        self._shown = shown
        card = msgspec.structs.replace(known.card(self._model), fingerprint=shown[1])
        await self._bus.publish_card(card, known.tokenizer_json, known.tokenizer_info)

    async def _recover(self, rid: str, *, unfed: bool = False) -> None:
        """Give the core a request that was admitted before, from its record and journals. Others are skipped; so are
        those that have joined another one, unless it is known that nothing lands for them (``unfed``)."""
        if rid in self._known:
            return
        try:
            record = await self._bus.read_request(rid)
            if record is None or not record.open or not record.prompts:
                return
            if not unfed and self._answers.recovered(record):
                if record.cancel is not None:
                    await self._answers.end_joined(rid, record.cancel)
                return
            choices = await read_choices(self._bus, record)
        except UNREADABLE as e:
            log.error("request %s cannot be read, it is left alone: %s", rid, type(e).__name__)
            return
        self._traces.follow(record)
        self._admit(arrive(record, self._clock, choices))
        if record.cancel is not None:
            self._apply(Cancel(rid, record.cancel))

    # -------------------------------------------------------------- into the core

    def _admit(self, event: Arrive) -> None:
        if event.rid in self._known:
            return
        self._known.add(event.rid)
        log.debug("request %s of %s: %s prompt tokens", event.rid, event.tenant, list(map(len, event.prompts)))
        self._apply(event)
        early = self._early_cancels.pop(event.rid, None)
        if early is not None:
            self._apply(Cancel(event.rid, early[0]))

    def _apply(self, event: Event) -> None:
        self._execute(self.core.apply(event, time.monotonic()))
        self._planning.set()
        if isinstance(event, WorkerServing):
            self._follow_capacity()

    async def _read_events(self) -> None:
        while True:
            for event in await self._bus.read_events(self._after, 1024, BLOCK_MS):
                self._note(event)
                self._after = event.event_id

    def _note(self, event: wire.Event) -> None:
        if event.kind == "hint" and event.hint is not None:
            hint = event.hint
            self._metrics.step(hint.wid, hint.exec_us)
            if self._traces.on:
                self._traces.committed(hint)
                self._hint = hint
            self._apply(
                StepDone(
                    hint.wid, hint.gen, hint.step, hint.rows, hint.exec_us, hint.idle_us, event.verdicts,
                    hint.dropped, hint.spoiled,
                )
            )  # fmt: skip
            self._hint = None
        elif event.kind == "worker":
            self._registry.changed.set()
        elif event.kind == "cancel" and event.rid is not None:
            self._group.create_task(self._cancel(event.rid))
        elif event.kind == "freed" and event.rid is not None:
            self._answers.joined.pop(event.rid, None)
            self._group.create_task(self._recover(event.rid))

    async def _cancel(self, rid: str) -> None:
        try:
            record = await self._bus.read_request(rid)
        except UNREADABLE:
            return
        if record is not None and record.moved is not None and rid in self._known:
            self._apply(Cancel(rid, "abort"))  # the store has ended it
        if record is None or record.cancel is None or not record.open:
            return
        log.debug("request %s is to end: %s", rid, record.cancel)
        if rid in self._known:
            self._apply(Cancel(rid, record.cancel))
        elif record.joins is not None and await self._answers.end_joined(rid, record.cancel):
            pass
        else:
            self._early_cancels[rid] = (record.cancel, time.monotonic())
            self._inbox.cancelled(rid)

    # -------------------------------------------------------------- out of the core

    async def _plan(self) -> None:
        shard = self._bus.keys.shard
        alive = self._health.alive(f"planner-{shard}" if shard else "planner")
        while True:
            self._planning.clear()
            started = time.monotonic()
            effects = self.core.plan(started)
            if effects:
                self._metrics.planning_time.observe(time.monotonic() - started)
            self._execute(effects)
            alive()
            wake = self.core.next_wake(started)
            pause = 1.0 if wake is None else min(1.0, wake - time.monotonic())
            if pause <= 0:
                await asyncio.sleep(0)
                continue
            try:
                async with asyncio.timeout(pause):
                    await self._planning.wait()
            except TimeoutError:
                pass

    def _execute(self, effects: Sequence[Effect]) -> None:
        """Start what the core asked for. Nothing is awaited here, since all requests wait for the core."""
        ending: dict[str, list[FinishChoice]] = {}
        for effect in effects:
            match effect:
                case SendPlan(wid, plan):
                    self._metrics.planned(wid, plan)
                    self._registry.send(wid, plan)
                    for new in plan.new:
                        log.debug("%s:%d goes to %s, placement %d", new.rid, new.choice, wid, new.placement)
                    if plan.new:
                        self._traces.placed(wid, plan)
                case FinishChoice():
                    ending.setdefault(effect.rid, []).append(effect)
                    if effect.error_code is not None:
                        self._traces.failed(effect.rid, effect.error_code)
                case Resync():
                    self._group.create_task(self._resync(effect))
                case RequestDone():
                    self._known.discard(effect.rid)
                    log.debug("request %s has ended: %s", effect.rid, effect.finish_reasons)
                    self._metrics.request_done(effect)
                    if self._answers.makes(effect.rid):
                        self._group.create_task(self._answers.keep(effect.rid, effect.finish_reasons))
                    if self._traces.on:
                        self._group.create_task(self._traces.done(effect, self._hint))
                case ReleaseWorker():
                    self._group.create_task(self._registry.release(effect))
        for rid, choices in ending.items():
            self._group.create_task(self._finish(rid, choices))

    async def _finish(self, rid: str, choices: list[FinishChoice]) -> None:
        """Write the terminal frames of choices that no worker runs; the core is told the resulting state of each."""
        async with self._finish_gate:
            try:
                left = await self._write_ends(rid, choices)
            except UNREADABLE:
                left = {choice.choice for choice in choices}  # read_state gives its state
            if left:
                await asyncio.sleep(AGAIN_S)
            for choice in choices:
                if choice.choice in left:
                    await self._resync(Resync(rid, choice.choice))
                else:
                    self._apply(ChoiceEnded(rid, choice.choice))

    async def _write_ends(self, rid: str, choices: list[FinishChoice]) -> set[int]:
        """Returns the choices whose state differs from what the core assumed."""
        record = await self._bus.read_request(rid)
        if record is None:
            return {choice.choice for choice in choices}
        rows, dead, left = [], None, set()
        journals = await self._bus.read_journals([(rid, choice.choice) for choice in choices])
        for choice, raw in zip(choices, journals, strict=True):
            journal = raw or b""
            if len(journal) != choice.cursor or record.ends[choice.choice] is not None:
                left.add(choice.choice)
                continue
            error = _error(choice)
            rows.append(terminal_row(record, choice.choice, journal, choice.reason, error))
            if choice.dead and error:
                dead = {"rid": rid, "hash": body_hash(encode(record.job)), **_texts(error)}
        verdicts = await self._bus.finish(self._epoch, rows, dead=dead) if rows else ""
        return left | {row.choice for row, verdict in zip(rows, verdicts, strict=True) if verdict != LANDED}

    async def _resync(self, effect: Resync) -> None:
        state = await read_state(self._bus, effect.rid, effect.choice)
        self._apply(Resynced(effect.rid, effect.choice, state))

    # -------------------------------------------------------------- the slow tick

    async def _tick(self) -> None:
        """Depth every 250 ms, where it changed; once a second inbox length, metrics, card, trimming, integrity; every
        five what the server tells of itself."""
        rate, ticks, checked, led_at = TokenRate(), 0, 0, time.time()
        depth: dict[str, int | float] = {}
        while True:
            now, stats = time.monotonic(), self.core.stats()
            rate.note(now, stats.counters.output_tokens, idle=not stats.running)
            told = {"rate": rate.value, "led_at": led_at, "taken_over": int(self._taken_over), **self._registry.lost}
            if depth != (depth := {**stats.depth(), **told}):
                await self._bus.write_depth(self._epoch, depth)
            if ticks % TICKS_PER_SECOND == 0:
                oldest = self.core.oldest_waiting()
                waits = max(0.0, now - oldest) if oldest is not None else 0.0
                self._metrics.observe(stats, rate.value, await self._bus.inbox_length(), waits)
                await self._publish_card()
                if not (stats.running or stats.waiting) and checked != stats.counters.output_tokens:
                    checked = stats.counters.output_tokens  # once each time that it becomes idle
                    self.core.check_integrity()
                self._forget_early_cancels(now)
                await self._look_at_joined()
                await self._bus.trim_events(self._after, epoch=self._epoch)
            if ticks % (SERVER_LOOK_S * TICKS_PER_SECOND) == 0:
                self._metrics.server(await self._bus.server())
            ticks += 1
            await asyncio.sleep(1 / TICKS_PER_SECOND)

    async def _look_at_joined(self) -> None:
        unfed, ended = await self._answers.look(self._clock.now_ms())
        for rid in unfed:
            await self._recover(rid, unfed=True)
        for rid in ended if self._traces.on else ():
            await self._traces.answered(rid)

    def _follow_capacity(self) -> None:
        """Limit admission to the longest sequence that the workers can hold: it may be less than the model's
        context."""
        offered = self._registry.max_model_len
        if offered is not None:
            self._tokenizers.max_model_len = min(offered, self._longest_wanted or offered)

    def _forget_early_cancels(self, now: float) -> None:
        for rid in [r for r, (_, since) in self._early_cancels.items() if now - since > EARLY_CANCEL_S]:
            del self._early_cancels[rid]


class TokenRate:
    """Output tokens per second, an exponential mean over RATE_S. An idle system keeps the last value."""

    def __init__(self) -> None:
        self.value = 0.0
        self._since: float | None = None
        self._total = 0

    def note(self, now: float, total: int, idle: bool) -> None:
        """``total`` tokens were journaled up to ``now``, in all."""
        since, made = self._since, total - self._total
        self._since, self._total = now, total
        if since is None or now <= since or (idle and not made):
            return
        elapsed = now - since
        share = min(1.0, elapsed / RATE_S) if self.value else 1.0
        self.value += (made / elapsed - self.value) * share


def _error(choice: FinishChoice) -> dict[str, str | None] | None:
    if choice.error_code is None:
        return None
    return {"code": choice.error_code, "message": choice.error_message, "param": choice.error_param}


def _texts(error: dict[str, str | None]) -> dict[str, str]:
    return {k: v for k, v in error.items() if v is not None}
