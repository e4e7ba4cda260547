"""A reader of server-sent events: frames become events as they arrive, and go to the socket in one write.

Nothing is buffered here: while a slow client's socket is full, rows are ignored, and when it has drained the reader
continues from its cursor in the journal. A client that reads nothing for too long is dropped.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

from gateway.edge import encode_json
from gateway.headers import tell
from gateway.metrics import DROPPED, INTER_TOKEN, TTFT
from gateway.openai.render import Chunks, EventId, split_frames
from gateway.streams import Follower
from protocol.bus import GatewayBus

SOCKET_BYTES = 256 * 1024  # most that is buffered for one socket
HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # tells proxies not to buffer events
}


class ReaderStalled(ConnectionError):
    """The client read nothing for too long; its stream is in the journal."""


class EventReader(Follower):
    """One open stream. ``begin`` sends the headers; ``run`` returns when the last event is written."""

    def __init__(self, rid: str, chunks: Chunks, model: str, arrived: float, shown: EventId | None = None) -> None:
        super().__init__(rid, chunks)
        self.chunks = chunks
        self.model = model
        self._tail = shown.tail if shown is not None else ""
        self._out: list[bytes] = []
        self._held = 0  # bytes in _out
        self._request: web.BaseRequest | None = None
        self._transport: asyncio.Transport | None = None
        self._writer: AbstractStreamWriter | None = None
        self._chunked = True
        self._arrived = arrived
        self._resumed = shown is not None
        self._last = [0.0] * chunks.choices  # when each choice's last token came; 0: none yet
        self.first_token_s: float | None = None
        self.trace_id: str | None = None
        self.closed = False

    @property
    def full(self) -> bool:
        """Whether the socket's buffer is full."""
        return self._request is not None and self._request.protocol.writing_paused

    # -------------------------------------------------------------- frames in

    def take(self, choice: int, raw: bytes) -> None:
        if self.full:
            self.fall_behind()
            return
        self._time(choice)
        if len(raw) > SOCKET_BYTES // 16:
            self._take_part(choice, raw)
        else:
            self._put(self.chunks.events(choice, raw))

    def _time(self, choice: int) -> None:
        now = time.monotonic()
        if last := self._last[choice]:
            INTER_TOKEN.observe(self.model, now - last)
        elif self.first_token_s is None and not self._resumed:
            self.first_token_s = now - self._arrived
            TTFT.observe_traced(self.model, self.first_token_s, self.trace_id)
        self._last[choice] = now

    def _take_part(self, choice: int, raw: bytes) -> None:
        """As much of a long journal as the socket may hold; the rest is read again when it has drained."""
        for piece, _ in split_frames(raw):
            if self._held > SOCKET_BYTES:
                self.fall_behind()
                return
            self._put(self.chunks.events(choice, piece))

    def put_unshown(self) -> None:
        """Begin with what is left over of the frame that the reader was shown in part."""
        self._put(self.chunks.unshown())

    def _put(self, events: bytes) -> None:
        self._out.append(events)
        self._held += len(events)

    # -------------------------------------------------------------- bytes out

    def flush(self) -> None:
        if self.tally.open == 0 and not self.closed:
            if self.tally.prompt_tokens is None:
                self.fall_behind()  # the usage is not known: read the record
            else:
                self.closed = True
                self._put(self.chunks.closing(self._tail))
                self.news.set()
        if self._transport is None or not self._out:
            return
        block = self._out[0] if len(self._out) == 1 else b"".join(self._out)
        self._out.clear()
        self._held = 0
        if block:
            self._write(block)

    def nudge(self) -> None:
        """A comment, without the empty line that some clients would take for an event."""
        if not self.full:
            self._write(b":\n")

    def _write(self, block: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(b"%x\r\n%b\r\n" % (len(block), block) if self._chunked else block)

    async def begin(self, request: web.BaseRequest, headers: dict[str, str]) -> web.StreamResponse:
        """Send the 200 and the events that exist already."""
        answer = web.StreamResponse(headers={**HEADERS, **headers})
        tell(request, answer.headers)
        writer = await answer.prepare(request)
        transport = request.transport
        if writer is None or transport is None:
            raise ConnectionResetError("the client has gone")
        transport.set_write_buffer_limits(high=SOCKET_BYTES)
        writer.send_headers()
        self._writer, self._chunked = writer, getattr(writer, "chunked", False)
        self._request, self._transport = request, transport
        self._out.insert(0, self.chunks.openings())
        self.flush()
        return answer

    async def run(self, bus: GatewayBus, stall_s: float) -> None:
        """Run the stream until its last event is written. ReaderStalled if the client stops reading."""
        while not (self.closed or self.failed):
            await self.news.wait()
            self.news.clear()
            if self.behind:
                if self.full:
                    await self._drained(stall_s)
                await self.catch_up(bus)
        if self.failed is not None:
            raise self.failed

    async def _drained(self, stall_s: float) -> None:
        assert self._writer is not None
        assert self._transport is not None
        while self.full:
            waiting = self._transport.get_write_buffer_size()
            try:
                async with asyncio.timeout(stall_s):
                    await self._writer.drain()
            except TimeoutError:
                if self._transport.get_write_buffer_size() >= waiting:
                    DROPPED.inc()
                    self._transport.abort()
                    raise ReaderStalled("the reader stalled") from None

    def write_error(self, error: dict[str, Any]) -> None:
        """An error event, the last one: no [DONE] follows."""
        self.closed = True
        self._put(b"data: " + encode_json(error) + b"\n\n")
        self.flush()

    def break_off(self) -> None:
        """Close the connection in the middle, so that no client takes it for the end of the stream."""
        if self._transport is not None:
            self._transport.close()
