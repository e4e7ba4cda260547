"""A simulated worker: plans in order over a KV pool that knows what it holds, commits by batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from protocol.messages import LANDED, Capacity, HintRow, NewSequence, Plan, pack_ids, unpack_ids, unpack_pairs
from scheduler.core.events import StepDone
from tests.factories import rows
from tests.scheduler.simulation.server import CommitRow, Fenced, Violation
from tests.scheduler.simulation.tokens import START, STOP, chain, draw, frame_bytes
from workers.spoiled import SpoiledBlocks

if TYPE_CHECKING:
    from tests.scheduler.simulation.world import World


@dataclass
class Seat:
    new: NewSequence
    ids: list[int]
    table: list[int]
    computed: int
    cursor: int
    prefixes: list[bytes]  # prefixes[k] is the hash of ids[:k + 1]
    ended: bool = False
    dropped: bool = False  # cannot be computed: its rows are passed over


SPOILED = b"spoiled"  # what a slot of a dropped sequence holds: whoever reads it has been given its blocks


class SimWorker:
    """Runs plans in order over a KV pool that knows what it holds; commits by batches."""

    def __init__(self, world: World, wid: str, size: Capacity) -> None:
        self.world = world
        self.wid = wid
        self.size = size
        self.up = False
        self.wake_at = 0
        self.start()

    def start(self) -> None:
        self.gen = self.world.server.register(self.wid, self.size)
        self.epoch = self.world.server.epoch
        self.draining = False
        self.up = True
        self.clear()

    def clear(self) -> None:
        """A new epoch or gen: no seats, no KV, no steps."""
        self.seats: dict[int, Seat] = {}
        self.pool: dict[int, bytes | None] = {}
        self.host: dict[int, list[bytes | None]] = {}
        self.step = 0
        self.batch: list[tuple[CommitRow, int]] = []  # row, seat
        self.batch_step = 0
        self.dropped: list[int] = []  # seats, since the last commit
        self.spoiled = b""
        self.tables = SpoiledBlocks(self.size.pools[0].unit_tokens)

    def kill(self) -> None:
        self.up = False

    def turn(self) -> None:
        """One thing of: run a step, commit, come back to life."""
        server, rng = self.world.server, self.world.rng
        if not self.up:
            self.start()
            return
        if self.batch_step and (rng.random() < 0.5 or self.next_plan() is None):
            self.commit()
            return
        plan = self.next_plan()
        if plan is not None:
            if plan.epoch > self.epoch:
                self.clear()
                self.epoch = plan.epoch
            self.execute(plan)
        elif server.epoch > self.epoch:
            self.clear()
            self.epoch = server.epoch
        elif server.workers[self.wid].retired or server.workers[self.wid].gen != self.gen:
            self.start()  # its heartbeat is fenced

    def next_plan(self) -> Plan | None:
        for plan in self.world.server.workers[self.wid].plans:
            if plan.gen == self.gen and (
                plan.epoch > self.epoch or (plan.epoch == self.epoch and plan.step > self.step)
            ):
                return plan
        return None

    def commit(self) -> None:
        batch, self.batch = self.batch, []
        event = StepDone(
            self.wid,
            self.gen,
            self.batch_step,
            [
                HintRow(
                    seat,
                    pack_ids([token for token, _ in row.frames if token is not None]),
                    row.cursor + sum(frame_bytes(*frame) for frame in row.frames),
                    row.frames[-1][1],
                )
                for row, seat in batch
            ],
            exec_us=self.world.rng.choice((0, 500, 2000, 20000)),
            idle_us=self.world.rng.choice((0, 0, 300)),
            dropped=self.dropped,
            spoiled=self.spoiled,
        )
        self.batch_step, self.dropped, self.spoiled = 0, [], b""
        try:
            verdicts = self.world.server.commit(self.epoch, self.wid, self.gen, [row for row, _ in batch], event)
        except Fenced as fenced:
            if fenced.cause == "gen":
                self.start()
            else:
                self.clear()
                self.epoch += 1
            return
        for (row, number), verdict in zip(batch, verdicts, strict=True):
            if verdict != LANDED:
                seat = self.seats.get(number)
                if seat is not None and seat.new.placement == row.placement and seat.new.rid == row.rid:
                    seat.ended = True
                self.batch = [kept for kept in self.batch if kept[1] != number]

    # -------------------------------------------------------------- one step

    def execute(self, plan: Plan) -> None:
        if plan.step != self.step + 1:
            raise Violation(f"step {plan.step} follows {self.step}")
        self.step = self.batch_step = plan.step
        work = rows(plan)
        if self.poisoned(plan, work):
            self.kill()
            return
        self.copy(plan)
        for number in plan.frees:
            if self.seats.pop(number, None) is None:
                raise Violation("a seat was freed twice")
        for new in plan.new:
            self.meet(new)
        for number, blocks in plan.blocks:
            self.seats[number].table += unpack_ids(blocks)
        self.check_size(plan, work)
        failed = self.drop(plan, work)
        for number, (count, _) in work.items():
            self.write(self.seats[number], count)
        for number, (_, samples) in work.items():
            if self.seats[number].dropped:
                if number in failed and not self.seats[number].ended:
                    self.add(number, self.seats[number], None, "error")
                continue
            self.read(self.seats[number])
            if samples:
                self.sample(number, self.seats[number])
            elif self.seats[number].computed >= len(self.seats[number].ids):
                raise Violation("a finished prefill does not sample")
        for number, reason in plan.ends:
            seat = self.seats.pop(number, None)
            if seat is None:
                raise Violation("the end of an empty seat")
            if not seat.ended and not seat.dropped:
                self.add(number, seat, None, reason)

    def copy(self, plan: Plan) -> None:
        """As devices may do it: what a plan copies out is as it was before any of its copies, and likewise in."""
        size, out = self.size.pools[0].unit_tokens, list(unpack_pairs(plan.copies_out))
        self.host |= {host: [self.pool.get(block * size + at) for at in range(size)] for block, host in out}
        if len({host for _, host in out}) < len(out):
            raise Violation("two copies to one host block")
        into = [(block, self.host[host]) for host, block in unpack_pairs(plan.copies_in)]
        self.pool |= {block * size + at: held for block, slots in into for at, held in enumerate(slots)}
        if any(number >= pool.units for pool in self.size.pools[1:] for number in self.host):
            raise Violation("a host block that there is not")
        self.world.count["copies out"] += len(out)
        self.world.count["copies in"] += len(into)

    def drop(self, plan: Plan, work: dict[int, tuple[int, bool]]) -> set[int]:
        """Mark the rows that cannot be computed, with all that read their blocks. Returns those that end with an
        error; the others are for the scheduler to place anew."""
        failed = {number for number, (_, samples) in work.items() if self.fails(self.seats[number], samples)}
        refused = {number for number in work if number not in failed and self.refuses(self.seats[number])}
        drops = self.tables.follow(plan, failed | refused)
        if drops is None:
            return failed
        failed -= drops.others
        for number in failed | refused | drops.others:
            seat = self.seats[number]
            seat.dropped = True
            for block in seat.table[seat.new.computed // self.size.pools[0].unit_tokens :]:
                for at in range(self.size.pools[0].unit_tokens):
                    self.pool[block * self.size.pools[0].unit_tokens + at] = SPOILED
            self.dropped.append(number)
        self.spoiled += drops.blocks
        self.world.note("dropped", *sorted(failed), "refused", *sorted(refused), "others", *sorted(drops.others))
        self.world.count["readers"] += len(drops.others)
        return failed

    def fails(self, seat: Seat, samples: bool) -> bool:
        """By what its client sent: at once (an id that the model lacks), or when it has so many outputs."""
        outputs = self.world.unservable.get(seat.new.rid)
        if outputs is None or seat.dropped or seat.ended:
            return False
        return outputs < 0 or (samples and len(seat.ids) - seat.new.prompt_len >= outputs)

    def refuses(self, seat: Seat) -> bool:
        """By what only the scheduler can have caused."""
        world = self.world
        if seat.dropped or seat.ended or not world.refusals or world.rng.random() > 0.1:
            return False
        world.refusals -= 1
        return True

    def poisoned(self, plan: Plan, work: dict[int, tuple[int, bool]]) -> bool:
        rids = {new.seat: new.rid for new in plan.new}
        for number in work:
            rid = rids.get(number) or self.seats[number].new.rid
            if rid in self.world.poison:
                self.world.note("poison", rid, len(work))
                return True
        return False

    def check_size(self, plan: Plan, work: dict[int, tuple[int, bool]]) -> None:
        if sum(count for count, _ in work.values()) > self.size.max_num_batched_tokens:
            raise Violation("over the token budget")
        if len(work) > self.size.max_num_seqs or any(number >= 2 * self.size.max_num_seqs for number in self.seats):
            raise Violation("over the number of sequences")

    def meet(self, new: NewSequence) -> None:
        if new.seat in self.seats:
            raise Violation("a seat is taken twice")
        ids = list(unpack_ids(new.token_ids))
        assert new.sampling.max_tokens is not None
        if len(ids) >= new.prompt_len + new.sampling.max_tokens or new.computed >= len(ids):
            raise Violation("nothing to compute")
        prefixes = []
        prefix = START
        for token in ids:
            prefix = chain(prefix, token)
            prefixes.append(prefix)
        table = list(unpack_ids(new.block_table))
        self.seats[new.seat] = Seat(new, ids, table, new.computed, new.cursor, prefixes)

    def slot(self, seat: Seat, position: int) -> int:
        size = self.size.pools[0].unit_tokens
        return seat.table[position // size] * size + position % size

    def write(self, seat: Seat, count: int) -> None:
        if seat.dropped:
            return
        if seat.computed + count > len(seat.ids):
            raise Violation("a row past the known tokens")
        for position in range(seat.computed, seat.computed + count):
            self.pool[self.slot(seat, position)] = seat.prefixes[position]
        seat.computed += count

    def read(self, seat: Seat) -> None:
        """Attention over all computed tokens. A row past a stop may read anything: it is thrown away."""
        if seat.ended:
            return
        for position in range(seat.computed):
            if self.pool.get(self.slot(seat, position)) != seat.prefixes[position]:
                raise Violation(f"{seat.new.rid}: wrong KV at position {position}")

    def sample(self, number: int, seat: Seat) -> None:
        if seat.computed != len(seat.ids):
            raise Violation("sampled before its tokens were computed")
        new = seat.new
        token = draw(seat.prefixes[-1], new.seed, new.choice)
        seat.ids.append(token)
        seat.prefixes.append(chain(seat.prefixes[-1], token))
        if seat.ended:
            return
        output = len(seat.ids) - new.prompt_len
        assert new.sampling.max_tokens is not None
        finish = "stop" if token % STOP == 0 else "length" if output == new.sampling.max_tokens else None
        if output > new.sampling.max_tokens:
            raise Violation("a row past max_tokens")
        self.add(number, seat, token, finish)

    def add(self, number: int, seat: Seat, token: int | None, finish: str | None) -> None:
        for row, other in self.batch:
            if other == number and row.placement == seat.new.placement and row.rid == seat.new.rid:
                row.frames.append((token, finish))
                break
        else:
            new = seat.new
            self.batch.append((CommitRow(new.rid, new.choice, new.placement, seat.cursor, [(token, finish)]), number))
        seat.cursor += frame_bytes(token, finish)
        seat.ended = finish is not None
