"""One history: who acts when, what breaks, and what must be true at its end. A pure function of the seed."""

from __future__ import annotations

from array import array
from collections import Counter
from random import Random

from protocol.sampling import SamplingParams
from scheduler.core.events import Arrive, Cancel, FinishChoice, RequestDone
from scheduler.core.scheduler import CoreConfig
from tests.factories import capacity
from tests.scheduler.simulation.server import Choice, Fenced, Record, Server, Violation
from tests.scheduler.simulation.service import SimScheduler
from tests.scheduler.simulation.tokens import undisturbed
from tests.scheduler.simulation.worker import SimWorker


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
        self.cancels = rng.choice((0, 1, 4))
        self.to_come = [self.request(k) for k in range(rng.randint(3, 10))]
        if rng.random() < 0.3:
            self.poison.add(rng.choice(self.to_come).rid)
        # requests of which a row cannot be computed: from how many outputs on, -1: not even the prompt
        self.unservable = {r.rid: rng.choice((-1, -1, 0, 3)) for r in self.to_come if rng.random() < 0.2}
        self.refusals = rng.choice((0, 0, 6))  # times that a worker gives up a sequence that is well
        size = capacity(
            blocks=rng.choice((10, 14, 40)),
            seqs=rng.choice((2, 4, 8)),
            tokens=rng.choice((8, 16, 64)),
            model_len=rng.choice((30, 36)),
            stages=1 + seed % 3,
            host=(0, 3, 40)[seed // 3 % 3],
            copy_us=(0.0, 2000.0)[seed // 9 % 2],
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
            return  # deposed, it may take a newer term's hints for its own: nothing that it writes will land
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
        elif self.cancels and rng.random() < 0.01:
            self.cancels -= 1
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
        while self.turns % 10 or not self.at_rest():
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
            if len(choice.output) > self.unservable.get(rid, len(choice.output)):
                raise Violation(f"{rid}:{k}: has tokens that could not be computed")
            if (choice.output, choice.finish) != (output, reason):
                raise Violation(f"{rid}:{k}: tokens differ from the undisturbed run's")
        elif choice.output != output[: len(choice.output)]:
            raise Violation(f"{rid}:{k}: tokens differ from the undisturbed run's start")
        elif choice.finish == "error" and rid in self.unservable:
            self.count["unservable"] += 1
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
