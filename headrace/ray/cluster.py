"""The Ray cluster as the controller sees it: named actors that each keep one process. The only file that calls Ray for
them.

All actors are detached, so they outlive whoever started them, and are found again by their names. Ray restarts those
whose node or process is lost. Each call is sent and its answer collected later: no actor that does not answer delays
the others.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError
from ray.util.placement_group import get_placement_group, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from headrace.ray.plan import Program
from headrace.ray.process import Process, State

NAMESPACE = "headrace"
CONTROLLER = "controller"
FRESH_S = 10.0  # an answer that is older tells nothing


@dataclass
class Actor:
    handle: Any
    asked: Any = None  # its answer to state() is under way
    state: State | None = None
    heard: float = 0.0  # monotonic seconds
    leaving: Any = None  # its answer to drain() is under way


class Cluster:
    def __init__(self, redis_url: str, drain_timeout: float) -> None:
        self._redis_url = redis_url
        self._drain_timeout = drain_timeout
        names = [name for name in ray.util.list_named_actors() if name != CONTROLLER]
        self._actors = {name: Actor(ray.get_actor(name)) for name in names}

    def start(self, program: Program) -> None:
        """Ask for an actor. It comes when there is room for it; a cluster that can grow does so for those that wait."""
        where: Any = "SPREAD"
        if program.group:
            group = self._group(program)
            where = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=program.rank)
        actor = ray.remote(Process).options(
            name=program.name, lifetime="detached", max_restarts=-1, max_concurrency=8,
            num_cpus=program.cpus, num_gpus=program.gpus, scheduling_strategy=where,
        )  # fmt: skip
        self._actors[program.name] = Actor(actor.remote(program, self._redis_url))

    def _group(self, program: Program) -> Any:
        """Ranks of a worker: on one node if they fit."""
        if not program.rank:
            self.forget_group(program.group)
            bundle = {"CPU": program.cpus} | ({"GPU": program.gpus} if program.gpus else {})
            placement_group([bundle] * program.ranks, strategy="PACK", name=program.group, lifetime="detached")
        return get_placement_group(program.group)

    def look(self) -> dict[str, State | None]:
        """Every actor, with what it said last; None: it has not said anything for a while."""
        now = time.monotonic()
        for name, actor in list(self._actors.items()):
            if actor.leaving is not None and _ready(actor.leaving):
                self._left(name, actor)
                continue
            if actor.asked is None:
                actor.asked = actor.handle.state.remote()
            elif _ready(actor.asked):
                try:
                    actor.state, actor.heard = ray.get(actor.asked), now
                except ActorDiedError:
                    actor.state = None
                    if name not in ray.util.list_named_actors():  # it could not be made, and is not tried again
                        del self._actors[name]
                        continue
                except RayError:  # it is being restarted
                    actor.state = None
                actor.asked = None
            if actor.state is not None and actor.state.leaving and actor.leaving is None:
                self.drain(name)  # another controller has asked it to leave
        return {n: a.state if now - a.heard < FRESH_S else None for n, a in self._actors.items()}

    def leaving(self) -> set[str]:
        return {name for name, actor in self._actors.items() if actor.leaving is not None}

    def drain(self, name: str) -> None:
        """Let a process end as it would on SIGTERM, then its actor. One that does not answer has none, or none that can
        be reached: it goes at once."""
        actor = self._actors[name]
        if actor.state is None:
            self.kill(name)
        else:
            actor.leaving = actor.handle.drain.remote(self._drain_timeout)

    def _left(self, name: str, actor: Actor) -> None:
        try:
            ray.get(actor.leaving)
        except RayError:  # its node was lost meanwhile, and Ray has begun to start it again
            pass
        self.kill(name)

    def kill(self, name: str) -> None:
        ray.kill(self._actors.pop(name).handle)

    def forget_group(self, name: str) -> None:
        try:
            remove_placement_group(get_placement_group(name))
        except ValueError:
            pass

    def doomed_nodes(self) -> set[str]:
        """Nodes that will be taken away: Ray was told so, by a cloud's notice or `ray drain-node`."""
        return set(ray._private.state.state.get_draining_nodes())


def _ready(answer: Any) -> bool:
    return bool(ray.wait([answer], timeout=0)[0])
