"""What the parts of a load took, for the line of the log that says that it is over."""

from __future__ import annotations

import time
from collections.abc import Callable


class Stages:
    """Seconds that each part of a load takes, in the order in which they came."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._entered = [("start", clock())]

    def enter(self, stage: str) -> bool:
        """Whether ``stage`` is another one than before."""
        if stage == self._entered[-1][0]:
            return False
        self._entered.append((stage, self._clock()))
        return True

    def __str__(self) -> str:
        ends = [*(at for _, at in self._entered[1:]), self._clock()]
        parts: dict[str, float] = {}
        for (stage, began), ended in zip(self._entered, ends, strict=True):
            parts[stage] = parts.get(stage, 0.0) + ended - began
        told = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in parts.items())
        return f"{sum(parts.values()):.1f} s ({told})"
