"""The gateway as a process of its own: what it loads, how it starts, and how it leaves."""

from __future__ import annotations

import asyncio
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp

from tests.gateway.backend import MODEL, Backend
from tests.waits import eventually

PROGRAM = """
import asyncio, logging, sys
logging.basicConfig(level="INFO", stream=sys.stdout, format="%(message)s")
import uvloop
from gateway.app import GatewayConfig, run_gateway
config = GatewayConfig(redis_url=sys.argv[1], port=0, drain_timeout=float(sys.argv[2]), ready_delay=0.05)
code = uvloop.run(run_gateway(config))
assert not {"torch", "transformers"} & set(sys.modules), "a gateway loads no model library"
raise SystemExit(code)
"""


@asynccontextmanager
async def gateway_process(
    redis_url: str, drain_timeout: float
) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROGRAM, redis_url, str(drain_timeout), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        line = (await asyncio.wait_for(process.stdout.readline(), 60)).decode()
        found = re.search(r"http://\S+", line)
        assert found, line
        yield process, found.group()
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_a_stream_ends_before_the_process_leaves(backend: Backend, redis_url: str) -> None:
    backend.hold = True
    async with gateway_process(redis_url, 60) as (process, url), aiohttp.ClientSession() as session:
        body = {"model": MODEL, "prompt": "x", "stream": True}
        async with session.post(url + "/v1/completions", json=body) as reply:
            assert reply.status == 200
            process.send_signal(signal.SIGTERM)

            async def refused() -> bool:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
                except OSError:
                    return True
                writer.close()
                return False

            await eventually(refused)
            backend.hold = False
            assert (await reply.read()).endswith(b"data: [DONE]\n\n")
        assert await asyncio.wait_for(process.wait(), 60) == 0


async def test_a_second_signal_ends_at_once(backend: Backend, redis_url: str) -> None:
    backend.hold = True
    async with gateway_process(redis_url, 3600) as (process, url), aiohttp.ClientSession() as session:
        reply = await session.post(url + "/v1/completions", json={"model": MODEL, "prompt": "x", "stream": True})
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        while b"draining" not in await asyncio.wait_for(process.stdout.readline(), 60):
            pass
        process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(process.wait(), 60) == 1
        reply.close()
    assert backend.cancelled == []  # the request can be picked up elsewhere
