"""What was pushed to a name that is no model: an alias or a route. Gateways hand it on to the model that they choose.

Such a name has an inbox of its own, in its own slot. Which model a push goes to is written down first, under its id;
then it is pushed there, with that id; then the entry is taken. So whoever dies in between, the next one hands it to the
same model, which runs one id once.
"""

from __future__ import annotations

import contextlib
from typing import Any, ClassVar

from protocol.bus.base import Base, rejection, stream_entries
from protocol.errors import StoreFailed
from protocol.records import InboxEntry, inbox_entry

GROUP = "routers"
STRANDED_MS = 30_000  # an entry that a gateway has read and not handed on for so long is another one's
DECISION_S = 86_400  # how long it is known where a push went


class VirtualBus(Base):
    """The inbox of one such name."""

    SCRIPTS: ClassVar[tuple[str, ...]] = ("reject",)

    async def open(self) -> None:
        """Make the group; a name that nobody ever pushed to has an empty stream from now on."""
        with contextlib.suppress(StoreFailed):  # it is there
            await self._link.command("XGROUP", "CREATE", self.keys.jobs, GROUP, "0", "MKSTREAM")

    async def read(self, consumer: str, count: int, block_ms: int) -> list[InboxEntry]:
        """Entries that nobody has handed on: those of gateways that died come first, then new ones."""
        claim = ("XAUTOCLAIM", self.keys.jobs, GROUP, consumer, STRANDED_MS, "0", "COUNT", count)
        _, stranded, *_ = await self._link.command(*claim)
        if found := [entry for entry in stranded if entry and entry[1]]:
            return [inbox_entry(*entry) for entry in found]
        read = ("XREADGROUP", "GROUP", GROUP, consumer, "COUNT", count, "BLOCK", block_ms)
        reply = await self._link.command(*read, "STREAMS", self.keys.jobs, ">", block_s=block_ms / 1000)
        return [inbox_entry(*entry) for entry in stream_entries(reply)]

    async def decide(self, tenant: str, id: str, model: str) -> str:
        """Where the push of this id goes: ``model``, unless it was decided before."""
        key = self.keys.routed(tenant, id)
        _, decided = await self._link.pipeline([("SET", key, model, "NX", "EX", DECISION_S), ("GET", key)])
        return bytes(decided).decode()

    async def decided(self, tenant: str, id: str) -> str | None:
        found: bytes | None = await self._link.command("GET", self.keys.routed(tenant, id))
        return None if found is None else found.decode()

    async def taken(self, entry_id: str) -> None:
        """It was handed on."""
        acknowledge = ("XACK", self.keys.jobs, GROUP, entry_id)
        await self._link.pipeline([acknowledge, ("XDEL", self.keys.jobs, entry_id)])

    async def reject(self, entry_id: str, **told: Any) -> None:
        """End a push that no model may have: a dead letter and one error result, here. See LeaderBus.reject."""
        args = ("", entry_id, self._retention_ms, *rejection(entry_id, **told))
        await self._run("reject", *args, key=self.keys.jobs)
        await self._link.command("XACK", self.keys.jobs, GROUP, entry_id)
