"""What a producer may do: push jobs, and read its results, journals and publications."""

from __future__ import annotations

from protocol import records
from protocol.bus.base import Base
from protocol.connection import Subscription
from protocol.keys import check_name
from protocol.messages import Terminal


class ProducerBus(Base):
    """The calls of a producer. None of them needs a script."""

    async def push(self, payload: bytes) -> str:
        """XADD jobs * job payload: what a bare producer does. Returns the entry id. Repeated if the reply is lost:
        with an ``id`` the job still runs only once."""
        entry: bytes = await self._link.command("XADD", self.keys.jobs, "*", "job", payload)
        return entry.decode()

    async def find_request(self, tenant: str, key: str) -> str | None:
        """The rid behind an idempotency key or a producer's id; None if unknown, expired or rejected."""
        value = await self._link.command("GET", self.keys.idempotency(tenant, key))
        rid = value.split(b" ")[0].decode() if value else "-"
        return None if rid == "-" else rid

    def subscribe(self, name: str) -> Subscription:
        return Subscription(self._link, self.keys.out(check_name(name, "reply_to")))

    async def read_results(
        self, name: str, after: str = "0-0", block_ms: int | None = None
    ) -> list[tuple[str, Terminal]]:
        """Terminal entries after stream id ``after``; without ``block_ms`` it does not wait."""
        key = self.keys.results(check_name(name, "results"))
        while entries := await self._read_stream(key, after, 1000, block_ms):
            results = [
                (entry_id.decode(), terminal) for entry_id, flat in entries if (terminal := records.terminal(flat))
            ]
            if results:
                return results
            after = entries[-1][0].decode()  # none of them is readable: skip them
        return []
