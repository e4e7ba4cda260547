"""How far ahead plans go out, on a virtual clock: a device, and ways to it and back that take random times."""

from __future__ import annotations

import heapq
from random import Random

import pytest

from protocol.messages import HintRow
from scheduler.core.events import SendPlan, StepDone
from scheduler.core.scheduler import Core, CoreConfig
from scheduler.core.step_time import StepTimeModel
from tests.factories import arrive, capacity, rows, serving

PROMPT = 20


class Device:
    """Executes plans in order as they reach it; ``way_s`` is the mean time there and, again, back."""

    def __init__(self, step_s: float, way_s: float, sequences: int = 8) -> None:
        self.rng = Random(1)
        self.step_s, self.way_s = step_s, way_s
        size = capacity(blocks=100_000, seqs=sequences, tokens=2048, model_len=100_000)
        self.core = Core(CoreConfig())
        self.core.apply(serving(model_len=size.max_model_len, blocks=100_000, seqs=sequences, tokens=2048), 0.0)
        for _ in range(sequences):
            self.core.apply(arrive(prompt=PROMPT, max_tokens=90_000), 0.0)
        self.hints: list[tuple[float, int, StepDone]] = []
        self.now = self.arrived = self.free = self.hinted = 0.0
        self.idle_s = self.busy_s = 0.0
        self.depths: list[int] = []

    def way(self) -> float:
        return self.way_s * self.rng.lognormvariate(0, 0.5)

    def plan(self, count: bool) -> None:
        for effect in self.core.plan(self.now):
            assert isinstance(effect, SendPlan)
            plan = effect.plan
            self.arrived = max(self.arrived, self.now + self.way())
            idle_s = max(0.0, self.arrived - self.free)
            exec_s = self.step_s * self.rng.lognormvariate(0, 0.1)
            self.free = max(self.arrived, self.free) + exec_s
            self.hinted = max(self.hinted, self.free + self.way())
            if count:
                self.idle_s += idle_s
                self.busy_s += exec_s
            done = [HintRow(seat, b"\1\0\0\0", 1) for seat, (_, samples) in rows(plan).items() if samples]
            event = StepDone("w0", 1, plan.step, done, int(exec_s * 1e6), int(idle_s * 1e6))
            heapq.heappush(self.hints, (self.hinted, plan.step, event))
        self.depths.append(len(self.hints))

    def run(self, steps: int, settle: int = 300) -> None:
        self.plan(False)
        for step in range(steps):
            while (wake := self.core.next_wake(self.now)) is not None and wake < self.hints[0][0]:
                self.now = max(self.now, wake) + 1e-6
                self.plan(step > settle)
            self.now, _, event = heapq.heappop(self.hints)
            self.core.apply(event, self.now)
            self.plan(step > settle)


@pytest.mark.parametrize("step_s", [0.002, 0.02, 0.2])
@pytest.mark.parametrize("way_s", [0.0005, 0.003])
def test_the_device_hardly_ever_waits(step_s: float, way_s: float):
    device = Device(step_s, way_s)
    device.run(1500)
    assert device.idle_s / (device.idle_s + device.busy_s) < 0.02


def test_where_steps_are_long_the_next_plan_waits_for_newcomers_until_just_before_it_is_needed():
    device = Device(0.2, 0.001)
    device.run(1000)
    assert sum(device.depths) / len(device.depths) < 1.7, "not one running and one waiting all the time"


def test_a_depth_grown_in_bad_times_shrinks_again():
    device = Device(0.005, 0.02)
    device.run(500)
    deep = max(device.depths[-100:])
    device.way_s = 0.0005
    device.run(6000)
    assert max(device.depths[-100:]) < deep


def test_step_times_are_told_apart_by_rows_and_prefill_tokens():
    step_time = StepTimeModel()
    for _ in range(50):
        step_time.learn(8, 0, 0.010)
        step_time.learn(64, 0, 0.030)
        step_time.learn(8, 100, 0.110)
    assert step_time.step_s(8, 0) == pytest.approx(0.010, rel=0.05)
    assert step_time.step_s(64, 50) == pytest.approx(0.080, rel=0.05)
    assert step_time.step_s(100, 0) == pytest.approx(0.030, rel=0.05), "the nearest that is known"


def test_mixed_steps_alone_are_enough_to_keep_decodes_going():
    """Under steady load no step may ever be of one kind: chunks must be bounded all the same."""
    step_time = StepTimeModel()
    step_time.learn(0, 512, 0.512)
    for rows_now in (4, 8, 16, 32, 32, 32, 32, 32):
        step_time.learn(rows_now, 256, 0.256 + 0.005 + rows_now * 0.001)
    assert step_time.step_s(32, 256) == pytest.approx(0.293, rel=0.1)
    assert 8 <= step_time.chunk(32, 10_000, 1) < 256


def test_what_a_prefill_token_costs_beside_few_rows_is_learned_from_there():
    """Two seconds for a long chunk alone, and twice as much a token beside eight rows: the chunk follows the latter."""
    step_time = StepTimeModel()
    step_time.learn(0, 1000, 2.0)
    step_time.learn(8, 0, 0.100)
    for _ in range(40):
        count = step_time.chunk(8, 10_000, 1)
        step_time.learn(8, count, 0.100 + 0.004 * count)
    assert 0.160 < 0.100 + 0.004 * step_time.chunk(8, 10_000, 1) < 0.190
    assert step_time.decode_s(8) == pytest.approx(0.100, rel=0.1)
    assert step_time.step_s(0, 1000) == pytest.approx(2.0), "a chunk of its own costs what it did"
