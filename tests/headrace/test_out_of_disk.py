"""A server that cannot write to its disk ends, is restarted until it can, and has lost nothing that it acknowledged.

Two ways to make writes fail for real: a file size limit on the processes (EFBIG, anybody may set it), and a small
file system that is full (ENOSPC, which only root can make).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from headrace.clients.queue import AsyncClient
from headrace.serve.embedded import server_url
from protocol.errors import Unavailable
from tests.headrace.readers import Reader, attempt
from tests.stack import Stack
from tests.waits import eventually

UNLIMITED = resource.RLIM_INFINITY
LARGEST = 1 << 20  # bytes of a file, where the size is limited: the append-only file alone grows so large
ROOM = 1 << 18  # bytes that are left of a disk that is about to be full


class SizeLimit:
    """No file of the processes of the stack may grow beyond LARGEST."""

    def __init__(self, data_dir: Path) -> None:
        pass

    def _set(self, stack: Stack, soft: int) -> None:
        """Of the server that runs, and of the supervisor, whose limit the next one gets."""
        assert stack.process is not None
        for pid in (stack.process.pid, *stack.pids("redis").values()):
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, UNLIMITED))

    def begin(self, stack: Stack) -> None:
        self._set(stack, LARGEST)

    def end(self, stack: Stack) -> None:
        self._set(stack, UNLIMITED)

    def close(self) -> None:
        pass


class FullDisk:
    """The data directory is a file system of its own, and a large file fills it but for a little."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._filler = data_dir / "filler"
        self._libc = ctypes.CDLL(None, use_errno=True)
        data_dir.mkdir(parents=True)
        if self._libc.mount(b"tmpfs", os.fsencode(data_dir), b"tmpfs", 0, b"size=16m,mode=700"):
            pytest.skip(f"mounting a file system is not permitted here ({os.strerror(ctypes.get_errno())})")

    def begin(self, stack: Stack) -> None:
        free = os.statvfs(self._data_dir)
        with self._filler.open("wb") as filler:
            os.posix_fallocate(filler.fileno(), 0, max(1, free.f_bavail * free.f_frsize - ROOM))

    def end(self, stack: Stack) -> None:
        self._filler.unlink()

    def close(self) -> None:
        self._libc.umount2(os.fsencode(self._data_dir), 2)  # lazily


@pytest.fixture(
    params=[SizeLimit, pytest.param(FullDisk, marks=pytest.mark.nightly)], ids=["file size limit", "full disk"]
)
def starved(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Stack, SizeLimit | FullDisk, Path]]:
    place = tmp_path / "stack"
    means = request.param(place / "data")
    try:
        model = request.getfixturevalue("model_dir")
        args = ("--model", str(model), "--served-model-name", "org/tiny", "--engine", "simulated")
        with Stack(place, *args, "--max-model-len", "30000") as stack:
            yield stack, means, place
    finally:
        means.close()


async def test_out_of_disk(starved: tuple[Stack, SizeLimit | FullDisk, Path]) -> None:
    stack, disk, place = starved
    url = server_url(place / "data")
    async with aiohttp.ClientSession() as session, AsyncClient(url, "org/tiny") as client:
        undisturbed = await Reader(session, stack.url, 100, 5).whole()
        running = Reader(session, stack.url, 1500, 5)
        await running.more()
        (first,) = stack.pids("redis").values()

        disk.begin(stack)
        accepted = []
        for number in range(10_000):  # each takes some 4 KiB of the disk
            text = f"{number} " + "x" * 3000
            try:
                async with asyncio.timeout(2):  # a client would go on trying for longer
                    accepted.append(await client.submit(text, max_tokens=8, seed=number, ignore_eos=True))
            except (Unavailable, TimeoutError):
                break
            if stack.pids("redis").get("redis") != first:
                break
        assert len(accepted) < 10_000
        # it ended by itself, and was started again though there is no room yet
        log = place / "run" / "logs" / "redis.log"
        await eventually(lambda: log.read_text(errors="replace").count("Exiting") >= 6, "six deaths of the server")
        assert stack.process is not None
        assert stack.process.poll() is None, "serve has given up"

        async def refused() -> bool:
            status, body = await attempt(session, stack.url)
            return status == 503 and body["error"]["code"] == "unavailable"

        await eventually(refused, "a 503")

        disk.end(stack)
        await eventually(lambda: answered(session, stack.url), "an answer after all")
        text = await running.whole()
        assert text.startswith(undisturbed)
        for request in accepted:
            async with asyncio.timeout(60):
                (choice,) = (await client.result(request)).choices
            assert (choice.finish_reason, len(choice.token_ids)) == ("length", 8)
    told = stack.log.read_text()
    assert "redis | " in told
    assert "AOF write error" in told


async def answered(session: aiohttp.ClientSession, url: str) -> bool:
    with contextlib.suppress(aiohttp.ClientError):
        status, _ = await attempt(session, url)
        return status == 200
    return False
