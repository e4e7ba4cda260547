"""Logprobs of prompts: transformers' own, beside other requests, in chunks, preempted, after a worker has died."""

from __future__ import annotations

import random
from array import array
from collections import deque
from typing import Any

import msgspec
import pytest
import torch

from protocol.levels import LEVEL
from protocol.messages import Plan, decode_frames
from protocol.prompt_logprobs import PromptLogprobs, prompt_logprobs_of
from protocol.sampling import SamplingParams
from scheduler.core.events import Arrive, ChoiceState, SendPlan, StepDone, WorkerLost, WorkerServing
from scheduler.core.scheduler import Core, CoreConfig
from tests.models import tiny_model
from tests.workers.torch_engine.parity import make_engine, reference_of
from workers.engines.simulated import SimulatedConfig, SimulatedEngine, byte_vocabulary
from workers.outputs import Outputs

pytestmark = pytest.mark.usefixtures("one_thread")

SEATS = 6  # most rows of logits in a step
NOISE = 2e-3  # float32 and float64 differ by 4e-4 in this model's logits, which are as large as 17
COMMON = [7 * at % 250 for at in range(24)]  # prompts begin alike: what is cached must not count


class World:
    """The real core with one worker after another, its outputs and their journals."""

    def __init__(self, make: Any, blocks: int = 96) -> None:
        self.make, self.blocks = make, blocks
        self.core = Core(CoreConfig(max_num_batched_tokens=24))
        self.journals: dict[tuple[str, int], bytes] = {}
        self.widest = self.deaths = 0
        self.now = 0.0
        self.start()

    def start(self) -> None:
        self.wid, self.engine = f"w{self.deaths}", self.make()
        capacity = self.engine.capacity
        pool = msgspec.structs.replace(capacity.pools[0], units=self.blocks)
        offered = msgspec.structs.replace(capacity, pools=[pool], level=LEVEL)
        self.outputs, self.in_flight = Outputs(byte_vocabulary(), frozenset()), deque[tuple[Plan, Any]]()
        self.core.apply(WorkerServing(self.wid, 1, offered), self.now)
        if (backend := getattr(self.engine, "backend", None)) is not None:
            forward = backend.forward

            def watched(step: Any) -> Any:
                self.widest = max(self.widest, len(step.logit_rows))
                return forward(step)

            backend.forward = watched

    def arrive(self, rid: str, prompt: list[int], **sampling: Any) -> None:
        params = SamplingParams(**{"max_tokens": 4, "temperature": 0.0, **sampling})
        self.core.apply(Arrive(rid, "t", "standard", [array("i", prompt)], params, 1, self.now), self.now)

    def run(self, steps: int = 10_000, late: int = 2) -> None:
        for _ in range(steps):
            self.now += 0.001
            plans = [effect.plan for effect in self.core.plan(self.now) if isinstance(effect, SendPlan)]
            self.in_flight += [(plan, self.engine.execute(plan)) for plan in plans]
            if self.in_flight and (len(self.in_flight) > late or not plans):
                self.finish()
            self.core.check_integrity()
            if not (self.in_flight or self.core.stats().requests):
                return
        assert steps < 10_000, "the core does not get on"

    def finish(self) -> None:
        plan, output = self.in_flight.popleft()
        self.outputs.step(plan, output.wait(), "x")
        batch = self.outputs.take()
        assert batch is not None
        for row in batch.commit_rows():
            before = self.journals.get((row.rid, row.choice), b"")
            assert len(before) == row.cursor
            self.journals[row.rid, row.choice] = before + row.frames
        self.core.apply(StepDone(self.wid, 1, plan.step, batch.hint_rows(), 1000), self.now)

    def die(self) -> None:
        """Before anything is committed. Another one starts."""
        assert not self.journals
        left = {at: ChoiceState(placement=1) for at in self.core.sequences_on(self.wid)}
        self.core.apply(WorkerLost(self.wid, 1, left), self.now)
        self.deaths += 1
        self.start()

    def told(self, rid: str) -> PromptLogprobs:
        found = prompt_logprobs_of(decode_frames(self.journals[rid, 0])[0].extra)
        assert found is not None
        return found


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_model(tmp_path_factory, "llama")


def check(told: PromptLogprobs, prompt: list[int], reference: Any) -> None:
    own = torch.log_softmax(reference(torch.tensor([prompt])).logits[0].float(), -1)
    positions = list(told.positions())
    assert len(positions) == len(prompt) - 1
    for at, (one, top) in enumerate(positions):
        assert one.token == prompt[at + 1]
        assert one.logprob == pytest.approx(float(own[at, one.token]), abs=NOISE)
        assert abs(one.rank - 1 - int((own[at] > own[at, one.token] + NOISE).sum())) <= 2
        best = own[at].topk(told.k).values.tolist()
        assert [other.logprob for other in top] == pytest.approx(best, abs=NOISE)
        assert [float(own[at, other.token]) for other in top] == pytest.approx(best, abs=NOISE)
        assert all(other.raw == (bytes([other.token]) if other.token < 256 else b"") for other in (one, *top))


@torch.inference_mode()
def test_they_are_the_models_own_beside_other_requests_in_chunks_and_after_preemption(tiny: Any) -> None:
    dice, reference = random.Random(3), reference_of(tiny)
    prompts = {
        f"s{number}": [*COMMON[: 8 * (number % 4)], *(dice.randrange(256) for _ in range(1 + 9 * (number % 5)))]
        for number in range(10)
    }
    world = World(lambda: make_engine(tiny, max_num_seqs=SEATS), blocks=20)
    for number, (rid, prompt) in enumerate(prompts.items()):
        world.arrive(rid, prompt, prompt_logprobs=number % 3, max_tokens=(4, 0, 20)[number % 3])
        world.arrive(f"p{number}", COMMON + prompt, max_tokens=20)
        world.run(steps=3)
    world.run()
    counters = world.core.stats().counters
    assert counters.preemptions > 0
    assert counters.prefix_hits > 0  # of the others
    assert world.widest <= SEATS
    for number, (rid, prompt) in enumerate(prompts.items()):
        check(world.told(rid), prompt, reference)
        frames = decode_frames(world.journals[rid, 0])
        assert [frame.finish for frame in frames if frame.finish] == ["length"]
        assert sum(frame.token is not None for frame in frames) == (4, 0, 20)[number % 3]


@torch.inference_mode()
def test_a_worker_that_dies_before_the_first_token_takes_nothing_with_it(tiny: Any) -> None:
    world, prompt = World(lambda: make_engine(tiny, max_num_seqs=SEATS)), COMMON + COMMON
    world.arrive("r", prompt, prompt_logprobs=2)
    world.run(steps=6)  # of eight
    world.die()
    world.run()
    assert world.deaths == 1
    check(world.told("r"), prompt, reference_of(tiny))


def test_the_simulated_engine_tells_of_every_position() -> None:
    def make() -> Any:
        engine = SimulatedEngine(SimulatedConfig(step_us=0, token_us=0, row_us=0, max_num_seqs=SEATS))
        engine.capacity = engine.load(lambda stage, fraction: None)  # type: ignore[attr-defined]
        return engine

    world = World(make)
    world.arrive("r", COMMON, prompt_logprobs=1, max_tokens=0)
    world.run()
    positions = list(world.told("r").positions())
    assert [own.logprob for own, _ in positions] == [-1.0 - at for at in range(len(COMMON) - 1)]
    assert all(top[0].token == 0 for _, top in positions)
