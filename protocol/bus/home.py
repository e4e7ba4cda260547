"""The home slot: which request stands behind an idempotency key, whatever model or slot it runs in.

The request itself lies in its model's slot, and no script reaches over two slots. So a key is *claimed* first, with the
rid that the request will have, and accepted under that rid afterwards. Whoever finds a claim without a request (its
maker died in between) completes it with the same rid; that is safe since a rid is accepted once. A claim stays as long
as its request: the sweep of the model's leader frees it once the request is gone, and only after the rid was made void
in the model's slot, so that an accept which is still on its way cannot come after the key was given to another.
"""

from __future__ import annotations

from protocol.connection import Link
from protocol.keys import HOME, claim_name
from protocol.records import Claim
from protocol.scripts import load

FIRST_LOOK_MS = 60_000  # a claim without a request is no older than this when it is freed


class HomeBus:
    """Claims. Calls are repeated as those of Base, with the same errors; every one is safe to repeat."""

    SCRIPTS = ("claim", "unclaim")

    def __init__(self, url: str, *, patience: float | None = None) -> None:
        self._link = Link(url, patience, HOME)
        self._scripts = load(self.SCRIPTS, sharded=self._link.in_cluster)

    async def close(self) -> None:
        await self._link.close()

    async def find(self, tenant: str, key: str, name: str) -> Claim | None:
        """The claim of a key, if there is one. ``name``: the model as the client wrote it."""
        claim = claim_name(tenant, key, name)
        value: bytes | None = await self._link.command("GET", HOME + claim)
        return None if value is None else _claim(claim, value)

    async def claim(self, tenant: str, key: str, name: str, *, model: str, rid: str, body: str) -> Claim:
        """Claim a key for the request ``rid`` of ``model``, or find who has it: ``mine`` tells."""
        claim = claim_name(tenant, key, name)
        args = (HOME, claim, model, rid, body, FIRST_LOOK_MS)
        found = await self._link.script(self._scripts["claim"], HOME + claim, args)
        held_by, owner, held_body = (part.decode() for part in found)
        return Claim(claim, held_by, owner, held_body, mine=owner == rid)

    async def due(self, model: str, count: int) -> list[Claim]:
        """Claims for requests of ``model`` that it is time to look at, the longest due first."""
        seconds, micros = await self._link.command("TIME")
        now = int(seconds) * 1000 + int(micros) // 1000
        names = await self._link.command(
            "ZRANGEBYSCORE", f"{HOME}sweep:{model}", "-inf", now, "LIMIT", 0, count
        )  # fmt: skip
        values = await self._link.pipeline([("GET", HOME + name.decode()) for name in names])
        return [
            _claim(name.decode(), value or f"{model} - -".encode()) for name, value in zip(names, values, strict=True)
        ]

    async def look_later(self, claim: Claim) -> None:
        """Its request is there: look again after a while."""
        await self._run_unclaim(claim, FIRST_LOOK_MS)

    async def free(self, claim: Claim) -> None:
        """Its rid is void: the key may be claimed anew. Nothing if it was."""
        await self._run_unclaim(claim, "")

    async def _run_unclaim(self, claim: Claim, wait_ms: int | str) -> None:
        args = (HOME, claim.name, claim.model, claim.rid, wait_ms)
        await self._link.script(self._scripts["unclaim"], HOME + claim.name, args)


def _claim(name: str, value: bytes) -> Claim:
    model, rid, body = value.decode().split(" ")
    return Claim(name, model, rid, body, mine=False)
