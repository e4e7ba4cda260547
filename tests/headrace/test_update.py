"""An update of a running service from an earlier version's real code: clients stream through it, whichever role goes
first, and what the old version left on disk is served on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.clients.http import HttpClient
from headrace.serve.embedded import FAST, EmbeddedServer
from protocol.bus import GatewayBus
from protocol.messages import decode_frames
from tests.stack import START_S, free_port

ROOT = Path(__file__).parents[2]
BEFORE = "2aa90d4"  # the version before levels of jobs were told
pytestmark = pytest.mark.timeout(900)  # six processes start one after the other
MODEL, TOKENS = "tiny", 120


@pytest.fixture(scope="module")
def old_code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old") / "code"
    folder.mkdir()
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", BEFORE], capture_output=True, check=True)
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder


class Services:
    """Processes of either version on one server."""

    def __init__(self, folder: Path, url: str, model_dir: Path) -> None:
        self.folder, self.url, self.model_dir = folder, url, model_dir
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, role: str, code: Path, version: str, port: int = 0, *more: str) -> None:
        own = {
            "gateway": ["--port", str(port)],
            "scheduler": ["--model", str(self.model_dir), "--served-model-name", MODEL],
            "worker": ["--model", str(self.model_dir), "--served-model-name", MODEL, "--engine", "simulated",
                       "--drain-timeout", "20"],
        }[role]  # fmt: skip
        name = f"{role}-{version}"
        command = [sys.executable, "-m", "headrace", role, "--redis-url", self.url, "--name", name, *own, *more]
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                command, cwd=code, env={**os.environ, "PYTHONPATH": str(code)}, stdout=log, stderr=log
            )

    def stop(self, name: str) -> None:
        process = self.processes.pop(name)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, (self.folder / f"{name}.log").read_text()

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()

    def logs(self) -> str:
        return "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in sorted(self.folder.glob("*.log")))


@pytest.fixture
def services(tmp_path: Path, model_dir: Path) -> Iterator[Services]:
    with EmbeddedServer(tmp_path / "data", settings=FAST) as server:
        made = Services(tmp_path, server.url, model_dir)
        try:
            yield made
        finally:
            made.close()


def ready(port: int) -> bool:
    with contextlib.suppress(urllib.error.URLError, OSError):
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5).status == 200
    return False


async def until_ready(services: Services, port: int) -> None:
    deadline = time.monotonic() + START_S
    while not await asyncio.to_thread(ready, port):
        assert time.monotonic() < deadline, services.logs()
        await asyncio.sleep(0.2)


async def until(services: Services, what: str, condition) -> None:
    deadline = time.monotonic() + START_S
    while not await condition():
        assert time.monotonic() < deadline, f"{what}\n{services.logs()}"
        await asyncio.sleep(0.2)


async def stream_all_the_time(client: HttpClient, seed: int, done: asyncio.Event) -> int:
    """One request after the other, the same tokens each time; returns how many."""
    first: list[int] = []
    streams = 0
    while not done.is_set():
        body = {"model": MODEL, "prompt": "x", "max_tokens": TOKENS, "seed": seed, "ignore_eos": True,
                "return_token_ids": True}  # fmt: skip
        tokens = [t async for c in client.stream(body) for k in c["choices"] for t in k.get("token_ids") or []]
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


@pytest.mark.parametrize(
    "order", [("gateway", "scheduler", "worker"), ("worker", "scheduler", "gateway")], ids=["down", "up"]
)
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
