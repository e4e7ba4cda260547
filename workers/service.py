"""The worker process: its configuration, its load, its signals, and one session after another.

What a worker may do is decided by (epoch, gen) alone. Once fenced, it drops all its sequences and registers anew:
the model is loaded once per process, a session (session.py) costs little.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from protocol.bus import WorkerBus
from protocol.errors import EngineFailed, Fenced, HeadraceError, StartError, Unavailable
from protocol.keys import check_name
from protocol.levels import LEVEL
from protocol.messages import Capacity
from protocol.routing.shards import ShardStore, served
from workers import session
from workers.detokenizer import Vocabulary, WindowVocabulary
from workers.engine_thread import Device, Ticket
from workers.engines.base import Engine, Progress, Sampled
from workers.engines.process import ProcessEngine
from workers.engines.ranks import RankedEngine, Remote
from workers.engines.remote import address_of
from workers.engines.simulated import SimulatedConfig, SimulatedEngine, byte_vocabulary
from workers.interruption import wait_for_notice
from workers.metrics import Metrics, serve_metrics
from workers.session import Session
from workers.stages import Stages

log = logging.getLogger("headrace.worker")

SHARD_S = 60  # how long a worker waits for its shard to be made
MOST_BARREN = 3  # engine processes in a row that ended before they had served a step
SWITCH_S = 0.0003  # with the default of 5 ms the device thread waits that long whenever text or a commit is being made

Loaded = tuple[int, Capacity, Vocabulary | WindowVocabulary]  # gen, and what the load told


@dataclass(kw_only=True)
class WorkerConfig:
    """Fields that an engine's own configuration has too (dtype, block_size, ...) are handed on; None: its default."""

    redis_url: str
    served_model_name: str
    model: str | None = None  # directory or hub id; a simulated engine may do without
    name: str = "worker-0"
    shard: int | None = None  # of the model: whose requests it computes; None: 0
    engine: str = "torch"  # or "simulated"
    tensor_parallel_size: int = 1  # ranks that compute each layer together
    pipeline_parallel_size: int = 1  # stages of layers, each of so many ranks
    rendezvous: str | None = None  # HOST:PORT where ranks of other machines come in; None: all ranks are here
    local_ranks: int = 1  # how many of them are here nevertheless
    dtype: str | None = None
    quantization: str | None = None
    dequantize: bool | None = None
    device: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    kv_cache_memory: int | None = None
    kv_cache_dtype: str | None = None
    kv_offload: int | None = None
    gpu_memory_utilization: float | None = None
    block_size: int | None = None
    kernel_cache: str | None = None
    threads: int | None = None
    engine_options: dict[str, Any] | None = None  # further fields of the engine's own; "process": whether in its own
    retention_s: float = 600.0  # how long journals stay after a request's end
    drain_timeout: float = 60.0
    stall_timeout: float = 60.0  # a step without any progress for so long ends the engine, or the process that it is in
    interruption_notice_url: str | None = None  # an address or a file that tells that this machine will go away
    metrics_host: str = "127.0.0.1"
    metrics_port: int | None = None  # None: no port; 0: any free one


async def run_worker(
    config: WorkerConfig, *, progress: Progress | None = None, engine: Engine | None = None, signals: bool = True
) -> int:
    """Serve until SIGTERM (drain, then 0) or a failure (non-zero). StartError where the start cannot succeed.

    ``progress`` is called from the device thread while the model loads. ``engine`` takes the place of the
    configured one. ``signals``: this process is the worker's alone (its signals, its interpreter's settings).
    """
    check_name(config.name, "name")
    tag = await _tag(config.redis_url, config.served_model_name, config.shard) if config.shard else None
    bus = WorkerBus(config.redis_url, tag or config.served_model_name, retention_s=config.retention_s)
    await bus.connect()
    worker = Worker(config, bus, engine or make_engine(config), progress or _silent)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT) if signals else ():
        loop.add_signal_handler(number, worker.on_signal, number)
        sys.setswitchinterval(SWITCH_S)
    try:
        return await worker.run()
    finally:
        if isinstance(worker.engine, ProcessEngine | RankedEngine):
            worker.engine.close()
        for number in (signal.SIGTERM, signal.SIGINT) if signals else ():
            loop.remove_signal_handler(number)
        await bus.close()


async def _tag(url: str, model: str, number: int) -> str:
    """The tag of a shard, once it is there: a scheduler makes it. StartError for one that does not come."""
    store, tries = ShardStore(url), 0
    try:
        while True:
            for shard in served(await store.read(model)):
                if shard.number == number:
                    return shard.tag
            if tries >= SHARD_S:
                raise StartError(f"--shard: {model} has no shard {number}; a scheduler makes it (--shards)")
            tries += 1
            await asyncio.sleep(1.0)
    except Unavailable as error:
        raise StartError(f"cannot use the Redis server: {error.message}") from None
    finally:
        await store.close()


def make_engine(config: WorkerConfig) -> Engine:
    """The configured engine. On a GPU in a process of its own, or as `process` of the engine options says."""
    if config.engine not in ("torch", "simulated"):
        raise StartError(f"engine must be torch or simulated, not {config.engine}")
    options = dict(config.engine_options or {})
    ranks = config.tensor_parallel_size, config.pipeline_parallel_size
    remote = Remote(address_of(config.rendezvous), config.local_ranks) if config.rendezvous else None
    apart = options.pop("process", config.engine == "torch" and on_gpu(config.device))
    if config.engine == "simulated":
        simulated = _engine_config(SimulatedConfig, config, options)
        if max(ranks) > 1:
            return RankedEngine("simulated", dataclasses.replace(simulated, stages=ranks[1]), *ranks, remote)
        return ProcessEngine("simulated", simulated) if apart else SimulatedEngine(simulated)
    if config.model is None:
        raise StartError("no model: pass --model with a local directory or a hub id")
    from workers.torch_engine.config import EngineConfig

    torch_config = _engine_config(EngineConfig, config, options)
    if max(ranks) > 1:
        return RankedEngine("torch", torch_config, *ranks, remote)
    if apart:
        return ProcessEngine("torch", torch_config)
    from workers.torch_engine.make import make_engine  # torch takes seconds to import

    return make_engine(torch_config)


def on_gpu(device: str | None) -> bool:
    """Whether ``device`` will be a GPU, as far as can be told without torch."""
    if device not in (None, "auto"):
        return str(device).startswith("cuda")
    return os.environ.get("CUDA_VISIBLE_DEVICES") != "" and any(Path("/dev").glob("nvidia[0-9]*"))


def _engine_config(kind: type[Any], config: WorkerConfig, options: dict[str, Any]) -> Any:
    names = {f.name for f in dataclasses.fields(kind)}
    given = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name in names}
    try:
        return kind(**{k: v for k, v in given.items() if v is not None} | options)
    except TypeError as error:
        raise StartError(f"--engine-options: {error}") from error


def load_vocabulary(engine: Engine) -> Vocabulary | WindowVocabulary:
    """From the tokenizer that the engine has loaded; bytes where it has none."""
    tokenizer = getattr(engine, "tokenizer", None)
    return byte_vocabulary() if tokenizer is None else Vocabulary.of(tokenizer)


def _silent(stage: str, fraction: float) -> None:
    pass


class Worker:
    """One worker process: loads once, then serves one session (gen) after another."""

    def __init__(self, config: WorkerConfig, bus: WorkerBus, engine: Engine, progress: Progress) -> None:
        self.config = config
        self.name = config.name
        self.bus = bus
        self.engine = engine
        self.metrics = Metrics(config.served_model_name, config.name)
        self.device = Device(engine, self._deliver)
        self.state = "loading"
        self.draining = asyncio.Event()
        self._report = progress
        self._session: Session | None = None
        self._signals: set[int] = set()
        self._engine_runs = 0
        self._stalled_since: float | None = None
        self._barren = 0

    def on_signal(self, number: int) -> None:
        """First: drain. The same one again: end at once."""
        if number in self._signals:
            log.warning("second signal: ending at once")
            os._exit(128 + number)
        self._signals.add(number)
        log.info("draining")
        self.draining.set()

    def health(self) -> dict[str, object]:
        stalled = self._stalled_since is not None and time.monotonic() - self._stalled_since > 5.0
        return {"ok": not stalled, "state": self.state, "stalled": stalled}

    def next_engine_run(self) -> int:
        self._engine_runs += 1
        return self._engine_runs

    async def run(self) -> int:
        config = self.config
        runner = None
        if config.metrics_port is not None:
            runner = await serve_metrics(self.metrics, config.metrics_host, config.metrics_port, self.health)
        life = asyncio.ensure_future(self._live())
        last_moment = asyncio.ensure_future(self._wait_out_drain())
        notice = asyncio.ensure_future(self._drain_on_notice(config.interruption_notice_url))
        try:
            await asyncio.wait((life, last_moment), return_when=asyncio.FIRST_COMPLETED)
            return life.result() if life.done() else last_moment.result()
        except HeadraceError:
            raise
        except Exception as error:  # the engine failed, a step hung, a plan was impossible: the supervisor restarts
            log.critical("ending: %s: %s", type(error).__name__, error, exc_info=error)
            return 1
        finally:
            self.device.stop()
            for task in (life, last_moment, notice):
                task.cancel()
            await asyncio.gather(life, last_moment, notice, return_exceptions=True)
            if runner is not None:
                await runner.cleanup()

    async def _live(self) -> int:
        loaded = await self._load_while_beating(await self._register())
        while loaded is not None:
            try:
                return await self._serve(*loaded)
            except EngineFailed as failure:
                loaded = await self._load_again(failure)
        return 0

    async def _register(self, capacity: Capacity | None = None) -> int:
        gen = await self.bus.register(self.name, capacity, self.state)
        log.info("registered as %s, generation %d", self.name, gen)
        return gen

    async def _load_again(self, failure: EngineFailed) -> Loaded | None:
        """Another engine process in place of one that has ended or hangs; as ``_load_while_beating``. Raises
        ``failure``, or that of a later one, where there is to be none."""
        while True:
            await self._replace_engine(failure)
            try:
                return await self._load_while_beating(await self._register())
            except (EngineFailed, StartError) as error:  # it could be started before: the options are not to blame
                failure = EngineFailed(str(error))

    async def _replace_engine(self, failure: EngineFailed) -> None:
        """An address that no kernel may touch, memory that lost a bit or a kernel that hangs spoil all that a process
        has on its device, and nothing beyond it. Where the engine shares this process, this process has to end."""
        if not isinstance(self.engine, ProcessEngine | RankedEngine):
            raise failure
        self._barren = 0 if self.device.steps else self._barren + 1
        if self._barren >= MOST_BARREN:
            log.critical("%d engine processes in a row ended before they had served a step", self._barren)
            raise failure
        log.error("%s; another engine process is started", failure)
        self.metrics.engine_restarts.inc()
        self.device.failed.add_done_callback(lambda failed: failed.exception())  # whatever it is, it was told
        self.device.stop()
        await asyncio.to_thread(self.engine.kill)
        self._session, self._stalled_since, self.state = None, None, "loading"
        self.engine = self.engine.again()
        self.device = Device(self.engine, self._deliver)

    async def _wait_out_drain(self) -> int:
        await self.draining.wait()
        await asyncio.sleep(self.config.drain_timeout)
        live = self._session.outputs.live if self._session is not None else 0
        log.warning("drain timeout: leaving with %d sequences here", live)
        return 0

    async def _drain_on_notice(self, source: str | None) -> None:
        if source is not None:
            await wait_for_notice(source)
            log.warning("this machine will be taken away: draining")
            self.draining.set()

    def _load(self) -> tuple[Capacity, Vocabulary | WindowVocabulary]:
        """In the device thread: the model and its tokenizer, then warm-up."""
        stages = Stages()

        def progress(stage: str, fraction: float) -> None:
            if stages.enter(stage):
                log.info("%s", stage)
                self.state = "loading" if stage == "load" else "warming"
            self._report(stage, fraction)

        capacity = self.engine.load(progress)
        stages.enter("tokenizer")
        vocabulary = load_vocabulary(self.engine)
        log.info("loaded in %s; path of a pass: %s", stages, self.engine.path)
        self.metrics.takes(self.engine.path)
        return msgspec.structs.replace(capacity, model=self.config.served_model_name, level=LEVEL), vocabulary

    async def _load_while_beating(self, gen: int) -> Loaded | None:
        """(gen, capacity, vocabulary), or None if the worker is to leave before it has loaded."""
        held = [gen]

        async def beat(said: str) -> None:
            while True:
                await asyncio.sleep(session.HEARTBEAT_S)
                state = self.state
                try:
                    await self.bus.heartbeat(self.name, held[0], state=state if state != said else None)
                except Fenced:  # retired meanwhile: the model goes on loading under another gen
                    held[0] = await self.bus.register(self.name, None, state)
                said = state

        loading = asyncio.ensure_future(self.device.start(self._load))
        others = [asyncio.ensure_future(beat(said="loading")), asyncio.ensure_future(self.draining.wait())]
        try:
            await asyncio.wait([loading, *others], return_when=asyncio.FIRST_COMPLETED)
            if self.draining.is_set():
                return None
            if not loading.done():
                others[0].result()  # raises what ended the beats
            capacity, vocabulary = await loading
            return held[0], capacity, vocabulary
        finally:
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, gen: int, capacity: Capacity, vocabulary: Vocabulary | WindowVocabulary) -> int:
        self.state = "serving"
        log.info("serving: %d sequences of at most %d tokens", capacity.max_num_seqs, capacity.max_model_len)
        while True:
            self._session = Session(self, gen, capacity, vocabulary)
            try:
                return await self._session.run()
            except Fenced as fenced:
                self.metrics.fenced.inc()
                if self.draining.is_set():
                    log.info("released by the scheduler")
                    return 0
                log.warning("%s: dropping all sequences and registering anew", fenced)
            await self._until_idle()
            gen = await self._register(capacity)

    async def _until_idle(self) -> None:
        """Let the step under way end first: a worker whose device hangs must not offer itself again."""
        self.device.reset(self.next_engine_run())
        seen = None
        while self.device.busy:
            progress = (self.device.steps, self.engine.beat())
            if progress == seen:
                self.watch_progress()
            else:
                self.progressed()
            seen = progress
            if self.device.failed.done():
                self.device.failed.result()
            await asyncio.sleep(0.02)

    def watch_progress(self) -> None:
        """Called when a step made no progress since the last look; raises once it has stood for too long."""
        now = time.monotonic()
        if self._stalled_since is None:
            self._stalled_since = now
        if now - self._stalled_since > self.config.stall_timeout:
            raise EngineFailed(f"a step made no progress for {self.config.stall_timeout:.0f} s")

    def progressed(self) -> None:
        self._stalled_since = None

    def _deliver(self, ticket: Ticket, sampled: Sampled, idle_us: int) -> None:
        if self._session is not None:
            self._session.executed(ticket, sampled, idle_us)
