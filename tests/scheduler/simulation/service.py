"""The scheduler service's part in the simulation: events to the core in order, effects out, each at its own moment."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from protocol.messages import STALE, Plan
from scheduler.core.events import (
    Arrive,
    Cancel,
    ChoiceEnded,
    Effect,
    Event,
    FinishChoice,
    ReleaseWorker,
    RequestDone,
    Resync,
    Resynced,
    SendPlan,
    StepDone,
    WorkerDraining,
    WorkerLost,
    WorkerServing,
)
from scheduler.core.scheduler import Core
from tests.scheduler.simulation.server import CommitRow, Fenced, Violation

if TYPE_CHECKING:
    from tests.scheduler.simulation.world import World


class SimScheduler:
    """The service's part: events in order, effects out, each call of its own moment."""

    def __init__(self, world: World) -> None:
        self.world = world
        server = world.server
        server.epoch += 1
        self.epoch = server.epoch
        self.core = Core(world.config)
        self.outbox: dict[str, deque[Plan]] = {}
        self.todo: list[Callable[[], None]] = []
        self.known: dict[str, tuple[int, str]] = {}  # wid -> gen, state told
        self.read = len(server.events)
        for rid, record in server.records.items():
            if any(choice.finish is None for choice in record.choices):
                self.meet(rid, recovered=True)
                if record.cancel:
                    self.apply(Cancel(rid, record.cancel))
        self.look()

    def meet(self, rid: str, recovered: bool = False) -> None:
        record = self.world.server.records[rid]
        event = record.event
        if recovered:
            states = [self.world.server.state(rid, k) for k in range(len(record.choices))]
            event = Arrive(**{**event.__dict__, "choices": states, "attempts": record.attempts})
        self.apply(event)

    def apply(self, event: Event) -> None:
        self.run(self.core.apply(event, self.world.now))
        if self.world.turns % self.world.check_every == 0:
            self.core.check_integrity()

    def plan(self) -> None:
        self.run(self.core.plan(self.world.now))
        if self.world.turns % self.world.check_every == 0:
            self.core.check_integrity()

    def run(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case SendPlan(wid, plan):
                    plan.epoch = self.epoch
                    self.outbox.setdefault(f"{wid}:{plan.gen}", deque()).append(plan)
                case FinishChoice():
                    self.todo.append(lambda e=effect: self.finish(e))
                case Resync(rid, choice):
                    self.world.count["resync"] += 1
                    self.todo.append(lambda r=rid, c=choice: self.resync(r, c))
                case ReleaseWorker(wid, gen):
                    self.world.count["released"] += 1
                    self.todo.append(lambda w=wid, g=gen: self.lose(w, g, died=False))
                case RequestDone():
                    self.world.done(self, effect)

    # -------------------------------------------------------------- turns

    def turn(self) -> None:
        """One thing of: read an event, send a plan, finish a choice, look at the workers, plan."""
        rng, server = self.world.rng, self.world.server
        kind = rng.random()
        if kind < 0.35 and self.read < len(server.events):
            event = server.events[self.read]
            self.read += 1
            if isinstance(event, str):
                self.look()
            elif isinstance(event, Cancel):
                self.apply(event)
            else:
                self.hint(event)
        elif kind < 0.6 and any(self.outbox.values()):
            self.send(rng.choice([key for key, plans in self.outbox.items() if plans]))
        elif kind < 0.7 and self.todo:
            self.todo.pop(rng.randrange(len(self.todo)))()
        else:
            self.plan()

    def hint(self, event: StepDone) -> None:
        chance = self.world.rng.random()
        planned_step = max(
            (p.step for p in self.world.server.workers[event.wid].plans if p.epoch == self.epoch), default=0
        )
        if chance < self.world.hint_loss and event.step < planned_step:  # another follows, which shows the gap
            self.world.count["lost hints"] += 1
            return
        self.apply(event)
        if chance > 0.97:
            self.apply(event)

    def send(self, key: str) -> None:
        wid, gen = key.split(":")
        plan = self.outbox[key].popleft()
        try:
            self.world.server.plan(self.epoch, wid, int(gen), plan)
        except Fenced as fenced:
            self.outbox[key].clear()
            if fenced.cause == "epoch":
                raise

    def finish(self, effect: FinishChoice) -> None:
        state = self.world.server.state(effect.rid, effect.choice)
        if state.finish is not None:
            self.apply(ChoiceEnded(effect.rid, effect.choice))
            return
        row = CommitRow(effect.rid, effect.choice, effect.placement, effect.cursor, [(None, effect.reason)])
        if self.world.server.finish(self.epoch, row, effect.dead) == STALE:
            raise Violation(f"{effect.rid}: finished in the wrong place")
        self.world.finishes[effect.rid, effect.choice] = effect
        self.apply(ChoiceEnded(effect.rid, effect.choice))

    def resync(self, rid: str, choice: int) -> None:
        self.apply(Resynced(rid, choice, self.world.server.state(rid, choice)))

    def look(self) -> None:
        """Tell the core about registrations and drains."""
        for wid, worker in self.world.server.workers.items():
            gen, told = self.known.get(wid, (0, ""))
            if gen and gen != worker.gen:
                self.lose(wid, gen, died=True)
                gen, told = 0, ""
            if worker.retired or (gen, told) == (worker.gen, worker.state):
                continue
            self.known[wid] = (worker.gen, worker.state)
            assert worker.capacity is not None
            if not told:
                self.apply(WorkerServing(wid, worker.gen, worker.capacity))
            if worker.state == "draining":
                self.apply(WorkerDraining(wid, worker.gen))

    def lose(self, wid: str, gen: int, died: bool) -> None:
        """Fence, read, tell."""
        if self.known.get(wid, (0, ""))[0] != gen:
            return
        self.world.server.retire(self.epoch, wid, gen, self.core.rids_in_flight(wid) if died else [])
        states = {key: self.world.server.state(*key) for key in self.core.sequences_on(wid)}
        if states and self.world.rng.random() < 0.1:
            states.pop(next(iter(states)))  # placed there while the journals were read
        del self.known[wid]
        self.apply(WorkerLost(wid, gen, states, died))
