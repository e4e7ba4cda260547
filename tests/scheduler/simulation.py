"""A deterministic world for the scheduler's core: simulated workers, and a model of what the scripts promise.

    python -m tests.scheduler.simulation --seeds 5000

One seed is one history: arrivals, cancels, deadlines, workers that die, hang, drain and come back, late, lost and
repeated hints, schedulers replaced in mid-flight, requests that kill whoever runs them. It is a pure function of the
seed, so a failure can be replayed (``--seed N --verbose``).

What keeps the core honest is that the workers really keep a KV pool: every slot holds a hash of the whole prefix
that ended there, a token is drawn from that hash, and reading a slot that another sequence has overwritten, or that was
never written, fails at once. At the end every journal must be what an undisturbed run would have made of it.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from protocol.messages import CLOSED, LANDED, STALE, Capacity, HintRow, NewSequence, Plan, pack_ids, unpack_ids
from protocol.sampling import SamplingParams
from scheduler.core import Core, CoreConfig
from scheduler.events import (
    Arrive,
    Cancel,
    ChoiceEnded,
    ChoiceState,
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
from tests.factories import capacity, rows

STOP = 13  # tokens divisible by it end a sequence
START = b"start"


class Violation(AssertionError):
    """The core, or this model, broke a promise."""


class Fenced(Exception):
    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


def chain(parent: bytes, token: int) -> bytes:
    return hashlib.blake2b(parent + token.to_bytes(4, "little"), digest_size=8).digest()


def draw(prefix: bytes, seed: int, choice: int) -> int:
    """The next token: fixed by all tokens before it, the seed and the choice."""
    digest = hashlib.blake2b(prefix + bytes([seed, choice]), digest_size=4).digest()
    return int.from_bytes(digest, "little") % 500 + 1


def undisturbed(prompt: array[int], max_tokens: int, seed: int, choice: int) -> tuple[list[int], str]:
    prefix = START
    for token in prompt:
        prefix = chain(prefix, token)
    output: list[int] = []
    while True:
        token = draw(prefix, seed, choice)
        output.append(token)
        prefix = chain(prefix, token)
        if token % STOP == 0:
            return output, "stop"
        if len(output) == max_tokens:
            return output, "length"


def frame_bytes(token: int | None, finish: str | None) -> int:
    """Frames differ in length: a cursor is not a count."""
    return 3 + (token or 0) % 4 + (7 if finish else 0)


# ------------------------------------------------------------------ the server


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
            self.records[new.rid].choices[new.choice].placement = new.placement
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
            event = StepDone(wid, gen, event.step, event.rows, event.exec_us, event.idle_us, verdicts)
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


# ------------------------------------------------------------------ a worker


@dataclass
class Seat:
    new: NewSequence
    ids: list[int]
    table: list[int]
    computed: int
    cursor: int
    prefixes: list[bytes]  # prefixes[k] is the hash of ids[:k + 1]
    ended: bool = False


class SimWorker:
    """Runs plans in order over a KV pool that knows what it holds; commits by batches."""

    def __init__(self, world: World, wid: str, size: Capacity) -> None:
        self.world = world
        self.wid = wid
        self.size = size
        self.up = False
        self.wake_at = 0
        self.start()

    def start(self) -> None:
        self.gen = self.world.server.register(self.wid, self.size)
        self.epoch = self.world.server.epoch
        self.draining = False
        self.up = True
        self.clear()

    def clear(self) -> None:
        """A new epoch or gen: no seats, no KV, no steps."""
        self.seats: dict[int, Seat] = {}
        self.pool: dict[int, bytes] = {}
        self.step = 0
        self.batch: list[tuple[CommitRow, int]] = []  # row, seat
        self.batch_step = 0

    def kill(self) -> None:
        self.up = False

    def turn(self) -> None:
        """One thing of: run a step, commit, come back to life."""
        server, rng = self.world.server, self.world.rng
        if not self.up:
            self.start()
            return
        if self.batch_step and (rng.random() < 0.5 or self.next_plan() is None):
            self.commit()
            return
        plan = self.next_plan()
        if plan is not None:
            if plan.epoch > self.epoch:
                self.clear()
                self.epoch = plan.epoch
            self.execute(plan)
        elif server.epoch > self.epoch:
            self.clear()
            self.epoch = server.epoch
        elif server.workers[self.wid].retired or server.workers[self.wid].gen != self.gen:
            self.start()  # its pulse is fenced

    def next_plan(self) -> Plan | None:
        for plan in self.world.server.workers[self.wid].plans:
            if plan.gen == self.gen and (
                plan.epoch > self.epoch or (plan.epoch == self.epoch and plan.step > self.step)
            ):
                return plan
        return None

    def commit(self) -> None:
        batch, self.batch = self.batch, []
        event = StepDone(
            self.wid,
            self.gen,
            self.batch_step,
            [
                HintRow(
                    seat,
                    pack_ids([token for token, _ in row.frames if token is not None]),
                    row.cursor + sum(frame_bytes(*frame) for frame in row.frames),
                    row.frames[-1][1],
                )
                for row, seat in batch
            ],
            exec_us=self.world.rng.choice((0, 500, 2000, 20000)),
            idle_us=self.world.rng.choice((0, 0, 300)),
        )
        self.batch_step = 0
        try:
            verdicts = self.world.server.commit(self.epoch, self.wid, self.gen, [row for row, _ in batch], event)
        except Fenced as fenced:
            if fenced.cause == "gen":
                self.start()
            else:
                self.clear()
                self.epoch += 1
            return
        for (row, number), verdict in zip(batch, verdicts, strict=True):
            if verdict != LANDED:
                seat = self.seats.get(number)
                if seat is not None and seat.new.placement == row.placement and seat.new.rid == row.rid:
                    seat.ended = True
                self.batch = [kept for kept in self.batch if kept[1] != number]

    # -------------------------------------------------------------- one step

    def execute(self, plan: Plan) -> None:
        if plan.step != self.step + 1:
            raise Violation(f"step {plan.step} follows {self.step}")
        self.step = self.batch_step = plan.step
        work = rows(plan)
        if self.poisoned(plan, work):
            self.kill()
            return
        for number in plan.frees:
            if self.seats.pop(number, None) is None:
                raise Violation("a seat was freed twice")
        for new in plan.new:
            self.meet(new)
        for number, blocks in plan.blocks:
            self.seats[number].table += unpack_ids(blocks)
        self.check_size(plan, work)
        for number, (count, _) in work.items():
            self.write(self.seats[number], count)
        for number, (_, samples) in work.items():
            self.read(self.seats[number])
            if samples:
                self.sample(number, self.seats[number])
            elif self.seats[number].computed >= len(self.seats[number].ids):
                raise Violation("a finished prefill does not sample")
        for number, reason in plan.ends:
            seat = self.seats.pop(number, None)
            if seat is None:
                raise Violation("the end of an empty seat")
            if not seat.ended:
                self.add(number, seat, None, reason)

    def poisoned(self, plan: Plan, work: dict[int, tuple[int, bool]]) -> bool:
        rids = {new.seat: new.rid for new in plan.new}
        for number in work:
            rid = rids.get(number) or self.seats[number].new.rid
            if rid in self.world.poison:
                self.world.note("poison", rid, len(work))
                return True
        return False

    def check_size(self, plan: Plan, work: dict[int, tuple[int, bool]]) -> None:
        if sum(count for count, _ in work.values()) > self.size.max_num_batched_tokens:
            raise Violation("over the token budget")
        if len(work) > self.size.max_num_seqs or any(number >= 2 * self.size.max_num_seqs for number in self.seats):
            raise Violation("over the number of sequences")

    def meet(self, new: NewSequence) -> None:
        if new.seat in self.seats:
            raise Violation("a seat is taken twice")
        ids = list(unpack_ids(new.token_ids))
        assert new.sampling.max_tokens is not None
        if len(ids) >= new.prompt_len + new.sampling.max_tokens or new.computed >= len(ids):
            raise Violation("nothing to compute")
        prefixes = []
        prefix = START
        for token in ids:
            prefix = chain(prefix, token)
            prefixes.append(prefix)
        table = list(unpack_ids(new.block_table))
        self.seats[new.seat] = Seat(new, ids, table, new.computed, new.cursor, prefixes)

    def slot(self, seat: Seat, position: int) -> int:
        size = self.size.pools[0].unit_tokens
        return seat.table[position // size] * size + position % size

    def write(self, seat: Seat, count: int) -> None:
        if seat.computed + count > len(seat.ids):
            raise Violation("a row past the known tokens")
        for position in range(seat.computed, seat.computed + count):
            self.pool[self.slot(seat, position)] = seat.prefixes[position]
        seat.computed += count

    def read(self, seat: Seat) -> None:
        """Attention over all computed tokens. A row past a stop may read anything: it is thrown away."""
        if seat.ended:
            return
        for position in range(seat.computed):
            if self.pool.get(self.slot(seat, position)) != seat.prefixes[position]:
                raise Violation(f"{seat.new.rid}: wrong KV at position {position}")

    def sample(self, number: int, seat: Seat) -> None:
        if seat.computed != len(seat.ids):
            raise Violation("sampled before its tokens were computed")
        new = seat.new
        token = draw(seat.prefixes[-1], new.seed, new.choice)
        seat.ids.append(token)
        seat.prefixes.append(chain(seat.prefixes[-1], token))
        if seat.ended:
            return
        output = len(seat.ids) - new.prompt_len
        assert new.sampling.max_tokens is not None
        finish = "stop" if token % STOP == 0 else "length" if output == new.sampling.max_tokens else None
        if output > new.sampling.max_tokens:
            raise Violation("a row past max_tokens")
        self.add(number, seat, token, finish)

    def add(self, number: int, seat: Seat, token: int | None, finish: str | None) -> None:
        for row, other in self.batch:
            if other == number and row.placement == seat.new.placement and row.rid == seat.new.rid:
                row.frames.append((token, finish))
                break
        else:
            new = seat.new
            self.batch.append((CommitRow(new.rid, new.choice, new.placement, seat.cursor, [(token, finish)]), number))
        seat.cursor += frame_bytes(token, finish)
        seat.ended = finish is not None


# ------------------------------------------------------------------ a scheduler


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
        lane_step = max(
            (p.step for p in self.world.server.workers[event.wid].plans if p.epoch == self.epoch), default=0
        )
        if chance < self.world.hint_loss and event.step < lane_step:  # another follows, which shows the gap
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


# ------------------------------------------------------------------ the world


class World:
    def __init__(self, seed: int, verbose: bool = False, check_every: int = 8) -> None:
        self.rng = rng = Random(seed)
        self.verbose = verbose
        self.now = 0.0
        self.turns = 0
        self.check_every = check_every
        self.server = Server()
        self.count: Counter[str] = Counter()
        self.finishes: dict[tuple[str, int], FinishChoice] = {}
        self.poison: set[str] = set()
        self.hint_loss = rng.choice((0.0, 0.0, 0.03))
        self.fault = rng.choice((0.0, 0.0, 0.003, 0.01))
        self.config = CoreConfig(
            max_num_batched_tokens=rng.choice((None, 16, 5)),
            aging_s=rng.choice((0.3, 30.0)),
            plans_ahead=rng.choice((1, 2, 5)),
        )
        self.to_come = [self.request(k) for k in range(rng.randint(3, 10))]
        if rng.random() < 0.3:
            self.poison.add(rng.choice(self.to_come).rid)
        size = capacity(
            blocks=rng.choice((10, 14, 40)),
            seqs=rng.choice((2, 4, 8)),
            tokens=rng.choice((8, 16, 64)),
            model_len=rng.choice((30, 36)),
        )
        self.workers = [SimWorker(self, f"w{k}", size) for k in range(rng.randint(1, 3))]
        self.limit = min(size.max_model_len, size.pools[0].units * size.pools[0].unit_tokens)
        self.schedulers = [SimScheduler(self)]

    def request(self, k: int) -> Arrive:
        rng = self.rng
        shared = list(range(1, 13))
        n = rng.choice((1, 1, 2))
        prompts = [
            array("i", shared[: rng.choice((0, 0, 8, 12))] + [rng.randint(100, 102) for _ in range(rng.randint(1, 12))])
            for _ in range(rng.choice((1, 1, 2)))
        ]
        return Arrive(
            rid=f"r{k}",
            tenant=rng.choice("ab"),
            priority=rng.choice(("interactive", "standard", "batch")),
            prompts=prompts,
            sampling=SamplingParams(max_tokens=rng.choice((None, 1, 2, 8, 12, 40)), n=n),
            seed=rng.randint(0, 255),
            arrived=0.0,
            deadline=rng.uniform(0.2, 3.0) if rng.random() < 0.1 else None,
        )

    def note(self, *what: object) -> None:
        self.count[str(what[0])] += 1
        if self.verbose:
            print(f"{self.turns:6d} {self.now:8.3f}", *what)

    def done(self, scheduler: SimScheduler, effect: RequestDone) -> None:
        if scheduler.epoch < self.server.epoch:
            return  # deposed, it may take a newer reign's hints for its own: nothing that it writes will land
        record = self.server.records[effect.rid]
        if any(choice.finish is None for choice in record.choices):
            raise Violation(f"{effect.rid}: done before its choices ended")
        self.count["done"] += 1

    # -------------------------------------------------------------- one turn

    def turn(self, faults: bool) -> None:
        rng = self.rng
        self.turns += 1
        self.now += rng.choice((0.0001, 0.001, 0.005))
        if faults and rng.random() < self.fault:
            self.break_something()
        if self.to_come and rng.random() < 0.05:
            self.arrival()
        elif rng.random() < 0.004:
            self.cancel()
        actor = rng.randrange(len(self.workers) + 2)
        if actor < len(self.workers):
            worker = self.workers[actor]
            if worker.wake_at <= self.turns:
                worker.turn()
        else:
            self.scheduler_turn()

    def scheduler_turn(self) -> None:
        """The leader's, or one of a deposed one that does not know it yet: its next call is its last."""
        scheduler = self.rng.choice(self.schedulers)
        try:
            scheduler.turn()
        except Fenced:
            self.schedulers.remove(scheduler)

    def arrival(self) -> None:
        event = self.to_come.pop()
        event = Arrive(
            **{**event.__dict__, "arrived": self.now, "deadline": event.deadline and self.now + event.deadline}
        )
        self.server.records[event.rid] = Record(event, [Choice() for _ in range(len(event.prompts) * event.sampling.n)])
        self.schedulers[-1].meet(event.rid)

    def cancel(self) -> None:
        rids = list(self.server.records)
        if rids:
            rid = self.rng.choice(rids)
            self.server.records[rid].cancel = "abort"
            self.server.events.append(Cancel(rid))
            self.note("cancel", rid)

    def break_something(self) -> None:
        rng = self.rng
        worker = rng.choice(self.workers)
        what = rng.choice(("kill", "kill", "hang", "drain", "takeover", "false alarm"))
        self.note(what, worker.wid)
        if what == "kill":
            worker.kill()
            worker.wake_at = self.turns + rng.choice((0, 50))
        elif what == "hang":
            worker.wake_at = self.turns + 80
        elif what == "takeover":
            self.take_over()
        elif what == "drain":
            self.drain(worker)
        elif what == "false alarm":
            self.lose(worker)
        if what in ("kill", "hang") and rng.random() < 0.6:
            self.lose(worker)

    def take_over(self) -> None:
        """A new leader; the old one does not know yet."""
        self.schedulers = [self.schedulers[-1], SimScheduler(self)]

    def drain(self, worker: SimWorker) -> None:
        record = self.server.workers[worker.wid]
        if not record.retired:
            record.state = "draining"
            self.server.events.append(worker.wid)

    def lose(self, worker: SimWorker) -> None:
        """The leader takes it for dead, rightly or not."""
        leader = self.schedulers[-1]
        gen, _ = leader.known.get(worker.wid, (0, ""))
        if gen:
            leader.lose(worker.wid, gen, died=True)

    # -------------------------------------------------------------- the end

    def at_rest(self) -> bool:
        return (
            not self.to_come
            and all(c.finish is not None for r in self.server.records.values() for c in r.choices)
            and self.schedulers[-1].core.stats().requests == 0
            and self.schedulers[-1].read == len(self.server.events)
            and not any(self.schedulers[-1].outbox.values())
            and all(w.up and w.next_plan() is None and not w.batch_step for w in self.workers)
        )

    def run(self, most_turns: int = 30000, faulty_turns: int = 2500) -> None:
        while not self.at_rest():
            self.turn(faults=self.turns < faulty_turns)
            if self.turns > most_turns:
                raise Violation("starved")
        self.check_end()

    def check_end(self) -> None:
        for rid, record in self.server.records.items():
            for k, choice in enumerate(record.choices):
                self.check_choice(rid, record, k, choice)
        core = self.schedulers[-1].core
        core.check_integrity()
        stats = core.stats()
        self.count["preemptions"] += stats.counters.preemptions
        self.count["prefix hits"] += stats.counters.prefix_hits
        if stats.running or stats.waiting or any(worker.blocks_used for worker in stats.workers.values()):
            raise Violation("not everything was given back")

    def check_choice(self, rid: str, record: Record, k: int, choice: Choice) -> None:
        event = record.event
        prompt = event.prompts[k // event.sampling.n]
        if choice.terminals != 1:
            raise Violation(f"{rid}:{k}: {choice.terminals} ends")
        room = self.limit - len(prompt)
        asked = event.sampling.max_tokens
        final = self.finishes.get((rid, k))
        if room < 1 or (asked is not None and asked > room):
            if choice.output or (choice.finish == "error") != (final is not None and final.error_code is not None):
                raise Violation(f"{rid}:{k}: should not fit")
            return
        output, reason = undisturbed(prompt, asked or room, event.seed, k)
        self.count[choice.finish or ""] += 1
        if choice.finish in ("stop", "length"):
            if rid in self.poison:
                raise Violation(f"{rid}:{k}: ran without killing its worker")
            if (choice.output, choice.finish) != (output, reason):
                raise Violation(f"{rid}:{k}: tokens differ from the undisturbed run's")
        elif choice.output != output[: len(choice.output)]:
            raise Violation(f"{rid}:{k}: tokens differ from the undisturbed run's start")
        elif choice.finish == "error" and not (record.dead and record.attempts >= 3):
            raise Violation(f"{rid}:{k}: an error without three deaths")
        elif choice.finish == "abort" and record.cancel is None:
            raise Violation(f"{rid}:{k}: aborted by nobody")
        elif choice.finish == "deadline" and event.deadline is None:
            raise Violation(f"{rid}:{k}: has no deadline")


def simulate(seed: int, verbose: bool = False) -> World:
    """Run one history to its end. Raises AssertionError on any broken promise."""
    world = World(seed, verbose)
    world.run()
    return world


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the scheduler's core through simulated histories.")
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, help="replay this one alone")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    if options.seed is not None:
        print(dict(simulate(options.seed, options.verbose).count))
        return 0
    total: Counter[str] = Counter()
    failed: list[int] = []
    begun = time.perf_counter()
    for seed in range(options.first, options.first + options.seeds):
        try:
            world = simulate(seed)
            total.update(world.count)
            total["turns"] += world.turns
        except Exception as error:
            failed.append(seed)
            print(f"seed {seed}: {type(error).__name__}: {error}", file=sys.stderr)
    print(f"{options.seeds} histories in {time.perf_counter() - begun:.1f} s, {len(failed)} failed: {failed[:20]}")
    print(dict(total))
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
