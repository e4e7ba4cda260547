"""What the tools of an operator read and change in the store, and how they find the model that is meant, with all its
shards.

They work as a person with the server's password: over all tenants. No prompt and no answer is read, but by `tail`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from protocol import records
from protocol.bus import GatewayBus, LeaderBus
from protocol.bus.base import stream_entries
from protocol.errors import InvalidRequest, StartError, Unavailable
from protocol.keys import NAME, Keys
from protocol.messages import ID_BYTES
from protocol.records import RequestRecord
from protocol.routing.shards import Shard, ShardStore, served

PATIENCE_S = 5.0
PAGE = 500


class OperatorBus(GatewayBus, LeaderBus):
    """Every read, and of the scripts those of a gateway."""

    SCRIPTS: ClassVar[tuple[str, ...]] = GatewayBus.SCRIPTS


@dataclass(frozen=True)
class Live:
    """One request that has not ended. Times in seconds."""

    rid: str
    tenant: str
    state: str  # inbox, queued, running
    age_s: float
    prompt_tokens: int
    choices: int
    open: int
    bytes: int  # of its journals
    attempts: int
    cancel: str | None


@dataclass(frozen=True)
class Letter:
    """A dead letter: what could not be run, and why. ``rid`` is None for a push that became no request."""

    entry: str
    age_s: float
    rid: str | None
    code: str
    message: str
    producer_id: str | None


async def shards_of(url: str, model: str) -> list[Shard]:
    """Those that may hold anything. ``model`` may be the tag of one of them."""
    store = ShardStore(url, PATIENCE_S)
    try:
        found = served(await store.read(model.partition("#")[0]))
    finally:
        await store.close()
    return [shard for shard in found if "#" not in model or shard.tag == model]


async def served_model(url: str, named: str | None) -> str:
    """The model that is meant: the one that is named, else the only one."""
    try:
        found = sorted(await GatewayBus.models(url, patience=PATIENCE_S))
    except Unavailable as error:
        raise StartError(f"--redis-url: {error.message}") from None
    if named is not None:
        return named
    if len(found) != 1:
        raise InvalidRequest(f"name it with --model: {', '.join(found) or 'no model is served here'}", param="model")
    return found[0]


@contextlib.asynccontextmanager
async def opened(values: Mapping[str, Any]) -> AsyncIterator[Stores]:
    url, stores = values["redis_url"], Stores()
    try:
        for shard in await shards_of(url, await served_model(url, values["model"])):
            stores.add(shard, OperatorBus(url, shard.tag, patience=PATIENCE_S))
        if not stores.parts:
            raise InvalidRequest(f"there is no shard {values['model']}", param="model")
        await asyncio.gather(*(store.bus.connect() for store in stores.parts))
        yield stores
    except Unavailable as error:
        raise StartError(f"--redis-url: {error.message}") from None
    finally:
        await asyncio.gather(*(store.bus.close() for store in stores.parts))


class Stores:
    """The requests and dead letters of one model, in all its shards."""

    def __init__(self) -> None:
        self.parts: list[Store] = []

    def add(self, shard: Shard, bus: OperatorBus) -> None:
        self.parts.append(Store(bus, shard))

    async def live(self, tenant: str | None = None) -> list[Live]:
        """Unfinished requests, oldest first."""
        found = await asyncio.gather(*(store.live(tenant) for store in self.parts))
        return sorted((one for some in found for one in some), key=lambda one: -one.age_s)

    async def find(self, named: str) -> tuple[Store, RequestRecord]:
        """The request of this id, as bodies or headers show it, or of the only unfinished one that begins so."""
        rid = named.removeprefix("chatcmpl-").removeprefix("cmpl-")
        if not NAME.fullmatch(rid):
            raise InvalidRequest("an id must match [A-Za-z0-9_-]{1,64}", param="id")
        for store in self.parts:
            if record := await store.bus.read_request(rid):
                return store, record
        begin = [(store, one) for store in self.parts for one in await store.bus.scan_live() if one.startswith(rid)]
        for store, one in begin if len(begin) == 1 else []:
            if record := await store.bus.read_request(one):
                return store, record
        raise StartError(f"no request {named}: it never was, or has ended longer ago than --retention")

    async def letters(self) -> list[tuple[Store, Letter]]:
        """Dead letters, oldest first."""
        found = [(store, letter) for store in self.parts for letter in await store.letters()]
        return sorted(found, key=lambda one: -one[1].age_s)

    def place_for(self, store: Store) -> Store:
        """Where what is tried again goes: the shard that it was in, but for one that drains."""
        return store if store.shard.open else self.parts[0]


class Store:
    """Those of one shard. Its dead letters are named by their entry, as ids of requests are: `s` and the number follows
    in another shard than the first."""

    def __init__(self, bus: OperatorBus, shard: Shard) -> None:
        self.bus = bus
        self.shard = shard
        self.keys: Keys = bus.keys
        self._suffix = f"s{shard.number}" if shard.number else ""

    async def live(self, tenant: str | None = None) -> list[Live]:
        """Unfinished requests, oldest first."""
        now, rids = await self.bus.server_ms(), sorted(await self.bus.scan_live())
        found = [one for at in range(0, len(rids), PAGE) for one in await self._page(rids[at : at + PAGE], now)]
        return sorted((one for one in found if tenant in (None, one.tenant)), key=lambda one: -one.age_s)

    async def _page(self, rids: list[str], now: int) -> list[Live]:
        fields = ("tenant", "n", "open", "created", "attempts", "cancel", "seed", "p0")
        commands: list[tuple[Any, ...]] = []
        for rid in rids:
            key = self.keys.request(rid)
            commands += [("HMGET", key, *fields), ("HSTRLEN", key, "prompt:0"), ("STRLEN", self.keys.journal(rid, 0))]
        replies = await self.bus._link.pipeline(commands, tolerant=True)
        found = []
        for rid, told, prompt, size in zip(rids, replies[::3], replies[1::3], replies[2::3], strict=True):
            if not told or told[0] is None:
                continue
            tenant, n, left, created, attempts, cancel, seed, placed = told
            found.append(
                Live(
                    rid=rid, tenant=tenant.decode(), age_s=max(0, now - int(created or now)) / 1000,
                    state="inbox" if seed is None else "running" if placed is not None else "queued",
                    prompt_tokens=int(prompt or 0) // ID_BYTES, choices=int(n or 0), open=int(left or 0),
                    bytes=int(size or 0), attempts=int(attempts or 0), cancel=cancel.decode() if cancel else None,
                )
            )  # fmt: skip
        return found

    async def letters(self) -> list[Letter]:
        """Dead letters, oldest first."""
        now = await self.bus.server_ms()
        reply = await self.bus._link.command("XRANGE", self.keys.dead, "-", "+")
        found = []
        for entry_id, flat in stream_entries([(b"", reply)]):
            told = {k.decode(): v.decode("utf-8", "replace") for k, v in records.fields_of(flat).items()}
            entry = entry_id.decode()
            found.append(
                Letter(
                    entry=entry + self._suffix, age_s=max(0, now - int(entry.partition("-")[0])) / 1000,
                    rid=told.get("rid") or None, code=told.get("code", ""), message=told.get("message", ""),
                    producer_id=told.get("id") or None,
                )
            )  # fmt: skip
        return found

    async def drop(self, letter: Letter) -> int:
        """Delete a dead letter; returns how many there were."""
        return int(await self.bus._link.command("XDEL", self.keys.dead, letter.entry.removesuffix(self._suffix)))
