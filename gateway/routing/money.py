"""What answers cost: counted for metrics, and summed per tenant and day for budgets.

Tokens of served models are counted by their leaders as requests end, those of upstreams here; both in the store, so a
budget holds over all gateways. What runs now is not in the sum yet: a tenant can exceed its budget by what it has under
way, no more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque

from gateway.metrics import COST, ROUTED, ROUTED_TOKENS
from gateway.models import Models
from protocol.errors import HeadraceError
from protocol.routing.store import RoutingStore, day_of

log = logging.getLogger("headrace.gateway")

READ_S = 2.0  # how often the sums are read, while somebody asks
MOST_TENANTS = 1000  # with series of their own; further ones count as "other"
LAST_FIRSTS = 32  # times to a first token that are kept of each candidate


class Money:
    def __init__(self, models: Models) -> None:
        self.models = models
        self._store = RoutingStore(models.url, patience=2.0)
        self._spent: dict[str, float] = {}
        self._read_at = float("-inf")
        self._reading = asyncio.Lock()
        self._tenants: set[str] = set()
        self._firsts: dict[str, deque[float]] = {}
        self._under_way: dict[str, int] = {}  # upstream -> requests of this gateway

    async def close(self) -> None:
        await self._store.close()

    # -------------------------------------------------------------- budgets

    async def over_budget(self, tenant: str) -> bool:
        """Whether the tenant has spent its money of today. While the sums cannot be read, the last ones hold."""
        terms = self.models.routing.tenants.get(tenant)
        if terms is None or terms.budget is None:
            return False
        await self._read()
        return self._spent.get(tenant, 0.0) >= terms.budget

    async def _read(self) -> None:
        async with self._reading:
            if time.monotonic() - self._read_at < READ_S:
                return
            table, day = self.models.routing, day_of(time.time())
            try:
                used = await self._store.used_upstream(day)
                for model in await self.models.opened():
                    used |= {(t, model.name): n for t, n in (await model.used_tokens(day)).items()}
            except HeadraceError as error:
                log.warning("what tenants have spent cannot be read, the last sums hold: %s", error)
                return
            spent: dict[str, float] = {}
            for (tenant, name), (prompt, output) in used.items():
                if price := table.price(name):
                    spent[tenant] = spent.get(tenant, 0.0) + price.of(prompt, output)
            self._spent, self._read_at = spent, time.monotonic()

    async def spend_upstream(self, tenant: str, upstream: str, prompt: int, output: int) -> None:
        with contextlib.suppress(HeadraceError):
            await self._store.spent_upstream(day_of(time.time()), tenant, upstream, prompt, output)

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
