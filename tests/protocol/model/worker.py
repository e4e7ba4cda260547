"""The smallest worker: several plans executed ahead, several steps in one commit, random tokens.

Its KV pool holds, for each position, a hash of all tokens up to there, so a row that reads what was never written
shows. Now and then a row cannot be computed: the choice ends with an error, or the placement is dropped and only the
hint tells of it. Who shares its blocks is found by the project's own SpoiledBlocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from protocol import messages
from protocol.errors import Fenced
from protocol.messages import CommitRow, Frame, Hint, HintRow, Plan, Terminal, pack_ids, unpack_ids, unpack_pairs
from tests.protocol.model.link import Turn
from tests.protocol.model.world import BLOCK, PROMPT, World, next_token
from workers.spoiled import SpoiledBlocks

DROP_RATE = 0.02  # of rows, and of sequences that arrive


@dataclass
class Seat:
    rid: str
    choice: int
    placement: int
    cursor: int
    ids: list[int]
    table: list[int]
    written: int  # positions whose KV is in the pool
    most: int
    over: bool = False  # ended or dropped here, or told stale or closed: later rows are thrown away

    @property
    def count(self) -> int:
        return len(self.ids) - len(PROMPT)


@dataclass
class Step:
    plan_id: str
    number: int
    rows: list[tuple[int, CommitRow, HintRow]] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    spoiled: bytes = b""


class Worker:
    def __init__(self, world: World, wid: str) -> None:
        self.world, self.bus, self.rng, self.wid = world, world.bus(), world.rng, wid
        self.gen = 0
        self.epoch = 0  # of the plans taken; those of an earlier one are skipped
        self.step = 0
        self.after = "0-0"
        self.seats: dict[int, Seat] = {}
        self.pending: list[Step] = []  # executed, not yet committed
        self.pool: dict[
            int, int | None
        ] = {}  # slot -> hash of the tokens up to its position; outlives terms, as memory does
        self.host: dict[int, list[int | None]] = {}  # host block -> what its slots hold
        self.blocks = SpoiledBlocks(BLOCK)

    async def live(self) -> None:
        self.gen = await self.bus.register(self.wid, None, "serving")
        while True:
            for plan_id, plan in await self.bus.read_plans(self.wid, self.after, 0):
                self.after = plan_id
                self.take(plan_id, plan)
                if self.pending and self.rng.random() < 0.2:
                    await self.commit()
            if self.pending and self.rng.random() < 0.4:
                await self.commit()
            elif self.rng.random() < 0.5:
                await self.bus.heartbeat(self.wid, self.gen)
            for _ in range(self.rng.randrange(12)):
                await Turn()
            await self.world.maybe_pause(0.004)

    def take(self, plan_id: str, plan: Plan) -> None:
        if plan.gen != self.gen or plan.epoch < self.epoch:
            return
        if plan.epoch > self.epoch:
            self.forget(plan.epoch)
        if plan.step != self.step + 1:
            self.world.wrong["a plan is missing or repeated"] += 1
            return
        self.step = plan.step
        self.copy(plan)
        for seat in plan.frees:
            self.seats.pop(seat, None)
        for new in plan.new:
            known, table = unpack_ids(new.token_ids).tolist(), unpack_ids(new.block_table).tolist()
            self.world.known.append((new.rid, new.choice, new.cursor, known[new.prompt_len :]))
            most = new.sampling.max_tokens or 1
            self.seats[new.seat] = Seat(
                new.rid, new.choice, new.placement, new.cursor, known, table, new.computed, most
            )
        step = Step(plan_id, plan.step)
        rows = unpack_seats(plan.seats)
        failed = self.drop(step, plan, [*(new.seat for new in plan.new), *rows])
        for new in plan.new:  # all are written before any is read
            if not self.seats[new.seat].over:
                self.write(self.seats[new.seat], most=len(self.seats[new.seat].ids) - 1)
        for number in rows:
            self.sample(step, number)
        for number in failed:
            self.append(step, number, [Frame(None, "", "error")])
        for number, reason in plan.ends:
            seat = self.seats[number]
            if not seat.over:
                self.append(step, number, [Frame(None, "", reason)])
        self.pending.append(step)

    def copy(self, plan: Plan) -> None:
        for block, host in unpack_pairs(plan.copies_out):
            self.host[host] = [self.pool.get(block * BLOCK + at) for at in range(BLOCK)]
            self.world.stats["blocks copied out"] += 1
        for host, block in unpack_pairs(plan.copies_in):
            self.pool |= {block * BLOCK + at: held for at, held in enumerate(self.host[host])}
            self.world.stats["blocks copied in"] += 1

    def drop(self, step: Step, plan: Plan, numbers: list[int]) -> list[int]:
        """Draw which rows cannot be computed; returns those whose choice ends with an error."""
        able = [number for number in dict.fromkeys(numbers) if not self.seats[number].over]
        unable = [number for number in able if self.world.faults and self.rng.random() < DROP_RATE]
        failed = [number for number in unable if self.rng.random() < 0.4]
        drops = self.blocks.follow(plan, unable)
        if drops is not None:
            others = set() if self.world.mutation == "followers" else drops.others
            step.dropped, step.spoiled = sorted(others.union(unable)), drops.blocks
            for number in step.dropped:
                if number in self.seats:
                    self.seats[number].over = True
            failed = [number for number in failed if number not in others]
            self.world.stats["dropped"] += len(step.dropped)
            self.world.stats["dropped for another's sake"] += len(others)
        return failed

    def write(self, seat: Seat, most: int) -> None:
        for at in range(seat.written, most):
            self.pool[slot(seat, at)] = prefix(seat.ids, at)
        seat.written = max(seat.written, most)

    def forget(self, epoch: int) -> None:
        self.epoch, self.step = epoch, 0
        self.seats.clear()
        self.pending.clear()
        self.blocks = SpoiledBlocks(BLOCK)

    def sample(self, step: Step, number: int) -> None:
        """Zero to three tokens; the end where it is due, in the last token's frame or in one of its own."""
        seat = self.seats[number]
        if seat.over:
            return
        self.write(seat, len(seat.ids))
        if any(self.pool.get(slot(seat, at)) != prefix(seat.ids, at) for at in range(len(seat.ids))):
            self.world.wrong["a token from what was never written"] += 1
        frames: list[Frame] = []
        for _ in range(self.rng.choice([0, 1, 1, 1, 1, 2, 3])):
            seat.ids.append(next_token(self.rng, seat.ids[-1]))
            frames.append(Frame(seat.ids[-1], self.rng.choice(["a", "a", "a", "some text", "é"])))
            stop = self.rng.random() < 0.03
            if stop or seat.count >= seat.most:
                reason = "stop" if stop else "length"
                if self.rng.random() < 0.5:
                    frames[-1].finish = reason
                else:
                    frames.append(Frame(None, "tail", reason))
                break
        self.write(seat, len(seat.ids) - 1)
        if frames:
            self.append(step, number, frames)

    def append(self, step: Step, number: int, frames: list[Frame]) -> None:
        seat, finish = self.seats[number], frames[-1].finish
        raw = b"".join(messages.encode(f) for f in frames)
        result = messages.encode(Terminal(rid=seat.rid, choice=seat.choice, finish_reason=finish)) if finish else None
        row = CommitRow(seat.rid, seat.choice, seat.placement, seat.cursor, raw, finish, result)
        seat.cursor += len(raw)
        seat.over = finish is not None
        tokens = pack_ids(f.token for f in frames if f.token is not None)
        step.rows.append((number, row, HintRow(number, tokens, seat.cursor, finish)))

    async def commit(self) -> None:
        """One or several steps, in order; the next only after this one's reply."""
        count = self.rng.randrange(1, len(self.pending) + 1)
        steps, epoch = self.pending[:count], self.epoch
        rows = [entry for step in steps for entry in step.rows]
        dropped = [number for step in steps for number in step.dropped]
        spoiled = b"".join(step.spoiled for step in steps)
        hint = Hint(self.wid, self.gen, steps[-1].number, [h for _, _, h in rows], dropped=dropped, spoiled=spoiled)
        await self.world.maybe_pause(0.08)
        try:
            verdicts = await self.bus.commit(
                self.wid, epoch, self.gen, [r for _, r, _ in rows], hint, executed=steps[-1].plan_id
            )
        except Fenced as fenced:
            if fenced.cause == "gen":
                raise
            self.forget(epoch + 1)
            self.world.stats["steps dropped: epoch"] += 1
            return
        self.world.stats["commits"] += 1
        self.world.stats["rows"] += len(rows)
        del self.pending[:count]
        refused = {number for (number, _, _), verdict in zip(rows, verdicts, strict=True) if verdict != messages.LANDED}
        for number in refused:
            if number in self.seats:
                self.seats[number].over = True
            for step in self.pending:
                step.rows = [entry for entry in step.rows if entry[0] != number]


def slot(seat: Seat, at: int) -> int:
    return seat.table[at // BLOCK] * BLOCK + at % BLOCK


def prefix(ids: list[int], at: int) -> int:
    return hash(tuple(ids[: at + 1]))


def unpack_seats(packed: bytes) -> list[int]:
    return [int.from_bytes(packed[at : at + 2], "little") for at in range(0, len(packed), 2)]


async def worker(world: World, wid: str) -> None:
    await Worker(world, wid).live()
