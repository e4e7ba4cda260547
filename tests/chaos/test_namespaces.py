"""The failures that only several machines have, in network namespaces: a way between two machines is cut while all
others stay, or is slow. The load and the judge of the chaos runs; `make namespaces`."""

from __future__ import annotations

import asyncio
import random
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import redis.asyncio

from headrace.serve.embedded import server_command
from tests.chaos.history import History, leftovers
from tests.chaos.load import Load
from tests.chaos.namespaces import Machine, Network, missing
from tests.chaos.shards import Shards
from tests.models import save_tiny_model

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(600)]

MODEL = "chaos"
START_S = 120.0
REDIS = 6379
DELAY_S = 0.05


class Drill:
    """A machine for the server, and two of each role; more come as a test needs them."""

    def __init__(self, network: Network, folder: Path) -> None:
        self.network, self.folder = network, folder
        save_tiny_model("llama", folder / "model")
        self.store = network.add("store")
        self.url = f"redis://{self.store.address}:{REDIS}/0"
        (folder / "redis").mkdir()
        command = server_command(folder / "redis", port=REDIS)
        self.store.start(*command, "--bind", "0.0.0.0", "--protected-mode", "no")
        for role in ("scheduler", "worker", "gateway"):
            for number in range(2):
                self.add(role, number, self.url)

    def add(self, role: str, number: int, redis_url: str) -> None:
        self.start(role, self.network.add(f"{role[0]}{number}"), redis_url)

    def start(self, role: str, machine: Machine, redis_url: str) -> None:
        model = ["--model", str(self.folder / "model"), "--served-model-name", MODEL, "--retention", "30m",
                 "--max-model-len", "4096"]  # fmt: skip
        options = {
            "scheduler": [*model, "--tool-format", "hermes"],
            "worker": [*model, "--engine", "simulated", "--engine-options", '{"random": true}', "--threads", "1"],
            "gateway": ["--host", "0.0.0.0"],
        }
        machine.headrace(role, redis_url, options[role])

    def gateways(self, *numbers: int) -> list[str]:
        return [f"http://{self.network.machines[f'g{number}'].address}:8000" for number in numbers]

    async def until(self, what: str, holds: Callable[[], bool], within_s: float = START_S) -> None:
        deadline = time.monotonic() + within_s
        while not await asyncio.to_thread(holds):
            if time.monotonic() > deadline:
                pytest.fail(f"{what}: not within {within_s:g} s\n{self.network.logs()}")
            await asyncio.sleep(0.2)

    def ready(self, *numbers: int) -> bool:
        return all(got(url + "/ready") for url in self.gateways(*numbers))

    def leads(self, scheduler: str) -> bool:
        text = got(f"http://{self.network.machines[scheduler].address}:9100/metrics")
        return f'headrace_is_leader{{model="{MODEL}"}} 1.0' in text

    @asynccontextmanager
    async def load(self, shards: Shards, seed: int, *gateways: int) -> AsyncIterator[Load]:
        """Clients at these gateways; at the end everything that they saw is judged, and nothing may be left over."""
        history = History()
        load = Load(self.gateways(*gateways), MODEL, history, random.Random(seed), shards)
        watching = asyncio.create_task(self._watch_epoch(shards, history))
        loading = asyncio.create_task(load.run(streams=6, detached=2, wholes=2, producers=2))
        await asyncio.sleep(3)
        try:
            yield load
            await asyncio.sleep(3)
        finally:
            load.stop.set()
            await asyncio.wait_for(loading, 300)
            watching.cancel()
        await self._rest(shards, history)
        await history.judge(shards)
        assert history.violations == [], "\n".join([*history.violations, self.network.logs()])
        assert len(history.accepted) > 20
        assert load.resumed

    async def _watch_epoch(self, shards: Shards, history: History) -> None:
        while True:
            history.epochs.append((await shards.buses[0].read_leader()).epoch)
            await asyncio.sleep(0.5)

    async def _rest(self, shards: Shards, history: History) -> None:
        async with redis.asyncio.Redis.from_url(self.url) as client:
            for _ in range(60):
                left = await shards.each(lambda bus: leftovers(bus, client))
                if not left:
                    return
                await asyncio.sleep(0.5)
        for item in left:
            history.blame(f"left over: {item}")


def got(url: str) -> str:
    """What a machine answers over the network; "": it does not, or not with success."""
    try:
        with urllib.request.urlopen(url, timeout=3) as reply:
            return str(reply.read().decode())
    except (urllib.error.URLError, OSError):
        return ""


@pytest.fixture(scope="module")
def drill(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drill]:
    if why := missing():
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("drill")
    with Network(folder) as network:
        yield Drill(network, folder)


@pytest.fixture
async def shards(drill: Drill) -> AsyncIterator[Shards]:
    await drill.until("all is up", lambda: drill.ready(0, 1))
    shards = Shards(drill.url, MODEL)
    await shards.connect()
    yield shards
    await shards.close()


async def gen_of(shards: Shards, worker: str) -> int:
    return next((record.gen for record in await shards.buses[0].list_workers() if record.wid == worker), 0)


async def test_two_schedulers_that_both_could_lead(drill: Drill, shards: Shards) -> None:
    """The leader cannot reach the server, and everybody can reach the leader. It believes for a while that it leads;
    what it has decided since is refused."""
    await drill.until("one leads", lambda: drill.leads("s0") != drill.leads("s1"))
    old, new = ("s0", "s1") if drill.leads("s0") else ("s1", "s0")
    epoch = (await shards.buses[0].read_leader()).epoch
    async with drill.load(shards, 1, 0, 1) as load:
        drill.network.cut(old, "store")
        await drill.until("the other leads", lambda: drill.leads(new), 30)
        assert await asyncio.to_thread(got, f"http://{drill.network.machines[old].address}:9100/metrics")
        done = load.done
        await asyncio.sleep(8)
        assert load.done > done
        drill.network.cut(old, "store", False)
        deposed = drill.network.machines[old]
        assert await asyncio.to_thread(deposed.processes.pop().wait, 30) == 1  # it has learnt of it, and ends
        assert await asyncio.to_thread(drill.leads, new)
        drill.start("scheduler", deposed, drill.url)  # as whoever keeps it running would
    assert (await shards.buses[0].read_leader()).epoch > epoch


async def test_a_worker_that_reaches_all_but_the_server(drill: Drill, shards: Shards) -> None:
    """Its sequences go on elsewhere while it still computes them; when it comes back it is a new one."""
    gen = await gen_of(shards, "w0")
    async with drill.load(shards, 2, 0, 1) as load:
        drill.network.cut("w0", "store")
        await asyncio.sleep(12)
        assert await asyncio.to_thread(got, f"http://{drill.network.machines['w0'].address}:9100/metrics")
        done = load.done
        await asyncio.sleep(3)
        assert load.done > done
        drill.network.cut("w0", "store", False)
        for _ in range(100):
            if await gen_of(shards, "w0") > gen:
                break
            await asyncio.sleep(0.2)
        assert await gen_of(shards, "w0") > gen


async def test_a_gateway_that_reaches_its_clients_but_not_the_server(drill: Drill, shards: Shards) -> None:
    """Its streams stand still, and are taken up at the other; what it answers meanwhile is an error, no half answer."""
    async with drill.load(shards, 3, 0, 1) as load:
        drill.network.cut("g0", "store")
        await asyncio.sleep(12)
        assert await asyncio.to_thread(got, drill.gateways(0)[0] + "/health")
        done = load.done
        await asyncio.sleep(3)
        assert load.done > done
        drill.network.cut("g0", "store", False)
        await drill.until("it serves again", lambda: drill.ready(0), 30)


async def test_a_move_to_machines_behind_a_slow_link(drill: Drill, shards: Shards) -> None:
    """Under load, all roles go over to machines for which the server is 50 ms away in each direction."""
    slow = drill.network.add("slow")
    target = f"{drill.store.address}:{REDIS}"
    slow.start(sys.executable, "-m", "tests.chaos.delay", f"{slow.address}:{REDIS}", target, str(DELAY_S))
    url = f"redis://{slow.address}:{REDIS}/0"
    for role in ("scheduler", "worker", "gateway"):
        drill.add(role, 2, url)
    await drill.until("the slow gateway is up", lambda: drill.ready(2))
    for _ in range(300):
        if any(w.wid == "w2" and w.state == "serving" for w in await shards.buses[0].list_workers()):
            break
        await asyncio.sleep(0.2)
    async with drill.load(shards, 4, 2) as load:
        for name in ("w0", "w1", "s0", "s1"):
            assert await asyncio.to_thread(drill.network.machines[name].leave) == [0]
        await drill.until("the slow one leads", lambda: drill.leads("s2"), 30)
        done = load.done
        await drill.until("requests end there", lambda: load.done > done + 10)
