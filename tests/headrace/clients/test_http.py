"""Streams over HTTP that go on by themselves: against a gateway killed under them, and a server that misbehaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from headrace.clients.http import HttpClient
from protocol.errors import EngineFailed, RequestError, Unavailable
from tests.stack import Stack


async def test_a_stream_goes_on_when_its_gateway_is_killed(stack: Stack) -> None:
    body = {"model": "org/tiny", "prompt": "def f():", "max_tokens": 1500, "seed": 8, "ignore_eos": True,
            "return_token_ids": True}  # fmt: skip
    async with HttpClient(stack.url) as client:
        whole = [chunk async for chunk in client.stream(body)]
        seen = []
        async for chunk in client.stream(body):
            seen.append(chunk)
            if len(seen) in (20, 400):
                await asyncio.to_thread(stack.kill, "gateway")
    assert _tokens(seen) == _tokens(whole)
    assert len(_tokens(seen)) == 1500
    assert len({chunk["id"] for chunk in seen}) == 1  # one request, not several


def _tokens(chunks: list[dict[str, Any]]) -> list[int]:
    return [t for c in chunks for choice in c["choices"] for t in choice.get("token_ids") or []]


async def test_chat_and_what_is_wrong_with_a_request(stack: Stack) -> None:
    async with HttpClient([stack.url + "/v1"]) as client:
        ask = {"model": "org/tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 6}
        chunks = [chunk async for chunk in client.stream(ask)]
        assert chunks[-1]["choices"][0]["finish_reason"]
        with pytest.raises(RequestError, match="temperature"):
            await anext(client.stream({"model": "org/tiny", "prompt": "x", "temperature": 9}))


# ------------------------------------------------------------------ a server that misbehaves by a script

Act = Callable[[web.Request], Awaitable[web.StreamResponse]]


def events(*steps: object) -> Act:
    """Answers 200 and these steps: a dict is an event, its id the `n` in it; bytes are sent as they are."""

    async def act(request: web.Request) -> web.StreamResponse:
        reply = web.StreamResponse(headers={"Content-Type": "text/event-stream", "X-Request-Id": "r1"})
        await reply.prepare(request)
        for step in steps:
            raw = step if isinstance(step, bytes) else f"id: {step.get('n', '')}\ndata: {json.dumps(step)}\n\n".encode()  # type: ignore[attr-defined]
            await reply.write(raw)
        return reply

    return act


def status(code: int, body: object = None, **headers: str) -> Act:
    async def act(request: web.Request) -> web.StreamResponse:
        return web.json_response(body, status=code, headers=headers)

    return act


class Script:
    """Plays one act for each request and notes what it was asked."""

    def __init__(self) -> None:
        self.acts: list[Act] = []
        self.asked: list[tuple[str, str, str | None, str | None]] = []

    async def play(self, request: web.Request) -> web.StreamResponse:
        headers = request.headers
        self.asked.append((request.method, request.path, headers.get("Last-Event-ID"), headers.get("Idempotency-Key")))
        return await self.acts[len(self.asked) - 1](request)


@pytest.fixture
async def script() -> AsyncIterator[Script]:
    played = Script()
    app = web.Application()
    app.router.add_route("*", "/{any:.*}", played.play)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    played.url = f"http://127.0.0.1:{runner.addresses[0][1]}"  # type: ignore[attr-defined]
    yield played
    await runner.cleanup()


DONE = b"data: [DONE]\n\n"


async def read(script: Script, **options: float) -> list[int]:
    async with HttpClient(script.url, **options) as client:  # type: ignore[attr-defined, arg-type]
        return [chunk["n"] async for chunk in client.stream({"prompt": "x"})]


async def test_it_goes_on_after_the_last_whole_event(script: Script) -> None:
    script.acts = [
        status(503, **{"Retry-After": "0"}),
        events({"n": 1}, {"n": 2}, b'id: 3\ndata: {"n": 3'),  # torn
        status(502),
        events({"n": 3}, {"error": {"code": "unavailable", "message": "draining", "type": "server_error"}}),
        events({"n": 4}, DONE),
    ]
    assert await read(script) == [1, 2, 3, 4]
    assert [a[:3] for a in script.asked] == [
        ("POST", "/v1/completions", None), ("POST", "/v1/completions", None), ("GET", "/v1/streams/r1", "2"),
        ("GET", "/v1/streams/r1", "2"), ("GET", "/v1/streams/r1", "3"),
    ]  # fmt: skip
    assert script.asked[0][3] == script.asked[1][3] is not None


async def test_a_stream_that_was_read_to_its_end_is_over(script: Script) -> None:
    script.acts = [events({"n": 1}), status(204)]
    assert await read(script) == [1]


@pytest.mark.parametrize(
    ("act", "error", "says"),
    [
        (
            status(404, {"error": {"message": "no such model", "code": "model_not_found"}}),
            RequestError,
            "no such model",
        ),
        (status(410, "not what one expects"), RequestError, "HTTP 410"),
        (events({"error": {"message": "died", "code": "engine_failed", "type": "server_error"}}), EngineFailed, "died"),
        (events({"error": {"message": "bad", "code": "x", "type": "invalid_request_error"}}), RequestError, "bad"),
    ],
)
async def test_ends_are_raised(script: Script, act: Act, error: type[Exception], says: str) -> None:
    script.acts = [act]
    with pytest.raises(error, match=says):
        await read(script)


async def test_patience_has_an_end(script: Script) -> None:
    script.acts = [status(503, **{"Retry-After": "0"})] * 1000
    with pytest.raises(Unavailable, match="nothing came from"):
        await read(script, patience=0.2)
