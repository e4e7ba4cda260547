"""Headrace on a real Ray cluster of three nodes, under load: workers by demand, a node lost, a node taken away. Judged
like the chaos runs: nothing is lost, nothing comes twice."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from headrace.serve.embedded import server_command
from tests.bus import Bus
from tests.chaos.history import History
from tests.chaos.load import Load
from tests.chaos.shards import Shards
from tests.models import save_tiny_model
from tests.ray.cluster import RayCluster, parent_of
from tests.stack import free_port

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]

MODEL, PAIR = "chaos", "org/pair"
PATIENCE_S = 180.0


class Place:
    """Ray, a server and headrace.toml."""

    def __init__(self, folder: Path, ray: RayCluster) -> None:
        self.folder, self.ray = folder, ray
        self.redis_port, self.port = free_port(), free_port()
        self.redis_url = f"redis://127.0.0.1:{self.redis_port}/0"
        self.urls = [f"http://127.0.0.1:{self.port + k}" for k in range(2)]
        (folder / "redis").mkdir()
        with (folder / "redis.log").open("ab") as log:
            command = server_command(folder / "redis", port=self.redis_port)
            self.server = subprocess.Popen(command, stdout=log, stderr=log)
        save_tiny_model("llama", folder / "model")
        self.config = folder / "headrace.toml"
        self.config.write_text(f"""
redis-url = "{self.redis_url}"
drain-timeout = "20s"
[gateway]
port = {self.port}
gateways = 2
[defaults]
model = "{folder / "model"}"
engine = "simulated"
engine-options = {{random = true, step_us = 25000}}
retention = "30m"
tool-format = "hermes"
max-model-len = 4096
schedulers = 2
[models."{MODEL}"]
[models."{MODEL}".ray]
min-workers = 1
max-workers = 3
requests-per-worker = 4
scale-down-after = 8
step-down-every = 3
cpus = 0.5
[models."{PAIR}"]
schedulers = 1
tensor-parallel-size = 2
[models."{PAIR}".ray]
min-workers = 0
scale-to-zero-after = 5
cpus = 0.5
""")

    async def serving(self, model: str) -> int:
        """Workers whose heartbeat moves."""
        bus = Bus(self.redis_url, model)
        try:
            before = {w.wid: (w.gen, w.beat) for w in await bus.list_workers()}
            await asyncio.sleep(2.5)
            now = await bus.list_workers()
            return sum(w.state == "serving" and before.get(w.wid) != (w.gen, w.beat) for w in now)
        finally:
            await bus.close()

    async def until(self, what: str, holds: Callable[[int], bool], model: str = MODEL) -> None:
        """Until so many workers serve."""
        deadline = asyncio.get_running_loop().time() + PATIENCE_S
        while not holds(count := await self.serving(model)):
            if asyncio.get_running_loop().time() > deadline:
                pytest.fail(f"{what}: {count} workers serve\n{self.ray.headrace('status')}\n{self.ray.logs()}")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("ray")
    with RayCluster(folder) as ray:
        place = Place(folder, ray)
        try:
            for name in ("second", "third"):  # Ray gives a node 30 s, which it does not keep once all else runs here
                ray.add(name, cpus=4)
            told = ray.headrace("up", "--config", str(place.config))
            assert re.search(rf"^gateway-1: http://[\d.]+:{place.port + 1}$", told, re.MULTILINE), told
            yield place
            ray.headrace("down")
            assert not _ours(ray), "processes are left over"
        finally:
            place.server.kill()
            place.server.wait()


def _ours(ray: RayCluster) -> list[str]:
    """Command lines of Headrace's processes below the cluster's."""
    found = []
    for name in ray.nodes:
        for pid in ray.pids(name):
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            if "headrace" in words:
                found.append(" ".join(words[:5]))
    return found


@pytest.fixture
async def shards(place: Place) -> AsyncIterator[Shards]:
    shards = Shards(place.redis_url, MODEL)
    await shards.connect()
    yield shards
    await shards.close()


async def judged(history: History, shards: Shards) -> None:
    await history.judge(shards)
    assert history.violations == []
    assert len(history.accepted) > 10
    assert sum(view.whole for view in history.views) > 5


async def test_workers_come_and_go_with_the_load_and_a_node_is_lost(place: Place, shards: Shards) -> None:
    """1 -> 3 -> 1, a node killed in between."""
    await place.until("one at the start", lambda count: count == 1)
    history = History()
    load = Load(place.urls, MODEL, history, random.Random(1), shards, structured=0.2)
    loading = asyncio.create_task(load.run(streams=8, detached=2, wholes=2, producers=2))
    try:
        await place.until("three under load", lambda count: count == 3)
        assert _ours_on(place, "second"), "the second node runs nothing of ours: killing it would show nothing"
        place.ray.kill("second")
        done = load.done
        await place.until("three again after a node was lost", lambda count: count == 3)
        await asyncio.sleep(5)
        assert load.done > done
    finally:
        load.stop.set()
        await asyncio.wait_for(loading, 300)
    await judged(history, shards)
    await place.until("one after the load", lambda count: count == 1)


def _ours_on(place: Place, name: str) -> list[int]:
    """Pids of its workers of MODEL."""
    found = []
    for pid in place.ray.pids(name):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        if "worker" in words and MODEL in words and "headrace" in words:
            found.append(pid)
    return found


async def test_actors_that_die_and_a_node_that_will_be_taken_away(place: Place, shards: Shards) -> None:
    history = History()
    load = Load(place.urls, MODEL, history, random.Random(2), shards, structured=0.2)
    loading = asyncio.create_task(load.run(streams=8, detached=2, wholes=2, producers=2))
    try:
        await place.until("three under load", lambda count: count == 3)
        for name in ("head", "third"):  # the actor, of which the kernel ends the process
            for pid in _ours_on(place, name)[:1]:
                os.kill(parent_of(pid), signal.SIGKILL)
        await place.until("three again after actors died", lambda count: count == 3)
        assert _ours_on(place, "third"), "the third node runs nothing of ours: its notice would show nothing"
        place.ray.give_notice("third")
        for _ in range(60):
            await asyncio.sleep(1)
            if not _ours_on(place, "third"):
                break
        assert not _ours_on(place, "third"), place.ray.headrace("status")
        place.ray.kill("third")
        await place.until("three on what is left", lambda count: count == 3)
    finally:
        load.stop.set()
        await asyncio.wait_for(loading, 300)
    await judged(history, shards)
    refused = {kind: n for kind, n in history.failures.items() if "error event" in kind}
    assert refused == {}


async def test_a_worker_of_two_ranks_comes_from_zero(place: Place) -> None:
    await place.until("none", lambda count: count == 0, PAIR)
    body = {"model": PAIR, "prompt": "x", "max_tokens": 20, "ignore_eos": True}

    def ask() -> str:
        request = urllib.request.Request(
            place.urls[0] + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as reply:
            return str(json.loads(reply.read())["usage"]["completion_tokens"])

    assert await asyncio.to_thread(ask) == "20"
    await place.until("none again", lambda count: count == 0, PAIR)
    groups = place.ray.ask(
        "from ray.util import placement_group_table as t; "
        "print(json.dumps([g['state'] for g in t().values() if g['state'] != 'REMOVED']))"
    )
    assert groups == []


async def test_up_twice_and_a_file_without_a_server_are_refused(place: Place, tmp_path: Path) -> None:
    assert "up in this Ray cluster already" in place.ray.headrace("up", "--config", str(place.config), expect=78)
    other = tmp_path / "headrace.toml"
    other.write_text(place.config.read_text().replace("redis-url", "# redis-url"))
    assert "redis-url is needed" in place.ray.headrace("up", "--config", str(other), expect=78)


async def test_ray_serve_in_front_streams_through(place: Place, shards: Shards) -> None:
    """Its own ingress: streams, whole answers, idempotency keys and resumed streams, with the same judge."""
    (port,) = [free_port()]
    serve = place.folder / "serve.py"
    serve.write_text(f"""
import ray, sys
from ray import serve
from headrace.ray.ingress import application
ray.init({place.ray.address!r})
if sys.argv[1] == "up":
    serve.start(http_options={{"host": "127.0.0.1", "port": {port}}})
    serve.run(application({{"redis-url": {place.redis_url!r}, "replicas": "2"}}), name="headrace")
else:
    serve.shutdown()
""")
    ended = place.ray.run(str(place.ray.python), str(serve), "up")
    assert ended.returncode == 0, ended.stderr[-4000:]
    history = History()
    load = Load([f"http://127.0.0.1:{port}"], MODEL, history, random.Random(3), shards, structured=0.2)
    loading = asyncio.create_task(load.run(streams=6, detached=1, wholes=2, producers=0))
    await asyncio.sleep(30)
    load.stop.set()
    await asyncio.wait_for(loading, 300)
    ended = place.ray.run(str(place.ray.python), str(serve), "down")
    assert ended.returncode == 0, ended.stderr[-4000:]
    await judged(history, shards)
    assert load.resumed
