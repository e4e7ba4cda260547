"""A worker made of bus calls alone: it obeys plans as the protocol says and draws predictable tokens, no engine.

The token after a context is a function of (seed, choice, position, last token): the same whatever the batch, the
chunks and the moves, so that a test can say what an undisturbed run would have given.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from protocol.errors import Fenced
from protocol.messages import (
    STALE,
    Capacity,
    CommitRow,
    Frame,
    Hint,
    HintRow,
    NewSequence,
    Plan,
    PoolCapacity,
    Terminal,
    choice_seed,
    encode,
    pack_ids,
    unpack_ids,
)
from tests.bus import Bus

VOCAB = 264


def next_token(seed: int, choice: int, context: list[int]) -> int:
    return (choice_seed(seed, choice) + 31 * len(context) + 7 * context[-1]) % 256


def expected_tokens(prompt: list[int], seed: int, choice: int, count: int) -> list[int]:
    """What an undisturbed worker generates."""
    context = list(prompt)
    for _ in range(count):
        context.append(next_token(seed, choice, context))
    return context[len(prompt) :]


@dataclass
class Seat:
    new: NewSequence
    ids: list[int]
    cursor: int
    computed: int
    text: str = ""
    ended: bool = False


@dataclass
class ScriptedWorker:
    bus: Bus
    wid: str = "worker-0"
    blocks: int = 64
    block_size: int = 16
    max_num_seqs: int = 16
    token_budget: int = 64
    max_model_len: int = 512
    running: asyncio.Event = field(default_factory=asyncio.Event)  # cleared: it neither executes nor beats
    held_at: int | None = None  # output length at which it stops working (as if it hung)
    hold_text: bool = False  # frames from `held_at` on hold their text back
    step_s: float = 0.0
    fingerprint: str = "weights"
    state: str = "serving"
    gen: int = 0
    epoch: int = 0
    steps: int = 0
    registrations: int = 0
    left: bool = False
    seats: dict[int, Seat] = field(default_factory=dict)
    task: asyncio.Task[None] | None = None

    def capacity(self) -> Capacity:
        pool = PoolCapacity("full", self.block_size, self.blocks)
        sizes = self.max_model_len, self.max_num_seqs, self.token_budget
        return Capacity("m", *sizes, [pool], VOCAB, "scripted", fingerprint=self.fingerprint)

    async def run(self) -> None:
        self.running.set()
        while not self.left:
            self.gen = await self.bus.register(self.wid, self.capacity(), self.state)
            self.registrations += 1
            self.seats.clear()
            self.epoch = 0
            try:
                await self._work()
            except Fenced as fenced:
                if self.state == "draining" and fenced.cause == "gen":
                    self.left = True

    async def drain(self) -> None:
        self.state = "draining"
        await self.bus.heartbeat(self.wid, self.gen, "draining")

    async def _work(self) -> None:
        after = "0-0"
        while True:
            for plan_id, plan in await self.bus.read_plans(self.wid, after, 100):
                after = plan_id
                await self.running.wait()
                if plan.gen != self.gen or plan.epoch < self.epoch:
                    continue
                if plan.epoch > self.epoch:
                    self.seats.clear()
                    self.epoch = plan.epoch
                try:
                    await self._execute(plan, plan_id)
                except Fenced as fenced:
                    if fenced.cause != "epoch":
                        raise
                    self.seats.clear()
                    self.epoch = plan.epoch + 1
            await self.running.wait()
            await self.bus.heartbeat(self.wid, self.gen)

    async def _execute(self, plan: Plan, plan_id: str) -> None:
        for seat in plan.frees:
            self.seats.pop(seat, None)
        for new in plan.new:
            ids = list(unpack_ids(new.token_ids))
            self.seats[new.seat] = Seat(new, ids, new.cursor, new.computed)
        rows: list[CommitRow] = []
        done: list[HintRow] = []
        numbers = list(memoryview(plan.seats).cast("H"))
        counts = list(unpack_ids(plan.counts)) or [1] * len(numbers)
        samples = list(plan.samples) or [1] * len(numbers)
        for number, count, sample in zip(numbers, counts, samples, strict=True):
            seat = self.seats[number]
            seat.computed += count
            if seat.ended:
                continue
            assert seat.computed <= len(seat.ids), "the plan computes tokens that are not known"
            if sample:
                assert seat.computed == len(seat.ids), "the plan samples before all known tokens are computed"
                self._sample(seat, rows, done)
        for number, reason in plan.ends:
            seat = self.seats.pop(number)
            if not seat.ended:
                self._row(seat, Frame(None, "", reason), rows, done, number)
        self.steps += 1
        await asyncio.sleep(self.step_s)
        verdicts = await self.bus.commit(
            self.wid, plan.epoch, self.gen, rows, Hint(self.wid, self.gen, plan.step, done, exec_us=500),
            executed=plan_id,
        )  # fmt: skip
        for row, verdict in zip(rows, verdicts, strict=True):
            if verdict == STALE:
                for seat in self.seats.values():
                    if (seat.new.rid, seat.new.choice) == (row.rid, row.choice):
                        seat.ended = True

    def _sample(self, seat: Seat, rows: list[CommitRow], done: list[HintRow]) -> None:
        token = next_token(seat.new.seed, seat.new.choice, seat.ids)
        seat.ids.append(token)
        made = len(seat.ids) - seat.new.prompt_len
        assert seat.new.sampling.max_tokens is not None
        finish = "length" if made >= seat.new.sampling.max_tokens else None
        if token in seat.new.sampling.stop_token_ids:
            finish = "stop"
        extra: dict[str, Any] | None = {"cached": seat.new.cached_tokens} if made == 1 else None
        text = f"<{token}>"
        if self.hold_text and made == self.held_at:
            text, extra = "", {"held": "held"}
        self._row(seat, Frame(token, text, finish, extra), rows, done, seat.new.seat)
        if self.held_at is not None and made >= self.held_at:
            self.running.clear()

    def _row(
        self, seat: Seat, frame: Frame, rows: list[CommitRow], done: list[HintRow], number: int
    ) -> None:  # fmt: skip
        raw, new = encode(frame), seat.new
        seat.text += frame.text
        result = None
        if frame.finish and new.wants_result:
            made = len(seat.ids) - new.prompt_len
            terminal = Terminal(
                rid=new.rid, id=new.id, choice=new.choice, finish_reason=frame.finish, text=seat.text,
                prompt_tokens=new.prompt_len, completion_tokens=made,
            )  # fmt: skip
            result = encode(terminal)
        rows.append(
            CommitRow(new.rid, new.choice, new.placement, seat.cursor, raw, frame.finish, result, new.id)
        )  # fmt: skip
        seat.cursor += len(raw)
        seat.ended = frame.finish is not None
        tokens = b"" if frame.token is None else pack_ids([frame.token])
        done.append(HintRow(number, tokens, seat.cursor, frame.finish))
