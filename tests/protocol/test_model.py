"""The seeded model holds over the real scripts, and fails as soon as one of their checks is taken out.

`python -m tests.protocol.model --seeds 500` runs more; HEADRACE_MODEL_SEEDS sets how many run here.
"""

from __future__ import annotations

import os

import pytest

from headrace.serve.embedded import EmbeddedServer
from tests.protocol.model import run_seed
from tests.protocol.model.homes import run_homes

SEEDS = int(os.environ.get("HEADRACE_MODEL_SEEDS", "8"))
# where each mutation is known to show; the seeds after it are tried should a change to the model move it
SHOWS = {"cursor": 1, "lockstep": 1, "move": 2, "placement": 8, "fence": 12, "followers": 7, "spoiled": 10}
MOST_SEEDS = 60


@pytest.mark.parametrize("seed", range(SEEDS))
def test_every_seed_holds(server: EmbeddedServer, seed: int) -> None:
    outcome = run_seed(server.url, seed)
    assert outcome.wrong == {}
    assert outcome.stats["rows"] > 100  # it did something


def test_a_run_is_decided_by_its_seed(server: EmbeddedServer) -> None:
    first, second = run_seed(server.url, 1), run_seed(server.url, 1)
    for outcome in (first, second):
        outcome.stats.pop("resyncs", None)  # when a publication arrives is the network's affair
    assert (first.calls, first.stats) == (second.calls, second.stats)


@pytest.mark.parametrize("mutation", sorted(SHOWS))
def test_without_one_of_the_checks_it_fails(server: EmbeddedServer, mutation: str) -> None:
    for seed in range(SHOWS[mutation], SHOWS[mutation] + MOST_SEEDS):
        if run_seed(server.url, seed, mutation).wrong:
            return
    pytest.fail(f"{MOST_SEEDS} seeds did not notice that the {mutation} check is gone")


@pytest.mark.parametrize("seed", range(max(2, SEEDS // 2)))
def test_one_key_is_one_request_and_a_limit_holds_in_whatever_slot(server: EmbeddedServer, seed: int) -> None:
    world = run_homes(server.url, seed)
    assert world.wrong == {}
    assert world.stats["requests"] == 28
    assert world.stats["moved"] > 1
    assert world.stats["found"] > 5
    assert world.stats["at the limit"] > 5


def test_without_the_number_of_a_batch_money_is_counted_twice(server: EmbeddedServer) -> None:
    seen = (run_homes(server.url, seed, "settled").wrong for seed in range(1, MOST_SEEDS))
    assert any("spent is not what ran" in wrong for wrong in seen)


def test_without_the_mark_that_a_rid_is_void_a_key_runs_twice(server: EmbeddedServer) -> None:
    assert any(run_homes(server.url, seed, "void").wrong for seed in range(1, MOST_SEEDS))
