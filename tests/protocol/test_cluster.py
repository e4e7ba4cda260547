"""A real Redis Cluster of three nodes: every model, or shard of one, lives in one slot, and the bus finds its node.

A little over 400 lines: the cluster is started once for all that is tested on it.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.crc import key_slot

from headrace.serve.embedded import FAST, EmbeddedServer, find_server
from protocol.bus import HomeBus, ProducerBus
from protocol.errors import Overloaded, StartError, Unavailable
from protocol.keys import REGISTRY, Keys
from protocol.messages import CommitRow, Job, ModelCard, new_rid, shard_of
from protocol.records import TenantLimits
from protocol.routing.shards import ShardStore
from tests.bus import Bus
from tests.conftest import MODEL
from tests.models import tiny_model
from tests.protocol.stage import CAPACITY, Stage, frame, terminal

# the life of a request as on a single server, by the same tests
from tests.protocol.test_bus import (
    test_accept_limits_joins_and_conflicts,  # noqa: F401
    test_fences,  # noqa: F401
    test_one_request_from_accept_to_end,  # noqa: F401
)
from tests.stack import Stack, free_port

ROOT = Path(__file__).parents[2]
WAIT_S = 60.0
SLOT = key_slot(Keys(MODEL).leader.encode())


@dataclass
class Cluster:
    """Three primaries without replicas, each with a third of the slots."""

    folder: Path
    nodes: list[redis.Redis] = field(default_factory=list)
    ports: list[int] = field(default_factory=list)
    commands: list[list[str]] = field(default_factory=list)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self) -> None:
        bus_ports = []
        for _ in range(3):
            port, bus_port = free_port(), free_port()
            home = self.folder / str(port)
            home.mkdir()
            options = {
                "port": port, "cluster-port": bus_port, "bind": "127.0.0.1", "dir": home, "save": "",
                "appendonly": "yes", "appendfsync": "always", "cluster-enabled": "yes", "cluster-node-timeout": 5000,
                "logfile": home / "log",
            }  # fmt: skip
            self.commands.append([str(part) for name, value in options.items() for part in (f"--{name}", value)])
            self.processes.append(subprocess.Popen([find_server(), *self.commands[-1]]))
            self.ports.append(port)
            self.nodes.append(redis.Redis(port=port, retry_on_error=[]))
            bus_ports.append(bus_port)
        for node in self.nodes:
            _until(lambda node=node: node.ping(), "a node that answers")
        for index, node in enumerate(self.nodes):
            node.execute_command("CLUSTER ADDSLOTSRANGE", 16384 * index // 3, 16384 * (index + 1) // 3 - 1)
            for port, bus_port in zip(self.ports, bus_ports, strict=True):
                node.execute_command("CLUSTER MEET", "127.0.0.1", port, bus_port)
        for node in self.nodes:
            _until(lambda node=node: self._whole(node), "a whole cluster")

    @staticmethod
    def _whole(node: redis.Redis) -> bool:
        told = node.execute_command("CLUSTER INFO")
        return told["cluster_state"] == "ok" and told["cluster_known_nodes"] == "3"

    def kill(self, index: int) -> None:
        self.processes[index].kill()
        self.processes[index].wait()

    def restart(self, index: int) -> None:
        self.processes[index] = subprocess.Popen([find_server(), *self.commands[index]])

    def stop(self) -> None:
        for node in self.nodes:
            node.close()
        for process in self.processes:
            process.kill()
            process.wait()

    @property
    def url(self) -> str:
        return "redis+cluster://" + ",".join(f"127.0.0.1:{port}" for port in self.ports)

    def owner(self, slot: int = SLOT) -> int:
        """Index of the node that holds ``slot``, as that node says itself."""
        for index, node in enumerate(self.nodes):
            with contextlib.suppress(redis.ResponseError):
                node.execute_command("EXISTS", f"{{{_name_in(slot)}}}")
                return index
        raise AssertionError("nobody holds the slot")

    def move(self, slot: int, to: int) -> None:
        """Hand a slot and its keys to another node, as resharding does."""
        source, target = self.nodes[self.owner(slot)], self.nodes[to]
        source_id, target_id = (node.execute_command("CLUSTER MYID").decode() for node in (source, target))
        target.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", source_id)
        source.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", target_id)
        while keys := source.execute_command("CLUSTER GETKEYSINSLOT", slot, 100):
            source.execute_command("MIGRATE", "127.0.0.1", self.ports[to], "", 0, 5000, "KEYS", *keys)
        for node in (target, source):
            node.execute_command("CLUSTER SETSLOT", slot, "NODE", target_id)


def _name_in(slot: int) -> str:
    return next(name for name in map(str, range(10**6)) if key_slot(name.encode()) == slot)


def _until(condition, what: str) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + WAIT_S
    while True:
        with contextlib.suppress(redis.RedisError):
            if condition():
                return
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="headrace-cluster-"))
    made = Cluster(folder)
    try:
        made.start()
        yield made
    finally:
        made.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def raw(cluster: Cluster) -> Iterator[redis.RedisCluster]:
    """Another implementation's view of the (emptied) cluster."""
    for node in cluster.nodes:
        node.flushall()
    with redis.RedisCluster(host="127.0.0.1", port=cluster.ports[0]) as client:
        yield client


@pytest.fixture
async def bus(cluster: Cluster, raw: redis.RedisCluster) -> AsyncIterator[Bus]:
    bus = Bus(cluster.url, MODEL, patience=30.0)
    await bus.connect()
    yield bus
    await bus.close()


async def test_all_keys_of_a_model_share_a_node_and_the_registry_has_its_own(bus: Bus, cluster: Cluster) -> None:
    registry = cluster.owner(key_slot(REGISTRY.encode()))
    if registry == cluster.owner():
        cluster.move(SLOT, (registry + 1) % 3)
    stage = Stage(bus, cluster.nodes[cluster.owner()])
    await stage.lead()
    await stage.register()
    rid = await stage.running(reply_to="gw")
    assert await stage.commit(CommitRow(rid, 0, 1, 0, frame(1, "a"))) == "l"
    await bus.publish_card(ModelCard(model=MODEL, created=1, max_model_len=256, vocab_size=257), b"{}")
    found = [{key.decode() for key in node.scan_iter()} for node in cluster.nodes]
    assert found[registry] == {REGISTRY}
    assert {"jobs", "live", "leader", "workers", "events", "tokenizer"} < {
        key.removeprefix(bus.keys.prefix) for key in found[cluster.owner()]
    }
    assert sum(map(bool, found)) == 2
    assert list(await Bus.models(cluster.url)) == [MODEL]


async def test_publications_stay_on_the_node_of_the_model(bus: Bus, cluster: Cluster) -> None:
    """Sharded: the other nodes are not told of each token."""
    stage = Stage(bus, cluster.nodes[cluster.owner()])
    subscription = bus.subscribe("gw")
    await subscription.start()
    counts = [node.execute_command("PUBSUB", "SHARDNUMSUB", bus.keys.out("gw"))[1] for node in cluster.nodes]
    assert counts == [int(index == cluster.owner()) for index in range(3)]
    await stage.lead()
    await stage.register()
    rid = await stage.running(reply_to="gw")
    assert await stage.commit(CommitRow(rid, 0, 1, 0, frame(1, "a"))) == "l"
    assert [(row.choice, row.cursor) for row in await rows_of(subscription, 2)] == [(-1, 0), (0, 0)]
    await subscription.close()


async def rows_of(subscription, count: int) -> list:  # type: ignore[no-untyped-def,type-arg]
    rows = []
    async with asyncio.timeout(WAIT_S):
        async for got in subscription:
            rows += got
            if len(rows) >= count:
                break
    return rows


async def running_and_read(bus: Bus, cluster: Cluster) -> tuple[Stage, Any, str]:
    """A stage at the owner, and a request that runs there, whose reader has been told so."""
    stage = Stage(bus, cluster.nodes[cluster.owner()])
    subscription = bus.subscribe("gw")
    await subscription.start()
    await stage.lead()
    await stage.register()
    rid = await stage.running(reply_to="gw")
    assert len(await rows_of(subscription, 1)) == 1
    return stage, subscription, rid


async def test_a_model_that_moves_to_another_node_is_followed(bus: Bus, cluster: Cluster) -> None:
    """Calls, blocking reads and subscriptions find the new node; nothing is lost on the way."""
    stage, subscription, rid = await running_and_read(bus, cluster)
    assert await stage.commit(CommitRow(rid, 0, 1, 0, frame(1, "a"))) == "l"
    after = (await bus.read_events("0-0", 100, 0))[-1].event_id
    reading = asyncio.create_task(bus.read_events(after, 10, 30_000))

    target = (cluster.owner() + 1) % 3
    await asyncio.to_thread(cluster.move, SLOT, target)
    assert cluster.owner() == target
    first = frame(1, "a")
    assert await stage.commit(CommitRow(rid, 0, 1, len(first), frame(2, "b", "stop"), "stop")) == "l"
    assert await bus.read_journal(rid, 0) == first + frame(2, "b", "stop")
    async with asyncio.timeout(WAIT_S):
        assert [event.kind for event in await reading] == ["hint"]
        lost = False
        async for got in subscription:  # the reader is told that rows may be missing
            if lost := not got:
                break
        assert lost
    next_rid = await stage.running(reply_to="gw", placement=1)
    assert {row.rid for row in await rows_of(subscription, 1)} == {next_rid}
    await subscription.close()


async def test_one_living_seed_is_enough_and_none_is_said(cluster: Cluster) -> None:
    dead = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    bus = Bus(f"redis+cluster://{dead[0]},{dead[1]},127.0.0.1:{cluster.ports[0]}", MODEL, patience=30.0)
    await bus.connect()
    assert (await bus.read_leader()).epoch >= 0
    await bus.close()
    lost = Bus("redis+cluster://" + ",".join(dead), MODEL, patience=0.1)
    with pytest.raises(StartError, match="does not answer"):
        await lost.connect()
    with pytest.raises(Unavailable):
        await Bus.models("redis+cluster://" + ",".join(dead), patience=0.1)


async def test_a_single_server_is_no_cluster(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path / "single", port=free_port(), settings=FAST) as single:
        bus = Bus(f"redis+cluster://127.0.0.1:{single.port}", MODEL, patience=5.0)
        with pytest.raises(StartError, match="cluster support disabled"):
            await bus.connect()
        await bus.close()


async def test_each_primary_is_checked_for_durability(cluster: Cluster) -> None:
    assert await Bus.durability(cluster.url, patience=5.0) == []
    cluster.nodes[1].config_set("appendfsync", "everysec")
    (line,) = await Bus.durability(cluster.url, patience=5.0)
    cluster.nodes[1].config_set("appendfsync", "always")
    assert line.startswith(f"127.0.0.1:{cluster.ports[1]}: appendfsync is everysec")


async def test_a_node_that_dies_and_returns_has_lost_nothing(bus: Bus, cluster: Cluster) -> None:
    stage, subscription, rid = await running_and_read(bus, cluster)
    owner = cluster.owner()
    cluster.kill(owner)
    committing = asyncio.create_task(stage.commit(CommitRow(rid, 0, 1, 0, frame(1, "a"))))
    reading = asyncio.create_task(rows_of(subscription, 1))
    await asyncio.sleep(0.5)  # the commit finds nobody for a while
    assert not committing.done()
    cluster.restart(owner)
    async with asyncio.timeout(WAIT_S):
        assert await committing == "l"
        assert await bus.read_journal(rid, 0) == frame(1, "a")
        cursor = len(frame(1, "a"))
        while not reading.done():  # rows that come before the subscription is up again are for the journal to tell
            assert await stage.commit(CommitRow(rid, 0, 1, cursor, frame(2, "b"))) == "l"
            cursor += len(frame(2, "b"))
            await asyncio.sleep(0.05)
        assert {row.rid for row in await reading} == {rid}
    await subscription.close()


async def test_the_users_of_the_roles_are_fit_for_a_cluster(cluster: Cluster, raw: redis.RedisCluster) -> None:
    lines = [line.split()[1:] for line in (ROOT / "deploy" / "users.acl").read_text().splitlines()]
    for node in cluster.nodes:
        for user in lines:
            if user[0] != "default":
                node.execute_command("ACL", "SETUSER", *user)
        node.execute_command("ACL", "LOG", "RESET")
    roles = {
        role: Bus(cluster.url.replace("://", f"://{role}:CHANGE-ME-{role}@"), MODEL, patience=30.0)
        for role in ("gateway", "scheduler", "worker")
    }
    for bus in roles.values():
        await bus.connect()
    gateway, worker = roles["gateway"], roles["worker"]
    stage = Stage(roles["scheduler"], cluster.nodes[cluster.owner()])
    await stage.lead()
    await stage.bus.publish_card(ModelCard(model=MODEL, created=1, max_model_len=256, vocab_size=257), b"{}")
    assert list(await Bus.models(gateway.url)) == [MODEL]
    stage.gen = await worker.register("w0", CAPACITY, "serving")
    subscription = gateway.subscribe("gw")
    await subscription.start()
    rid = new_rid()
    homes = {
        role: HomeBus(cluster.url.replace("://", f"://{role}:CHANGE-ME-{role}@"), patience=30.0)
        for role in ("gateway", "scheduler")
    }
    claim = await homes["gateway"].claim("default", "once", "alias", model=MODEL, rid=rid, body="h")
    assert claim.mine
    late = await homes["gateway"].claim("default", "never", "alias", model=MODEL, rid=new_rid(), body="h")
    await gateway.accept(Job(prompt="x", results="done"), rid=rid, reply_to="gw", idempotency="once")
    assert not await roles["scheduler"].void(rid)
    assert await roles["scheduler"].void(late.rid)
    assert await gateway.void(late.rid)
    await homes["gateway"].free(late)
    await homes["scheduler"].free_or_put_off([(claim, 0)])
    assert await homes["scheduler"].due(MODEL, 10) == []  # not for a minute
    found = await homes["gateway"].find("default", "once", "alias")
    assert found is not None
    assert (found.model, found.rid, found.mine) == (MODEL, rid, False)
    assert await homes["gateway"].find("default", "never", "alias") is None
    await stage.admit(rid)
    for name in ("a", "b", "c", "d"):  # those whom nobody hears make room
        await gateway.attach(rid, "default", name)
    await stage.place(rid)
    assert len(await worker.read_plans("w0", "0-0", 100)) == 1
    stage.bus = worker
    assert await stage.commit(CommitRow(rid, 0, 1, 0, frame(1, "a", "stop"), "stop", terminal(rid))) == "l"
    assert [row.choice for row in await rows_of(subscription, 2)] == [-1, 0]
    assert len(await gateway.read_journal(rid, 0)) > 0
    assert await roles["scheduler"].scan_live() == {}
    await limits_of_roles(homes, roles, stage.epoch)
    await shards_of_roles(cluster, roles["scheduler"])
    await subscription.close()
    for bus in (*roles.values(), *homes.values()):
        await bus.close()
    assert [node.execute_command("ACL", "LOG") for node in cluster.nodes] == [[], [], []]


async def limits_of_roles(homes: dict[str, HomeBus], roles: dict[str, Bus], epoch: int) -> None:
    one, rid = TenantLimits(concurrent=1, tokens_per_minute=1000), new_rid()
    held = await homes["gateway"].reserve("few", rid, MODEL, 5, one)
    assert held.tokens == 5
    with pytest.raises(Overloaded):  # it is looked whether some have ended
        await homes["scheduler"].reserve("few", new_rid(), MODEL, 5)
    assert await homes["scheduler"].due_holds(MODEL, 10) == []
    number, owed = await roles["scheduler"].collect(epoch, 0)
    assert (number, owed) == (0, [])
    await homes["scheduler"].settle(MODEL, 1, [b"few", b"5", f"end:{rid}".encode(), b"few"])
    await homes["gateway"].reserve("few", rid, MODEL, 5, one)
    await homes["gateway"].give_back("few", rid)
    job = Job(prompt="x", tenant="few")
    accepted = await homes["gateway"].accept(roles["gateway"], job, rid=new_rid(), tenant_limits=one)
    assert not accepted.joined
    await roles["gateway"].cancel(accepted.rid, "few")


async def shards_of_roles(cluster: Cluster, scheduler: Bus) -> None:
    """A scheduler makes them, the others see them; a push is moved from one to the other."""
    stores = {
        role: ShardStore(cluster.url.replace("://", f"://{role}:CHANGE-ME-{role}@"))
        for role in ("scheduler", "gateway", "worker", "producer")
    }
    shards = await stores["scheduler"].create(MODEL, 2)
    assert [await store.read(MODEL) for store in stores.values()] == [shards] * 4
    second = Bus(scheduler.url, shards[1].tag, patience=30.0)
    epoch = await second.lead("me", await second.read_leader())
    assert epoch is not None
    producer = ProducerBus(stores["producer"].url, shards[1].tag, patience=30.0)
    entry = await producer.push(b"{}")
    await second.read_jobs("term", 10, 0)
    await second.divert(epoch, entry)
    ((moving, origin, payload),) = await second.read_moving(10)
    assert origin == entry
    await scheduler.receive(1, moving, origin, payload)
    await second.moved(moving)
    assert await second.read_moving(10) == []
    for closing in (second, producer, *stores.values()):
        await closing.close()


async def test_shards_lie_on_all_nodes_alike(cluster: Cluster, raw: redis.RedisCluster) -> None:
    store = ShardStore(cluster.url)
    shards = await store.create(MODEL, 9)
    await store.close()
    held = collections.Counter(cluster.owner(key_slot(Keys(shard.tag).leader.encode())) for shard in shards)
    assert held == {0: 3, 1: 3, 2: 3}


def test_a_whole_stack_streams_from_a_cluster(
    cluster: Cluster, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = tiny_model(tmp_path_factory, "llama")
    args = (
        "--redis-url",
        cluster.url,
        "--model",
        str(model),
        "--served-model-name",
        "org/tiny",
        "--engine",
        "simulated",
    )
    with Stack(tmp_path / "stack", *args) as stack:
        body = {"model": "org/tiny", "prompt": "x", "max_tokens": 50, "ignore_eos": True, "seed": 1}
        texts = []
        for streamed in (True, False):
            raw = json.dumps({**body, "stream": streamed}).encode()
            ask = urllib.request.Request(stack.url + "/v1/completions", raw, {"Content-Type": "application/json"})
            with urllib.request.urlopen(ask, timeout=WAIT_S) as reply:
                lines = reply.read().decode().splitlines()
            if streamed:
                assert lines[-2:] == ["data: [DONE]", ""]
                lines = [line.removeprefix("data: ") for line in lines if line.startswith("data: {")]
                assert len(lines) >= 50
            texts.append("".join(choice["text"] for line in lines for choice in json.loads(line)["choices"]))
        assert texts[0] == texts[1]
        assert len(texts[0]) > 0


def test_a_whole_stack_serves_three_shards_from_three_nodes(
    cluster: Cluster, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = tiny_model(tmp_path_factory, "llama")
    args = ("--redis-url", cluster.url, "--model", str(model), "--served-model-name", "org/tiny")
    processes = ("--engine", "simulated", "--shards", "3", "--workers", "3", "--schedulers", "2")
    with Stack(tmp_path / "stack", *args, *processes) as stack:
        rids: list[str] = []
        deadline = time.monotonic() + WAIT_S
        while {shard_of(rid) for rid in rids} != {0, 1, 2} and time.monotonic() < deadline:
            body = {"model": "org/tiny", "prompt": f"prompt {len(rids)}", "max_tokens": 3, "ignore_eos": True}
            ask = urllib.request.Request(
                stack.url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(ask, timeout=WAIT_S) as reply:
                assert json.load(reply)["usage"]["completion_tokens"] == 3
                rids.append(reply.headers["X-Request-Id"])
        assert {shard_of(rid) for rid in rids} == {0, 1, 2}
        for rid in rids:
            with urllib.request.urlopen(f"{stack.url}/v1/requests/{rid}", timeout=WAIT_S) as reply:
                assert json.load(reply)["status"] == "completed"
