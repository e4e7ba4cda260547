"""A scheduler that does what a test tells it: leads, admits, plans and reads hints through the real bus."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Awaitable, Callable
from typing import TypeVar

from protocol.messages import Frame, Job, NewSequence, Plan, decode_frames, new_rid, pack_ids, unpack_ids
from protocol.records import Event, RequestRecord, WorkerRecord
from protocol.sampling import SamplingParams
from tests.bus import Bus

T = TypeVar("T")
DEADLINE_S = 60.0  # a loaded machine is slow; nothing waits this long on a good day
BLOCKS = 64  # blocks of 16 tokens per seat: no test outgrows its table


async def until(condition: Callable[[], Awaitable[T]], what: str) -> T:
    """Wait until ``condition`` returns something true, and return that."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + DEADLINE_S
    while loop.time() < deadline:
        if found := await condition():
            return found
        await asyncio.sleep(0.01)
    raise AssertionError(f"waited in vain: {what}")


class ScriptedScheduler:
    def __init__(self, bus: Bus, owner: str = "scripted") -> None:
        self.bus = bus
        self.owner = owner
        self.epoch = 0
        self.gen = 0
        self.step = 0
        self.wid = ""
        self.hints: list[Event] = []
        self._after = "0-0"

    async def lead(self) -> None:
        epoch = await self.bus.lead(self.owner, await self.bus.read_leader())
        assert epoch is not None
        self.epoch = epoch
        self.step = 0
        self._after = await self.bus.last_event_id()  # hints of an earlier term are not ours

    async def adopt(self, wid: str, beyond: int = 0) -> WorkerRecord:
        """Wait for ``wid`` to serve under a gen above ``beyond``; plans go to it from now on."""

        async def serving() -> WorkerRecord | None:
            found = [w for w in await self.bus.list_workers() if w.wid == wid and w.gen > beyond]
            return found[0] if found and found[0].state == "serving" else None

        worker = await until(serving, f"{wid} serves")
        self.wid, self.gen, self.step = wid, worker.gen, 0
        return worker

    async def admit(self, prompt: bytes = b"prompt", seed: int = 1, **fields: object) -> str:
        """A request through accept and admit; ``fields`` of its sampling, and results/reply_to of its job."""
        ours = {k: fields.pop(k) for k in ("results", "reply_to") if k in fields}
        rid = new_rid()
        job = Job(prompt=list(prompt), sampling=SamplingParams(**{"max_tokens": 100, **fields}), **ours)
        await self.bus.accept(job, rid=rid)
        (entry,) = await self.bus.read_jobs(self.owner, 10, 1000)
        ids = pack_ids(list(prompt))
        verdict, _ = await self.bus.admit(self.epoch, entry.entry_id, rid=rid, prompts=[ids], seed=seed)
        assert verdict == "new"
        return rid

    async def seat(self, seat: int, rid: str, placement: int = 1, choice: int = 0) -> NewSequence:
        """The NewSequence that continues this choice at its journal's end."""
        record = await self.record(rid)
        raw = await self.bus.read_journal(rid, choice)
        ids = [*unpack_ids(record.prompts[0]), *(f.token for f in decode_frames(raw) if f.token is not None)]
        return NewSequence(
            seat=seat, rid=rid, choice=choice, placement=placement, token_ids=pack_ids(ids),
            prompt_len=len(record.prompts[0]) // 4, sampling=record.job.sampling, seed=record.seed or 0,
            cursor=len(raw), block_table=pack_ids(range(seat * BLOCKS, (seat + 1) * BLOCKS)), computed=0,
            wants_result=record.job.results is not None,
        )  # fmt: skip

    async def plan(self, rows: dict[int, int] | None = None, **fields: object) -> Plan:
        """Send the next step; ``rows``: seat -> tokens to compute. A new sequence without a row is computed whole."""
        rows = dict(rows or {})
        for new in fields.get("new", []):  # type: ignore[attr-defined]
            rows.setdefault(new.seat, len(new.token_ids) // 4)
        self.step += 1
        plan = Plan(
            self.epoch, self.gen, self.step, seats=array("H", rows).tobytes(), counts=pack_ids(rows.values()), **fields
        )  # type: ignore[arg-type]
        await self.bus.plan(self.epoch, self.wid, self.gen, plan)
        return plan

    async def decode(self, *seats: int, steps: int = 1) -> None:
        for _ in range(steps):
            await self.plan(dict.fromkeys(seats, 1))

    async def done(self, step: int | None = None) -> list[Event]:
        """Wait for the hint of ``step`` (default: the last one planned); all hints of this gen so far."""
        step = self.step if step is None else step

        async def hinted() -> bool:
            for event in await self.bus.read_events(self._after, 100, 50):
                self._after = event.event_id
                if event.kind == "hint" and event.hint is not None:
                    self.hints.append(event)
            return any(e.hint is not None and e.hint.gen == self.gen and e.hint.step >= step for e in self.hints)

        await until(hinted, f"hint of step {step}")
        return [e for e in self.hints if e.hint is not None and e.hint.gen == self.gen]

    async def frames(self, rid: str, choice: int = 0) -> list[Frame]:
        return decode_frames(await self.bus.read_journal(rid, choice))

    async def record(self, rid: str) -> RequestRecord:
        record = await self.bus.read_request(rid)
        assert record is not None
        return record
