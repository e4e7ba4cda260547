"""A server that could lose what it acknowledged is named at every start, and refused where that is asked for."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import redis

from headrace.serve.durability import with_check
from headrace.serve.embedded import EmbeddedServer
from protocol.durability import HIDDEN
from protocol.errors import StartError, Unavailable
from tests.bus import Bus
from tests.stack import START_S, free_port
from tests.waits import eventually

WEAKER = {
    "appendonly": ("no", "yes"),
    "appendfsync": ("everysec", "always"),
    "no-appendfsync-on-rewrite": ("yes", "no"),
    "maxmemory-policy": ("allkeys-lru", "noeviction"),
}


@pytest.fixture
def foreign(tmp_path: Path) -> Iterator[EmbeddedServer]:
    """A server that somebody else configured."""
    with EmbeddedServer(tmp_path / "weak", settings={name: value for name, (value, _) in WEAKER.items()}) as running:
        yield running


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Bus]:
    bus = Bus(url, "m", patience=10.0)
    await bus.connect()
    yield bus
    await bus.close()


async def test_our_own_server_has_every_setting(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path / "own") as own:
        assert await Bus.durability(own.url) == []


async def test_each_weaker_setting_is_named(foreign: EmbeddedServer) -> None:
    found = await Bus.durability(foreign.url)
    assert [line.split(":")[0] for line in found] == [
        f"{name} is {value}, not {wanted}" for name, (value, wanted) in WEAKER.items()
    ]
    with redis.Redis.from_url(foreign.url) as client:
        client.config_set("appendfsync", "always")
    assert not any("appendfsync is" in line for line in await Bus.durability(foreign.url))


async def test_a_server_that_hides_its_settings_is_said_to(foreign: EmbeddedServer) -> None:
    with redis.Redis.from_url(foreign.url) as client:
        client.acl_setuser("guest", enabled=True, passwords=["+secret"], categories=["+@all"], commands=["-config"])
    (line,) = await Bus.durability(foreign.url.replace("unix://", "unix://guest:secret@"))
    assert HIDDEN in line
    assert all(name in line for name in WEAKER)


async def test_a_write_that_was_torn_by_a_power_cut_is_the_only_one_missing(tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path / "torn").start()
    async with opened(server.url) as bus:
        pushed = [await bus.push(b'{"v": 1, "prompt": "%d"}' % number) for number in range(10)]
        assert server.process is not None
        server.process.kill()
        server.stop()
        (log,) = (tmp_path / "torn" / "appendonlydir").glob("*.incr.aof")
        with log.open("ab") as file:
            file.truncate(log.stat().st_size - 7)
        server.start()
        assert await bus.inbox_length() == len(pushed) - 1
        await bus.push(b'{"v": 1, "prompt": "again"}')
        server.stop()
        server.start()
        assert await bus.inbox_length() == len(pushed)
    server.stop()


# ------------------------------------------------------------------ starts


async def test_a_service_starts_while_its_server_is_away_and_warns_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    started, stop = asyncio.Event(), asyncio.Event()

    async def service() -> int:
        started.set()
        await stop.wait()
        return 3

    port = free_port()
    running = asyncio.create_task(with_check(f"redis://127.0.0.1:{port}/0", False, service()))
    await started.wait()
    with caplog.at_level(logging.WARNING), EmbeddedServer(tmp_path / "late", port=port, settings={"appendonly": "no"}):
        async with asyncio.timeout(60):
            while "appendonly is no" not in caplog.text:  # noqa: ASYNC110 (a log)
                await asyncio.sleep(0.02)
    stop.set()
    assert await running == 3


async def test_a_strict_service_is_not_begun(foreign: EmbeddedServer) -> None:
    async def service() -> int:
        raise AssertionError("it was begun")

    with pytest.raises(StartError, match="appendfsync is everysec, not always"):
        await with_check(foreign.url, True, service())


async def test_a_server_that_does_not_know_us_is_said_to(
    foreign: EmbeddedServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A gateway, which starts without its server too, would else be silent about why it answers 503."""
    url = foreign.url.replace("unix://", "unix://nobody:a-wrong-word@")
    refused = asyncio.Event()

    async def service() -> int:
        async with asyncio.timeout(60):
            while "refused us" not in caplog.text:  # noqa: ASYNC110 (a log)
                await asyncio.sleep(0.02)
        refused.set()
        return 0

    assert await with_check(url, False, service()) == 0
    assert refused.is_set()
    assert "a-wrong-word" not in caplog.text
    with pytest.raises(StartError, match="refused us"):
        await with_check(url, True, service())


async def test_a_server_that_is_not_there_yet_is_told_and_waited_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever part was started first: it used to say nothing at all until the server came."""
    monkeypatch.setattr("headrace.serve.durability.PATIENCE_S", 0.1)
    port, checked = free_port(), asyncio.Event()

    async def service() -> int:
        await checked.wait()
        return 0

    with caplog.at_level(logging.INFO, logger="headrace"):
        running = asyncio.create_task(with_check(f"redis://127.0.0.1:{port}/0", False, service()))
        await eventually(lambda: "Redis does not answer" in caplog.text)
        assert f"127.0.0.1:{port}" in caplog.text
        with EmbeddedServer(tmp_path / "late", port=port):
            await eventually(lambda: "Redis answers now" in caplog.text)
        checked.set()
        assert await running == 0


async def test_a_check_has_an_end(tmp_path: Path) -> None:
    with pytest.raises(Unavailable):
        await Bus.durability(f"redis://127.0.0.1:{free_port()}/0", patience=0.1)


def test_every_command_refuses_when_it_is_to_be_strict(foreign: EmbeddedServer, tmp_path: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HEADRACE_REDIS_URL": foreign.url}
    wanted = ["--strict-durability", "--log-level", "warning"]
    model = ["--model", str(Path(__file__).parents[3] / "examples" / "demo-model"), "--engine", "simulated"]
    commands = {
        "serve": [*wanted, *model, "--port", "0", "--run-dir", str(tmp_path / "run")],
        "gateway": [*wanted, "--port", "0"],
        "scheduler": [*wanted, *model[:2]],
        "worker": [*wanted, *model],
    }
    started = {
        name: subprocess.Popen([sys.executable, "-m", "headrace", name, *args], stderr=subprocess.PIPE, env=env)
        for name, args in commands.items()
    }
    for name, process in started.items():
        _, told = process.communicate(timeout=START_S)
        assert process.returncode == 78, told.decode()
        assert f"headrace {name}: --strict-durability" in told.decode()
        assert all(f"{setting} is {value}" in told.decode() for setting, (value, _) in WEAKER.items())
