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
    """Decodes by their number as they were measured, whatever the model of the rest says; more tokens, more time."""
    step_time = StepTimeModel()
    for _ in range(50):
        step_time.learn(8, 0, 0.010)
        step_time.learn(64, 0, 0.030)
        step_time.learn(8, 100, 0.045)
    assert step_time.step_s(8, 0) == pytest.approx(0.010, rel=0.05)
    assert step_time.step_s(64, 0) == pytest.approx(0.030, rel=0.05)
    assert step_time.step_s(8, 100) == pytest.approx(0.045, rel=0.2)
    assert step_time.step_s(64, 50) > step_time.step_s(64, 10) > 0.030


def test_mixed_steps_alone_are_enough_to_keep_decodes_going():
    """Under steady load no step may ever be of one kind: chunks must be bounded all the same."""
    step_time = StepTimeModel()
    step_time.learn(0, 512, 0.512)
    for rows_now in (4, 8, 16, 32, 32, 32, 32, 32):
        step_time.learn(rows_now, 256, 0.256 + 0.005 + rows_now * 0.001)
    assert step_time.step_s(32, 256) == pytest.approx(0.293, rel=0.1)
    assert 8 <= step_time.chunk(32, 10_000, 1) < 256


def machine(fixed_s: float, token_s: float, rng: Random, noise: float = 0.05):
    def step_s(rows: int, prefill: int) -> float:
        return (fixed_s + token_s * (rows + prefill)) * max(0.5, rng.gauss(1, noise))

    return step_s


def test_what_a_prefill_token_costs_beside_few_rows_is_learned_from_there():
    """A fixed part of 12 ms and 1.7 ms a token, as on two cores: told apart from the chunks that the model chooses."""
    step_s, step_time = machine(0.012, 0.0017, Random(1)), StepTimeModel()
    step_time.learn(0, 1000, step_s(0, 1000))
    for k in range(300):
        count = step_time.chunk(8, 10_000, 1) if k % 3 else 0
        step_time.learn(8, count, step_s(8, count))
    assert step_time.decode_s(8) == pytest.approx(0.012 + 8 * 0.0017, rel=0.1)
    assert step_time.step_s(8, 40) == pytest.approx(0.012 + 48 * 0.0017, rel=0.1)
    assert step_time.step_s(0, 1000) == pytest.approx(1.712, rel=0.15), "a chunk of its own costs what it did"


def test_a_long_prompt_beside_streams_makes_their_steps_less_than_twice_as_long():
    step_s, step_time = machine(0.012, 0.0017, Random(2)), StepTimeModel()
    for k in range(300):
        count = min(step_time.chunk(8, 10_000, 1), 2048) if k % 3 else 0
        step_time.learn(8, count, step_s(8, count))
        if k > 100 and count:
            assert 0.012 + 0.0017 * (8 + count) < 2 * (0.012 + 0.0017 * 8)


def test_small_chunks_do_not_drive_the_price_of_a_token_up():
    """On a GPU a small step costs what a larger one does. However small the chunks are for a while, the fixed part is
    told from the tokens, and the chunk comes back to the knee."""
    step_s, step_time = machine(0.006, 0.00002, Random(3)), StepTimeModel(most_tokens=2048)
    for k in range(400):
        count = 16 if k % 2 else 0
        step_time.learn(64, count, step_s(64, count))
    for _ in range(200):
        count = min(step_time.chunk(64, 10_000, 8), 2048 - 64)
        step_time.learn(64, count, step_s(64, count))
    assert 500 < step_time.chunk(64, 10_000, 8) < 2048


H100 = [(1, 6200), (16, 6500), (64, 6800), (128, 7200), (256, 8400), (384, 11300), (512, 13800), (768, 18300),
        (1024, 24500), (1536, 35000), (2048, 45000)]  # fmt: skip


def test_decodes_and_prefill_fill_the_bucket_at_the_knee():
    step_time = StepTimeModel(H100, 2048)
    assert step_time.chunk(100, 200, 5) == 768 - 100
    assert step_time.chunk(600, 200, 5) == 1024 - 600, "at least half a knee, rounded up to a bucket"
    assert step_time.chunk(100, 200, 1) == 768 - 100, "a short prompt slows one step"
    assert step_time.step_s(0, 700) == pytest.approx(0.0183)


def test_what_a_step_was_off_corrects_its_bucket_and_moves_no_knee():
    step_time = StepTimeModel(H100, 2048)
    for _ in range(50):
        step_time.learn(0, 768, 0.030)
    assert step_time.step_s(0, 768) == pytest.approx(0.030, rel=0.02)
    assert step_time.step_s(0, 1024) == pytest.approx(0.0245)
    assert step_time.chunk(100, 200, 5) == 768 - 100


def test_a_target_between_tokens_bounds_the_step():
    bounded, free = StepTimeModel(H100, 2048, target_s=0.0125), StepTimeModel(H100, 2048)
    assert bounded.chunk(100, 10_000, 5) == 384 - 100
    assert bounded.chunk(100, 10_000, 5) < free.chunk(100, 10_000, 5)
