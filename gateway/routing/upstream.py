"""Answers of servers that are not ours, streamed through.

Such an answer has no journal: if this gateway or that server dies, it is broken off, and nothing of it can be resumed.
It is tried again elsewhere only while no byte of it was sent. Every request carries the names of the Headrace services
that it came through, so that one that comes back is refused instead of going round for ever.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec
from aiohttp import web

from gateway.auth import Caller
from gateway.edge import encode_json, error_body, json_answer
from gateway.headers import tell
from gateway.metrics import ACTIVE, DURATION, REQUESTS, TTFT
from gateway.routing.money import Money
from gateway.routing.router import Step
from gateway.sse import HEADERS
from protocol.errors import Overloaded, RequestError, Unavailable
from protocol.messages import new_rid
from protocol.routing.table import Upstream
from protocol.telemetry.context import trace_id_of

log = logging.getLogger("headrace.gateway")
request_log = logging.getLogger("headrace.gateway.requests")

HOPS = "X-Headrace-Hops"
MOST_HOPS = 8
MOST_ANSWER = 64 << 20  # bytes of one answer
MOST_ERROR = 1 << 16
RETRIED = {408, 409, 425, 429}  # of the upstream's 4xx, what another server may do better
OURS = {401, 402, 403, 404}  # and what our own key or address is wrong in: no fault of the client's
PATHS = {"chat": "/chat/completions", "completion": "/completions"}


class LoopDetected(RequestError):
    status, code = 508, "loop_detected"


class UpstreamDown(Unavailable):
    """It could not be reached, or could not answer now. Nothing was sent to the client."""

    code = "upstream_unavailable"


@dataclass(eq=False)
class Passing:
    """One answer on its way through."""

    step: Step
    caller: Caller
    stream: bool
    usage: bool  # the client asked for the usage of a stream
    arrived: float
    rid: str
    trace: str | None  # the caller's traceparent
    prompt_tokens: int = 0
    output_tokens: int = 0
    status: int = 0

    @property
    def headers(self) -> dict[str, str]:
        return {"X-Request-Id": self.rid, **self.step.header}


class Upstreams:
    def __init__(self, money: Money) -> None:
        self.money = money
        self._session: aiohttp.ClientSession | None = None
        self.open: set[Passing] = set()

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def answer(
        self, step: Step, request: web.BaseRequest, caller: Caller, kind: str, raw: bytes
    ) -> web.StreamResponse:
        """The answer to the body ``raw``, streamed if it says so. UpstreamDown or Overloaded while nothing was sent."""
        upstream = step.upstream
        assert upstream is not None
        body = msgspec.json.decode(raw)
        options = body.get("stream_options") or {}
        passing = Passing(step, caller, bool(body.get("stream")), bool(options.get("include_usage")),
                          time.monotonic(), new_rid(), request.headers.get("traceparent"))  # fmt: skip
        if self.money.load(step.name) >= upstream.max_concurrent:
            raise Overloaded(f"as many requests are at {step.name} as may be at once", retry_after=1.0)
        body["model"] = upstream.model or step.name
        for ours in ("background", "timeout_s", "request_id"):
            body.pop(ours, None)
        if passing.stream:
            body["stream_options"] = {**options, "include_usage": True}
        self.money.began(step.name)
        self.open.add(passing)
        ACTIVE.labels(step.name).inc()
        try:
            return await self._passed(passing, upstream, request, PATHS[kind], encode_json(body))
        except (UpstreamDown, Overloaded) as error:
            passing.status = error.status
            raise
        except (asyncio.CancelledError, ConnectionError):
            passing.status = passing.status or 499
            raise
        finally:
            self.money.began(step.name, -1)
            self.open.discard(passing)
            ACTIVE.labels(step.name).dec()
            await asyncio.shield(self._account(passing))

    async def _passed(
        self, passing: Passing, upstream: Upstream, request: web.BaseRequest, path: str, body: bytes
    ) -> web.StreamResponse:
        reply = await self._begun(passing, upstream, request, path, body)
        async with reply:
            if reply.status >= 400:
                return await self._refused(passing, reply)
            if passing.stream and reply.content_type == "text/event-stream":
                return await self._streamed(passing, upstream, request, reply)
            return await self._whole(passing, upstream, reply)

    async def _begun(
        self, passing: Passing, upstream: Upstream, request: web.BaseRequest, path: str, body: bytes
    ) -> aiohttp.ClientResponse:
        """The upstream's status and headers. UpstreamDown."""
        if self._session is None:
            self._session = aiohttp.ClientSession(auto_decompress=True, read_bufsize=1 << 18)
        service = self.money.models.routing.service
        hops = ",".join(part for part in (request.headers.get(HOPS), service) if part)
        headers = {"Content-Type": "application/json", HOPS: hops, "X-Request-Id": passing.rid}
        headers |= {name: request.headers[name] for name in ("traceparent", "tracestate") if name in request.headers}
        if upstream.key_env is not None:
            key = os.environ.get(upstream.key_env)
            if not key:
                log.error(
                    "upstream %s: this gateway has no environment variable %s", passing.step.name, upstream.key_env
                )
                raise UpstreamDown(f"{passing.step.name} cannot be asked: its key is not set")
            headers["Authorization"] = f"Bearer {key}"
        limits = aiohttp.ClientTimeout(total=upstream.timeout, connect=10.0)
        try:
            async with asyncio.timeout(upstream.first_byte_timeout):
                return await self._session.post(
                    upstream.url.rstrip("/") + path, data=body, headers=headers, timeout=limits, allow_redirects=False
                )
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            log.warning("upstream %s cannot be reached: %s", passing.step.name, type(error).__name__)
            raise UpstreamDown(f"{passing.step.name} cannot be reached") from None

    async def _refused(self, passing: Passing, reply: aiohttp.ClientResponse) -> web.StreamResponse:
        """What the client did wrong is told to it as the upstream told it. All else is another candidate's turn."""
        if reply.status >= 500 or reply.status in RETRIED or reply.status in OURS:
            log.warning("upstream %s answered %d", passing.step.name, reply.status)
            raise UpstreamDown(f"{passing.step.name} answered {reply.status}")
        try:
            told = msgspec.json.decode(await reply.content.read(MOST_ERROR))
            message = str(told["error"]["message"])[:1000]
        except (msgspec.MsgspecError, KeyError, TypeError, aiohttp.ClientError, TimeoutError):
            message = "the request was refused"
        passing.status = reply.status
        body = {
            "error": {"message": message, "type": "invalid_request_error", "param": None, "code": "upstream_refused"}
        }
        return json_answer(body, reply.status, passing.headers)

    async def _whole(self, passing: Passing, upstream: Upstream, reply: aiohttp.ClientResponse) -> web.StreamResponse:
        try:
            raw = bytearray()
            async for piece in reply.content.iter_chunked(1 << 16):
                raw += piece
                if len(raw) > MOST_ANSWER:
                    raise UpstreamDown(f"the answer of {passing.step.name} is too long")
            body = msgspec.json.decode(raw)
            if not isinstance(body, dict):
                raise UpstreamDown(f"the answer of {passing.step.name} cannot be read")
        except (aiohttp.ClientError, TimeoutError, msgspec.MsgspecError):
            raise UpstreamDown(f"the answer of {passing.step.name} was broken off") from None
        self._saw_usage(passing, body)
        body["model"] = passing.step.name
        passing.status = 200
        return json_answer(body, headers=passing.headers)

    # -------------------------------------------------------------- streams

    async def _streamed(
        self, passing: Passing, upstream: Upstream, request: web.BaseRequest, reply: aiohttp.ClientResponse
    ) -> web.StreamResponse:
        """The first event is awaited before anything is sent: until then another candidate can answer."""
        events = self._events(passing, reply)
        try:
            async with asyncio.timeout(upstream.first_byte_timeout):
                first = await anext(events, None)
        except (aiohttp.ClientError, TimeoutError, ValueError):
            first = None
        if first is None:
            raise UpstreamDown(f"{passing.step.name} sent nothing")
        seconds = time.monotonic() - passing.arrived
        TTFT.observe(passing.step.name, seconds)
        self.money.saw_first_token(passing.step.name, seconds)
        answer = web.StreamResponse(headers={**HEADERS, **passing.headers})
        tell(request, answer.headers)
        await answer.prepare(request)
        passing.status = 200
        try:
            await answer.write(first)
            async for event in events:
                await answer.write(event)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            if isinstance(error, ConnectionError):
                raise  # the client has gone
            log.warning("upstream %s broke off: %s", passing.step.name, type(error).__name__)
            broken = UpstreamDown(f"{passing.step.name} broke off; such an answer cannot be resumed")
            await answer.write(b"data: " + encode_json(error_body(broken)) + b"\n\n")  # and no [DONE]
        await answer.write_eof()
        return answer

    async def _events(self, passing: Passing, reply: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        """Its events, under our name of the model. The one that only tells the usage is passed on if it was wanted."""
        size = 0
        async for line in reply.content:
            size += len(line)
            if size > MOST_ANSWER:
                raise ValueError("the answer is too long")
            line = line.strip()
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                yield b"data: [DONE]\n\n"
                return
            try:
                event = msgspec.json.decode(data)
            except msgspec.MsgspecError:
                raise ValueError("an event cannot be read") from None
            if not isinstance(event, dict):
                continue
            self._saw_usage(passing, event)
            if not passing.usage:
                if not event.get("choices") and "error" not in event:
                    continue
                event.pop("usage", None)
            if "model" in event:
                event["model"] = passing.step.name
            yield b"data: " + encode_json(event) + b"\n\n"
        raise ValueError("the stream has ended without [DONE]")

    # -------------------------------------------------------------- accounts

    def _saw_usage(self, passing: Passing, told: dict[str, Any]) -> None:
        usage = told.get("usage")
        if isinstance(usage, dict):
            passing.prompt_tokens = _tokens(usage.get("prompt_tokens"))
            passing.output_tokens = _tokens(usage.get("completion_tokens"))

    async def _account(self, passing: Passing) -> None:
        step, tenant, seconds = passing.step, passing.caller.tenant, time.monotonic() - passing.arrived
        REQUESTS.labels(step.name, str(passing.status or 500)).inc()
        DURATION.observe(step.name, seconds)
        tokens = passing.prompt_tokens, passing.output_tokens
        cost = self.money.count(step.name, tenant, step.asked, step.rule, *tokens)
        line = {
            "event": "request", "id": passing.rid, "trace": trace_id_of(passing.rid, passing.trace),
            "model": step.name, "tenant": tenant, "kind": "upstream", "asked": step.asked, "rule": step.rule,
            "stream": passing.stream, "status": passing.status, "prompt_tokens": tokens[0], "output_tokens": tokens[1],
            "cost": cost, "seconds": round(seconds, 4),
        }  # fmt: skip
        request_log.info("%s", encode_json(line).decode())
        if passing.prompt_tokens or passing.output_tokens:
            await self.money.spend_upstream(tenant, step.name, passing.prompt_tokens, passing.output_tokens)


def check_hops(request: web.BaseRequest, service: str) -> None:
    """LoopDetected for a request that has come through this service before, or through too many."""
    hops = request.headers.get(HOPS)
    if hops is None:
        return
    parts = hops.split(",")
    if (service and service in parts) or len(parts) > MOST_HOPS:
        raise LoopDetected("this request has come through here before: an upstream leads back to this service")


def _tokens(value: object) -> int:
    return value if isinstance(value, int) and 0 <= value < 1 << 40 else 0
