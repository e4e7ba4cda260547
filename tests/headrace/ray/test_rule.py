from __future__ import annotations

import msgspec
import pytest

from headrace.ray.rule import Scaler, Scaling

RULE = Scaling(min_workers=0, max_workers=4, requests_per_worker=10, scale_down_after=60, step_down_every=30,
               scale_to_zero_after=100)  # fmt: skip


def test_more_at_once_and_one_for_every_so_many() -> None:
    scaler = Scaler(RULE)
    assert scaler.wanted(0, 0, 0) == 0
    assert scaler.wanted(10, 1, 0) == 1
    assert scaler.wanted(20, 25, 1) == 3
    assert scaler.wanted(30, 900, 3) == 4


def test_what_is_nearly_enough_stays() -> None:
    assert Scaler(RULE).wanted(0, 21, 2) == 2
    assert Scaler(RULE).wanted(0, 23, 2) == 3


def test_fewer_only_after_a_while_and_one_by_one() -> None:
    scaler = Scaler(RULE)
    workers, history = 4, {}
    for now in range(0, 200, 10):
        history[now] = workers = scaler.wanted(now, 40 if now == 0 else 5, workers)
    assert [history[now] for now in (60, 70, 90, 100, 130, 190)] == [4, 3, 3, 2, 1, 1]


def test_a_short_lull_stops_nothing() -> None:
    scaler = Scaler(RULE)
    assert [scaler.wanted(now, 40 if now % 50 == 0 else 0, 4) for now in range(0, 300, 10)] == [4] * 30


def test_the_last_leaves_long_after_the_last_request() -> None:
    scaler = Scaler(RULE)
    assert scaler.wanted(0, 1, 1) == 1
    assert scaler.wanted(90, 0, 1) == 1
    assert scaler.wanted(100, 0, 1) == 0
    assert scaler.wanted(110, 1, 0) == 1


def test_an_unknown_demand_changes_nothing_and_stops_nobody() -> None:
    scaler = Scaler(RULE)
    assert scaler.wanted(0, None, 3) == 3
    assert scaler.wanted(1000, None, 0) == 1


def test_a_least_number_is_kept() -> None:
    rule = msgspec.structs.replace(RULE, min_workers=2)
    assert Scaler(rule).wanted(0, 0, 0) == 2
    assert Scaler(rule).wanted(0, 0, 2) == 2
    assert Scaler(rule).wanted(10_000, 0, 2) == 2


@pytest.mark.parametrize(
    "given", [{"max-workers": 0}, {"requests-per-worker": 0}, {"min-workers": -1}, {"scale-down-after": -1}, {"mni": 1}]
)
def test_what_makes_no_sense_is_refused(given: dict[str, int]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(given, Scaling)


def test_the_least_is_not_above_the_most() -> None:
    assert Scaling().fault() is None
    assert Scaling(min_workers=9).fault() == ("min-workers", "9 is more than max-workers = 8")
