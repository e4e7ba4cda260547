"""The promise under fire, in short: every kind of process killed once under load. `make chaos` runs for an hour."""

from __future__ import annotations

from pathlib import Path

import pytest

from protocol.messages import shard_of
from tests.chaos.driver import Chaos

KINDS = [
    "kill worker", "kill scheduler", "kill gateway", "restart redis", "lose reply worker", "lose reply scheduler",
    "cut worker", "freeze worker", "freeze redis", "term worker",
]  # fmt: skip
STEPS = ("--engine-options", '{"random": true, "step_us": 10000}')  # streams last through faults, little is computed


@pytest.mark.timeout(600)
async def test_nothing_is_lost_and_nothing_comes_twice(tmp_path: Path) -> None:
    chaos = Chaos(tmp_path, seed=11, args=STEPS)
    await chaos.run(seconds=150, every=2.5, kinds=KINDS, once=True)
    print(chaos.report())
    assert chaos.history.violations == []
    assert len(chaos.history.accepted) > 20
    assert chaos.history.structured["ended by stop"] > 0
    assert len(chaos.faults) >= len(KINDS) - 2  # a fault that finds no process of its role is skipped


@pytest.mark.nightly  # tests/headrace/test_rolling.py restarts one of each role
@pytest.mark.timeout(600)
async def test_a_rolling_restart_fails_no_request(tmp_path: Path) -> None:
    """Every process in turn is asked to leave, and started again, under load: nobody is refused, no stream errs."""
    chaos = Chaos(tmp_path, seed=12)
    await chaos.run(seconds=0, every=0, rolling=True)
    assert chaos.history.violations == []
    refused = {kind: count for kind, count in chaos.history.failures.items() if not kind.startswith("503")}
    assert refused == {}
    assert len(chaos.faults) == 6


@pytest.mark.nightly
@pytest.mark.timeout(600)
@pytest.mark.parametrize("option", ["--tensor-parallel-size", "--pipeline-parallel-size"])
async def test_ranks_that_die_or_freeze_lose_nothing(tmp_path: Path, option: str) -> None:
    chaos = Chaos(tmp_path, seed=13, args=(option, "2"))
    await chaos.run(seconds=150, every=5, kinds=["kill rank", "freeze rank", "kill worker", "kill scheduler"])
    print(chaos.report())
    assert chaos.history.violations == []
    assert chaos.ranks


@pytest.mark.nightly
@pytest.mark.timeout(600)
async def test_two_shards_lose_nothing(tmp_path: Path) -> None:
    """Idempotency keys and pushes under one id come now to this shard, now to that."""
    chaos = Chaos(tmp_path, seed=14, args=("--shards", "2"))
    await chaos.run(seconds=150, every=5, kinds=KINDS)
    print(chaos.report())
    assert chaos.history.violations == []
    assert {shard_of(rid) for rid in chaos.history.accepted} == {0, 1}
