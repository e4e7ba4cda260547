"""A rolling update to other weights, with real processes, while a client streams: no answer is of two models."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from headrace.clients.http import HttpClient
from protocol.bus import GatewayBus
from tests.headrace.services import MODEL, ROOT, Services, until, until_ready
from tests.stack import free_port

TOKENS = 300
# the simulated engine's weights: which tokens it gives
WEIGHTS = {"old": (97, 100), "new": (110, 113), "newer": (120, 123)}


def start_worker(services: Services, version: str) -> None:
    options = {"token_range": WEIGHTS[version], "step_us": 30_000, "eos_token_ids": [256]}
    services.start("worker", ROOT, version, 0, "--engine-options", json.dumps(options))


def made_by(tokens: list[int]) -> str:
    (found,) = {name for name, (low, high) in WEIGHTS.items() for token in tokens if low <= token < high}
    return found


class Stream:
    """One streamed completion, token by token."""

    def __init__(self, client: HttpClient) -> None:
        self.tokens: list[int] = []
        self.end: Any = None
        self.begun = asyncio.Event()
        self.task = asyncio.ensure_future(self._read(client))

    async def _read(self, client: HttpClient) -> None:
        body = {"model": MODEL, "prompt": "x", "max_tokens": TOKENS, "ignore_eos": True, "return_token_ids": True}
        try:
            async for chunk in client.stream(body):
                for choice in chunk["choices"]:
                    self.tokens += choice.get("token_ids") or []
                    self.end = choice.get("finish_reason") or self.end
                if self.tokens:
                    self.begun.set()
        except Exception as error:
            self.end = error


@pytest.mark.nightly
async def test_no_answer_is_of_two_models(services: Services) -> None:
    port = free_port()
    services.start("gateway", ROOT, "one", port)
    services.start("scheduler", ROOT, "one", 0, "--weights-grace", "1")
    start_worker(services, "old")
    await until_ready(services, port)
    bus = GatewayBus(services.url, MODEL, patience=5.0)
    await bus.connect()

    async def serves(version: str) -> bool:
        return any(w.wid == f"worker-{version}" and w.state == "serving" for w in await bus.list_workers())

    async def shown() -> str:
        return (await bus.models(services.url))[MODEL].fingerprint

    async def agreed() -> bool:
        return bool(await shown())

    async def differ() -> bool:
        return not await shown()

    async with HttpClient(f"http://127.0.0.1:{port}", patience=5.0) as client:

        async def one_on_each() -> dict[str, Stream]:
            """A worker that runs nothing is preferred, so the second stream goes to the other one."""
            streams = []
            for _ in range(2):
                streams.append(Stream(client))
                await streams[-1].begun.wait()
            return {made_by(stream.tokens): stream for stream in streams}

        await until(services, "the fingerprint in the card", agreed)
        before = await shown()
        start_worker(services, "new")
        await until(services, "the new worker", lambda: serves("new"))
        streams = await one_on_each()
        await asyncio.to_thread(services.stop, "worker-old")  # drains: what it has begun it ends
        for version, stream in streams.items():
            await stream.task
            assert (stream.end, len(stream.tokens), made_by(stream.tokens)) == ("length", TOKENS, version)
        assert set(streams) == {"old", "new"}
        await until(services, "the fingerprint of the new one", agreed)
        assert await shown() != before

        start_worker(services, "newer")
        await until(services, "the newer worker", lambda: serves("newer"))
        await until(services, "that two models serve", differ)
        streams = await one_on_each()
        process = services.processes.pop("worker-new")
        process.kill()
        process.wait()
        for version, stream in streams.items():
            await stream.task
            assert made_by(stream.tokens) == version
        assert len(streams["new"].tokens) < TOKENS
        assert "no worker is left that has the weights" in str(streams["new"].end)
        assert (streams["newer"].end, len(streams["newer"].tokens)) == ("length", TOKENS)
    await bus.close()
