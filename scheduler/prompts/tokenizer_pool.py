"""Jobs to token ids in processes: the scheduler's loop only sends bytes and gets bytes.

Two groups, each with processes of its own: one for short jobs, one for long ones, at a lower priority than anything
that serves running streams. So a long text stands before no short one, here and on the processor. A process has one job
at a time, and one that dies, or takes more time or memory than its group allows, ends that job and no other.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from protocol import errors
from protocol.errors import EngineFailed, HeadraceError, InvalidRequest, RequestError, ServiceError, StartError
from protocol.messages import Job, ModelCard, encode
from protocol.preloaded import Preloaded, Worker, WorkerDied

log = logging.getLogger("headrace.scheduler")

SpecialTokensInContent = Literal["guard", "allow"]

MODULE = "scheduler.prompts.tokenizer_process"
SHORT = 16 << 10  # bytes of a job that is short: some 10 ms of tokenizing
RELOAD_S = 1.0  # between two tries to bring a lost process back

_decode_card = msgspec.msgpack.Decoder(ModelCard).decode
_decode_job = msgspec.msgpack.Decoder(Job).decode


@dataclass(frozen=True)
class Bounds:
    """What one job may take. The slowest text that we know takes 2 s of CPU time and 200 MiB a megabyte."""

    processes: int
    nice: int
    memory_mib: int  # beyond what was loaded
    cpu_s: float
    cpu_s_per_mib: float = 12.0
    wall_s: float = 600.0  # for a machine that gives it no time at all

    def time(self, size: int) -> float:
        return self.cpu_s + self.cpu_s_per_mib * size / (1 << 20)


CPUS = os.cpu_count() or 1
SHORT_BOUNDS = Bounds(processes=max(1, min(4, CPUS // 2)), nice=0, memory_mib=256, cpu_s=3.0)
LONG_BOUNDS = Bounds(processes=max(1, min(4, CPUS // 4)), nice=15, memory_mib=384, cpu_s=4.0)


@dataclass(frozen=True)
class Prepared:
    prompts: list[bytes]  # int32 bytes, one per prompt
    job: Job | None  # of a push


class TokenizerPool:
    """``load`` first. ``max_model_len``: most tokens of a context now; the term lowers it to what the workers offer."""

    def __init__(
        self,
        model: str,
        max_model_len: int | None = None,
        special_tokens_in_content: SpecialTokensInContent = "guard",
        home: Preloaded | None = None,
        *,
        tool_format: str = "auto",
        reasoning_format: str = "auto",
        generation_config: str = "model",
        short: Bounds = SHORT_BOUNDS,
        long: Bounds = LONG_BOUNDS,
    ) -> None:
        """``home``: one that has loaded this model already, and that others use as well."""
        self._arguments = (
            model, max_model_len, special_tokens_in_content, tool_format, reasoning_format, generation_config,
        )  # fmt: skip
        self._home = home or Preloaded(MODULE)
        self._lent = home is not None
        self._short, self._long = _Processes(self, short), _Processes(self, long)
        self._reloading = asyncio.Lock()
        self._card: ModelCard | None = None
        self.tokenizer_json: bytes | None = None
        self.tokenizer_info: bytes | None = None
        self.max_model_len = 0

    async def load(self) -> None:
        """Start the process that loads. StartError and ModelRefused say what to do."""
        told = self._home.told
        if told is None:
            self._home.start()
            told = await asyncio.to_thread(self._home.load, *self._arguments)
        card, self.tokenizer_json, self.tokenizer_info = told
        self._card = _decode_card(card)
        self.max_model_len = self._card.max_model_len

    async def warm_up(self) -> None:
        """Fork the processes for short jobs and have each prepare something: what a forked process touches first is
        copied page by page, some 50 ms that the first requests of a burst would wait for."""
        greeting = [{"role": "user", "content": "hello"}]
        jobs = [encode(Job(prompt="hello")), encode(Job(messages=greeting))]  # the latter is refused without a template
        for body in jobs:
            asked = (self._prepare(False, body) for _ in range(self._short.bounds.processes))
            for found in await asyncio.gather(*asked, return_exceptions=True):
                if isinstance(found, BaseException) and not isinstance(found, RequestError | ServiceError):
                    raise found

    def card(self, model: str) -> ModelCard:
        """What the registry will say of this model under the served name ``model``."""
        assert self._card is not None
        return msgspec.structs.replace(
            self._card, model=model, created=int(time.time()), max_model_len=self.max_model_len
        )

    async def accepted(self, body: bytes) -> Prepared:
        """The prompts of a job as we wrote it. RequestError, ServiceError."""
        return await self._prepare(False, body)

    async def push(self, payload: bytes) -> Prepared:
        """The prompts of a producer's payload, and the job that it is. RequestError, ServiceError."""
        return await self._prepare(True, payload)

    async def _prepare(self, push: bool, body: bytes) -> Prepared:
        group = self.group(len(body))
        limit = group.bounds.time(len(body))
        try:
            async with group.worker() as worker:
                answer = await worker.ask((push, body, self.max_model_len), limit, group.bounds.wall_s)
        except WorkerDied as death:
            log.error("the process that prepared a prompt died of it: %s", death)
            raise _ended(death, limit) from None
        if answer[0] == "refused":
            raise _refusal(*answer[1:])
        _, prompts, job = answer
        return Prepared(prompts, _decode_job(job) if job is not None else None)

    def group(self, size: int) -> _Processes:
        return self._short if size <= SHORT else self._long

    async def fork(self, bounds: Bounds) -> Worker:
        """A new process. One that loaded and was lost is brought back first, however long that takes."""
        async with self._reloading:
            while not self._home.alive:
                log.error("the process that holds the tokenizer has ended, it is started again")
                self._home.close()
                try:
                    await self.load()
                except StartError as error:
                    log.error("%s", error)
                    await asyncio.sleep(RELOAD_S)
                except EngineFailed:
                    await asyncio.sleep(RELOAD_S)
            return await self._home.fork(bounds.memory_mib, bounds.nice)

    def close(self) -> None:
        self._short.close()
        self._long.close()
        if not self._lent:
            self._home.close()


class _Processes:
    """Processes with the same bounds; forked at need, kept, replaced when they end."""

    def __init__(self, pool: TokenizerPool, bounds: Bounds) -> None:
        self.bounds = bounds
        self._pool = pool
        self._free = asyncio.Semaphore(bounds.processes)
        self._idle: list[Worker] = []
        self._all: set[Worker] = set()

    @contextlib.asynccontextmanager
    async def worker(self) -> AsyncIterator[Worker]:
        """A process for one job, first come, first served."""
        async with self._free:
            worker = await self._take()
            try:
                yield worker
            finally:
                self._idle.append(worker)

    async def _take(self) -> Worker:
        while self._idle:
            worker = self._idle.pop()
            if not worker.closed:
                return worker
            worker.close()
            self._all.discard(worker)
        worker = await self._pool.fork(self.bounds)
        self._all.add(worker)
        return worker

    def close(self) -> None:
        for worker in self._all:
            worker.close()
        self._all.clear()
        self._idle.clear()


def _ended(death: WorkerDied, limit: float) -> RequestError | ServiceError:
    """What becomes of the job: it is not tried again, so that what kills a process does so once."""
    if death.out_of_time:
        return InvalidRequest(f"to prepare this prompt takes more than {limit:.1f} s, the limit for its length")
    return EngineFailed(f"the prompt could not be prepared: {death}")


def _refusal(name: str, message: str, param: str | None, code: str) -> HeadraceError:
    """The error that a process answered."""
    kind: Any = getattr(errors, name)
    error: HeadraceError = kind(message, param=param, code=code) if issubclass(kind, RequestError) else kind(message)
    return error
