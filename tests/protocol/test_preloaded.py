"""Bounded workers of a preloaded process: real processes, real limits, real deaths."""

from __future__ import annotations

import asyncio
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.errors import EngineFailed, StartError
from protocol.preloaded import Preloaded, Worker, WorkerDied

MODULE = "tests.protocol.preloaded_module"
LONG_S = 60.0


@pytest.fixture(scope="module")
def home() -> Iterator[Preloaded]:
    home = Preloaded(MODULE)
    home.start()
    home.load("ballast")
    yield home
    home.close()


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):  # it went while its file was read
        return True


def until_gone(*pids: int) -> None:
    deadline = time.monotonic() + LONG_S
    while not all(map(gone, pids)):
        assert time.monotonic() < deadline, pids
        time.sleep(0.01)


async def echo(worker: Worker, *values: object) -> list[object]:
    return await worker.ask(("echo", *values), LONG_S, LONG_S)


async def test_workers_answer_in_order_and_are_children_of_what_was_loaded(home: Preloaded) -> None:
    worker = await home.fork(64)
    large = b"x" * (4 << 20)
    for k in range(3):
        _, pid, parent, number, body = await echo(worker, k, large)
        assert (parent, number, body) == (home.told[0], k, large)  # type: ignore[index]
    assert pid != parent
    worker.close()
    until_gone(pid)  # type: ignore[arg-type]


async def test_what_loops_is_ended_by_the_kernel_and_nothing_else_is(home: Preloaded) -> None:
    looping, other = await home.fork(64), await home.fork(64)
    spin = asyncio.ensure_future(looping.ask(("spin",), 0.2, LONG_S))
    assert (await echo(other, 1))[3] == 1
    with pytest.raises(WorkerDied) as died:
        await spin
    assert died.value.out_of_time
    assert looping.closed
    assert (await echo(other, 2))[3] == 2
    other.close()


async def test_what_takes_no_time_of_the_processor_is_ended_by_the_clock(home: Preloaded) -> None:
    worker = await home.fork(64)
    _, pid, *_ = await echo(worker)
    with pytest.raises(WorkerDied) as died:
        await worker.ask(("sleep",), LONG_S, 0.1)
    assert died.value.out_of_time
    until_gone(pid)  # type: ignore[arg-type]


async def test_memory_is_bounded_beyond_what_was_loaded(home: Preloaded) -> None:
    worker = await home.fork(64)
    assert await worker.ask(("allocate", 16), LONG_S, LONG_S) == ["held", 16]
    assert await worker.ask(("allocate", 128), LONG_S, LONG_S) == ["no memory"]
    worker.close()


async def test_a_nice_worker_gives_way_to_every_session(home: Preloaded) -> None:
    worker = await home.fork(64, nice=15)
    _, pid, *_ = await echo(worker)
    assert os.getpriority(os.PRIO_PROCESS, pid) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + 15)  # type: ignore[arg-type]
    assert os.getsid(pid) == pid  # type: ignore[arg-type]
    assert autogroup_nice(pid) in ("15", None)  # type: ignore[arg-type]
    worker.close()


def autogroup_nice(pid: int) -> str | None:
    """None where there are no such groups."""
    group = Path(f"/proc/{pid}/autogroup")
    return group.read_text().split()[-1] if group.exists() else None


async def test_a_killed_worker_is_told_from_one_that_ran_out_of_time(home: Preloaded) -> None:
    worker = await home.fork(64)
    _, pid, *_ = await echo(worker)
    asked = asyncio.ensure_future(worker.ask(("sleep",), LONG_S, LONG_S))
    await asyncio.sleep(0)
    os.kill(pid, signal.SIGKILL)  # type: ignore[arg-type]
    with pytest.raises(WorkerDied, match="SIGKILL") as died:
        await asked
    assert not died.value.out_of_time


async def test_a_worker_that_dies_idle_is_known_to_be_closed(home: Preloaded) -> None:
    worker = await home.fork(64)
    _, pid, *_ = await echo(worker)
    os.kill(pid, signal.SIGKILL)  # type: ignore[arg-type]
    async with asyncio.timeout(LONG_S):
        while not worker.closed:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    worker.close()


async def test_a_last_answer_ends_the_worker(home: Preloaded) -> None:
    worker = await home.fork(64)
    _, pid, *_ = await echo(worker)
    assert await worker.ask(("last",), LONG_S, LONG_S) == ["goodbye"]
    assert worker.closed
    until_gone(pid)  # type: ignore[arg-type]


async def test_a_question_that_is_cancelled_as_its_answer_comes_is_cancelled(home: Preloaded) -> None:
    """A scheduler that stops leaves what it was preparing to the next one: nobody is told that a process died."""
    worker = await home.fork(64)
    asked = asyncio.ensure_future(echo(worker, 1))
    await asyncio.sleep(0)
    worker._incoming.add_done_callback(lambda _: asked.cancel())
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert worker.closed


async def test_a_worker_that_is_closed_by_another_task_has_died_for_who_asks(home: Preloaded) -> None:
    worker = await home.fork(64)
    asked = asyncio.ensure_future(worker.ask(("sleep",), LONG_S, LONG_S))
    await asyncio.sleep(0)
    worker.close()
    with pytest.raises(WorkerDied):
        await asked


async def test_a_cancelled_question_ends_its_worker(home: Preloaded) -> None:
    worker = await home.fork(64)
    _, pid, *_ = await echo(worker)
    asked = asyncio.ensure_future(worker.ask(("spin",), LONG_S, LONG_S))
    await asyncio.sleep(0.05)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    until_gone(pid)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wanted", "error", "text"),
    [
        ("refuse", StartError, "nothing here to load"),
        ("break", EngineFailed, "ZeroDivisionError: in the middle"),
        ("vanish", EngineFailed, "ended while it loaded"),
    ],
)
def test_a_failed_load_is_raised_here(wanted: str, error: type[Exception], text: str) -> None:
    home = Preloaded(MODULE)
    home.start()
    with pytest.raises(error, match=text):
        home.load(wanted)
    home.close()


async def test_without_the_preloaded_process_its_workers_end_and_none_is_forked() -> None:
    home = Preloaded(MODULE)
    home.start()
    pid, _ = home.load("ballast")
    worker = await home.fork(64)
    _, child, *_ = await echo(worker)
    asked = asyncio.ensure_future(worker.ask(("spin",), LONG_S, LONG_S))
    await asyncio.sleep(0)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(WorkerDied):
        await asked
    until_gone(child)  # type: ignore[arg-type]
    assert not home.alive
    with pytest.raises(EngineFailed):
        await home.fork(64)
    home.close()


PARENT = f"""
import asyncio, sys
from protocol.preloaded import Preloaded

async def main():
    home = Preloaded({MODULE!r})
    home.start()
    pid, _ = home.load("ballast")
    worker = await home.fork(64)
    _, child, *_ = await worker.ask(("echo",), 60.0, 60.0)
    print(pid, child, flush=True)
    await worker.ask(("spin",), 60.0, 60.0)

asyncio.run(main())
"""


def test_nothing_outlives_a_parent_that_is_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    parent.kill()
    parent.wait()
    parent.stdout.close()
    until_gone(*pids)


BODIES = """
import re, sys
from pathlib import Path
from protocol.preloaded import give_back_large_blocks
if sys.argv[1] == "set":
    give_back_large_blocks()
held = lambda: int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10
before, lasting = held(), []
for size in (1_000_000, 900_000):  # blocks as large as the largest one before are mapped apart once more
    bodies = []
    for _ in range(100):
        bodies.append(bytearray(b"x") * size)
        lasting.append(bytearray(b"x") * 60_000)
    del bodies
print(held() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is about glibc's allocator")
def test_what_large_bodies_took_is_given_back() -> None:
    def kept(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", BODIES, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert kept("set") < 30
    assert kept("as it is") > 60, "else there is nothing to be set"
