"""The seeded model of several slots: one idempotency key, whatever shard its request could run in, a tenant that may
have a few requests at once, a shard that drains, and every fault.

Clients retry a key until they are told a rid and choose a slot at random each time, as gateways with an old and a new
list of shards would; producers push under an id, or none, now to this shard, now to that. Sweepers are reckless: a
claim is due at once. Whatever dies between any two calls, and however late a call is executed, there is one request for
each key in the end, all who asked were told its rid, and once the requests are gone so are the claims. Requests are
accepted under reservations and ended by leaders: never run more of a tenant's requests than it may have, over all
slots, and nothing stays reserved. From some moment on the last shard gives what is pushed there to the first: each push
is one request all the same.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Coroutine
from typing import Any

import msgspec
import redis

from protocol.bus import HomeBus
from protocol.bus import home as home_module
from protocol.bus import leader as leader_module
from protocol.connection import OutOfMemory
from protocol.errors import Overloaded, Voided
from protocol.keys import HOME
from protocol.messages import Job, Terminal, encode
from protocol.records import InboxEntry, TenantLimits
from protocol.sampling import SamplingParams
from scheduler.claims import Elsewhere, claim_and_reserve
from scheduler.recovery import terminal_row
from scheduler.sweep import move, settle, sweep
from tests.bus import Bus
from tests.protocol.model.clients import draw_job, operator
from tests.protocol.model.link import Crash, ModelLink, Turn
from tests.protocol.model.world import World

MODELS = ("one", "one#1.0", "one#2.0")
NAME = "one"
KEYS = 7  # of each client
PUSHES = 8
AT_ONCE = TenantLimits(concurrent=5, tokens_per_minute=10**9)
TERMS = {"b:default": "1000000.0", f"p:{NAME}": "1000000.0 0.0"}  # a token of a prompt costs one


class HomeWorld(World):
    def __init__(self, url: str, seed: int, mutation: str | None = None) -> None:
        super().__init__(url, seed, mutation)
        self.told: dict[str, set[str]] = {}  # key -> rids
        self.counted_at = 0  # calls when open requests were counted last
        self.draining = False  # the last shard
        self.unnamed = 0  # pushes without an id
        self.plain.hset(f"{HOME}terms", mapping=TERMS)

    def home(self) -> HomeBus:
        made = HomeBus("unix:///model")
        made._link = ModelLink(self)  # type: ignore[assignment]
        made._scripts = self.scripts
        made.slot = self.bus  # type: ignore[method-assign]
        return made

    def at_rest(self) -> bool:
        return self.clients_left == 0 and not any(self.open_requests()) and not self.waiting()

    def open_requests(self) -> list[int]:
        """What may run now: unfinished requests by slot."""
        return [self.plain.hlen(f"headrace:{{{model}}}:live") for model in MODELS]

    def owed(self) -> int:
        """Batches that some slot has not settled yet, as far as it knows."""
        return sum(self.plain.exists(f"headrace:{{{m}}}:{name}") for m in MODELS for name in ("owed", "owing"))

    def waiting(self) -> int:
        streams = [f"headrace:{{{model}}}:{name}" for model in MODELS for name in ("jobs", "moving")]
        return sum(self.plain.xlen(stream) for stream in streams)

    def step(self) -> None:
        super().step()
        if self.calls < self.counted_at + 5:
            return
        self.counted_at = self.calls
        if sum(self.open_requests()) > (AT_ONCE.concurrent or 0):
            self.wrong["more requests at once than the tenant may have"] += 1

    def judge(self) -> None:
        owners: dict[str, set[str]] = {}
        for model in MODELS:
            for found in self.plain.scan_iter(f"headrace:{{{model}}}:r:*"):
                key = self.plain.hget(found, "idem").decode().rpartition(":")[2]
                owners.setdefault(key, set()).add(found.decode().rpartition(":")[2])
        pushed = {key: owners.pop(key) for key in list(owners) if not key.startswith("k")}
        named = {key for key in pushed if key.startswith("p")}
        if any(len(rids) != 1 for rids in pushed.values()) or named != set(self.pushed):
            self.wrong["a push that is no request, or several"] += 1
        if len(pushed) - len(named) != self.unnamed:
            self.wrong["a push without an id that is no request, or several"] += 1
        results = [entry[b"result"] for m in MODELS for _, entry in self.plain.xrange(f"headrace:{{{m}}}:results:res")]
        if sum(bool(msgspec.msgpack.decode(result, type=Terminal).id) for result in results) != len(pushed):
            self.wrong["a push without its result, or with several"] += 1
        self.stats["requests"] = sum(map(len, owners.values()))
        if any(len(rids) != 1 for rids in owners.values()):
            self.wrong["a key with several requests"] += 1
        if owners != self.told:
            self.wrong["told another rid"] += 1
        for model in MODELS:  # as after the retention
            for kind in ("r", "idem"):
                for found in self.plain.scan_iter(f"headrace:{{{model}}}:{kind}:*"):
                    self.plain.delete(found)
        for _ in range(3000):
            self.step()
        for _ in range(30_000):
            if not self.owed():
                break
            self.step()
        spent = sum(int(self.plain.hget(key, "default")) for key in self.plain.scan_iter(f"{HOME}spent:*"))
        if spent != len(pushed) * 10**9:  # what clients asked for was never admitted, each push has one token
            self.wrong["spent is not what ran"] += 1
        left = {key.decode().removeprefix(HOME) for key in self.plain.scan_iter(f"{HOME}*") if self.plain.ttl(key) < 0}
        if left - {"settled", "terms"}:  # claims of ended requests expire with them
            self.wrong["a claim or a reservation that is never freed"] += 1


async def client(world: HomeWorld, number: int) -> None:
    """Each key is asked for until a rid is told, and perhaps once more."""
    for index in range(KEYS):
        key, job = f"k{number}-{index}", draw_job(world.rng)
        for _ in range(world.rng.choice([1, 1, 2])):
            rid = await ask(world, key, job)
            world.told.setdefault(key, set()).add(rid)


async def ask(world: HomeWorld, key: str, job: Job) -> str:
    rng: random.Random = world.rng
    while True:
        slot = rng.randrange(len(MODELS))
        home, rid = world.home(), f"{rng.getrandbits(128):032x}" + (f"s{slot}" if slot else "")
        try:
            claim = await home.claim("default", key, NAME, model=MODELS[slot], rid=rid, body="h")
            for _ in range(rng.choice([0, 0, 50])):
                await Turn()
            accepted = await home.accept(
                world.bus(claim.model), job, rid=claim.rid, claim=claim, idempotency=key, tenant_limits=AT_ONCE,
                prompt_tokens=7,
            )  # fmt: skip
            world.stats["found"] += not claim.mine
            return accepted.rid
        except Voided:
            world.stats["voided"] += 1
            try:
                await home.free(claim)
            except Crash:
                world.stats["client died"] += 1
        except Crash:
            world.stats["client died"] += 1
        except OutOfMemory:
            world.stats["refused: out of memory"] += 1
        except Overloaded:
            world.stats["at the limit"] += 1
        for _ in range(rng.randrange(60)):
            await Turn()


async def producer(world: HomeWorld) -> None:
    """Pushes under an id, now here, now there, until one was told; and without an id where no reply is lost."""
    rng = world.rng
    for index in range(PUSHES):
        job = Job(prompt="x", sampling=SamplingParams(max_tokens=3), results="res", id=f"p{index}")
        for _ in range(rng.choice([1, 1, 2])):
            while job.id not in world.pushed or rng.random() < 0.2:
                try:
                    await world.bus(rng.choice(MODELS)).push(encode(job))
                    world.pushed[job.id or ""] = job
                except Crash:
                    world.stats["producer died"] += 1
                except OutOfMemory:
                    world.stats["refused: out of memory"] += 1
                for _ in range(rng.randrange(60)):
                    await Turn()
        unnamed = encode(Job(prompt="x", sampling=SamplingParams(max_tokens=3), results="res"))
        with contextlib.suppress(redis.exceptions.OutOfMemoryError):
            world.plain.xadd(f"headrace:{{{rng.choice(MODELS[1:])}}}:jobs", {"job": unnamed})
            world.unnamed += 1
        world.draining = world.draining or index == PUSHES // 2


async def end(bus: Bus, epoch: int, rid: str, entry: str | None = None) -> None:
    record = await bus.read_request(rid)
    if record is not None and record.open:
        choices = range(record.job.choices)
        await bus.finish(epoch, [terminal_row(record, i, b"", "abort") for i in choices], entry_id=entry)


async def take(world: HomeWorld, bus: Bus, epoch: int, entry: InboxEntry) -> bool:
    """One entry of the inbox. False: a push whose tenant is at its limit, or which cannot be claimed now."""
    if entry.rid is not None:
        await end(bus, epoch, entry.rid, entry.entry_id)
        return True
    if world.draining and bus.keys.model == MODELS[-1]:
        await bus.divert(epoch, entry.entry_id)
        world.stats["diverted"] += 1
        return True
    job, home = msgspec.msgpack.decode(entry.payload or b"", type=Job), world.home()
    try:
        rid, held, claim = await claim_and_reserve(bus, home, job, 1)
    except Elsewhere:
        await bus.finish(epoch, [], entry_id=entry.entry_id)
        return True
    except (OutOfMemory, Overloaded):
        return False
    verdict, owner = await bus.admit(
        epoch, entry.entry_id, rid=rid, prompts=[b"abcd"], seed=1, job=job, reserved=held.tokens, origin=entry.origin
    )  # fmt: skip
    if owner != rid:
        await home.withdraw(bus, job.tenant, rid, held, claim)
    world.stats[f"push {verdict}"] += 1
    if verdict in ("new", "repeat"):
        await end(bus, epoch, owner)
    return verdict != "void"


async def leader(world: World, model: str) -> None:
    """Sweeps, ends what runs, settles and moves. Fenced by the next one at any time: `World.process` starts it
    again."""
    assert isinstance(world, HomeWorld)
    bus, home, settled = world.bus(model), world.home(), 0
    for _ in range(world.rng.randrange(1500)):  # else two would only depose each other
        await Turn()
    epoch = await bus.lead(f"{world.rng.getrandbits(64):x}", await bus.read_leader())
    waiting: list[InboxEntry] = []
    if epoch is not None:
        for rid in await bus.scan_live():
            record = await bus.read_request(rid)
            if record is not None and record.prompts:  # admitted: it has no entry any more
                await end(bus, epoch, rid)
    while epoch is not None:
        world.stats["freed"] += await sweep(home, bus, model)
        consumer = f"epoch-{epoch}"
        waiting += await bus.claim_jobs(consumer, 10) + await bus.read_jobs(consumer, 10, 0)
        waiting = [entry for entry in waiting if not await take(world, bus, epoch, entry)]
        settled = await settle(home, bus, model, epoch, settled)
        if bus.keys.shard:
            with contextlib.suppress(OutOfMemory):
                world.stats["moved"] += await move(bus, world.bus(MODELS[0]))
        for _ in range(world.rng.randrange(20)):
            await Turn()


def run_homes(url: str, seed: int, mutation: str | None = None) -> HomeWorld:
    """One run; ``wrong`` of the world says what did not hold."""
    patience, home_module.FIRST_LOOK_MS = home_module.FIRST_LOOK_MS, 0
    stranded, leader_module.STRANDED_MS = leader_module.STRANDED_MS, 0
    try:
        world = HomeWorld(url, seed, mutation)
        for number in range(4):
            world.add_client(client(world, number))
        world.add_client(producer(world))
        agents: list[Coroutine[Any, Any, None]] = [world.process(leader, model) for model in MODELS * 2]
        world.agents += [*agents, operator(world)]
        world.run()
    finally:
        home_module.FIRST_LOOK_MS, leader_module.STRANDED_MS = patience, stranded
    return world
