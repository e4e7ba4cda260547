"""A day of one model on two shards whose load comes and goes, and a rule that asks for workers: how many deadlines are
met, at what price, beside the best fixed number. In simulated time.

    python -m benchmarks.fleet [--seeds 1 2] [--requests-per-worker 20 ...] [--plot docs/images/fleet.svg]

Real are the scheduler's core, which plans every step and moves sequences when a worker leaves, and the rule of
headrace/ray/rule.py, which is KEDA's and Kubernetes' as deploy/kubernetes sets it. Everything else is a model: workers
only keep time, and a step stands for a hundred tokens of a stream. The load of each shard fills four workers at noon
and a tenth of that at midnight; six times a day it is half as much again for five minutes, without notice. A worker
serves 90 s after it was asked for, the rule looks every 15 s. A request takes half a minute on a full worker.

Ideal: as many whole workers at each moment as the load of that moment fills, known beforehand and there at once.
A deadline is twice the time that the request takes on a full worker, and 10 s. A flap is a change of the number that
follows one in the other direction within five minutes.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import math
import random
from array import array
from dataclasses import dataclass, field
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import msgspec

from headrace.ray.rule import Scaler, Scaling
from protocol.messages import LANDED, STALE, Capacity, HintRow, Plan, PoolCapacity, pack_ids
from protocol.sampling import SamplingParams
from scheduler.core.events import (
    Arrive,
    ChoiceState,
    Effect,
    ReleaseWorker,
    Resync,
    Resynced,
    SendPlan,
    StepDone,
    WorkerDraining,
    WorkerLost,
    WorkerServing,
)
from scheduler.core.scheduler import Core, CoreConfig

COLD_S = 90.0
SEATS = 20  # of a worker
STEP_S, ROW_S, PROMPT_S = 2.8, 0.02, 0.001  # of a step; for each row; for each prompt token: 3.2 s when full
OUTPUT, PROMPT = (4, 16), (16, 32)
GRACE_S = 10.0
SURGES, SURGE = 6, 1.5
FLAP_S = 300.0
MOST = 12  # workers of a shard
FRAME = 12  # bytes
SHARDS = ("one", "two")
PEAK = 4.0  # full workers of each shard


def mean(bounds: tuple[int, int]) -> float:
    return sum(bounds) / 2


def full_s(prompt: float, output: float) -> float:
    """Seconds of a request on a full worker."""
    return output * (STEP_S + SEATS * ROW_S) + prompt * PROMPT_S


@dataclass(frozen=True)
class Day:
    """Seconds: its length, that of a surge, from one look of the rule to the next."""

    seconds: float
    surge: float
    tick: float


@dataclass
class Load:
    """``peak``: workers that are full then, at noon. ``surges``: when they begin."""

    peak: float
    surges: list[float]
    day: Day

    def offered(self, now: float) -> float:
        """In full workers."""
        wave = 0.1 + 0.9 * (1 - math.cos(2 * math.pi * now / self.day.seconds)) / 2
        return self.peak * wave * (SURGE if any(s <= now < s + self.day.surge for s in self.surges) else 1)

    def arrivals(self, dice: random.Random, rate: float) -> list[float]:
        """Poisson, thinned. ``rate``: requests a second that fill a worker."""
        most, now, found = self.peak * SURGE * rate, 0.0, []
        while (now := now + dice.expovariate(most)) < self.day.seconds:
            if dice.random() * self.peak * SURGE < self.offered(now):
                found.append(now)
        return found

    def ideal(self) -> float:
        """Worker-seconds."""
        return sum(max(1, math.ceil(self.offered(now))) * self.day.tick for now in self.ticks())

    def ticks(self) -> list[float]:
        return [k * self.day.tick for k in range(int(self.day.seconds / self.day.tick))]


def load_of(seed: int) -> Load:
    """Of each shard: requests are spread over both alike."""
    dice, day = random.Random(f"surges{seed}"), Day(86400.0, 300.0, 15.0)
    return Load(PEAK, [dice.uniform(0, day.seconds - day.surge) for _ in range(SURGES)], day)


# ------------------------------------------------------------------ one shard


@dataclass
class Request:
    arrived: float
    prompt: int
    output: int
    left: int
    placement: int = 0
    ended: float = math.inf

    @property
    def state(self) -> ChoiceState:
        made = self.output - self.left
        return ChoiceState(array("i", [1] * made), FRAME * made, self.placement)

    @property
    def met(self) -> bool:
        return self.ended - self.arrived <= 2 * full_s(self.prompt, self.output) + GRACE_S


@dataclass
class Worker:
    gen: int
    asked: float
    serves: bool = False
    leaving: bool = False
    free_at: float = 0.0
    seats: dict[int, list[Any]] = field(default_factory=dict)  # seat -> [request, placement, tokens without KV yet]


class World:
    """One shard's day. ``fixed``: so many workers, there from the start; else as ``rule`` says."""

    def __init__(self, shard: str, seed: int, rule: Scaling | None, fixed: int = 0) -> None:
        self.load = load_of(seed)
        self.day_s = self.load.day.seconds
        self.dice = random.Random(f"{seed}{shard}")
        self.core = Core(CoreConfig(plans_ahead=2))
        self.now = 0.0
        self.requests: list[Request] = []
        self.workers: dict[str, Worker] = {}
        self.rule = rule
        self.scaler = Scaler(rule) if rule else None
        self.worker_s = 0.0
        self.open = 0
        self.moved = 0
        self.history: list[tuple[float, float, int, int]] = []  # time, offered, asked for, serving
        self._gens = itertools.count(1)
        self._order = itertools.count()
        self._events: list[tuple[float, int, str, Any]] = []
        for _ in range(fixed or 1):
            self._ask(0.0)

    def at(self, when: float, kind: str, what: Any = None) -> None:
        heapq.heappush(self._events, (when, next(self._order), kind, what))

    def run(self) -> World:
        for arrived in self.load.arrivals(self.dice, SEATS / full_s(mean(PROMPT), mean(OUTPUT))):
            self.at(arrived, "arrive")
        for tick in self.load.ticks():
            self.at(tick, "tick")
        while self._events:
            self.now, _, kind, what = heapq.heappop(self._events)
            getattr(self, f"on_{kind}")(what)
            self._apply(self.core.plan(self.now))
            if self.now > self.day_s and not self.open:
                break
            wake = self.core.next_wake(self.now)
            if wake is not None and (not self._events or wake < self._events[0][0]):
                self.at(max(wake, self.now + 1e-3), "wake")
        for worker in self.workers.values():
            self.worker_s += self.day_s - worker.asked
        return self

    def _apply(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case SendPlan(wid, plan):
                    self._execute(wid, plan)
                case ReleaseWorker(wid, gen):
                    worker = self.workers.pop(wid)
                    self.worker_s += min(self.now, self.day_s) - worker.asked
                    states = {key: self.requests[int(key[0], 16)].state for key in self.core.sequences_on(wid)}
                    self._apply(self.core.apply(WorkerLost(wid, gen, states, died=False), self.now))
                case Resync(rid, choice):
                    state = self.requests[int(rid, 16)].state
                    self._apply(self.core.apply(Resynced(rid, choice, state), self.now))

    # -------------------------------------------------------------- load

    def on_arrive(self, _: None) -> None:
        prompt, output = self.dice.randint(*PROMPT), self.dice.randint(*OUTPUT)
        rid = f"{len(self.requests):032x}"
        self.requests.append(Request(self.now, prompt, output, output))
        self.open += 1
        ids = array("i", (self.dice.randrange(1 << 20) for _ in range(prompt)))
        sampling = SamplingParams(max_tokens=output, ignore_eos=True)
        self._apply(self.core.apply(Arrive(rid, "t", "standard", [ids], sampling, 0, self.now), self.now))

    def on_wake(self, _: None) -> None:
        pass

    # -------------------------------------------------------------- workers

    def _ask(self, cold_s: float) -> None:
        wid = next(f"worker-{k}" for k in itertools.count() if f"worker-{k}" not in self.workers)
        worker = self.workers[wid] = Worker(next(self._gens), self.now)
        self.at(self.now + cold_s, "serve", (wid, worker.gen))

    def on_serve(self, what: tuple[str, int]) -> None:
        wid, gen = what
        worker = self.workers.get(wid)
        if worker is None or worker.gen != gen:
            return
        worker.serves = True
        pool = PoolCapacity("full", 16, SEATS * 16)
        capacity = Capacity("", 256, SEATS, 2048, [pool], 1 << 20)
        self._apply(self.core.apply(WorkerServing(wid, gen, capacity), self.now))

    def on_tick(self, _: None) -> None:
        staying = [wid for wid, worker in self.workers.items() if not worker.leaving]
        serving = sum(self.workers[wid].serves for wid in staying)
        self.history.append((self.now, self.load.offered(self.now), len(staying), serving))
        if self.scaler is not None:
            wanted = self.scaler.wanted(self.now, self.open, len(staying))
            for _ in range(wanted - len(staying)):
                self._ask(COLD_S)
            for wid in sorted(staying, key=lambda wid: int(wid[7:]))[wanted:]:
                self._leave(wid)

    def _leave(self, wid: str) -> None:
        worker = self.workers[wid]
        worker.leaving = True
        if worker.serves:
            self._apply(self.core.apply(WorkerDraining(wid, worker.gen), self.now))
        else:
            self.worker_s += self.now - self.workers.pop(wid).asked

    def _execute(self, wid: str, plan: Plan) -> None:
        worker = self.workers[wid]
        for new in plan.new:
            request = self.requests[int(new.rid, 16)]
            self.moved += request.placement > 0
            request.placement = new.placement
            worker.seats[new.seat] = [request, new.placement, len(new.token_ids) // 4 - new.computed]
        rows = memoryview(plan.seats).cast("H")
        counts = memoryview(plan.counts).cast("i") if plan.counts else [1] * len(rows)
        prompts, drawn = 0, []
        for k, (seat, count) in enumerate(zip(rows, counts, strict=True)):
            sequence = worker.seats[seat]
            if sequence[2] > 1:
                prompts += count
            sequence[2] = max(1, sequence[2] - count)
            if not plan.samples or plan.samples[k]:
                drawn.append((seat, sequence[0], sequence[1]))
        took = STEP_S + len(drawn) * ROW_S + prompts * PROMPT_S if len(rows) else 0.0
        worker.free_at = max(worker.free_at, self.now) + took * self.dice.uniform(0.95, 1.05)
        self.at(worker.free_at, "step", (wid, worker.gen, plan.step, drawn, took))

    def on_step(self, what: tuple[str, int, int, list[tuple[int, Request, int]], float]) -> None:
        """The commit: a row of a sequence that has been placed elsewhere meanwhile does not land."""
        wid, gen, step, drawn, took = what
        rows, verdicts = [], ""
        for seat, request, placement in drawn:
            landed = request.placement == placement and request.left > 0
            if landed:
                request.left -= 1
                if not request.left:
                    request.ended = self.now
                    self.open -= 1
            finish = "length" if landed and not request.left else None
            rows.append(HintRow(seat, pack_ids([1]), FRAME * (request.output - request.left), finish))
            verdicts += LANDED if landed else STALE
        if (worker := self.workers.get(wid)) is not None and worker.gen == gen:
            told = StepDone(wid, gen, step, rows, round(took * 1e6), 0, verdicts if STALE in verdicts else "")
            self._apply(self.core.apply(told, self.now))

    # -------------------------------------------------------------- figures

    def flaps(self) -> int:
        return changes_back([(now, asked) for now, _, asked, _ in self.history], FLAP_S)


def changes_back(asked: list[tuple[float, int]], within_s: float) -> int:
    """How often a number changed that had changed in the other direction shortly before."""
    changes = [(now, after - before) for (_, before), (now, after) in itertools.pairwise(asked) if after != before]
    return sum(b[0] - a[0] <= within_s and a[1] * b[1] < 0 for a, b in itertools.pairwise(changes))


# ------------------------------------------------------------------ all of it


def figures(case: tuple[str, int, dict[str, Any] | None, int]) -> dict[str, Any]:
    shard, seed, rule, fixed = case
    world = World(shard, seed, msgspec.convert(rule, Scaling) if rule is not None else None, fixed).run()
    return {
        "requests": len(world.requests),
        "met": sum(request.met for request in world.requests),
        "worker_s": world.worker_s,
        "ideal_s": world.load.ideal(),
        "flaps": world.flaps(),
        "moved": world.moved,
        "most": max(asked for _, _, asked, _ in world.history),
        "history": world.history,
    }


def together(found: list[dict[str, Any]]) -> dict[str, Any]:
    total = {
        key: sum(one[key] for one in found) for key in ("requests", "met", "worker_s", "ideal_s", "flaps", "moved")
    }
    return {**total, "met": total["met"] / total["requests"], "of_ideal": total["worker_s"] / total["ideal_s"]}


def row(name: str, one: dict[str, Any]) -> str:
    return f"{name:34}{one['met']:9.2%}{one['of_ideal']:9.2f}{one['flaps']:7}{one['moved']:8}{one['requests']:10}"


def fixed_numbers(pool: Any, seeds: list[int]) -> tuple[int, dict[str, Any]]:
    """The least fixed number of each shard that meets 99% of the deadlines: at least what the peak fills."""
    for count in range(math.ceil(PEAK), MOST + 1):
        found = together(pool.map(figures, [(shard, seed, None, count) for shard in SHARDS for seed in seeds]))
        if found["met"] >= 0.99:
            break
    return count, found


def plot(path: Path, seed: int, rule: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "fleet"
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(len(SHARDS), 1, figsize=(9, 6), sharex=True)
    for panel, shard in zip(panels, SHARDS, strict=True):
        hours, offered, asked, serving = zip(*figures((shard, seed, rule, 0))["history"][::8], strict=True)
        hours = [now / 3600 for now in hours]
        panel.fill_between(hours, offered, color="0.85", label="load, in full workers")
        panel.step(hours, [max(1, math.ceil(one)) for one in offered], color="0.5", lw=0.8, where="post", label="ideal")
        panel.step(hours, asked, color="tab:orange", lw=1.2, where="post", label="asked for")
        panel.step(hours, serving, color="tab:blue", lw=1.2, where="post", label="serving")
        panel.set_ylabel(f"workers of shard {shard}")
        panel.set_ylim(0)
    panels[0].legend(loc="upper right", fontsize=8)
    panels[-1].set_xlabel("hour of the day")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--requests-per-worker", type=int, nargs="*", default=[20, 18, 22])
    parser.add_argument("--scale-down-after", type=float, nargs="*", default=[300.0])
    parser.add_argument("--step-down-every", type=float, nargs="*", default=[150.0])
    parser.add_argument("--plot", type=Path, help="the first rule's decisions, as SVG")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rules = [
        {"max-workers": MOST, "requests-per-worker": count, "scale-down-after": after, "step-down-every": every}
        for count in args.requests_per_worker
        for after in args.scale_down_after
        for every in args.step_down_every
    ]
    print(f"{'':34}{'met':>9}{'of ideal':>9}{'flaps':>7}{'moved':>8}{'requests':>10}")
    with Pool(2) as pool:
        for rule in rules:
            one = together(pool.map(figures, [(shard, seed, rule, 0) for shard in SHARDS for seed in args.seeds]))
            after, every = rule["scale-down-after"], rule["step-down-every"]
            name = f"{rule['requests-per-worker']} of {SEATS}, {after:g} s, {every:g} s"
            print(json.dumps({"rule": rule} | one) if args.json else row(name, one), flush=True)
        count, one = fixed_numbers(pool, args.seeds)
        print(json.dumps({"fixed": count} | one) if args.json else row(f"{count} at all times", one), flush=True)
    if args.plot:
        plot(args.plot, args.seeds[0], rules[0])


if __name__ == "__main__":
    main()
