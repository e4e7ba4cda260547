"""What answers cost: counted for metrics, and summed per tenant and day for budgets.

The sum is in the home slot (protocol/bus/home.py), which settles what requests of our models cost and refuses those
beyond a budget, whatever way they come; what upstreams cost is added here when they have answered.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque

from gateway.metrics import COST, ROUTED, ROUTED_TOKENS
from gateway.models import Models
from protocol.bus import HomeBus
from protocol.errors import HeadraceError

log = logging.getLogger("headrace.gateway")

MOST_TENANTS = 1000  # with series of their own; further ones count as "other"
LAST_FIRSTS = 32  # times to a first token that are kept of each candidate


class Money:
    def __init__(self, models: Models, home: HomeBus) -> None:
        self.models = models
        self._home = home
        self._spent: dict[str, float] = {}  # by tenant, as read last
        self._tenants: set[str] = set()
        self._firsts: dict[str, deque[float]] = {}
        self._under_way: dict[str, int] = {}  # upstream -> requests of this gateway

    # -------------------------------------------------------------- budgets

    async def over_budget(self, tenant: str) -> bool:
        """Whether the tenant has spent its money of today. While the sum cannot be read, the last one holds."""
        terms = self.models.routing.tenants.get(tenant)
        if terms is None or terms.budget is None:
            return False
        try:
            self._spent[tenant] = await self._home.spent(tenant)
        except HeadraceError as error:
            log.warning("what tenants have spent cannot be read, the last sum holds: %s", error)
        return self._spent.get(tenant, 0.0) >= terms.budget

    async def spend_upstream(self, tenant: str, upstream: str, prompt: int, output: int) -> None:
        terms, price = self.models.routing.tenants.get(tenant), self.models.routing.price(upstream)
        if terms is not None and terms.budget is not None and price is not None:
            with contextlib.suppress(HeadraceError):
                await self._home.spend(tenant, price.of(prompt, output))

    # -------------------------------------------------------------- metrics and what choices go by

    def count(self, name: str, tenant: str, asked: str, rule: str, prompt: int, output: int) -> float | None:
        """One answer of ``name``, however it ended. Returns its money; None where ``name`` has no price."""
        if tenant not in self._tenants:
            if len(self._tenants) >= MOST_TENANTS:
                tenant = "other"
            self._tenants.add(tenant)
        ROUTED.labels(name, tenant, asked, rule).inc()
        ROUTED_TOKENS.labels(name, tenant, rule, "prompt").inc(prompt)
        ROUTED_TOKENS.labels(name, tenant, rule, "output").inc(output)
        price = self.models.routing.price(name)
        if price is None:
            return None
        cost = price.of(prompt, output)
        COST.labels(name, tenant, rule).inc(cost)
        return cost

    def saw_first_token(self, name: str, seconds: float) -> None:
        self._firsts.setdefault(name, deque(maxlen=LAST_FIRSTS)).append(seconds)

    def first_token_s(self, name: str) -> float:
        """The shortest of late; 0 where none was seen, so that it is tried."""
        return min(self._firsts.get(name, (0.0,)))

    def began(self, upstream: str, count: int = 1) -> None:
        self._under_way[upstream] = self._under_way.get(upstream, 0) + count

    def load(self, upstream: str) -> int:
        return self._under_way.get(upstream, 0)
