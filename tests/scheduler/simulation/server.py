"""A model of the scripts: fences, placements, cursors. Each method is one atomic operation."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field, replace

from protocol.messages import CLOSED, LANDED, STALE, Capacity, Plan
from scheduler.core.events import Arrive, Cancel, ChoiceState, StepDone
from tests.scheduler.simulation.tokens import frame_bytes


class Violation(AssertionError):
    """The core, or this model, broke a promise."""


class Fenced(Exception):
    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


@dataclass
class Choice:
    output: list[int] = field(default_factory=list)
    cursor: int = 0
    placement: int = 0
    finish: str | None = None
    terminals: int = 0


@dataclass
class Record:
    event: Arrive
    choices: list[Choice]
    attempts: int = 0
    cancel: str | None = None
    dead: bool = False


@dataclass
class CommitRow:
    rid: str
    choice: int
    placement: int
    cursor: int
    frames: list[tuple[int | None, str | None]]


@dataclass
class Worker:
    gen: int = 0
    state: str = "loading"
    capacity: Capacity | None = None
    plans: list[Plan] = field(default_factory=list)
    retired: bool = True


class Server:
    """The scripts' meaning: fences, placements, cursors. Each method is one atomic operation."""

    def __init__(self) -> None:
        self.epoch = 0
        self.gens = 0
        self.records: dict[str, Record] = {}
        self.workers: dict[str, Worker] = {}
        self.events: list[StepDone | Cancel | str] = []

    def fence(self, epoch: int, wid: str | None = None, gen: int = 0) -> None:
        if epoch != self.epoch:
            raise Fenced("epoch")
        if wid is not None and (self.workers[wid].gen != gen or self.workers[wid].retired):
            raise Fenced("gen")

    def register(self, wid: str, capacity: Capacity) -> int:
        self.gens += 1
        self.workers[wid] = Worker(self.gens, "serving", capacity, [], False)
        self.events.append(wid)
        return self.gens

    def plan(self, epoch: int, wid: str, gen: int, plan: Plan) -> None:
        self.fence(epoch, wid, gen)
        for new in plan.new:
            choice = self.records[new.rid].choices[new.choice]
            if new.placement <= choice.placement:
                raise Violation("a placement was used before: a row of the earlier stay could pass for one of this")
            choice.placement = new.placement
        self.workers[wid].plans.append(plan)

    def append(self, row: CommitRow) -> str:
        choice = self.records[row.rid].choices[row.choice]
        if choice.finish is not None:
            return CLOSED
        if choice.placement != row.placement or choice.cursor != row.cursor:
            return STALE
        for token, finish in row.frames:
            if token is not None:
                choice.output.append(token)
            choice.cursor += frame_bytes(token, finish)
            if finish is not None:
                choice.finish = finish
                choice.terminals += 1
        return LANDED

    def commit(self, epoch: int, wid: str, gen: int, rows: list[CommitRow], event: StepDone) -> str:
        self.fence(epoch, wid, gen)
        verdicts = "".join(self.append(row) for row in rows)
        if verdicts.strip(LANDED):
            event = replace(event, verdicts=verdicts)
        self.events.append(event)
        return verdicts

    def finish(self, epoch: int, row: CommitRow, dead: bool) -> str:
        self.fence(epoch)
        verdict = self.append(row)
        if verdict == LANDED and dead:
            self.records[row.rid].dead = True
        return verdict

    def retire(self, epoch: int, wid: str, gen: int, attempts: list[str]) -> None:
        self.fence(epoch)
        worker = self.workers[wid]
        if worker.gen == gen:
            worker.retired = True
            worker.plans.clear()
        for rid in attempts:
            self.records[rid].attempts += 1

    def state(self, rid: str, choice: int) -> ChoiceState:
        c = self.records[rid].choices[choice]
        return ChoiceState(array("i", c.output), c.cursor, c.placement, c.finish)
