"""Who is loaded on a card that models share."""

from __future__ import annotations

import pytest

from headrace.serve.turns import Decision, Guest, decide

STAY = 30.0
A = Guest("a", loaded=True, since=0.0, busy_at=10.0)
B = Guest("b", loaded=True, since=5.0, busy_at=8.0)
WAITS = Guest("c", loaded=False, since=20.0, waits=True)
LATER = Guest("d", loaded=False, since=21.0, waits=True)
WHY = "waits for its turn on gpu0: a and b stays for 30 s at least"


@pytest.mark.parametrize(
    ("guests", "now", "comes", "leaves"),
    [
        ([A, B], 100.0, None, None),
        ([A, WAITS], 29.0, "c", None),  # there is room
        ([A, B, WAITS], 29.0, None, None),  # nobody has stayed long enough
        ([A, B, WAITS], 31.0, "c", "a"),  # only one has
        ([A, B, WAITS], 40.0, "c", "b"),  # it is idle longest
        ([A, B, LATER, WAITS], 40.0, "c", "b"),  # who has waited longest comes
    ],
)
def test_a_decision(guests: list[Guest], now: float, comes: str | None, leaves: str | None) -> None:
    found = decide("gpu0", guests, 2, STAY, now)
    assert (found.comes, found.leaves) == (comes, leaves)
    reasons = dict(found.reasons or {})
    if leaves:
        assert reasons.pop(comes or "") == f"waits until {leaves} has ended what it runs on gpu0"
    assert reasons.keys() == {guest.name for guest in guests if guest.waits} - {comes}
    if len([guest for guest in guests if guest.loaded]) == 2:
        assert set(reasons.values()) <= {WHY}


def test_all_busy_the_one_that_has_stayed_longest_gives_way() -> None:
    busy = [Guest("a", True, 3.0, 50.0), Guest("b", True, 1.0, 50.0), WAITS]
    assert decide("gpu0", busy, 2, STAY, 50.0) == Decision(
        "c", "b", {"c": "waits until b has ended what it runs on gpu0"}
    )
