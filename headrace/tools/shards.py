"""``headrace shards ls | add | drain | open | retire``: the slots that a model's requests are spread over."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

from headrace.tools.show import as_json, table
from headrace.tools.stored import PATIENCE_S, served_model
from protocol.bus import LeaderBus
from protocol.errors import InvalidRequest, StartError, Unavailable
from protocol.records import LeaderRecord
from protocol.routing.shards import Shard, ShardStore

LEFT_S = 10.0  # how long it takes at most until nobody leads a shard any more that is retired
POLL_S = 0.5
KNOWN_S = 5.0  # until every gateway and client has read that a shard drains (they look every three seconds)


@dataclasses.dataclass(frozen=True)
class Line:
    """One shard as it is shown."""

    shard: int
    state: str
    tag: str
    leader: str
    workers: int
    unfinished: int


def run(values: Mapping[str, Any]) -> int:
    """The command."""
    return asyncio.run(change(values))


async def change(values: Mapping[str, Any]) -> int:
    url, action = values["redis_url"], values["action"]
    store = ShardStore(url, PATIENCE_S)
    try:
        model = await served_model(url, values["model"])
        shards = await store.read(model)
        if action == "add":
            shards = await store.create(model, sum(shard.open for shard in shards) + 1)
        elif action != "ls":
            for named in values["id"] or [""]:
                await _set(store, url, _named(shards, named), action)
            if action == "drain":  # what is shown as unfinished after that is all that there will be
                await asyncio.sleep(KNOWN_S)
            shards = await store.read(model)
        await _show(url, shards, values["json"])
    except Unavailable as error:
        raise StartError(f"--redis-url: {error.message}") from None
    finally:
        await store.close()
    return 0


def _named(shards: Sequence[Shard], named: str) -> Shard:
    for shard in shards:
        if str(shard.number) == named and shard.number:
            return shard
    others = ", ".join(str(shard.number) for shard in shards if shard.number)
    raise InvalidRequest(f"name a shard by its number, one of: {others or 'there is only the first, which stays'}")


async def _set(store: ShardStore, url: str, shard: Shard, action: str) -> None:
    if shard.state == "retired":
        raise InvalidRequest(f"shard {shard.number} is retired: its number is not used again")
    if action == "retire":
        await _retire(store, url, shard)
    else:
        await store.set_state(shard, "draining" if action == "drain" else "open")


async def _retire(store: ShardStore, url: str, shard: Shard) -> None:
    """Close the inbox of a shard that has drained, once its leader has left it."""
    bus = LeaderBus(url, shard.tag, patience=PATIENCE_S)
    try:
        if shard.open or await bus.unfinished():
            raise InvalidRequest(f"shard {shard.number} is {shard.state} and has work: drain it, and wait for its end")
        await store.set_state(shard, "retired")
        if not (await _left(bus) and await bus.retire_shard()):
            await store.set_state(shard, "draining")
            raise InvalidRequest(f"shard {shard.number} got work meanwhile: it drains on")
    finally:
        await bus.close()


async def _left(bus: LeaderBus) -> bool:
    """Wait until nobody leads. A lead whose beat stands still is that of a process that died."""
    seen, changed = LeaderRecord(0, "", 0), 0.0
    for _ in range(int(2 * LEFT_S / POLL_S)):
        now = await bus.read_leader()
        if not now.owner or (now == seen and time.monotonic() - changed > LEFT_S):
            return True
        if now != seen:
            seen, changed = now, time.monotonic()
        await asyncio.sleep(POLL_S)
    return False


async def _show(url: str, shards: Sequence[Shard], as_lines: bool) -> None:
    lines = [await _line(url, shard) for shard in shards]
    if as_lines:
        as_json(lines)
        return
    rows = [(str(one.shard), one.state, one.tag, one.leader, str(one.workers), str(one.unfinished)) for one in lines]
    table(("shard:", "state", "tag", "leader", "workers:", "unfinished:"), rows, "")


async def _line(url: str, shard: Shard) -> Line:
    if shard.state == "retired":
        return Line(shard.number, shard.state, shard.tag, "", 0, 0)
    bus = LeaderBus(url, shard.tag, patience=PATIENCE_S)
    try:
        leader, workers = await bus.read_leader(), await bus.list_workers()
        serving = sum(worker.state == "serving" for worker in workers)
        return Line(shard.number, shard.state, shard.tag, leader.owner, serving, await bus.unfinished())
    finally:
        await bus.close()
