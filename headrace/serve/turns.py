"""Models that share a card by turns: who is loaded, who has to wait and why. Pure: the fleet does what is decided here.

A card holds so many models at once. One that has work and is not loaded gets the place of another: of those that have
stayed for the least stay, the one that has been idle longest, or else (all have work) the one that has stayed longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Guest:
    """One model of a card. Times are monotonic seconds."""

    name: str
    loaded: bool
    since: float = 0.0  # when it was loaded; of one that is not, since when it has had work
    busy_at: float = 0.0  # when it last had work
    waits: bool = False  # it has work and is not loaded


@dataclass(frozen=True)
class Decision:
    """``leaves`` gives its place to ``comes``; ``reasons`` says of each that waits why it does."""

    comes: str | None = None
    leaves: str | None = None
    reasons: dict[str, str] | None = None


def decide(card: str, guests: Sequence[Guest], holds: int, least_stay: float, now: float) -> Decision:
    """What is to happen next on a card: one move at a time."""
    loaded = [guest for guest in guests if guest.loaded]
    waiting = sorted((guest for guest in guests if guest.waits), key=lambda guest: guest.since)
    if not waiting:
        return Decision(reasons={})
    names = " and ".join(guest.name for guest in loaded)
    reason = f"waits for its turn on {card}: {names} stays for {least_stay:g} s at least"
    reasons = {guest.name: reason for guest in waiting}
    comes = waiting[0].name
    if len(loaded) < holds:
        return Decision(comes, reasons={k: v for k, v in reasons.items() if k != comes})
    may_leave = [guest for guest in loaded if now - guest.since >= least_stay]
    if not may_leave:
        return Decision(reasons=reasons)
    leaves = min(may_leave, key=lambda guest: (guest.busy_at, guest.since))
    reasons[comes] = f"waits until {leaves.name} has ended what it runs on {card}"
    return Decision(comes, leaves.name, reasons)
