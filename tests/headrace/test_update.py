"""An update of a running service from an earlier version's real code: clients stream through it, whichever role goes
first, and what the old version left on disk is served on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from headrace.clients.http import HttpClient
from headrace.tools.shards import change
from protocol.bus import GatewayBus
from protocol.messages import decode_frames, shard_of
from protocol.routing.shards import ShardStore
from tests.headrace.services import MODEL, ROOT, Services, ready, until, until_ready
from tests.stack import START_S, free_port

BEFORE = "2aa90d4"  # the version before levels of jobs were told
pytestmark = pytest.mark.timeout(900)  # six processes start one after the other
TOKENS = 120


@pytest.fixture(scope="module")
def old_code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old") / "code"
    folder.mkdir()
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", BEFORE], capture_output=True, check=True)
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder


async def stream_all_the_time(
    client: HttpClient, seed: int, done: asyncio.Event, prompt: str = "x", shards: set[int] | None = None
) -> int:
    """One request after the other, the same tokens each time; returns how many. ``shards`` learns where they ran."""
    first: list[int] = []
    streams = 0
    while not done.is_set():
        body = {"model": MODEL, "prompt": prompt, "max_tokens": TOKENS, "seed": seed, "ignore_eos": True,
                "return_token_ids": True}  # fmt: skip
        chunks = [chunk async for chunk in client.stream(body)]
        tokens = [t for c in chunks for k in c["choices"] for t in k.get("token_ids") or []]
        if shards is not None:
            shards.add(shard_of(chunks[0]["id"].removeprefix("cmpl-")))
        first = first or tokens
        assert len(tokens) == TOKENS
        assert tokens == first
        streams += 1
    return streams


def structured(port: int) -> int:
    """The status of a request that the old version cannot read."""
    body = {"model": MODEL, "prompt": "x", "max_tokens": 8, "structured_outputs": {"choice": ["a", "b"]}}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        return int(urllib.request.urlopen(request, timeout=60).status)
    except urllib.error.HTTPError as error:
        return error.code


UP = pytest.param(("worker", "scheduler", "gateway"), marks=pytest.mark.nightly, id="up")


@pytest.mark.parametrize("order", [pytest.param(("gateway", "scheduler", "worker"), id="down"), UP])
async def test_clients_stream_through_an_update(order: tuple[str, ...], services: Services, old_code: Path) -> None:
    first = free_port()
    ports = {"old": first, "new": first + 1}
    for role in ("gateway", "scheduler", "worker"):
        services.start(role, old_code, "old", ports["old"])
    await until_ready(services, ports["old"])
    bus = GatewayBus(services.url, MODEL, patience=5.0)
    await bus.connect()

    async def replaced(role: str) -> bool:
        if role == "gateway":
            return await asyncio.to_thread(ready, ports["new"])
        if role == "worker":
            return any(w.wid == "worker-new" and w.state == "serving" for w in await bus.list_workers())
        return True

    async def led_by_the_new_one() -> bool:
        return "scheduler-new" in (await bus.read_leader()).owner

    done = asyncio.Event()
    urls = [f"http://127.0.0.1:{port}" for port in ports.values()]
    async with HttpClient(urls, patience=START_S) as client, asyncio.TaskGroup() as group:
        users = [group.create_task(stream_all_the_time(client, k, done)) for k in range(2)]
        for role in order:
            services.start(role, ROOT, "new", ports["new"])
            await until(services, f"a new {role}", lambda role=role: replaced(role))
            if role == "gateway" and order[0] == "gateway":
                refused = await asyncio.to_thread(structured, ports["new"])
                assert refused == 503, "the old scheduler could not read it, so it is not accepted"
            await asyncio.to_thread(services.stop, f"{role}-old")
            if role == "scheduler":
                await until(services, "the new scheduler's lead", led_by_the_new_one)
        done.set()
    assert all(user.result() > 0 for user in users)
    await bus.close()


@pytest.mark.nightly
async def test_an_update_brings_shards_and_ranks(services: Services, old_code: Path) -> None:
    """From a version that knows neither, as docs/scaling.md says: gateways first. Then back to one shard."""
    first = free_port()
    ports = {"old": first, "new": first + 1}
    for role in ("gateway", "scheduler", "worker"):
        services.start(role, old_code, "old", ports["old"])
    await until_ready(services, ports["old"])
    store = ShardStore(services.url)
    done, ran = asyncio.Event(), set[int]()

    async def serves(worker: str, shard: int) -> bool:
        known = {one.number: one.tag for one in await store.read(MODEL)}
        if shard not in known:
            return False
        bus = GatewayBus(services.url, known[shard], patience=5.0)
        try:
            return any(w.wid == worker and w.state == "serving" for w in await bus.list_workers())
        finally:
            await bus.close()

    async def ran_in(shard: int) -> bool:
        return shard in ran

    urls = [f"http://127.0.0.1:{port}" for port in ports.values()]
    async with HttpClient(urls, patience=START_S) as client, asyncio.TaskGroup() as group:
        users = [group.create_task(stream_all_the_time(client, k, done, f"prompt {k}", ran)) for k in range(6)]
        services.start("gateway", ROOT, "new", ports["new"])
        await until_ready(services, ports["new"])
        await asyncio.to_thread(services.stop, "gateway-old")
        services.start("scheduler", ROOT, "new", 0, "--shards", "2")
        await asyncio.to_thread(services.stop, "scheduler-old")
        services.start("worker", ROOT, "new", 0, "--tensor-parallel-size", "2")
        await until(services, "a worker of two ranks", lambda: serves("worker-new", 0))
        await asyncio.to_thread(services.stop, "worker-old")
        services.start("worker", ROOT, "second", 0, "--pipeline-parallel-size", "2", "--shard", "1")
        await until(services, "a worker of two stages", lambda: serves("worker-second", 1))
        await until(services, "requests in the second shard", lambda: ran_in(1))
        await change({"redis_url": services.url, "model": MODEL, "id": ["1"], "json": False, "action": "drain"})
        (second,) = [one for one in await store.read(MODEL) if one.number]
        bus = GatewayBus(services.url, second.tag, patience=5.0)

        async def drained() -> bool:
            return not await bus._link.command("HLEN", bus.keys.live)

        await until(services, "nothing in the second shard", drained)
        await bus.close()
        await asyncio.to_thread(services.stop, "worker-second")
        done.set()
    assert all(user.result() > 0 for user in users)
    assert ran == {0, 1}
    await store.close()


async def test_what_the_old_version_accepted_is_served_by_the_new_one(services: Services, old_code: Path) -> None:
    port = free_port()
    for role in ("gateway", "scheduler", "worker"):
        services.start(role, old_code, "old", port)
    await until_ready(services, port)
    for role in ("worker", "scheduler"):
        await asyncio.to_thread(services.stop, f"{role}-old")
    body = {"model": MODEL, "prompt": "x", "max_tokens": 20, "seed": 1, "ignore_eos": True, "stream": True}
    headers = {"Content-Type": "application/json", "X-Headrace-Detached": "true"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), headers)
    with contextlib.suppress(TimeoutError, OSError):  # nobody admits it now: it waits in the stream of jobs
        await asyncio.to_thread(urllib.request.urlopen, request, None, 2.0)
    await asyncio.to_thread(services.stop, "gateway-old")
    bus = GatewayBus(services.url, MODEL, patience=5.0)
    await bus.connect()
    live = await bus._link.command("HKEYS", bus.keys.live)
    assert len(live) == 1
    for role in ("scheduler", "worker"):
        services.start(role, ROOT, "new")

    async def ended() -> bool:
        record = await bus.read_request(live[0].decode())
        return record is not None and not record.open

    await until(services, "the end of the old request", ended)
    frames = decode_frames(await bus.read_journal(live[0].decode(), 0))
    assert sum(frame.token is not None for frame in frames) == 20
    assert frames[-1].finish == "length"
    await bus.close()
