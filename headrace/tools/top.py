"""``headrace top``: what a running service does now, in the terminal. All of it is read from the store.

Models with their leader, workers and queue (a further shard of one is a line of its own, MODEL#k); tenants by what they
have waiting; requests with --requests.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console, Group
from rich.live import Live as LiveView
from rich.text import Text

from headrace.tools.show import duration, grid
from headrace.tools.stored import PATIENCE_S, Live, OperatorBus, Store, shards_of
from protocol import records
from protocol.bus import GatewayBus
from protocol.errors import StartError, Unavailable
from protocol.routing.shards import Shard

SILENT_S = 4.0  # without a beat: something is wrong
WIDE = 400  # columns
TENANTS = 10  # shown of each model


@dataclass
class WorkerLine:
    wid: str
    state: str
    beats: bool  # it is not long ago that its heartbeat has moved
    device: str
    dtype: str
    gen: int


@dataclass
class ModelLine:
    """One model at one moment. ``leads``: it is not long ago that the leader's beat has moved."""

    model: str
    epoch: int
    leader: str
    leads: bool
    inbox: int
    waiting: int
    waiting_tokens: int
    live: int
    tokens_per_s: float
    workers: list[WorkerLine] = field(default_factory=list)
    tenants: list[tuple[str, int, int]] = field(default_factory=list)  # name, unfinished requests, waiting tokens
    requests: list[Live] = field(default_factory=list)


class Watch:
    """Looks again and again, and knows what has moved between two looks."""

    def __init__(self, url: str, model: str | None, requests: int) -> None:
        self._url = url
        self._model = model
        self._requests = requests
        self._buses: dict[str, OperatorBus] = {}
        self._beats: dict[tuple[str, str], tuple[tuple[int, int], float]] = {}  # with when it was first seen

    async def look(self) -> list[ModelLine]:
        names = sorted(await GatewayBus.models(self._url, patience=PATIENCE_S))
        shards = [shard for name in names for shard in await shards_of(self._url, name)]
        return [await self._look_at(one) for one in shards if self._model in (None, one.model, one.tag)]

    async def _look_at(self, shard: Shard) -> ModelLine:
        name = shard.label
        bus = self._buses.get(name)
        if bus is None:
            bus = self._buses[name] = OperatorBus(self._url, shard.tag, patience=PATIENCE_S)
            await bus.connect()
        leader = await bus.read_leader()
        link, keys = bus._link, bus.keys
        depth_fields, inbox, live = await link.pipeline(
            [("HGETALL", keys.depth), ("XLEN", keys.jobs), ("HLEN", keys.live)]
        )
        depth = {name.decode(): float(value) for name, value in records.fields_of(depth_fields).items()}
        line = ModelLine(
            model=name,
            epoch=leader.epoch,
            leader=leader.owner,
            leads=self._alive(name, "", (leader.epoch, leader.beat)),
            inbox=inbox,
            waiting=int(depth.get("requests", 0)),
            waiting_tokens=int(depth.get("tokens", 0)),
            live=live,
            tokens_per_s=round(depth.get("rate", 0.0), 1) if depth.get("running") else 0.0,  # else it is the last one
        )
        for worker in await bus.list_workers():
            offered = worker.capacity
            device, dtype = (offered.device, offered.dtype) if offered else ("", "")
            beats = self._alive(name, worker.wid, (worker.gen, worker.beat))
            line.workers.append(WorkerLine(worker.wid, worker.state, beats, device, dtype, worker.gen))
        line.tenants = await self._tenants(bus, depth)
        if self._requests:
            line.requests = (await Store(bus, shard).live())[: self._requests]
        return line

    async def _tenants(self, bus: OperatorBus, depth: dict[str, float]) -> list[tuple[str, int, int]]:
        names = [name.decode() for name in await bus._link.command("SMEMBERS", bus.keys.tenants)]
        counts = await bus._link.pipeline([("SCARD", bus.keys.running(name)) for name in names])
        found = [(name, count, int(depth.get(f"tokens:{name}", 0))) for name, count in zip(names, counts, strict=True)]
        return sorted(found, key=lambda one: (-one[2], -one[1], one[0]))[:TENANTS]

    def _alive(self, model: str, who: str, beat: tuple[int, int]) -> bool:
        before = self._beats.get((model, who))
        if before is None or before[0] != beat:
            before = self._beats[model, who] = beat, time.monotonic()
        return time.monotonic() - before[1] < SILENT_S

    async def close(self) -> None:
        for bus in self._buses.values():
            await bus.close()


def drawn(lines: list[ModelLine]) -> Group:
    if not lines:
        return Group(Text("no model is served here"))
    models = grid(("model", "leader", "epoch:", "live:", "inbox:", "waiting:", "their tokens:", "tokens/s:"))
    workers = grid(("model", "worker", "state", "device", "dtype", "session:"))
    tenants = grid(("model", "tenant", "unfinished:", "waiting tokens:"))
    requests = grid(("model", "request", "tenant", "state", "age:", "prompt:"))
    for line in lines:
        leader = Text(line.leader or "none", style="red" if not line.leader or not line.leads else "")
        models.add_row(
            line.model, leader, str(line.epoch), str(line.live), str(line.inbox), str(line.waiting),
            str(line.waiting_tokens), f"{line.tokens_per_s:g}",
        )  # fmt: skip
        for worker in line.workers:
            state = Text(
                worker.state if worker.beats else f"{worker.state}, silent", style="" if worker.beats else "red"
            )
            workers.add_row(line.model, worker.wid, state, worker.device, worker.dtype, str(worker.gen))
        for name, count, tokens in line.tenants:
            tenants.add_row(line.model, name, str(count), str(tokens))
        for one in line.requests:
            requests.add_row(line.model, one.rid, one.tenant, one.state, duration(one.age_s), str(one.prompt_tokens))
    parts = [part for part in (models, workers, tenants, requests) if part.row_count]
    return Group(*(piece for part in parts for piece in (part, Text(""))))


def run(values: Mapping[str, Any]) -> int:
    """The command: until Ctrl-C, or one look with --once, or where the output is no terminal."""
    return asyncio.run(_run(values))


async def _run(values: Mapping[str, Any]) -> int:
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDE)  # nothing is cut for a program
    watch = Watch(values["redis_url"], values["model"], values["requests"])
    try:
        if values["once"] or values["json"] or not console.is_terminal:
            await watch.look()
            await asyncio.sleep(values["interval"])  # what moves shows between two looks
            lines = await watch.look()
            if values["json"]:
                for line in lines:
                    print(json.dumps(asdict(line)))
            else:
                console.print(drawn(lines))
            return 0
        with LiveView(console=console, screen=True, auto_refresh=False) as view:
            while True:
                view.update(drawn(await watch.look()), refresh=True)
                await asyncio.sleep(values["interval"])
    except Unavailable as error:
        raise StartError(f"--redis-url: {error.message}") from None
    finally:
        await watch.close()
