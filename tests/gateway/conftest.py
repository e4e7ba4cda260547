"""A real gateway over HTTP, a scripted backend behind a real server, and the unmodified openai client in front."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import openai
import pytest

from gateway.app import Gateway, GatewayConfig
from tests.gateway.backend import MODEL, Backend

PATIENCE_S = 60.0  # for what must come; a loaded machine may be slow


CHAT = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "hi"}],
    "stream": True,
    "stream_options": {"include_usage": True},
}
COMPLETION = {"model": MODEL, "prompt": "hi", "stream": True}


def event_id(event: bytes) -> str | None:
    """The id of an event, if it has one."""
    first = event.split(b"\n")[0]
    return first.removeprefix(b"id: ").decode() if first.startswith(b"id: ") else None


def payload(event: bytes) -> Any:
    return json.loads(event.split(b"data: ", 1)[1])


def rid_of(events: list[bytes]) -> str:
    """The public id of the request that a stream belongs to."""
    return str(payload(events[0])["id"])


async def eventually(condition: Callable[[], Any], what: str = "the condition") -> Any:
    """Wait until ``condition()`` (may be async) is true, and return it."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            value = condition()
            if isinstance(value, Awaitable):
                value = await value
            if value:
                return value
            await asyncio.sleep(0.01)


class Front:
    """One gateway and its clients."""

    def __init__(self, gateway: Gateway, session: aiohttp.ClientSession) -> None:
        self.gateway = gateway
        self.session = session
        self.url = f"http://127.0.0.1:{gateway.port}"

    async def ask(self, method: str, path: str, **kwargs: Any) -> tuple[int, Any, Any]:
        """(status, body decoded, headers)."""
        async with self.session.request(method, self.url + path, **kwargs) as reply:
            body = await reply.json() if reply.content_type == "application/json" else await reply.read()
            return reply.status, body, reply.headers

    async def post(self, path: str, body: Any, **kwargs: Any) -> tuple[int, Any, Any]:
        return await self.ask("POST", path, json=body, **kwargs)

    async def events(self, method: str, path: str, **kwargs: Any) -> list[bytes]:
        """A whole stream, split into its events."""
        async with self.session.request(method, self.url + path, **kwargs) as reply:
            assert reply.status == 200, await reply.text()
            assert reply.content_type == "text/event-stream"
            return split_events(await reply.read())


def split_events(raw: bytes) -> list[bytes]:
    assert raw.endswith(b"\n\n") or not raw
    return [event + b"\n\n" for event in raw.split(b"\n\n")[:-1]]


@pytest.fixture
async def backend(redis_url: str, raw: Any) -> AsyncIterator[Backend]:
    async with Backend(redis_url) as running:
        yield running


@pytest.fixture
async def open_gateway(redis_url: str, backend: Backend) -> AsyncIterator[Callable[..., Awaitable[Front]]]:
    """A factory of gateways; all are closed at the end."""
    closing: list[Any] = []

    async def make(**settings: Any) -> Front:
        gateway = Gateway(GatewayConfig(**{"redis_url": redis_url, "port": 0, "drain_timeout": 5.0, **settings}))
        await gateway.__aenter__()
        session = aiohttp.ClientSession()
        closing.append((gateway, session))
        return Front(gateway, session)

    yield make
    for gateway, session in closing:
        await session.close()
        # no zombies: with its clients gone a gateway follows nothing
        await eventually(lambda g=gateway: not g.models.open_streams() and not g.answers.open)
        await gateway.__aexit__()


@pytest.fixture
async def front(open_gateway: Callable[..., Awaitable[Front]]) -> Front:
    return await open_gateway()


@pytest.fixture
async def client(front: Front) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=front.url + "/v1", api_key="none", max_retries=0) as made:
        yield made
