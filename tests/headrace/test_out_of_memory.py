"""A server without memory to spare takes no new work; what runs ends, whoever dies meanwhile."""

from __future__ import annotations

from collections.abc import Iterator

import aiohttp
import pytest
import redis

from headrace.serve.embedded import server_url
from protocol.keys import Keys
from tests.headrace.readers import Reader, attempt
from tests.stack import Stack
from tests.waits import eventually

TOKENS = 1500
LEADER = Keys("org/tiny").leader


@pytest.fixture
def server(stack: Stack) -> Iterator[redis.Redis]:
    client = redis.Redis.from_url(server_url(stack.run_dir / "data"))
    yield client
    client.config_set("maxmemory", 0)
    client.close()


async def replaced(stack: Stack, role: str) -> None:
    ((name, old),) = stack.pids(role).items()
    stack.kill(role)
    await eventually(lambda: stack.pids(role).get(name, old) != old, f"another {role}")


async def test_out_of_memory(stack: Stack, server: redis.Redis) -> None:
    async with aiohttp.ClientSession() as session:
        undisturbed = [await Reader(session, stack.url, 100, seed).whole() for seed in range(2)]
        running = [Reader(session, stack.url, TOKENS, seed) for seed in range(2)]
        cancelled = Reader(session, stack.url, 20_000, 9)
        for reader in (*running, cancelled):
            await reader.more()
        epoch = int(server.hget(LEADER, "epoch"))

        server.config_set("maxmemory", 1 << 20)  # less than it holds
        for streamed in (False, True):
            status, body = await attempt(session, stack.url, stream=streamed)
            assert (status, body["error"]["code"]) == (503, "unavailable"), body
        async with session.delete(f"{stack.url}/v1/requests/{cancelled.events[0]['id']}") as reply:
            assert reply.status in (200, 202, 204), await reply.text()
        await cancelled.task
        assert [c["finish_reason"] for c in cancelled.events[-2]["choices"]] == ["abort"], cancelled.events[-2:]

        await replaced(stack, "worker")
        for reader in running:
            await reader.more()
        await replaced(stack, "scheduler")
        for reader in running:
            await reader.more()
        assert int(server.hget(LEADER, "epoch")) == epoch + 1

        status, body = await attempt(session, stack.url)
        assert (status, body["error"]["code"]) == (503, "unavailable"), body
        texts = [await reader.whole() for reader in running]
        assert [text[: len(start)] for text, start in zip(texts, undisturbed, strict=True)] == undisturbed
        assert server.hlen(Keys("org/tiny").live) == 0

        server.config_set("maxmemory", 0)
        status, body = await attempt(session, stack.url)
        assert status == 200, body
