"""The seeded model of claims: one idempotency key, several slots in which its request could run, and every fault.

Clients retry a key until they are told a rid and choose a slot at random each time, as gateways with an old and a new
table of aliases would. Sweepers are reckless: a claim is due at once. Whatever dies between any two calls, and however
late a call is executed, there is one request for each key in the end, all who asked were told its rid, and once the
requests are gone so are the claims.
"""

from __future__ import annotations

import random
from collections.abc import Coroutine
from typing import Any

from protocol.bus import HomeBus
from protocol.bus import home as home_module
from protocol.connection import OutOfMemory
from protocol.errors import Overloaded, Voided
from protocol.keys import HOME
from protocol.messages import Job
from scheduler.sweep import sweep
from tests.protocol.model.clients import draw_job, operator
from tests.protocol.model.link import Crash, ModelLink, Turn
from tests.protocol.model.world import World

MODELS = ("one", "two", "three")
NAME = "alias"
KEYS = 12  # of each client


class HomeWorld(World):
    def __init__(self, url: str, seed: int, mutation: str | None = None) -> None:
        super().__init__(url, seed, mutation)
        self.told: dict[str, set[str]] = {}  # key -> rids

    def home(self) -> HomeBus:
        made = HomeBus("unix:///model")
        made._link = ModelLink(self)  # type: ignore[assignment]
        made._scripts = self.scripts
        return made

    def at_rest(self) -> bool:
        return self.clients_left == 0

    def judge(self) -> None:
        owners: dict[str, set[str]] = {}
        for model in MODELS:
            for found in self.plain.scan_iter(f"headrace:{{{model}}}:r:*"):
                key = self.plain.hget(found, "idem").decode().rpartition(":")[2]
                owners.setdefault(key, set()).add(found.decode().rpartition(":")[2])
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
        if list(self.plain.scan_iter(f"{HOME}*")):
            self.wrong["a claim that is never freed"] += 1


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
        home, rid = world.home(), f"{rng.getrandbits(128):032x}"
        try:
            claim = await home.claim("default", key, NAME, model=rng.choice(MODELS), rid=rid, body="h")
            for _ in range(rng.choice([0, 0, 50])):
                await Turn()
            bus = world.bus(claim.model)
            accepted = await bus.accept(job, rid=claim.rid, idempotency=key, fingerprint="h", claimed=not claim.mine)
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
        except (OutOfMemory, Overloaded):
            world.stats["refused: out of memory"] += 1
        for _ in range(rng.randrange(60)):
            await Turn()


async def sweeper(world: World, model: str) -> None:
    assert isinstance(world, HomeWorld)
    while True:
        world.stats["freed"] += await sweep(world.home(), world.bus(model), model)
        for _ in range(world.rng.randrange(20)):
            await Turn()


def run_homes(url: str, seed: int, mutation: str | None = None) -> HomeWorld:
    """One run; ``wrong`` of the world says what did not hold."""
    patience, home_module.FIRST_LOOK_MS = home_module.FIRST_LOOK_MS, 0
    try:
        world = HomeWorld(url, seed, mutation)
        for number in range(4):
            world.add_client(client(world, number))
        agents: list[Coroutine[Any, Any, None]] = [world.process(sweeper, model) for model in MODELS]
        world.agents += [*agents, operator(world)]
        world.run()
    finally:
        home_module.FIRST_LOOK_MS = patience
    return world
