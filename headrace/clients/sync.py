"""Client: the queue's client without ``await``, an AsyncClient on an event loop in a thread of its own.

    with Client("redis://127.0.0.1:6379/0") as client:
        request = client.submit("def add(a, b):", max_tokens=64)
        for piece in client.stream(request):
            print(piece.text, end="")

It is connected once it is made. Without ``with``, call ``close()`` at the end.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any, TypeVar

from headrace.clients.queue import AsyncClient, Piece, Result
from protocol.messages import DEFAULT_TENANT

T = TypeVar("T")


class Client:
    """Arguments, methods and errors are those of AsyncClient. May be used from several threads at once.

    ``on_loop`` is the AsyncClient; what awaits it goes through ``run``.
    """

    def __init__(self, redis_url: str, model: str | None = None, *, tenant: str = DEFAULT_TENANT) -> None:
        self.on_loop = AsyncClient(redis_url, model, tenant=tenant)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="headrace client", daemon=True)
        self._thread.start()
        try:
            self.run(self.on_loop.connect())
        except BaseException:
            self._end_loop()
            raise

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Requests go on; this client only stops listening. A second call does nothing."""
        if self._loop.is_closed():
            return
        try:
            self.run(self.on_loop.close())
        finally:
            self._end_loop()

    @property
    def model(self) -> str | None:
        return self.on_loop.model

    def submit(self, prompt: str | list[int] | None = None, **options: Any) -> str:
        return self.run(self.on_loop.submit(prompt, **options))

    def result(self, request_id: str) -> Result:
        return self.run(self.on_loop.result(request_id))

    def cancel(self, request_id: str) -> bool:
        return self.run(self.on_loop.cancel(request_id))

    def stream(self, request_id: str) -> Iterator[Piece]:
        pieces = self.on_loop.stream(request_id)
        try:
            while (piece := self.run(_next(pieces))) is not None:
                yield piece
        finally:
            self.run(_close(pieces))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Await ``work`` on the client's loop. Where the wait is interrupted (Ctrl-C), ``work`` is cancelled."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # of no effect on what has ended
            raise

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _next(pieces: AsyncIterator[Piece]) -> Piece | None:
    return await anext(pieces, None)


async def _close(pieces: Any) -> None:
    await pieces.aclose()
