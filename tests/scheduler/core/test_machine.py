"""The core under hypothesis: arrivals, cancels, hints, plans, worker losses and takeovers in any order it can think of.

Integrity is checked after every event. At the end faults stop, and everything must end within a bounded number of
turns, every choice once, with the tokens of an undisturbed run.
"""

from __future__ import annotations

from array import array

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from protocol.sampling import SamplingParams
from scheduler.core.events import Arrive
from tests.scheduler.simulation import Fenced, World

pick = st.integers(0, 2)


class CoreMachine(RuleBasedStateMachine):
    world: World | None = None

    @initialize(seed=st.integers(0, 10**6))
    def begin(self, seed: int) -> None:
        """The seed fixes sizes: of the pool, the budgets, the workers."""
        self.world = World(seed, check_every=1)
        self.world.to_come = []
        self.world.fault = self.world.hint_loss = 0.0
        self.world.poison = set()
        self.world.unservable = {}
        self.world.refusals = 0

    @rule(
        prompt=st.lists(st.integers(1, 3), min_size=1, max_size=34),
        max_tokens=st.none() | st.integers(1, 30),
        n=st.integers(1, 3),
        tenant=st.sampled_from("abc"),
        priority=st.sampled_from(("interactive", "standard", "batch")),
        timeout=st.none() | st.floats(0.01, 1.0),
        unservable=st.none() | st.sampled_from((-1, 0, 2)),
    )
    def arrival(self, prompt, max_tokens, n, tenant, priority, timeout, unservable) -> None:
        rid = f"r{len(self.world.server.records)}"
        sampling = SamplingParams(max_tokens=max_tokens, n=n)
        event = Arrive(rid, tenant, priority, [array("i", prompt)], sampling, 3, 0.0, timeout)
        if unservable is not None:
            self.world.unservable[rid] = unservable
        self.world.to_come.append(event)
        self.world.arrival()

    @precondition(lambda self: self.world.server.records)
    @rule()
    def cancel(self) -> None:
        self.world.cancel()

    @rule(which=pick, turns=st.integers(1, 8))
    def worker_runs(self, which: int, turns: int) -> None:
        worker = self.world.workers[which % len(self.world.workers)]
        for _ in range(turns):
            worker.turn()

    @rule(turns=st.integers(1, 8), seconds=st.floats(0.0, 0.3))
    def scheduler_runs(self, turns: int, seconds: float) -> None:
        self.world.now += seconds
        for _ in range(turns):
            self.world.scheduler_turn()

    @rule(which=pick)
    def worker_dies(self, which: int) -> None:
        self.world.workers[which % len(self.world.workers)].kill()

    @rule(which=pick)
    def worker_is_given_up(self, which: int) -> None:
        try:
            self.world.lose(self.world.workers[which % len(self.world.workers)])
        except Fenced:
            raise AssertionError("the newest scheduler is never fenced") from None

    @rule(which=pick)
    def worker_drains(self, which: int) -> None:
        self.world.drain(self.world.workers[which % len(self.world.workers)])

    @rule()
    def worker_gives_rows_up(self) -> None:
        self.world.refusals = min(6, self.world.refusals + 1)

    @rule()
    def takeover(self) -> None:
        self.world.take_over()

    @invariant()
    def whole(self) -> None:
        if self.world is not None:
            self.world.schedulers[-1].core.check_integrity()

    def teardown(self) -> None:
        if self.world is not None:
            self.world.check_every = 8
            self.world.run(most_turns=self.world.turns + 30000, faulty_turns=0)


TestCore = CoreMachine.TestCase
TestCore.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
