"""A pipeline under the real scheduler core in imagined time: stages are busy at once, since steps under way together
have no sequence in common."""

from __future__ import annotations

import random
from array import array
from collections import Counter, deque

import numpy as np
import pytest

from protocol.levels import LEVEL
from protocol.messages import HintRow, pack_ids
from protocol.sampling import SamplingParams
from scheduler.core.events import Arrive, SendPlan, StepDone, WorkerServing
from scheduler.core.scheduler import Core, CoreConfig
from workers.engines.simulated import SimulatedConfig, SimulatedEngine

TICK = 0.002  # seconds
WAY = 0.001  # of a plan to the worker, and of a hint to the scheduler


class World:
    """One worker; ``arrivals``: (time, prompt length, output length)."""

    def __init__(self, config, arrivals):
        self.now = 0.0
        self.engine = SimulatedEngine(config, clock=lambda: self.now)
        capacity = self.engine.load(lambda stage, fraction: None)
        capacity.level = LEVEL
        self.core = Core(CoreConfig())
        self.core.apply(WorkerServing("w0", 1, capacity), 0.0)
        self.arrivals = deque(sorted(arrivals))
        self.left = {}  # rid -> tokens to come
        self.seats = {}
        self.plans, self.steps = deque(), deque()
        self.done_at = 0.0
        self.work = []  # (time, busy seconds of each stage until then)
        self.recent = deque(maxlen=config.stages - 1)  # seats of the last plans
        self.shared = Counter()  # plans, by whether one of the last has a sequence in common

    def run(self):
        while self.arrivals or self.left:
            self.now += TICK
            while self.arrivals and self.arrivals[0][0] <= self.now:
                _, prompt, output = self.arrivals.popleft()
                rid = f"r{len(self.seats)}-{len(self.left)}-{self.now}"
                self.left[rid] = output
                params = SamplingParams(max_tokens=output, ignore_eos=True)
                ids = [array("i", np.random.default_rng(len(self.left)).integers(0, 90, prompt).astype("i4").tobytes())]
                self.core.apply(Arrive(rid, "t", "standard", ids, params, 0, self.now), self.now)
            while self.plans and self.plans[0][0] <= self.now:
                self._execute(self.plans.popleft()[1])
            while self.steps and self.steps[0][0] + WAY <= self.now:
                self._hint(*self.steps.popleft()[1:])
            for effect in self.core.plan(self.now):
                if isinstance(effect, SendPlan):
                    self.plans.append((self.now + WAY, effect.plan))
        self.work.append((self.done_at, self.engine.busy_s))

    def bubble(self, begin=0.0, end=1e9):
        """Share of the time between that the stages stand still."""
        inside = [(at, busy) for at, busy in self.work if begin <= at <= end]
        (first, before), (last, after) = inside[0], inside[-1]
        return 1 - (after - before) / (last - first)

    def _execute(self, plan):
        idle = 0.0 if self.steps else self.now - self.done_at
        for new in plan.new:
            self.seats[new.seat] = new.rid
        seats = set(np.frombuffer(plan.seats, "<u2").tolist())
        self.shared[any(not seats.isdisjoint(other) for other in self.recent)] += 1
        self.recent.append(seats)
        output = self.engine.execute(plan)
        self.done_at = output.ready_at
        self.work.append((self.done_at, self.engine.busy_s))
        self.steps.append((output.ready_at, plan, output.sampled, idle))

    def _hint(self, plan, sampled, idle):
        rows = []
        for seat, token in zip(sampled.seats.tolist(), sampled.tokens.tolist(), strict=True):
            rid = self.seats[seat]
            if rid not in self.left:
                continue
            self.left[rid] -= 1
            ended = "length" if not self.left[rid] else None
            if ended:
                del self.left[rid]
            rows.append(HintRow(seat, pack_ids([token]), 0, ended))
        hint = StepDone("w0", 1, plan.step, rows, sampled.exec_us, round(idle * 1e6))
        self.core.apply(hint, self.now)
        self.core.check_integrity()


def config(stages, **fields):
    """A model that takes 50 ms for a step of decodes, cut into stages a millisecond apart."""
    return SimulatedConfig(
        step_us=48_000, token_us=40, row_us=80, stages=stages, link_us=1000, num_blocks=20_000, **fields
    )  # fmt: skip


@pytest.mark.parametrize("stages", [2, 4])
def test_decodes_keep_all_stages_busy(stages):
    world = World(config(stages), [(0.0, 8, 70)] * 64)
    world.run()
    bubble = world.bubble()
    print(f"{stages} stages, 64 decodes: bubble share {bubble:.3f}, {world.shared}")
    assert bubble <= 0.10
    assert world.shared[True] <= 0.05 * world.shared.total()


def test_prompts_that_arrive_leave_the_stages_busy():
    rng = random.Random(3)
    arrivals = [(k * 0.1, rng.randint(64, 2000), rng.randint(60, 200)) for k in range(60)]
    world = World(config(4), arrivals)
    world.run()
    bubble = world.bubble(1.5, arrivals[-1][0])
    print(f"4 stages, prompts arriving: bubble share {bubble:.3f}")
    assert bubble <= 0.20


def test_one_sequence_alone_waits_for_its_own_tokens():
    world = World(config(4), [(0.0, 8, 40)])
    world.run()
    assert world.bubble() > 0.7
