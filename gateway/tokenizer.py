"""/tokenize, /detokenize and echo: one process per model does the work, started at first use, so that the loop of the
gateway only passes bytes on. Shorter texts go first, and longer ones age; what waits is bounded in bytes."""

from __future__ import annotations

import asyncio
import heapq
import logging
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from protocol.errors import EngineFailed, HeadraceError, InvalidRequest, Overloaded, Unavailable
from protocol.messages import pack_ids
from protocol.preloaded import Message, Preloaded, Worker, WorkerDied

log = logging.getLogger("headrace.gateway")

MODULE = "gateway.tokenizer_process"
MAX_WAITING = 96 << 20  # bytes of text and ids
AGEING = 1 << 20  # bytes: so much longer, a text lets a shorter one pass that comes a second later
IDLE_S = 600.0  # then the process ends
NICE = 10  # running streams go before
MEMORY_MIB = 384  # for one text, beyond the tokenizer
CPU_S, CPU_S_PER_MIB, WALL_S = 4.0, 12.0, 300.0


class Turns:
    """One at a time, the shortest first."""

    def __init__(self) -> None:
        self._busy = False
        self._waiting: list[tuple[float, int, asyncio.Future[None]]] = []  # a heap
        self._bytes = 0
        self._count = 0

    async def take(self, size: int) -> None:
        """Wait for the turn of something of ``size`` bytes. Overloaded if too much waits already."""
        if self._bytes and self._bytes + size > MAX_WAITING:
            raise Overloaded("too much text waits to be tokenized", retry_after=1.0)
        if not self._busy:
            self._busy = True
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._count += 1
        heapq.heappush(self._waiting, (time.monotonic() + size / AGEING, self._count, turn))
        self._bytes += size
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give()
            raise
        finally:
            self._bytes -= size

    def give(self) -> None:
        """The one whose turn it was is done."""
        while self._waiting:
            _, _, turn = heapq.heappop(self._waiting)
            if not turn.done():
                turn.set_result(None)
                return
        self._busy = False


class TokenizerProcess:
    """Of one tokenizer.json."""

    def __init__(self, tokenizer_json: bytes) -> None:
        self._json: bytes | None = tokenizer_json  # until it is loaded
        self._home = Preloaded(MODULE)
        self._worker: Worker | None = None
        self._turns = Turns()
        self._ending: asyncio.TimerHandle | None = None
        self.closed = False

    async def encode(self, text: str, special: bool) -> tuple[int, msgspec.Raw]:
        """How many ids, and the ids as a JSON array."""
        count, ids = await self._ask(("encode", text, special), len(text))
        return count, msgspec.Raw(ids)

    async def decode(self, ids: list[int], skip_special: bool) -> str:
        packed = pack_ids(ids)
        (text,) = await self._ask(("decode", packed, skip_special), len(packed))
        return str(text)

    async def strings(self, ids: Sequence[int]) -> msgspec.Raw:
        """A JSON array of texts: each token as the vocabulary has it."""
        packed = pack_ids(ids)
        (texts,) = await self._ask(("strings", packed, False), len(packed))
        return msgspec.Raw(texts)

    async def _ask(self, question: Message, size: int) -> list[Any]:
        await self._turns.take(size)
        try:
            worker = await self._ready()
            limit = CPU_S + CPU_S_PER_MIB * size / (1 << 20)
            answer = await worker.ask(question, limit, WALL_S)
        except WorkerDied as death:
            log.error("a text could not be tokenized: %s", death)
            if death.out_of_time:
                raise InvalidRequest(
                    f"to tokenize this takes more than {limit:.1f} s, the limit for its length"
                ) from None
            raise EngineFailed(f"the text could not be tokenized: {death}") from None
        finally:
            self._turns.give()
        if answer[0] == "refused":
            raise InvalidRequest(answer[1])
        return answer[1:]

    async def _ready(self) -> Worker:
        if self._ending is not None:
            self._ending.cancel()
        self._ending = asyncio.get_running_loop().call_later(IDLE_S, self.close)
        if self.closed:
            raise Unavailable("the tokenizer is being loaded again")
        if self._worker is None or self._worker.closed:
            try:
                if self._home.told is None:
                    self._home.start()
                    await asyncio.to_thread(self._home.load, self._json)
                    self._json = None
                if self._worker is not None:
                    self._worker.close()
                self._worker = await self._home.fork(MEMORY_MIB, NICE)
            except HeadraceError as error:
                self.close()  # the next request makes a new one
                raise Unavailable(f"the tokenizer cannot be used: {error}") from None
            except asyncio.CancelledError:
                if self._home.told is None:
                    self.close()
                raise
        return self._worker

    def close(self) -> None:
        self.closed = True
        if self._ending is not None:
            self._ending.cancel()
        if self._worker is not None:
            self._worker.close()
        self._home.close()
