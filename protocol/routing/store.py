"""Where the table of routes is kept: beside the registry, for all gateways. One value, replaced by compare-and-set:
whoever reads it reads one state, and no change is lost.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable

import msgspec

from protocol.connection import Link
from protocol.errors import StartError
from protocol.keys import REGISTRY, ROUTING
from protocol.routing.table import Routing

_SWAP = """
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
return 1
"""
_decoder = msgspec.json.Decoder(Routing)
_encode = msgspec.json.Encoder().encode


def decode(raw: bytes) -> Routing:
    """The table. StartError for one that this version cannot read."""
    if not raw:
        return Routing()
    try:
        return _decoder.decode(raw)
    except msgspec.MsgspecError as error:
        raise StartError(f"the table of routes in the store cannot be read: {error}") from None


class RoutingStore:
    """The table of one server. Calls repeat for ``patience`` seconds, then raise Unavailable."""

    def __init__(self, url: str, patience: float | None = 5.0) -> None:
        self.url = url
        self._link = Link(url, patience, REGISTRY)

    async def close(self) -> None:
        await self._link.close()

    async def read(self) -> bytes:
        """The table's bytes; b"": there is none."""
        return await self._link.command("GET", ROUTING) or b""

    async def change(self, make: Callable[[Routing], Routing]) -> Routing:
        """Replace the table by what ``make`` makes of it, at once for all who read. ``make`` may be called again."""
        while True:
            raw = await self.read()
            table = make(decode(raw))
            new = _encode(msgspec.structs.replace(table, service=table.service or secrets.token_hex(8)))
            if await self._link.command("EVAL", _SWAP, 1, ROUTING, raw, new):
                return decode(new)

    async def clear(self) -> None:
        """No table: every name is a served model's."""
        await self._link.command("DEL", ROUTING)
