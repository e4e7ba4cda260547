"""Runs an engine under the real scheduler core, without Redis: plans in, hints out, several plans in flight."""

from __future__ import annotations

from array import array
from collections import deque
from typing import Any

import msgspec

from protocol.levels import LEVEL
from protocol.messages import Capacity, HintRow, NewSequence, Plan, pack_ids
from scheduler.core.events import Arrive, ChoiceState, Resync, Resynced, SendPlan, StepDone, WorkerServing
from scheduler.core.lifecycle import Counters
from scheduler.core.scheduler import Core, CoreConfig
from tests.workers.plan_maker import Sequence

FRAME = 10  # bytes of a frame in this world


class CoreDriver:
    """One worker, one engine. Hints come ``late`` steps after their plan was executed."""

    def __init__(self, engine: Any, capacity: Capacity, blocks: int, budget: int, late: int = 2) -> None:
        self.engine, self.late = engine, late
        pools = [msgspec.structs.replace(capacity.pools[0], units=blocks), *capacity.pools[1:]]
        self.core = Core(CoreConfig(max_num_batched_tokens=budget))
        self.core.apply(WorkerServing("w0", 1, msgspec.structs.replace(capacity, pools=pools, level=LEVEL)), 0.0)
        self.seats: dict[int, Sequence] = {}
        self.by_rid: dict[str, Sequence] = {}
        self.placements: dict[str, int] = {}
        self.given_up: set[int] = set()  # seats in which nothing counts any more
        self.resyncs = 0

    def run(self, sequences: list[Sequence]) -> Counters:
        """Run all to their end; a sequence arrives before the step that its ``joins`` names."""
        waiting = deque(sorted(sequences, key=lambda s: s.joins))
        in_flight: deque[tuple[Plan, Any]] = deque()
        now, step = 0.0, 0
        while waiting or in_flight or self.core.stats().requests:
            now += 0.001
            while waiting and waiting[0].joins <= step:
                self._arrive(waiting.popleft(), now)
            effects = self.core.plan(now)
            for effect in effects:
                if isinstance(effect, Resync):
                    self._resync(effect, now)
            plans = [effect.plan for effect in effects if isinstance(effect, SendPlan)]
            for plan in plans:
                self._meet(plan)
                in_flight.append((plan, self.engine.execute(plan)))
            step += 1
            if in_flight and (len(in_flight) > self.late or not plans):
                for effect in self.core.apply(self._hint(*in_flight.popleft()), now):
                    if isinstance(effect, Resync):
                        self._resync(effect, now)
            self.core.check_integrity()
            assert step < 20_000, "the core does not get on"
        return self.core.stats().counters

    def _arrive(self, sequence: Sequence, now: float) -> None:
        rid = f"r{len(self.by_rid)}"
        self.by_rid[rid] = sequence
        prompts = [array("i", sequence.prompt)]
        self.core.apply(Arrive(rid, "t", "standard", prompts, sequence.sampling, sequence.seed, now), now)

    def _resync(self, effect: Resync, now: float) -> None:
        """The journal holds what was hinted."""
        self.resyncs += 1
        output = array("i", self.by_rid[effect.rid].output)
        state = ChoiceState(output, FRAME * len(output), self.placements[effect.rid])
        self.core.apply(Resynced(effect.rid, effect.choice, state), now)

    def _meet(self, plan: Plan) -> None:
        for new in plan.new:
            self._check(new)
            self.given_up.discard(new.seat)
            self.placements[new.rid] = new.placement
            self.seats[new.seat] = self.by_rid[new.rid]

    def _check(self, new: NewSequence) -> None:
        sequence = self.by_rid[new.rid]
        assert new.token_ids == pack_ids([*sequence.prompt, *sequence.output])
        assert new.prompt_len == len(sequence.prompt)

    def _hint(self, plan: Plan, output: Any) -> StepDone:
        sampled = output.wait()
        self.given_up.update(sampled.late)
        rows = []
        for seat, token in zip(sampled.seats.tolist(), sampled.tokens.tolist(), strict=True):
            sequence = self.seats[seat]
            if sequence.finished or seat in self.given_up:
                continue
            sequence.output.append(token)
            sequence.logprobs.append(sampled.logprobs.get(seat))
            ended = "length" if sequence.finished else None
            rows.append(HintRow(seat, pack_ids([token]), FRAME * len(sequence.output), ended))
        return StepDone("w0", 1, plan.step, rows, 1000)
