"""Where the table of routes and the tokens that tenants have used are kept: beside the registry, for all gateways.

The table is one value, replaced by compare-and-set: whoever reads it reads one state, and no change is lost. Tokens
are counted by day (UTC) and tenant: of served models by their leaders, in a key of the model; of upstreams by the
gateway that answered. Money is a matter of the reader, who knows the prices.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable

import msgspec

from protocol.connection import Link
from protocol.errors import StartError
from protocol.keys import REGISTRY, ROUTING
from protocol.records import fields_of
from protocol.routing.table import Routing

KEPT_MS = 3 * 86_400_000  # how long a day's count stays

_SWAP = """
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
return 1
"""
_decoder = msgspec.json.Decoder(Routing)
_encode = msgspec.json.Encoder().encode

Used = dict[tuple[str, str], tuple[int, int]]  # (tenant, model or upstream) -> prompt tokens, output tokens


def day_of(unix_s: float) -> int:
    return int(unix_s // 86400)


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

    # -------------------------------------------------------------- used tokens

    async def spent_upstream(self, day: int, tenant: str, upstream: str, prompt: int, output: int) -> None:
        """Count the tokens of an upstream's answer. Counted twice, at worst, if the server's reply was lost."""
        key = f"{{{REGISTRY}}}:used:{day}"
        await self._link.pipeline(
            [
                ("HINCRBY", key, f"in:{tenant}:{upstream}", prompt),
                ("HINCRBY", key, f"out:{tenant}:{upstream}", output),
                ("PEXPIRE", key, KEPT_MS),
            ]
        )

    async def used_upstream(self, day: int) -> Used:
        found = fields_of(await self._link.command("HGETALL", f"{{{REGISTRY}}}:used:{day}"))
        used: Used = {}
        for field, value in found.items():
            kind, tenant, upstream = field.decode().split(":", 2)
            _add(used, kind, (tenant, upstream), int(value))
        return used


def _add(used: Used, kind: str, key: tuple[str, str], count: int) -> None:
    prompt, output = used.get(key, (0, 0))
    used[key] = (prompt + count, output) if kind == "in" else (prompt, output + count)
