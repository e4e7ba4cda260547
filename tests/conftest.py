"""What all tests share: one real server per session, and a bus to it with an empty database per test."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import redis

from headrace import default_model
from headrace.model import cache_dir
from headrace.serve.embedded import FAST, EmbeddedServer
from protocol.keys import HOME, REGISTRY
from tests.bus import Bus
from tests.long import pytest_collection_modifyitems
from tests.sharing import pytest_xdist_make_scheduler
from tests.skips import pytest_make_collect_report, pytest_runtest_makereport
from tests.stack import Stack

__all__ = [  # hooks
    "pytest_collection_modifyitems", "pytest_make_collect_report", "pytest_runtest_makereport",
    "pytest_xdist_make_scheduler",
]  # fmt: skip

MODEL = "test/model"
TRIES = 3  # a machine under load may be too slow for a registry's few seconds

# Where there is no GPU, Triton's kernels are tested in its interpreter. That is settled when triton is first imported,
# which any test that imports transformers does.
if not Path("/proc/driver/nvidia").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


# Test processes stand beside each other: torch's threads would wait for each other's cores, by spinning.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def server() -> Iterator[EmbeddedServer]:
    """A real server that forgets everything when it ends. Its unix socket's path must be short.

    HEADRACE_TEST_REDIS_SERVER names another server binary to run the tests against.
    """
    data_dir = Path(tempfile.mkdtemp(prefix="headrace-test-"))
    try:
        with EmbeddedServer(data_dir, settings=FAST, binary=os.environ.get("HEADRACE_TEST_REDIS_SERVER")) as running:
            yield running
    finally:
        shutil.rmtree(data_dir, ignore_errors=True)


@pytest.fixture(scope="session")
def redis_url(server: EmbeddedServer) -> str:
    return server.url


@pytest.fixture(scope="session")
def small_model() -> Path:
    """The directory of the real model that `headrace serve` takes by itself, from the cache that it keeps."""
    why = ""
    for _ in range(TRIES):
        try:
            return default_model.directory(cache_dir(None), lambda stage, fraction: None, print)
        except default_model.NotFetched as error:
            why = str(error)
    pytest.fail(f"the small model cannot be had: {why}")


@pytest.fixture(scope="session")
def small_stack(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Iterator[Stack]:
    """As a user starts it, but for the memory that it takes: no --model. ``small_model`` says if it cannot be had."""
    place = tmp_path_factory.mktemp("small")
    with Stack(place, "--max-model-len", "2048", "--kv-cache-memory", "256MiB", "--dtype", "float32") as running:
        yield running


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch's own arithmetic on one thread: sums in one order."""
    import torch  # takes seconds, and most tests need none

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def raw(redis_url: str) -> Iterator[redis.Redis]:
    """A plain synchronous client on an empty database: another implementation's view."""
    client = redis.Redis.from_url(redis_url)
    client.config_set("maxmemory", 0)
    client.flushall()
    yield client
    client.config_set("maxmemory", 0)
    client.close()


@pytest.fixture
async def bus(redis_url: str, raw: redis.Redis) -> AsyncIterator[Bus]:
    """A bus on an empty database."""
    bus = Bus(redis_url, MODEL, patience=5.0)
    await bus.connect()
    yield bus
    await bus.close()


# keys that may stay for ever: the rest must be gone or carry a TTL once every request has ended
PERMANENT = {"leader", "jobs", "events", "dead", "depth", "workers", "tokenizer", "tokenizer_info"}
PERMANENT_PREFIXES = ("w:", "plans:")  # and sets of running requests are empty, so gone; claims are swept


def leaked_keys(client: redis.Redis, model: str = MODEL) -> list[str]:
    """Keys without a TTL that should have one, with every request ended; and entries left in `live` or pending."""
    prefix = f"headrace:{{{model}}}:"
    leaks = []
    for raw_key in client.scan_iter():
        key = raw_key.decode()
        name = key.removeprefix(prefix)
        if key == REGISTRY or key.startswith(HOME) or name in PERMANENT or name.startswith(PERMANENT_PREFIXES):
            continue
        if client.ttl(key) == -1:
            leaks.append(key)
    return leaks
