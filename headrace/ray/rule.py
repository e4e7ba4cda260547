"""How many workers a model needs: the rule of KEDA and Kubernetes' autoscaler, as deploy/kubernetes sets it.

Demand is open requests: waiting + running + inbox, as the leading scheduler shows them. One worker for every so many;
more of them at once; fewer only after the least that was asked for over a while, one by one; none only long after the
last open request. Pure: the clock is the caller's.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Annotated

import msgspec

Seconds = Annotated[float, msgspec.Meta(ge=0)]
Number = Annotated[int, msgspec.Meta(ge=0)]

TOLERANCE = 0.1  # the autoscaler of Kubernetes lets a number be that is so near to what is wanted


class Scaling(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """`[models."NAME".ray]` of a configuration file: between which numbers, by which demand, with which resources."""

    min_workers: Number = 1  # 0: none while nobody asks for the model
    max_workers: Annotated[int, msgspec.Meta(ge=1)] = 8
    requests_per_worker: Annotated[int, msgspec.Meta(ge=1)] = 16
    scale_down_after: Seconds = 300.0  # the greatest number that was wanted within so many seconds counts
    step_down_every: Seconds = 150.0  # from one worker that is stopped to the next
    scale_to_zero_after: Seconds = 600.0  # from the last open request
    cpus: Seconds | None = None  # of a rank; None: its threads, else 1
    gpus: Seconds | None = None  # of a rank; None: 1, but for the device cpu and the simulated engine

    def fault(self) -> tuple[str, str] | None:
        """(key, what is wrong with it)."""
        if self.min_workers > self.max_workers:
            return "min-workers", f"{self.min_workers} is more than max-workers = {self.max_workers}"
        return None


class Scaler:
    """One model's number of workers over time."""

    def __init__(self, rule: Scaling) -> None:
        self.rule = rule
        self._wanted: deque[tuple[float, int]] = deque()  # (when, how many demand alone asked for)
        self._busy_at: float | None = None  # when a request was open last
        self._stepped_at = -math.inf

    def wanted(self, now: float, demand: int | None, workers: int) -> int:
        """How many workers there should be, where ``workers`` are there or on their way. ``demand`` None: it is not
        known, and the number stays, at least 1 since a request may be open."""
        rule = self.rule
        if demand is None:
            return max(workers, min(1, rule.max_workers))
        if demand or self._busy_at is None:
            self._busy_at = now
        if not workers:
            return max(rule.min_workers, self._by(demand, 0)) if demand else rule.min_workers
        if not demand and not rule.min_workers and now - self._busy_at >= rule.scale_to_zero_after:
            self._wanted.clear()
            return 0
        self._wanted.append((now, self._by(demand, workers)))
        while self._wanted[0][0] < now - rule.scale_down_after:
            self._wanted.popleft()
        most = max(count for _, count in self._wanted)
        if most >= workers:
            return max(workers, self._wanted[-1][1])
        if now - self._stepped_at < rule.step_down_every:
            return workers
        self._stepped_at = now
        return workers - 1

    def _by(self, demand: int, workers: int) -> int:
        """What this demand alone asks for."""
        ratio = demand / self.rule.requests_per_worker
        if workers and abs(ratio / workers - 1) <= TOLERANCE:
            ratio = workers
        return max(1, self.rule.min_workers, min(self.rule.max_workers, math.ceil(ratio)))
