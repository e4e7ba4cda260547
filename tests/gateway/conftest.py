"""A real gateway over HTTP, a scripted backend behind a real server, and the unmodified openai client in front."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import openai
import pytest

from gateway.app import Gateway, GatewayConfig
from tests.gateway.backend import Backend
from tests.gateway.front import Front, followers
from tests.waits import eventually


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
        await eventually(lambda g=gateway: not followers(g) and not g.answers.open)
        await gateway.__aexit__()


@pytest.fixture
async def front(open_gateway: Callable[..., Awaitable[Front]]) -> Front:
    return await open_gateway()


@pytest.fixture
async def client(front: Front) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=front.url + "/v1", api_key="none", max_retries=0) as made:
        yield made
