"""A scheduler process: for each shard of its model it stands by until it leads, then leads until stopped or fenced.

A term reads its whole state from Redis when it begins: only the lead itself is handed over.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import secrets
import signal
import socket
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Literal

from aiohttp.web import AppRunner

from protocol.bus import HomeBus, LeaderBus
from protocol.errors import Fenced, InvalidRequest, StartError, StoreFailed
from protocol.keys import check_name
from protocol.preloaded import Preloaded, give_back_large_blocks
from protocol.routing.shards import Shard, ShardStore, served
from protocol.telemetry.traces import traces
from scheduler.answers import AnswerSettings, fingerprint
from scheduler.election import ServerClock, Timing, keep_lead, stand_by
from scheduler.leader import Process, Term
from scheduler.metrics import Exposed, Health, Metrics, serve_status
from scheduler.prompts.chat_format import AUTO
from scheduler.prompts.tokenizer_pool import SpecialTokensInContent, TokenizerPool

log = logging.getLogger("headrace.scheduler")

RELEASE_S = 3.0  # timeout of handing over the lead
LOOK_S = 3.0  # how often it is looked whether the model has further shards
LATER_S = 3.0  # how long a scheduler waits before it stands by for a shard that another one is to lead first


@dataclass(frozen=True)
class SchedulerConfig:
    """The configuration of a scheduler."""

    model: str  # local directory or hub id
    served_model_name: str
    redis_url: str
    name: str | None = None  # default: the host's name
    max_model_len: int | None = None  # default: the model's own; never more than the workers offer
    metrics_host: str = "127.0.0.1"
    metrics_port: int | None = None  # None or 0: no metrics port
    retention_s: float = 600.0  # how long journals stay after a request's end
    special_tokens_in_content: SpecialTokensInContent = "guard"  # or "allow": special tokens in messages are kept
    tool_format: str = AUTO  # how the model writes tool calls: a family, "none", or "auto": found out
    reasoning_format: str = AUTO  # the same for its thoughts
    generation_config: Literal["model", "off"] = "model"  # whether generation_config.json gives sampling defaults
    tenant_weights: dict[str, float] | None = None  # share of served tokens; 1 where not named
    inter_token_target_ms: float = 0.0  # longest step that prefill may cause beside decodes; 0: the knee decides
    trace_content: bool = False  # traces, where there are any, hold prompts and answers
    response_cache: bool = False  # answers of deterministic requests are kept, for requests that ask for the same
    response_cache_ttl: float = 3600.0  # seconds
    response_cache_memory: int | None = None  # bytes; None: a tenth of the server's maxmemory
    response_cache_shared: bool = False  # by all tenants
    weights_grace: float = 60.0  # seconds that a begun request waits for a worker with its weights beside others
    shards: int | None = None  # so many are made, if there are less; None: as many as there are
    shard: int | None = None  # which this process leads first; None: all alike
    timing: Timing = field(default_factory=Timing)

    @property
    def answers(self) -> AnswerSettings:
        return AnswerSettings(
            self.response_cache, self.response_cache_ttl, self.response_cache_memory, self.response_cache_shared
        )


async def run_scheduler(
    config: SchedulerConfig, stop: asyncio.Event | None = None, home: Preloaded | None = None
) -> int:
    """Serve until stopped (0) or deposed by another leader (1). StartError and ModelRefused say what to do. Where the
    model has several shards, a lead that is lost is stood by for again: the others go on.

    ``stop`` ends it; without it, the process is a scheduler alone and SIGTERM and SIGINT end it. The lead is handed
    over in both cases.
    """
    loop = asyncio.get_running_loop()
    alone = stop is None
    if stop is None:
        stop = asyncio.Event()
        give_back_large_blocks()  # a producer's long texts pass through here
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
    life = _Life(config, alone, home)
    try:
        await _until(stop, life.run())
    except Fenced:
        log.error("deposed: another scheduler leads %s, this one ends", config.served_model_name)
        return 1
    finally:
        await life.close()
    return 0


class _Life:
    """A scheduler from its start: it loads, and stands by for each shard of its model. Can be cancelled at any
    point."""

    def __init__(self, config: SchedulerConfig, alone: bool, home: Preloaded | None) -> None:
        self.config = config
        self.alone = alone
        self.claims = HomeBus(config.redis_url)
        self.store = ShardStore(config.redis_url, patience=None)
        self.tokenizers = TokenizerPool(
            config.model, config.max_model_len, config.special_tokens_in_content, home,
            tool_format=config.tool_format, reasoning_format=config.reasoning_format,
            generation_config=config.generation_config,
        )  # fmt: skip
        self.first = Metrics(config.served_model_name)
        self.exposed = Exposed(self.first)
        self.health = Health()
        self.traces = traces("scheduler")
        self.fingerprint = ""  # of the model, where answers are cached
        self.status: AppRunner | None = None
        self.warming: asyncio.Task[None] | None = None
        self.seats: dict[int, _Seat] = {}

    async def run(self) -> None:
        """Ends only by cancellation, Fenced, or an error; the leads are released."""
        config = self.config
        if config.metrics_port:
            self.status = await serve_status(self.exposed, self.health, config.metrics_host, config.metrics_port)
        await self.tokenizers.load()
        self.warming = asyncio.create_task(self._warm_up())
        if config.response_cache:
            self.fingerprint = await fingerprint(config.model)
        if self.alone:
            gc.freeze()  # imported modules are permanent: the collector can skip them
        model = config.served_model_name
        self.seats[0] = first = _Seat(self, Shard(model, 0, model))
        await first.bus.connect()  # else it says what is wrong with the server
        if config.shards is not None:
            try:
                await self.store.create(model, config.shards)
            except InvalidRequest as error:
                raise StartError(f"--shards: {error}") from None
        ended: list[BaseException] = []
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(first.run())
                group.create_task(self._follow(group))
        except* (Fenced, StartError) as error:
            ended += error.exceptions  # raised below: Python before 3.11.4 wraps in a group what is raised in here
        for failure in ended:
            raise failure

    async def _follow(self, group: asyncio.TaskGroup) -> None:
        """Stand by for every further shard there is, and for those that come later."""
        while True:
            try:
                shards = served(await self.store.read(self.config.served_model_name))
            except StoreFailed as error:  # a user of the server that may not read them
                log.error("the shards of %s cannot be read: %s", self.config.served_model_name, error)
                shards = []
            for shard in shards:
                if shard.number not in self.seats:
                    self.seats[shard.number] = seat = _Seat(self, shard)
                    seat.task = group.create_task(seat.run())
                self.seats[shard.number].shard = shard
            for number in self.seats.keys() - {shard.number for shard in shards} - {0} if shards else ():
                self._leave(self.seats.pop(number))
            await asyncio.sleep(LOOK_S)

    def _leave(self, seat: _Seat) -> None:
        """Its shard is retired."""
        if seat.task is not None:
            seat.task.cancel()
        log.info("%s is retired", seat.shard.tag)

    async def _warm_up(self) -> None:
        try:
            await self.tokenizers.warm_up()
        except Exception:
            log.warning("the processes that tokenize are forked at need", exc_info=True)

    def note_state(self) -> None:
        self.health.state = "leading" if any(seat.leads for seat in self.seats.values()) else "standby"

    async def close(self) -> None:
        if self.warming is not None:
            self.warming.cancel()
            await asyncio.gather(self.warming, return_exceptions=True)
        if self.traces is not None:
            await self.traces.close()
        if self.status is not None:
            await self.status.cleanup()
        for seat in self.seats.values():
            await seat.bus.close()
        await self.claims.close()
        await self.store.close()
        self.tokenizers.close()


class _Seat:
    """One shard for which this process stands by, and which it leads."""

    def __init__(self, life: _Life, shard: Shard) -> None:
        self.life = life
        self.shard = shard
        config = life.config
        self.bus = LeaderBus(config.redis_url, shard.tag, retention_s=config.retention_s)
        self.metrics = life.exposed.of(shard.number)
        self.part = f"-{shard.number}" if shard.number else ""
        self.owner = ""
        self.leads = False
        self.task: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Ends only by cancellation or an error, or by Fenced where there are no other shards; the lead is released."""
        try:
            await self.bus.connect()
            await self._run()
        finally:
            if self.shard.number:  # that of the first is used by the others
                await self.bus.close()

    async def _run(self) -> None:
        if self.life.config.shard not in (None, self.shard.number):
            await asyncio.sleep(LATER_S)  # another scheduler may want it first
        while True:
            try:
                await self._lead()
            except Fenced:
                if len(self.life.seats) == 1:
                    raise
                log.error("deposed: another scheduler leads %s", self.shard.tag)
            finally:
                self.leads = False
                self.life.health.forget("planner" + self.part)
                self.life.note_state()
                self.metrics.is_leader.set(0)
                with contextlib.suppress(TimeoutError):  # the server is unreachable: standbys will notice
                    async with asyncio.timeout(RELEASE_S):
                        await self._release()

    async def _lead(self) -> None:
        life, config, clock, timing = self.life, self.life.config, ServerClock(), self.life.config.timing
        name = check_name(config.name, "name") if config.name else socket.gethostname()
        # unique to this process and try: a restarted scheduler must not be taken for the one before
        self.owner = f"{name}.{secrets.token_hex(4)}"
        life.note_state()
        note = life.health.alive("leadership" + self.part)
        log.info("%s stands by for the lead of %s", self.owner, self.shard.tag)
        epoch, taken_over = await stand_by(self.bus, self.owner, timing, note)
        log.info("%s leads %s in epoch %d", self.owner, self.shard.tag, epoch)
        self.leads = True
        life.note_state()
        self.metrics.leads(epoch, taken_over)
        process = Process(
            self.bus, life.tokenizers, self.metrics, life.health, clock, timing, config.served_model_name,
            config.tenant_weights or {}, config.max_model_len, config.inter_token_target_ms / 1e3,
            life.traces, config.trace_content, config.answers, life.fingerprint,
            config.weights_grace, life.claims, life.seats[0].bus if self.shard.number else None,
            lambda: self.shard.state == "draining", lambda: len(life.seats) > 1,
        )  # fmt: skip
        term = Term(process, epoch, taken_over)
        deposed: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(keep_lead(self.bus, epoch, self.owner, timing, clock, note))
                group.create_task(term.run())
        except* Fenced as fenced:
            deposed = fenced  # raised below: Python before 3.11.4 wraps in a group what is raised in here
        if deposed is not None:
            raise Fenced("epoch") from deposed

    async def _release(self) -> None:
        """Hand the lead over if this process leads, also if it began to lead just before the end."""
        seen = await self.bus.read_leader()
        if seen.owner == self.owner and await self.bus.release(seen.epoch, self.owner):
            log.info("%s gave up the lead of %s", self.owner, self.shard.tag)


async def _until(stop: asyncio.Event, life: Coroutine[None, None, None]) -> None:
    """Run ``life`` until ``stop`` is set, then cancel it and wait for its end. Its own fault is raised."""
    living = asyncio.ensure_future(life)
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({living, stopping}, return_when=asyncio.FIRST_COMPLETED)
    finally:  # also where this is cancelled: what ``life`` uses is closed next
        stopping.cancel()
        living.cancel()
        (ended,) = await asyncio.gather(living, return_exceptions=True)
    if isinstance(ended, BaseException) and not (isinstance(ended, asyncio.CancelledError) and stop.is_set()):
        raise ended
