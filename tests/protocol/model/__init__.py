"""The seeded model of the protocol: the project's own Lua scripts and bus, on a real server, under every fault we know.

Agents (clients, producers, two schedulers, workers, a reader, an operator who fills the memory) are coroutines over
real `Bus` objects. Their link to the server is the model's: each call is a point where any other agent may run, where
the process may die before or after it, where the reply may be lost and the call repeated, and where a call that was
given up may still be executed much later. Everything is drawn from one seed, in one thread.

Sampled tokens are random, so a token generated twice shows as a conflict, and each carries a checksum of the one
before it, so a token that follows another context than its own shows too. The scheduler and the worker here are not
the project's: they are the smallest that use every operation, and they are reckless where the protocol promises to be
safe (moves without waiting for hints, several plans in flight, several steps in one commit). Blocks of KV are shared
by prefix as soon as they are planned, and rows that cannot be computed are dropped: whatever a row reads must be what
was written for just its prefix.

    python -m tests.protocol.model --seeds 500
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol.bus import leader as bus_module
from tests.protocol.model.clients import client, operator, producer, reader
from tests.protocol.model.link import AGENT_MUTATIONS
from tests.protocol.model.link import MUTATIONS as SCRIPT_MUTATIONS
from tests.protocol.model.scheduler import scheduler
from tests.protocol.model.worker import worker
from tests.protocol.model.world import World

__all__ = ["MUTATIONS", "Outcome", "run_seed"]
MUTATIONS = (*SCRIPT_MUTATIONS, *AGENT_MUTATIONS)
REQUESTS = 10  # of each client and producer


@dataclass
class Outcome:
    seed: int
    calls: int
    wrong: dict[str, int]
    stats: dict[str, int]


def run_seed(url: str, seed: int, mutation: str | None = None) -> Outcome:
    stranded = bus_module.STRANDED_MS
    bus_module.STRANDED_MS = 0  # no reads run beside each other here, and no time passes
    try:
        world = World(url, seed, mutation)
        for number in range(3):
            world.add_client(client(world, number, REQUESTS))
        world.add_client(producer(world, 3, REQUESTS))
        world.agents += [world.process(scheduler, name) for name in ("sA", "sB")]
        world.agents += [world.process(worker, wid) for wid in ("w0", "w1")]
        world.agents += [reader(world), operator(world)]
        world.run()
    finally:
        bus_module.STRANDED_MS = stranded
    return Outcome(seed, world.calls, dict(world.wrong), dict(world.stats))
