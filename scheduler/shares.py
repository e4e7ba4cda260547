"""The fair shares of tenants over all shards of a model: leaders tell each other, in the home slot, how much they
have served whom, and each counts in its own queue what the others have served.

Only fairness hangs on it: what is lost, or counted twice after a lost reply, is a second's service.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from protocol.bus import HomeBus
from protocol.errors import ServiceError
from scheduler.core.events import Event, ServedElsewhere
from scheduler.core.scheduler import Core

log = logging.getLogger("headrace.scheduler")

EXCHANGE_S = 1.0
AHEAD_S = 10.0  # by so many seconds of this shard's service a tenant may be ahead for what it got elsewhere


class Shares:
    """Of one term. ``several``: whether the model has other shards now."""

    def __init__(self, home: HomeBus, model: str, core: Core, several: Callable[[], bool]) -> None:
        self._home = home
        self._model = model
        self._core = core
        self._several = several
        self._known: dict[str, float] = {}  # active tenant -> tokens that all shards have served it

    async def exchange(self, apply: Callable[[Event], None]) -> None:
        """Tell what was served here since the last time, and apply what was served elsewhere meanwhile."""
        charged = self._core.take_charged()
        if not self._several():
            self._known = {}
            return
        wanted = {tenant: charged.get(tenant, 0.0) for tenant in (*self._core.active_tenants(), *charged)}
        totals = await self._home.add_served(self._model, wanted)
        served = {
            tenant: total - self._known[tenant] - wanted[tenant]
            for tenant, total in totals.items()
            if tenant in self._known
        }
        self._known = totals
        if served := {tenant: tokens for tenant, tokens in served.items() if tokens > 0}:
            apply(ServedElsewhere(served, AHEAD_S / EXCHANGE_S * sum(charged.values())))

    async def exchange_often(self, apply: Callable[[Event], None]) -> None:
        """Until cancelled. Where the home slot does not answer, each shard is fair by itself."""
        while True:
            await asyncio.sleep(EXCHANGE_S)
            try:
                await self.exchange(apply)
            except ServiceError as error:
                log.warning("the shares of tenants could not be told: %s", error)
