"""The actor that asks for workers: compares what should run with what runs, once a second.

Per model: schedulers, and as many workers as the rule says (rule.py). Workers are numbered as in a StatefulSet: the
lowest free number comes, the highest goes, drained. What runs on a node that will be taken away is drained, and what
takes its place is asked for at once. It keeps nothing but the rule's memory of the last minutes: after a restart it
finds all actors again by their names.
"""

from __future__ import annotations

import itertools
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any, Protocol

from headrace.ray.plan import Fleet, Model, Program, worker_of
from headrace.ray.process import State
from headrace.ray.rule import Scaler

TICK_S = 1.0


class Actors(Protocol):
    """What cluster.py offers."""

    def start(self, program: Program) -> None: ...
    def look(self) -> dict[str, State | None]: ...
    def leaving(self) -> set[str]: ...
    def drain(self, name: str) -> None: ...
    def kill(self, name: str) -> None: ...
    def forget_group(self, name: str) -> None: ...
    def doomed_nodes(self) -> set[str]: ...


class Control:
    """The comparison, by ``tick``."""

    def __init__(self, fleet: Fleet, actors: Actors) -> None:
        self.fleet = fleet
        self.actors = actors
        self.ending = False
        self.states: dict[str, State | None] = {}
        self.demand: dict[str, int | None] = {}
        self.leaving: set[str] = set()  # after the last tick
        self._scalers = {model.name: Scaler(model.scaling) for model in fleet.models}
        self._groups: set[str] = set()

    def tick(self, now: float) -> None:
        self.states = self.actors.look()
        self._leave_doomed_nodes()
        if self.ending:
            self._end()
        else:
            for program in self._services():
                if program.name not in self.states:
                    self._start(program)
        for model in self.fleet.models:
            workers = self._workers(model)
            if model.ranks > 1:
                self._drop_ranks(model, workers)
                self._keep_ranks(model, workers)
            if not self.ending:
                self._scale(model, workers, now)
        self.leaving = self.actors.leaving()

    def _services(self) -> Iterator[Program]:
        yield from self.fleet.gateways
        for model in self.fleet.models:
            yield from model.schedulers

    def _start(self, program: Program) -> None:
        self.states[program.name] = None
        self.actors.start(program)

    def _leave_doomed_nodes(self) -> None:
        doomed = self.actors.doomed_nodes()
        there = {worker_of(name) for name, state in self.states.items() if state is not None and state.node in doomed}
        for name in there & self.states.keys() - self.actors.leaving():
            self.actors.drain(name)

    # -------------------------------------------------------------- workers

    def _workers(self, model: Model) -> list[int]:
        """Numbers of its workers, those that leave too."""
        numbers = (model.number_of(name) for name in self.states)
        return sorted(number for number in numbers if number is not None)

    def _scale(self, model: Model, workers: list[int], now: float) -> None:
        leaving = self.actors.leaving()
        staying = [k for k in workers if model.worker(k).name not in leaving]
        demands = (self.states.get(program.name) for program in model.schedulers)
        demand = next((s.demand for s in demands if s is not None and s.demand is not None), None)
        self.demand[model.name] = demand
        wanted = self._scalers[model.name].wanted(now, demand, len(staying))
        free = (k for k in itertools.count() if k not in workers)
        for k in itertools.islice(free, max(0, wanted - len(staying))):
            self._start(model.worker(k))
        for k in staying[wanted:]:
            self.actors.drain(model.worker(k).name)

    def _drop_ranks(self, model: Model, workers: list[int]) -> None:
        """Ranks and groups of workers that have left: before a new worker takes the name."""
        names = {model.worker(k).name for k in workers}
        for name in list(self.states):
            if name.startswith(f"{model.name} worker-") and worker_of(name) not in names:
                self.actors.kill(name)
                del self.states[name]
                self._groups.add(worker_of(name))
        for group in {group for group in self._groups - names if group.startswith(f"{model.name} worker-")}:
            self.actors.forget_group(group)
            self._groups.discard(group)

    def _keep_ranks(self, model: Model, workers: list[int]) -> None:
        """The ranks of a worker follow it to where it listens."""
        for worker in map(model.worker, workers):
            self._groups.add(worker.group)
            state = self.states[worker.name]
            for rank in range(1, model.ranks) if state is not None else ():
                assert state is not None
                program = worker.as_rank(rank, state.rendezvous)
                there = self.states.get(program.name)
                if program.name not in self.states:
                    self._start(program)
                elif there is not None and there.rendezvous != state.rendezvous:  # the worker is on another node now
                    self.actors.kill(program.name)

    # -------------------------------------------------------------- end

    def _end(self) -> None:
        """As serve does: gateways drain, then workers, then schedulers."""
        models = self.fleet.models
        workers = [model.worker(k) for model in models for k in self._workers(model)]
        schedulers = [program for model in models for program in model.schedulers]
        for programs in (self.fleet.gateways, workers, schedulers):
            left = {program.name for program in programs} & self.states.keys()
            for name in left - self.actors.leaving():
                self.actors.drain(name)
            if left:
                return


class Controller:
    """The actor."""

    def __init__(self, fleet: Fleet) -> None:
        from headrace.ray.cluster import Cluster

        self._control = Control(fleet, Cluster(fleet.redis_url, fleet.drain_timeout))
        threading.Thread(target=self._watch, name="controller", daemon=True).start()

    def _watch(self) -> None:
        while True:
            try:
                self._control.tick(time.monotonic())
            except Exception:  # Ray's services may be away for a while; nothing is decided then
                traceback.print_exc()
            time.sleep(TICK_S)

    def describe(self) -> dict[str, Any]:
        """What runs, and each model's demand."""
        control = self._control
        return {"actors": dict(control.states), "leaving": control.leaving, "demand": dict(control.demand)}

    def end(self) -> None:
        """Drain everything; it is done when `describe` shows no actor."""
        self._control.ending = True
