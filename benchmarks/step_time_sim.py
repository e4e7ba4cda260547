"""Chunk policies of the scheduler's core against models of machines, in simulated time; a run takes seconds.

    python -m benchmarks.step_time_sim [--machine h100-8b,...] [--scenario burst,...] [--policy knee,...] [--seed N]

The core is the real one; only its StepTimeModel is replaced where another policy than "knee" is asked for. Time is a
model: h100-8b fits what an H100 took (docs/performance.md), cpu-135m two cores, h100-0.5b is one point and a guess.
Milliseconds. In `long`, the ITL is that of the streams beside the prompts.
"""

from __future__ import annotations

import argparse
import bisect
import heapq
import random
from array import array
from dataclasses import dataclass, replace
from multiprocessing import Pool

import scheduler.core.worker
from protocol.messages import Capacity, HintRow, Plan, PoolCapacity, pack_ids
from protocol.sampling import SamplingParams
from scheduler.core.events import Arrive, SendPlan, StepDone, WorkerServing
from scheduler.core.scheduler import Core, CoreConfig
from scheduler.core.step_time import UNBOUNDED, StepTimeModel

NOISE, WARM_NOISE, WAY_S = 0.05, 0.01, 0.0003  # of step times, of those at warm-up; core to device, and back
ENDLESS = 1 << 30


@dataclass(frozen=True)
class Machine:
    """A step takes the time of its tokens by table, and that of reading the contexts of decodes and chunks."""

    table: tuple[tuple[int, float], ...]  # tokens -> ms
    padded: bool  # a step with prefill costs what the next larger entry does (CUDA graphs); else interpolated
    row_ms: float  # a decode row, beyond a prefill token
    read_ms: float  # per token of a decode's context
    attend_ms: float  # per prefill token and token of its context
    count: int  # Poisson arrivals
    budget: int = 2048
    rows: int = 256
    blocks: int = 27216
    long: tuple[int, int] = (8000, 32000)
    beside: int = 32  # streams

    def step_s(self, decodes: int, context: int, chunks: list[tuple[int, int]]) -> float:
        products = look_up(self.table, decodes + sum(count for count, _ in chunks), self.padded and bool(chunks))
        attend = sum(count * (before + count / 2) for count, before in chunks) * self.attend_ms
        return (products + decodes * self.row_ms + context * self.read_ms + attend) / 1e3


def look_up(table: tuple[tuple[int, float], ...] | list[tuple[int, float]], tokens: int, padded: bool) -> float:
    k = min(bisect.bisect_left(table, (tokens, 0.0)), len(table) - 1)
    (n1, t1), (n0, t0) = table[k], table[k - 1]
    if k == 0 or padded or tokens > n1:
        return t1 * max(1.0, tokens / n1)
    return t0 + (t1 - t0) * (tokens - n0) / (n1 - n0)


H100 = ((1, 6.2), (16, 6.5), (32, 6.6), (64, 6.8), (128, 7.2), (256, 8.4), (384, 11.3), (512, 13.8), (768, 18.3),
        (1024, 24.5), (1536, 35.0), (2048, 45.0), (4096, 91.0), (8192, 180.0))  # fmt: skip
SMALL = ((1, 1.0), (128, 1.05), (256, 1.2), (512, 1.6), (1024, 2.6), (2048, 4.8), (4096, 9.5), (8192, 19.0))
CPU = ((1, 14.0), (8, 25.7), (16, 39.0), (32, 65.5), (64, 119.0), (128, 226.0), (512, 867.0), (2048, 3430.0))
MACHINES = {
    "h100-8b": Machine(H100, True, 0.002, 5.2e-5, 1.3e-6, 1500),
    "h100-0.5b": Machine(SMALL, True, 0.002, 5e-6, 1e-7, 3000),
    "cpu-135m": Machine(CPU, False, 1.08, 2e-5, 1e-5, 250, 2048, 64, 4096, (1000, 4000), 8),
}


class LinearPrice(StepTimeModel):
    """What the scheduler did before: a learned price for each prefill token, by number of rows beside it. The price
    contains the step's fixed part, so chunks and price drive each other down."""

    SLOWER, WAITING_WEIGHT = 1.7, 4

    def __init__(self, *_: object) -> None:
        super().__init__()
        self.prefill_token_s = 0.0
        self._beside_s: dict[int, float] = {}

    def token_s(self, rows: int) -> float:
        return self._beside_s.get(rows.bit_length(), self.prefill_token_s)

    def decode_s(self, rows: int) -> float:
        if not rows or not self._decode_s:
            return 0.0
        size = rows.bit_length()
        return self._decode_s[min(self._decode_s, key=lambda k: (abs(k - size), k))]

    def step_s(self, rows: int, prefill_tokens: int) -> float:
        return self.decode_s(rows) + prefill_tokens * self.token_s(rows)

    def learn(self, rows: int, prefill_tokens: int, exec_s: float) -> None:
        tokens, size = rows + prefill_tokens, rows.bit_length()
        if not tokens or exec_s <= 0:
            return
        decode_s, prefill_s = self.decode_s(rows), prefill_tokens * self.token_s(rows)
        if rows and (not decode_s or (not prefill_tokens and size not in self._decode_s)):
            decode_s = max(exec_s - prefill_s, exec_s * rows / tokens)
        if prefill_tokens and not prefill_s:
            prefill_s = max(exec_s - decode_s, exec_s * prefill_tokens / tokens)
        off = min(exec_s / (decode_s + prefill_s), 5.0) - 1
        if rows:
            self._decode_s[size] = decode_s * (1 + (0.025 if prefill_tokens else 0.2) * off)
        if prefill_tokens:
            token_s = prefill_s / prefill_tokens * (1 + 0.2 * off)
            if rows:
                self._beside_s[size] = token_s
            if not rows or not self.prefill_token_s:
                self.prefill_token_s = token_s

    def chunk(self, rows: int, prompt_tokens: int, prompts: int) -> int:
        decode_s, token_s = self.decode_s(rows), self.token_s(rows)
        if not decode_s or not token_s:
            return UNBOUNDED
        weight = max(1.0, self.WAITING_WEIGHT * (prompts - 1) / rows)
        return max(64 if prompt_tokens <= 256 else 8, round((self.SLOWER - 1) * decode_s / token_s * weight))


class NoBound(StepTimeModel):
    def chunk(self, rows: int, prompt_tokens: int, prompts: int) -> int:
        return UNBOUNDED


class Fixed512(StepTimeModel):
    def chunk(self, rows: int, prompt_tokens: int, prompts: int) -> int:
        return 512


class Target25(StepTimeModel):
    """The knee, and --inter-token-target-ms 25."""

    def __init__(self, step_us: list[tuple[int, int]], most_tokens: int) -> None:
        super().__init__(step_us, most_tokens, target_s=0.025)


POLICIES: dict[str, tuple[type[StepTimeModel], int]] = {  # and the budget; 0: the machine's
    "linear price": (LinearPrice, 0), "linear price 8192": (LinearPrice, 8192), "no bound": (NoBound, 0),
    "no bound 8192": (NoBound, 8192), "fixed 512": (Fixed512, 0), "target 25": (Target25, 0),
    "knee": (StepTimeModel, 0),
}  # fmt: skip

Job = tuple[float, int, int]  # arrival, prompt, output
SCENARIOS = ("burst", "poisson50", "poisson80", "poisson95", "long", "heavy", "mixed")


def jobs_of(machine: Machine, scenario: str, rng: random.Random) -> list[Job]:
    def poisson(load: float, count: int, prompts: tuple[int, int], outputs: tuple[int, int]) -> list[Job]:
        prompt, output, rows, (tokens, ms) = sum(prompts) / 2, sum(outputs) / 2, machine.rows, machine.table[-1]
        decodes_s = output * machine.step_s(rows, round(rows * (prompt + output / 2)), []) / rows
        rate, at, jobs = load / (prompt * ms / tokens / 1e3 + decodes_s), 0.2, []  # 1: a full machine, each kind apart
        for _ in range(count):
            at += rng.expovariate(rate)
            jobs.append((at, rng.randint(*prompts), rng.randint(*outputs)))
        return jobs

    if scenario == "burst":
        return [(0.0, rng.randint(64, 512), 128) for _ in range(machine.rows)]
    if scenario == "long":
        return [(0.0, 64, ENDLESS)] * machine.beside + poisson(0.5, 12, machine.long, (32, 32))
    if scenario == "heavy":
        return poisson(0.8, machine.count // 3, (2000, 2000), (32, 32))
    if scenario == "mixed":  # short ones at half of the capacity, long ones at a third
        short = poisson(0.5, machine.count, (64, 512), (64, 192))
        return sorted(short + [j for j in poisson(0.33, 40, machine.long, (64, 192)) if j[0] < short[-1][0]])
    return poisson(int(scenario.removeprefix("poisson")) / 100, machine.count, (64, 512), (64, 192))


def run(case: tuple[str, str, str, int]) -> dict[str, float]:
    """Machine, scenario, policy, seed: one core, one device that does its plans in order."""
    name, scenario, policy, seed = case
    random.seed(seed)
    jobs = jobs_of(MACHINES[name], scenario, rng := random.Random(seed))
    asked = [k for k, job in enumerate(jobs) if job[2] < ENDLESS]
    model, budget = POLICIES[policy]
    machine = replace(MACHINES[name], budget=budget or MACHINES[name].budget)
    scheduler.core.worker.StepTimeModel = model  # type: ignore[misc]
    step_us = []
    if machine.padded:  # timed at warm-up, as an engine that records its steps does
        timed = [(n, ms * max(0.9, random.gauss(1, WARM_NOISE))) for n, ms in machine.table if n <= machine.budget]
        step_us = [(n, round(ms * 1e3)) for n, ms in timed]
    core = Core(CoreConfig(plans_ahead=2))
    pool = PoolCapacity("full", 16, machine.blocks)
    capacity = Capacity("", 1 << 20, machine.rows, machine.budget, [pool], 32000, step_us=step_us)
    core.apply(WorkerServing("w0", 1, capacity), 0.0)
    seats: dict[int, list[int]] = {}  # seat -> [request, computed tokens, known ones when it came]
    left = [output for _, _, output in jobs]
    times: list[list[float]] = [[] for _ in jobs]
    done: list[tuple[float, int, StepDone]] = []  # heap
    now, free_at, arrived = 0.0, 0.0, 0

    def execute(plan: Plan) -> None:
        nonlocal free_at
        for new in plan.new:
            seats[new.seat] = [int(new.rid, 16), new.computed, len(new.token_ids) // 4]
        rows = memoryview(plan.seats).cast("H")
        counts = memoryview(plan.counts).cast("i") if plan.counts else [1] * len(rows)
        chunks, contexts, hints = [], [], []
        for seat, count in zip(rows, counts, strict=True):
            _, computed, known = seats[seat]
            if computed >= known:
                contexts.append(computed)
            else:
                chunks.append((count, computed))
            seats[seat][1] += count
        took = machine.step_s(len(contexts), sum(contexts), chunks) if len(rows) else 0.0
        start = max(free_at, now + WAY_S)
        idle, free_at = start - free_at, start + took * max(0.8, rng.gauss(1, NOISE))
        for k, seat in enumerate(rows):
            request = seats[seat][0]
            if (not plan.samples or plan.samples[k]) and left[request]:
                left[request] -= 1
                times[request].append(free_at + WAY_S)
                finish = None if left[request] else "length"
                hints.append(HintRow(seat, pack_ids([1]), 12 * len(times[request]), finish))
        event = StepDone("w0", 1, plan.step, hints, round((free_at - start) * 1e6), round(idle * 1e6))
        heapq.heappush(done, (free_at + WAY_S, plan.step, event))

    while any(left[k] for k in reversed(asked)):
        for effect in core.plan(now):
            if isinstance(effect, SendPlan):
                execute(effect.plan)
        wake = core.next_wake(now)
        nexts = [at for at, *_ in [*done[:1], *jobs[arrived : arrived + 1]]]
        now = max(now, min(nexts + ([] if wake is None else [max(wake, now + 1e-5)])))
        while arrived < len(jobs) and jobs[arrived][0] <= now:
            at, prompt, output = jobs[arrived]
            sampling = SamplingParams(temperature=0.0, max_tokens=min(output, 60_000), ignore_eos=True)
            ids = array("i", (rng.randrange(32000) for _ in range(prompt)))
            core.apply(Arrive(f"{arrived:032x}", "t", "standard", [ids], sampling, 0, at), now)
            arrived += 1
        while done and done[0][0] <= now:
            core.apply(heapq.heappop(done)[2], now)
    began, streams = jobs[asked[0]][0], [k for k, job in enumerate(jobs) if job[2] == ENDLESS] or asked
    ttft = sorted(times[k][0] - jobs[k][0] for k in asked)
    gaps = sorted(b - a for k in streams for a, b in zip(times[k], times[k][1:]) if a >= began)  # noqa: B905
    found = {"tokens/s": sum(map(len, times)) / max(times[k][-1] for k in asked)}
    for what, values in (("TTFT", ttft), ("ITL", gaps)):
        found |= {f"{what} p{p}": 1e3 * values[min(len(values) * p // 100, len(values) - 1)] for p in (50, 99)}
    return {**found, "mean time": 1e3 * sum(times[k][-1] - jobs[k][0] for k in asked) / len(asked)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, known in (("--machine", MACHINES), ("--scenario", SCENARIOS), ("--policy", POLICIES)):
        parser.add_argument(option, default=",".join(known), type=lambda value: value.split(","))
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    cases = [(m, s, p, args.seed) for m in args.machine for s in args.scenario for p in args.policy]
    with Pool() as pool:
        for case, found in zip(cases, pool.imap(run, cases), strict=True):
            if case[2] == args.policy[0]:
                print(f"\n{case[0] + ' ' + case[1]:22}" + "".join(f"{key:>11}" for key in found))
            print(f"  {case[2]:20}" + "".join(f"{value:11,.1f}" for value in found.values()), flush=True)


if __name__ == "__main__":
    main()
