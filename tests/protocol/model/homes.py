"""The seeded model of the home slot: one idempotency key, several slots in which its request could run, a tenant that
may have a few requests at once, and every fault.

Clients retry a key until they are told a rid and choose a slot at random each time, as gateways with an old and a new
table of aliases would. Sweepers are reckless: a claim is due at once. Whatever dies between any two calls, and however
late a call is executed, there is one request for each key in the end, all who asked were told its rid, and once the
requests are gone so are the claims. Requests are accepted under reservations and ended by leaders: never run more of a
tenant's requests than it may have, over all slots, and nothing stays reserved.
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
from protocol.records import TenantLimits
from scheduler.recovery import terminal_row
from scheduler.sweep import settle, sweep
from tests.protocol.model.clients import draw_job, operator
from tests.protocol.model.link import Crash, ModelLink, Turn
from tests.protocol.model.world import World

MODELS = ("one", "two", "three")
NAME = "alias"
KEYS = 8  # of each client
AT_ONCE = TenantLimits(concurrent=5, tokens_per_minute=10**9)


class HomeWorld(World):
    def __init__(self, url: str, seed: int, mutation: str | None = None) -> None:
        super().__init__(url, seed, mutation)
        self.told: dict[str, set[str]] = {}  # key -> rids
        self.counted_at = 0  # calls when open requests were counted last

    def home(self) -> HomeBus:
        made = HomeBus("unix:///model")
        made._link = ModelLink(self)  # type: ignore[assignment]
        made._scripts = self.scripts
        made.slot = self.bus  # type: ignore[method-assign]
        return made

    def at_rest(self) -> bool:
        return self.clients_left == 0 and not any(self.open_requests())

    def open_requests(self) -> list[int]:
        return [self.plain.hlen(f"headrace:{{{model}}}:live") for model in MODELS]

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
        left = {key.decode().removeprefix(HOME) for key in self.plain.scan_iter(f"{HOME}*")}
        if left - {"settled", "t:default"}:
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
        home, rid = world.home(), f"{rng.getrandbits(128):032x}"
        try:
            claim = await home.claim("default", key, NAME, model=rng.choice(MODELS), rid=rid, body="h")
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


async def leader(world: World, model: str) -> None:
    """Sweeps, ends what runs, and settles. Fenced by the next one at any time: `World.process` starts it again."""
    assert isinstance(world, HomeWorld)
    bus, home, settled = world.bus(model), world.home(), 0
    epoch = await bus.lead(f"{world.rng.getrandbits(64):x}", await bus.read_leader())
    while epoch is not None:
        world.stats["freed"] += await sweep(home, bus, model)
        for entry in await bus.claim_jobs(f"epoch-{epoch}", 10) + await bus.read_jobs(f"epoch-{epoch}", 10, 0):
            record = await bus.read_request(entry.rid or "")
            if record is not None and record.open:
                choices = range(record.job.choices)
                await bus.finish(
                    epoch, [terminal_row(record, i, b"", "abort") for i in choices], entry_id=entry.entry_id
                )
        settled = await settle(home, bus, model, epoch, settled)
        for _ in range(world.rng.randrange(20)):
            await Turn()


def run_homes(url: str, seed: int, mutation: str | None = None) -> HomeWorld:
    """One run; ``wrong`` of the world says what did not hold."""
    patience, home_module.FIRST_LOOK_MS = home_module.FIRST_LOOK_MS, 0
    try:
        world = HomeWorld(url, seed, mutation)
        for number in range(4):
            world.add_client(client(world, number))
        agents: list[Coroutine[Any, Any, None]] = [world.process(leader, model) for model in MODELS * 2]
        world.agents += [*agents, operator(world)]
        world.run()
    finally:
        home_module.FIRST_LOOK_MS = patience
    return world
