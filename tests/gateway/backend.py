"""A scripted backend: the scheduler's and the worker's half of the protocol, made of real bus calls.

It leads, admits, plans and commits as the real services do; only the tokens come from a script. Each choice
emits ``tokens`` frames, and a test decides when: ``hold`` keeps them back until ``step`` lets some go.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from protocol.bus import HomeBus
from protocol.errors import Fenced
from protocol.formats.spec import FormatSpec
from protocol.messages import (
    Capacity,
    CommitRow,
    Frame,
    Hint,
    ModelCard,
    NewSequence,
    Plan,
    PoolCapacity,
    encode,
    new_rid,
    pack_ids,
    unpack_ids,
)
from protocol.records import RequestRecord
from tests.bus import Bus

MODEL = "test/model"
VOCAB = 512
MAX_LEN = 256


def byte_tokenizer() -> str:
    """tokenizer.json of one token per byte, as GPT-2's byte level."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text: str = tokenizer.to_str()
    return text


def word(choice: int, index: int) -> str:
    """The text of one token: different everywhere, with characters that JSON must escape."""
    return f'c{choice}-{index}é"\n '


def logprobs(index: int) -> dict[str, object]:
    return {
        "lp": -0.5 - index,
        "tok": word(0, index).encode(),
        "top": [[5, b"hi", -0.25], [6, b"\xc3", float("-inf")]],
    }


@dataclass(eq=False)
class Running:
    """One choice on its way."""

    record: RequestRecord
    choice: int
    seat: int
    cursor: int = 0
    emitted: int = 0
    over: bool = False  # its last frame is on its way
    landed: bool = False  # and in its journal
    frames: list[bytes] = field(default_factory=list)


Script = Callable[[RequestRecord, int, int], Frame]


@dataclass
class Backend:
    url: str
    model: str = MODEL
    tokens: int = 5  # per choice
    hold: bool = False  # frames only come by `step`
    worker_lives: bool = True  # its heart beats
    admit: bool = True  # requests are admitted as they come
    refuse: tuple[str, str, str | None] | None = None  # error code, message, param at admission
    script: Script | None = None
    format: FormatSpec | None = None  # how the model writes tool calls and thoughts
    running: list[Running] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: list[str] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)
    entries: list[tuple[str, RequestRecord]] = field(default_factory=list)
    steps: int = 0

    async def __aenter__(self) -> Backend:
        self.bus = Bus(self.url, self.model)
        await self.bus.connect()
        self.card = ModelCard(
            model=self.model, created=1700000000, max_model_len=MAX_LEN, vocab_size=VOCAB, format=self.format
        )
        await self.bus.publish_card(self.card, byte_tokenizer().encode(), b'{"tokenizer_class":"Bytes"}')
        epoch = await self.bus.lead("backend", await self.bus.read_leader())
        assert epoch is not None
        self.epoch = epoch
        capacity = Capacity(self.model, MAX_LEN, 8, 512, [PoolCapacity("full", 16, 64)], VOCAB)
        self.gen = await self.bus.register("w0", capacity, "serving")
        self.home, self._settled = HomeBus(self.url), 0
        self._tasks = [asyncio.create_task(t()) for t in (self._beat, self._inbox, self._events, self._emit)]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await self.bus.close()
        await self.home.close()

    async def settle(self) -> None:
        """Take what tenants owe to the home slot."""
        number, owed = await self.bus.collect(self.epoch, self._settled)
        if owed:
            await self.home.settle(self.model, number, owed)
        self._settled = number or self._settled

    # -------------------------------------------------------------- the scheduler's half

    async def _beat(self) -> None:
        while True:
            await self.bus.renew_lead(self.epoch, "backend")
            if self.worker_lives:
                with contextlib.suppress(Fenced):  # registered anew meanwhile
                    await self.bus.heartbeat("w0", self.gen)
            await asyncio.sleep(0.1)

    async def _inbox(self) -> None:
        while True:
            for entry in await self.bus.read_jobs("term", 16, 50):
                assert entry.rid is not None
                record = await self.bus.read_request(entry.rid)
                assert record is not None
                self.entries.append((entry.entry_id, record))
                if self.admit:
                    await self.admit_next()

    async def admit_next(self) -> str:
        """Admit the oldest entry that waits, or refuse it. Returns its rid."""
        entry_id, record = self.entries.pop(0)
        job = record.job
        if self.refuse is not None:
            code, message, param = self.refuse
            await self._end_early(entry_id, record, "error", {"code": code, "message": message, "param": param})
            return record.rid
        texts = job.prompts() or ["".join(m["content"] for m in job.messages or [])]
        prompts = [pack_ids(list(t.encode()) if isinstance(t, str) else t) for t in texts]
        verdict, _ = await self.bus.admit(self.epoch, entry_id, rid=record.rid, prompts=prompts, seed=7,
            thinking=job.thinking(unpack_ids(prompts[0])),
        )  # fmt: skip
        if verdict == "cancelled":  # meanwhile
            await self._end_early(entry_id, record, "abort")
            return record.rid
        assert verdict == "new", verdict
        self.steps += 1
        new, begun = [], []
        for choice in range(job.choices):
            ids = prompts[choice // job.sampling.n]
            seat = len(self.running) + len(begun)
            new.append(NewSequence(seat, record.rid, choice, 1, ids, len(ids) // 4, job.sampling, 7, 0, b"", 0))
            begun.append(Running(record, choice, seat))
        await self.bus.plan(self.epoch, "w0", self.gen, Plan(self.epoch, self.gen, self.steps, new=new))
        self.running += begun
        self.arrived.set()
        return record.rid

    async def _end_early(
        self, entry_id: str, record: RequestRecord, reason: str, error: dict[str, object] | None = None
    ) -> None:
        raw = encode(Frame(None, "", reason, error))
        rows = [CommitRow(record.rid, c, 0, 0, raw, reason) for c in range(record.job.choices)]
        await self.bus.finish(self.epoch, rows, entry_id=entry_id)

    async def _events(self) -> None:
        after = "0-0"
        while True:
            for event in await self.bus.read_events(after, 64, 50):
                after = event.event_id
                if event.kind == "cancel" and event.rid is not None:
                    record = await self.bus.read_request(event.rid)
                    if record is not None and record.moved is not None:  # the store has ended it
                        self.moved.append(event.rid)
                        self.running = [r for r in self.running if r.record.rid != event.rid]
                        continue
                    self.cancelled.append(event.rid)
                    for choice in [r for r in self.running if r.record.rid == event.rid and not r.over]:
                        await self.commit([(choice, Frame(None, "", "abort"))])

    # -------------------------------------------------------------- the worker's half

    async def _emit(self) -> None:
        while True:
            await asyncio.sleep(0.005)
            if not self.hold:
                await self.step()

    async def step(self, *, only: int | None = None) -> None:
        """One frame of every running choice (of choice ``only``)."""
        due = [r for r in self.running if not r.over and only in (None, r.choice)]
        if due:
            await self.commit([(r, self._next(r)) for r in due])

    def _next(self, running: Running) -> Frame:
        make = self.script or self._frame
        return make(running.record, running.choice, running.emitted)

    def _frame(self, record: RequestRecord, choice: int, index: int) -> Frame:
        sampling = record.job.sampling
        count = min(self.tokens, sampling.max_tokens or self.tokens)
        finish = None if index + 1 < count else ("length" if count == sampling.max_tokens else "stop")
        extra: dict[str, object] = {} if sampling.logprobs is None else logprobs(index)
        if index == 0:
            extra["cached"] = 2
        return Frame(index + 10, word(choice, index), finish, extra or None)

    async def commit(self, due: list[tuple[Running, Frame]]) -> None:
        rows = []
        for running, frame in due:
            raw = encode(frame)
            rows.append(
                CommitRow(
                    running.record.rid, running.choice, 1, running.cursor, raw, frame.finish, id=running.record.job.id
                )
            )
            running.cursor += len(raw)
            running.emitted += 1
            running.over = frame.finish is not None
            running.frames.append(raw)
        self.steps += 1
        verdicts = await self.bus.commit("w0", self.epoch, self.gen, rows, Hint("w0", self.gen, self.steps))
        assert set(verdicts) <= {"l"}, verdicts
        for running, _ in due:
            running.landed = running.over

    # -------------------------------------------------------------- faults

    async def silence(self, raw: object) -> None:
        """From now on the requests that run have no reply channel: their publications are lost."""
        for running in self.running:
            raw.hset(self.bus.keys.live, running.record.rid, "")  # type: ignore[attr-defined]

    async def until_running(self, count: int = 1) -> list[Running]:
        """Wait until ``count`` choices run."""
        while len(self.running) < count:
            self.arrived.clear()
            await asyncio.wait_for(self.arrived.wait(), 30)
        return self.running


__all__ = ["MODEL", "VOCAB", "Backend", "Running", "byte_tokenizer", "logprobs", "new_rid", "word"]
