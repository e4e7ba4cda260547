"""What the bus makes of a server that dies, restarts, stalls, refuses, or was never there."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import redis

from headrace.serve.embedded import EmbeddedServer
from protocol import messages
from protocol.connection import Link
from protocol.errors import StartError, Unavailable
from protocol.messages import Job
from tests.bus import Bus
from tests.protocol.stage import MODEL, Stage, frame
from tests.protocol.test_scripts import row
from tests.waits import eventually


@pytest.fixture
def durable() -> Iterator[EmbeddedServer]:
    data_dir = Path(tempfile.mkdtemp(prefix="headrace-test-"))
    server = EmbeddedServer(data_dir)
    try:
        yield server.start()
    finally:
        server.stop()
        shutil.rmtree(data_dir, ignore_errors=True)


@pytest.fixture
async def stage(durable: EmbeddedServer) -> AsyncIterator[Stage]:
    bus = Bus(durable.url, MODEL, patience=60.0)
    await bus.connect()
    raw = redis.Redis.from_url(durable.url)
    stage = Stage(bus, raw)
    await stage.lead()
    await stage.register()
    yield stage
    raw.close()
    await bus.close()


def kill(server: EmbeddedServer) -> None:
    assert server.process is not None
    server.process.kill()
    server.process.wait()
    server.stop()


async def test_all_that_was_acknowledged_survives_a_kill_and_work_goes_on(
    stage: Stage, durable: EmbeddedServer
) -> None:
    rid, waiting = await stage.running(reply_to="gw"), await stage.accept()
    first, last = frame(1, "a"), frame(2, "b", "stop")
    assert await stage.commit(row(rid, 0, first)) == "l"
    subscription = stage.bus.subscribe("gw")
    await subscription.start()
    stream = aiter(subscription)
    told = asyncio.ensure_future(anext(stream))
    plans = asyncio.ensure_future(stage.bus.read_plans("w0", stage.key("x") and "9999999999999-0", 30_000))
    kill(durable)

    committed = asyncio.ensure_future(stage.commit(row(rid, len(first), last, finish="stop")))
    accepted = asyncio.ensure_future(stage.accept())
    durable.start()
    assert await asyncio.wait_for(committed, 60) == "l"
    assert await asyncio.wait_for(told, 60) == []  # resync, it says
    later = await asyncio.wait_for(accepted, 60)
    assert sorted(await stage.bus.scan_live()) == sorted([waiting, later])
    assert stage.journal(rid) == first + last
    assert [e.rid for e in await stage.bus.read_jobs(stage.consumer, 9, 0)] == [waiting, later]
    assert not plans.done()
    plans.cancel()
    await subscription.close()


async def test_a_server_that_forgot_the_scripts_is_sent_them(stage: Stage) -> None:
    stage.raw.script_flush()
    assert await stage.commit(row(await stage.running(), 0, frame(1, "a"))) == "l"


async def test_a_stalled_server_is_waited_for(stage: Stage, durable: EmbeddedServer) -> None:
    rid = await stage.running()
    pid = durable.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        committed = asyncio.ensure_future(stage.commit(row(rid, 0, frame(1, "a"))))
        await asyncio.wait([committed], timeout=0.2)
        assert not committed.done()
    finally:
        os.kill(pid, signal.SIGCONT)
    assert await asyncio.wait_for(committed, 60) == "l"


async def test_a_call_that_was_given_up_may_land_late_and_changes_nothing(
    stage: Stage, durable: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rid = await stage.running()
    monkeypatch.setattr("protocol.connection.REPLY_TIMEOUT_S", 0.1)
    for _ in range(3):  # connections that are made already, so that each repeat reaches the server's socket
        stage.bus._link._idle.append(await stage.bus._link.open_connection())
    monkeypatch.setattr(stage.bus._link, "drop_idle", lambda: asyncio.sleep(0))
    pid = durable.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        committed = asyncio.ensure_future(stage.commit(row(rid, 0, frame(1, "a"))))
        await eventually(lambda: stage.bus._link.losses >= 3)  # three repeats wait in the server's sockets
    finally:
        monkeypatch.setattr("protocol.connection.REPLY_TIMEOUT_S", 15.0)
        os.kill(pid, signal.SIGCONT)
    assert await asyncio.wait_for(committed, 60) == "l"
    assert await stage.commit(row(rid, len(frame(1, "a")), frame(2, "b", "stop"), finish="stop")) == "l"
    assert stage.journal(rid) == frame(1, "a") + frame(2, "b", "stop")
    assert stage.field(rid, "open") == "0"


async def test_patience_ends(durable: EmbeddedServer) -> None:
    bus = Bus(durable.url, MODEL, patience=0.3)
    await bus.connect()
    kill(durable)
    with pytest.raises(Unavailable):
        await bus.accept(Job(prompt="x"), rid=messages.new_rid())
    with pytest.raises(Unavailable):
        await bus.read_jobs("term", 1, 1000)
    await bus.close()
    with pytest.raises(Unavailable):
        await bus.server_ms()


async def test_a_subscription_outlasts_patience(durable: EmbeddedServer) -> None:
    bus = Bus(durable.url, MODEL, patience=0.1)
    subscription = bus.subscribe("gw")
    await subscription.start()
    told = asyncio.ensure_future(anext(aiter(subscription)))
    kill(durable)
    with pytest.raises(Unavailable):
        await bus.server_ms()
    assert not told.done()
    durable.start()
    assert await asyncio.wait_for(told, 60) == []
    await subscription.close()
    await bus.close()


async def test_a_publication_that_is_not_ours_asks_for_a_resync(stage: Stage) -> None:
    subscription = stage.bus.subscribe("gw")
    await subscription.start()
    for garbage in (b"\xc1garbage", b"\x95", b"\x01", b"\x92\x01\x02"):
        stage.raw.publish(stage.key("out:gw"), garbage)
        assert await asyncio.wait_for(anext(aiter(subscription)), 60) == []
    await subscription.close()


async def test_no_server_a_wrong_password_and_no_permission_are_start_errors(durable: EmbeddedServer) -> None:
    for url in ("unix:///nowhere/redis.sock", "redis://127.0.0.1:1"):
        bus = Bus(url, MODEL, patience=0.2)
        with pytest.raises(StartError):
            await bus.connect()
        await bus.close()
    client = redis.Redis.from_url(durable.url)
    client.execute_command("ACL", "SETUSER", "limited", "on", ">secret", "~*", "&*", "+@all", "-evalsha", "-eval")
    path = durable.url.removeprefix("unix://")
    bus = Bus(f"unix://limited:wrong@{path}", MODEL, patience=0.2)
    with pytest.raises(StartError) as caught:
        await bus.connect()
    assert "wrong" not in str(caught.value).replace("wrong username", "")
    await bus.close()
    client.close()


async def test_a_read_that_was_cancelled_loses_no_job(stage: Stage) -> None:
    """The entries that a cancelled read took along are read again."""
    for _ in range(20):
        reading = asyncio.ensure_future(stage.bus.read_jobs(stage.consumer, 9, 5000))
        await asyncio.sleep(0)
        rid = await stage.accept()
        reading.cancel()
        await asyncio.wait([reading])
        got = [] if reading.cancelled() else reading.result()
        entries = got or await stage.bus.read_jobs(stage.consumer, 9, 0)
        assert [e.rid for e in entries] == [rid]


async def test_idle_connections_are_used_again(stage: Stage) -> None:
    link = Link(stage.bus.url, 5.0)
    for _ in range(20):
        await link.command("PING")
    assert len(link._idle) == 1
    await asyncio.gather(*(link.command("PING") for _ in range(5)))
    assert len(link._idle) == 5
    blocked = asyncio.ensure_future(link.command("BLPOP", "nothing", 30, block_s=30))
    await asyncio.sleep(0)
    blocked.cancel()
    await asyncio.wait([blocked])
    assert len(link._idle) == 4  # the cancelled one's is gone, no other
    await link.close()
