"""A scheduler process: it stands by until it leads, then leads until it is stopped or fenced.

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
from protocol.errors import Fenced
from protocol.keys import check_name
from protocol.preloaded import Preloaded
from protocol.telemetry.traces import traces
from scheduler.answers import AnswerSettings, fingerprint
from scheduler.election import ServerClock, Timing, keep_lead, stand_by
from scheduler.leader import Process, Term
from scheduler.metrics import Health, Metrics, serve_status
from scheduler.prompts.chat_format import AUTO
from scheduler.prompts.tokenizer_pool import SpecialTokensInContent, TokenizerPool

log = logging.getLogger("headrace.scheduler")

RELEASE_S = 3.0  # timeout of handing over the lead


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
    timing: Timing = field(default_factory=Timing)

    @property
    def answers(self) -> AnswerSettings:
        return AnswerSettings(
            self.response_cache, self.response_cache_ttl, self.response_cache_memory, self.response_cache_shared
        )


async def run_scheduler(
    config: SchedulerConfig, stop: asyncio.Event | None = None, home: Preloaded | None = None
) -> int:
    """Serve until stopped (0) or deposed by another leader (1). StartError and ModelRefused say what to do.

    ``stop`` ends it; without it, the process is a scheduler alone and SIGTERM and SIGINT end it. The lead is handed
    over in both cases.
    """
    loop = asyncio.get_running_loop()
    alone = stop is None
    if stop is None:
        stop = asyncio.Event()
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
    """A scheduler from its start: it loads, stands by, and leads, once each. Can be cancelled at any point."""

    def __init__(self, config: SchedulerConfig, alone: bool, home: Preloaded | None) -> None:
        self.config = config
        self.alone = alone
        name = check_name(config.name, "name") if config.name else socket.gethostname()
        # unique to this process: a restarted scheduler must not be taken for the one before
        self.owner = f"{name}.{secrets.token_hex(4)}"
        self.claims = HomeBus(config.redis_url)
        self.bus = LeaderBus(config.redis_url, config.served_model_name, retention_s=config.retention_s)
        self.tokenizers = TokenizerPool(
            config.model, config.max_model_len, config.special_tokens_in_content, home,
            tool_format=config.tool_format, reasoning_format=config.reasoning_format,
            generation_config=config.generation_config,
        )  # fmt: skip
        self.metrics, self.health = Metrics(config.served_model_name), Health()
        self.traces = traces("scheduler")
        self.fingerprint = ""  # of the model, where answers are cached
        self.status: AppRunner | None = None
        self.warming: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Ends only by cancellation, Fenced, or an error; the lead is released."""
        config = self.config
        if config.metrics_port:
            self.status = await serve_status(self.metrics, self.health, config.metrics_host, config.metrics_port)
        await self.tokenizers.load()
        self.warming = asyncio.create_task(self._warm_up())
        if config.response_cache:
            self.fingerprint = await fingerprint(config.model)
        if self.alone:
            gc.freeze()  # imported modules are permanent: the collector can skip them
        await self.bus.connect()
        try:
            await self._lead()
        finally:
            self.metrics.is_leader.set(0)
            with contextlib.suppress(TimeoutError):  # the server is unreachable: standbys will notice the missing beats
                async with asyncio.timeout(RELEASE_S):
                    await self._release()

    async def _warm_up(self) -> None:
        try:
            await self.tokenizers.warm_up()
        except Exception:
            log.warning("the processes that tokenize are forked at need", exc_info=True)

    async def _lead(self) -> None:
        config, clock = self.config, ServerClock()
        model, timing = config.served_model_name, config.timing
        self.health.state = "standby"
        note = self.health.alive("leadership")
        log.info("%s stands by for the lead of %s", self.owner, model)
        epoch, taken_over = await stand_by(self.bus, self.owner, timing, note)
        log.info("%s leads %s in epoch %d", self.owner, model, epoch)
        self.health.state = "leading"
        self.metrics.leads(epoch, taken_over)
        process = Process(
            self.bus, self.tokenizers, self.metrics, self.health, clock, timing, model,
            config.tenant_weights or {}, config.max_model_len, config.inter_token_target_ms / 1e3,
            self.traces, config.trace_content, config.answers, self.fingerprint,
            config.weights_grace, self.claims,
        )  # fmt: skip
        term = Term(process, epoch)
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
            log.info("%s gave up the lead of %s", self.owner, self.config.served_model_name)

    async def close(self) -> None:
        if self.warming is not None:
            self.warming.cancel()
            await asyncio.gather(self.warming, return_exceptions=True)
        if self.traces is not None:
            await self.traces.close()
        if self.status is not None:
            await self.status.cleanup()
        await self.bus.close()
        await self.claims.close()
        self.tokenizers.close()


async def _until(stop: asyncio.Event, life: Coroutine[None, None, None]) -> None:
    """Run ``life`` until ``stop`` is set, then cancel it and wait for its end. Its own fault is raised."""
    living = asyncio.ensure_future(life)
    stopping = asyncio.ensure_future(stop.wait())
    await asyncio.wait({living, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    living.cancel()
    try:
        await living
    except asyncio.CancelledError:
        if not stop.is_set():
            raise
