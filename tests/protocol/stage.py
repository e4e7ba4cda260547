"""A small stage for script tests: a leader, a worker, and requests placed on it, all through the bus."""

from __future__ import annotations

from dataclasses import dataclass, field

import redis

from protocol import messages
from protocol.messages import (
    Capacity,
    CommitRow,
    Frame,
    Hint,
    HintRow,
    Job,
    NewSequence,
    Plan,
    PoolCapacity,
    Terminal,
    pack_ids,
)
from protocol.sampling import SamplingParams
from tests.bus import Bus

MODEL = "test/model"
CAPACITY = Capacity(MODEL, 256, 8, 512, [PoolCapacity("full", 16, 64)], 1000)


def frame(token: int | None, text: str = "", finish: str | None = None) -> bytes:
    return messages.encode(Frame(token, text, finish))


def terminal(rid: str, finish: str = "stop", **fields: object) -> bytes:
    return messages.encode(Terminal(rid=rid, finish_reason=finish, **fields))  # type: ignore[arg-type]


@dataclass
class Stage:
    bus: Bus
    raw: redis.Redis
    epoch: int = 0
    gen: int = 0
    step: int = 0
    consumer: str = "term"
    committed: int = 0
    names: dict[str, str] = field(default_factory=dict)

    def key(self, name: str) -> str:
        return self.bus.keys.prefix + name

    async def lead(self, owner: str = "me") -> int:
        self.epoch = await self.bus.lead(owner, await self.bus.read_leader()) or 0
        assert self.epoch
        return self.epoch

    async def register(self, wid: str = "w0", state: str = "serving") -> int:
        self.gen = await self.bus.register(wid, CAPACITY, state)
        self.step = 0
        return self.gen

    async def accept(self, job: Job | None = None, **options: object) -> str:
        rid = messages.new_rid()
        await self.bus.accept(job or Job(prompt="x"), rid=rid, **options)  # type: ignore[arg-type]
        return rid

    async def admit(self, rid: str) -> tuple[str, str]:
        """Read the inbox and admit what is (or was) the entry of ``rid``."""
        for entry in await self.bus.read_jobs(self.consumer, 100, 0):
            if entry.rid:
                self.names[entry.rid] = entry.entry_id
        return await self.bus.admit(self.epoch, self.names[rid], rid=rid, prompts=[pack_ids([1, 2, 3])], seed=5)

    async def admit_nothing(self, rid: str) -> None:
        """The request ends before it is admitted: its prompt cannot be served."""
        (entry,) = [e for e in await self.bus.read_jobs(self.consumer, 100, 0) if e.rid == rid]
        row = CommitRow(rid, 0, 0, 0, frame(None, "", "error"), "error")
        assert await self.bus.finish(self.epoch, [row], entry_id=entry.entry_id) == "l"

    async def place(self, *rids: str, choice: int = 0, placement: int = 1, wid: str = "w0", cursor: int = 0) -> None:
        self.step += 1
        new = [
            NewSequence(seat, rid, choice, placement, b"", 3, SamplingParams(max_tokens=9), 5, cursor, b"", 0)
            for seat, rid in enumerate(rids)
        ]
        await self.bus.plan(self.epoch, wid, self.gen, Plan(self.epoch, self.gen, self.step, new=new))

    async def running(self, job: Job | None = None, placement: int = 1, **options: object) -> str:
        """A request that was accepted, admitted and placed on w0 (choice 0)."""
        rid = await self.accept(job, **options)
        assert await self.admit(rid) == ("new", rid)
        await self.place(rid, placement=placement)
        return rid

    async def commit(self, *rows: CommitRow, epoch: int | None = None, gen: int | None = None, **options: str) -> str:
        self.committed += 1
        hint = Hint("w0", self.gen, self.committed, [HintRow(0, b"", row.cursor + len(row.frames)) for row in rows])
        return await self.bus.commit(
            "w0", self.epoch if epoch is None else epoch, self.gen if gen is None else gen, rows, hint, **options
        )

    def journal(self, rid: str, choice: int = 0) -> bytes:
        value: bytes | None = self.raw.get(self.bus.keys.journal(rid, choice))
        return value or b""

    def field(self, rid: str, name: str) -> str | None:
        value: bytes | None = self.raw.hget(self.bus.keys.request(rid), name)
        return None if value is None else value.decode()

    def entries(self, name: str) -> list[dict[bytes, bytes]]:
        return [fields for _, fields in self.raw.xrange(self.key(name))]
