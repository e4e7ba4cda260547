"""The smallest scheduler that uses every operation, and is reckless where the protocol promises to be safe.

Over 400 lines: one program, which the seeds run against faults.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from protocol import messages
from protocol.errors import HeadraceError
from protocol.jobs import decode_job
from protocol.messages import (
    CommitRow,
    Frame,
    Hint,
    Job,
    NewSequence,
    Plan,
    Terminal,
    decode_frames,
    pack_ids,
    unpack_ids,
)
from protocol.records import LeaderRecord, WorkerRecord
from protocol.sampling import SamplingParams
from scheduler.core.blocks import BlockManager, chain_hashes
from scheduler.core.host_blocks import HostBlocks
from tests.protocol.model.link import Turn
from tests.protocol.model.world import BLOCK, PROMPT, World

QUIET_READS = 10  # (epoch, beat) unchanged this often: the leader is taken for dead
QUIET_BEATS = 6
PLANS_AHEAD = 5
POOL = 80  # blocks of each worker
HOST = 30  # host blocks behind them
MOST_A_ROW = 3  # tokens
MOST_DROPS = 5  # without a token between them: far more than chance makes


@dataclass
class Stay:
    """One choice, as the scheduler knows it."""

    rid: str
    choice: int
    max_tokens: int
    placement: int = 0  # as recorded, for all we know
    top: int = 0  # highest that was ever planned: no number is used twice, whether it was recorded or not
    cursor: int = 0
    tokens: list[int] = field(default_factory=list)
    where: WorkerView | None = None
    seat: int = -1
    last_step: int = 0  # last step planned for it where it is
    leaving: bool = False  # no more rows: it leaves after the hint of its last step
    ending: bool = False  # its worker was told to end it
    cancel: str | None = None
    lost: bool = False  # the journal must be read before it can be placed
    table: list[int] = field(default_factory=list)  # blocks where it is
    hashes: list[bytes] = field(default_factory=list)
    drops: int = 0  # since its last token


@dataclass(eq=False)
class WorkerView:
    wid: str
    gen: int
    beat: int = -1
    quiet: int = 0
    step: int = 0
    hinted: int = 0
    seats: dict[int, tuple[Stay, int]] = field(default_factory=dict)  # seat -> (sequence, placement)
    frees: list[int] = field(default_factory=list)
    blocks: BlockManager = field(default_factory=lambda: BlockManager(POOL, BLOCK, HostBlocks(HOST)))


class Scheduler:
    def __init__(self, world: World, name: str) -> None:
        self.world, self.bus, self.rng = world, world.bus(), world.rng
        self.owner = f"{name}-{self.rng.getrandbits(32):x}"
        self.epoch = 0
        self.sequences: dict[tuple[str, int], Stay] = {}
        self.workers: dict[str, WorkerView] = {}
        self.after = "0-0"
        self.next_seat = 0
        self.joined: set[str] = set()
        self.heeds_joins = self.rng.random() < 0.7  # else it is of an older version, and places what has joined

    async def wait_for_the_lead(self) -> None:
        last, quiet = LeaderRecord(-1, "", -1), 0
        while not self.epoch:
            seen = await self.bus.read_leader()
            quiet = quiet + 1 if (seen.epoch, seen.beat) == (last.epoch, last.beat) else 0
            last = seen
            if quiet >= QUIET_READS or (seen.epoch and not seen.owner):
                self.epoch = await self.bus.lead(self.owner, seen) or 0
            for _ in range(16):
                await Turn()
        self.world.epochs.append(self.epoch)
        self.world.stats["terms"] += 1

    async def recover(self) -> None:
        """Lead first, read after: nothing of an earlier epoch lands any more."""
        self.after = await self.bus.last_event_id()
        for rid in await self.bus.scan_live():
            await self.adopt(rid)
        await self.look_at_workers()

    async def adopt(self, rid: str) -> None:
        """Take up a request from what is stored of it. One that was never admitted is still in the inbox; one that has
        joined another is that one's affair, unless it is to end."""
        record = await self.bus.read_request(rid)
        if record is None or not record.prompts:
            return
        if record.joins is not None and self.heeds_joins:
            self.joined.add(rid)
            return
        for choice in range(record.job.choices):
            if (rid, choice) not in self.sequences and record.ends[choice] is None:
                sequence = Stay(rid, choice, record.job.sampling.max_tokens or 1)
                sequence.lost, sequence.cancel = True, record.cancel
                self.sequences[rid, choice] = sequence

    async def term(self) -> None:
        world, rng = self.world, self.rng
        await self.wait_for_the_lead()
        await self.recover()
        while True:
            await self.bus.renew_lead(self.epoch, self.owner)
            await self.take_in()
            await self.hear()
            await self.look_at_workers()
            await self.end_joined()
            for sequence in [s for s in self.sequences.values() if s.lost and s.where is None]:
                await self.read_journal(sequence)
            await self.finish_waiting()
            for view in list(self.workers.values()):
                if view.step - view.hinted < PLANS_AHEAD and rng.random() < 0.9:
                    await self.plan(view)
            if rng.random() < 0.1:
                await self.bus.trim_events(self.after, epoch=self.epoch)
                await self.bus.write_depth(self.epoch, {"requests": len(self.sequences)})
            await world.maybe_pause(0.005)
            if world.faults and rng.random() < 0.03:
                await self.bus.release(self.epoch, self.owner)
                return

    # ------------------------------------------------------------ the inbox

    async def take_in(self) -> None:
        for entry in [*await self.bus.read_jobs(self.owner, 4, 0), *await self.bus.claim_jobs(self.owner, 4)]:
            if entry.rid is not None:
                record = await self.bus.read_request(entry.rid)
                await self.admit(entry.entry_id, entry.rid, record.job if record else None)
                continue
            try:
                job = decode_job(entry.payload or b"")
            except HeadraceError:
                await self.bus.reject(self.epoch, entry.entry_id, payload_hash="h", error={"code": "invalid_request"})
                continue
            await self.admit(entry.entry_id, f"{self.rng.getrandbits(128):032x}", job, push=True)

    async def admit(self, entry_id: str, rid: str, job: Job | None, push: bool = False) -> None:
        shared = job is not None and job.cache_salt is not None
        verdict, rid = await self.bus.admit(
            self.epoch, entry_id, rid=rid, prompts=[pack_ids(PROMPT)], seed=1, job=job if push else None,
            tell=not shared,
        )  # fmt: skip
        self.world.stats[f"admit {verdict}"] += 1
        if verdict == "new" and shared:
            record = await self.bus.read_request(rid)
            if record is not None:
                said = await self.bus.join(self.epoch, record, record.job.cache_salt or "")
                self.world.stats[f"join {said}"] += 1
        if verdict in ("new", "repeat"):
            await self.adopt(rid)
        elif verdict == "cancelled" and job is not None:
            rows = [self.end_row(Stay(rid, choice, 1), "abort") for choice in range(job.choices)]
            await self.bus.finish(self.epoch, rows, entry_id=entry_id)

    # ------------------------------------------------------------ events

    async def hear(self) -> None:
        for event in await self.bus.read_events(self.after, 16, 0):
            self.after = event.event_id
            if event.hint is not None:
                self.apply(event.hint, event.verdicts)
            elif event.kind == "freed" and event.rid is not None:
                self.world.stats["freed"] += 1
                self.joined.discard(event.rid)
                await self.adopt(event.rid)
            elif event.kind == "cancel" and event.rid is not None:
                record = await self.bus.read_request(event.rid)
                for (rid, _), sequence in self.sequences.items():
                    if rid == event.rid and record is not None:
                        sequence.cancel = record.cancel

    async def end_joined(self) -> None:
        """Those that have joined and are cancelled end here, wherever their journals are by then."""
        for rid in sorted(self.joined):
            record = await self.bus.read_request(rid)
            if record is None or not record.open or record.joins is None:
                self.joined.discard(rid)
                if record is not None and record.open:
                    await self.adopt(rid)
            elif record.cancel is not None:
                rows = []
                for choice in [c for c, end in enumerate(record.ends) if end is None]:
                    stay = Stay(rid, choice, 1, cursor=len(await self.bus.read_journal(rid, choice)))
                    rows.append(self.end_row(stay, record.cancel))
                await self.bus.finish(self.epoch, rows)

    def apply(self, hint: Hint, verdicts: str) -> None:
        view = self.workers.get(hint.wid)
        if view is None or view.gen != hint.gen or hint.step <= view.hinted:
            return
        view.hinted = hint.step
        for number, row in enumerate(hint.rows):
            sequence, placement = view.seats.get(row.seat, (None, 0))
            if sequence is None or self.sequences.get((sequence.rid, sequence.choice)) is not sequence:
                continue
            if placement != sequence.placement:  # it was moved in haste; what landed before outdates what we know
                sequence.lost = True
            elif verdicts and verdicts[number] != messages.LANDED:
                self.world.stats[f"verdict {verdicts[number]}"] += 1
                sequence.lost = True
                self.leave(sequence)
            elif sequence.where is view:
                sequence.tokens += unpack_ids(row.tokens)
                sequence.cursor = row.cursor
                sequence.drops = 0
                self.publish(sequence)
                if row.finish is not None:
                    self.leave(sequence)
                    del self.sequences[sequence.rid, sequence.choice]
        self.drop(view, hint)
        for sequence in self.sequences.values():
            if sequence.where is view and sequence.leaving and view.hinted >= sequence.last_step:
                self.leave(sequence)

    def drop(self, view: WorkerView, hint: Hint) -> None:
        """What its worker has dropped is read again and placed anew; its blocks are found by nobody."""
        if self.world.mutation != "spoiled":
            view.blocks.forget(unpack_ids(hint.spoiled))
        for seat in hint.dropped:
            sequence, placement = view.seats.get(seat, (None, 0))
            if sequence is None or sequence.where is not view or sequence.placement != placement:
                continue
            sequence.lost, sequence.drops = True, sequence.drops + 1
            self.leave(sequence)
            if sequence.drops > MOST_DROPS:
                self.world.wrong["dropped wherever it is placed"] += 1

    def leave(self, sequence: Stay) -> None:
        """Nothing more is planned for it where it was. Steps run in order, so its blocks may be given out at once."""
        if (view := sequence.where) is not None:
            view.frees.append(sequence.seat)
            view.blocks.release(sequence.table)
        sequence.where, sequence.table = None, []

    def publish(self, sequence: Stay) -> None:
        """Its full blocks can be found from now on. The last token's KV is written by the step after."""
        assert sequence.where is not None
        known = array("i", [*PROMPT, *sequence.tokens][:-1])
        chain_hashes("", known, BLOCK, sequence.hashes)
        for block, digest in zip(sequence.table, sequence.hashes, strict=False):
            sequence.where.blocks.publish(block, digest)

    async def read_journal(self, sequence: Stay) -> None:
        """What the journal holds is what is known. Nobody may write there any more, or its rows are of an old
        placement by the time that ours land."""
        record = await self.bus.read_request(sequence.rid)
        journal = await self.bus.read_journal(sequence.rid, sequence.choice)
        sequence.hashes = []
        if record is None or record.ends[sequence.choice] is not None:
            self.sequences.pop((sequence.rid, sequence.choice), None)
            return
        frames = decode_frames(journal) if journal else []
        if frames and frames[-1].finish is not None:  # it ended between the two reads
            self.sequences.pop((sequence.rid, sequence.choice), None)
            return
        sequence.tokens = [f.token for f in frames if f.token is not None]
        sequence.cursor, sequence.cancel, sequence.lost = len(journal), record.cancel, False
        sequence.placement = record.placements[sequence.choice]
        sequence.top = max(sequence.top, sequence.placement)

    # ------------------------------------------------------------ workers

    async def look_at_workers(self) -> None:
        found = {record.wid: record for record in await self.bus.list_workers()}
        for wid in [wid for wid in self.workers if wid not in found]:
            await self.lose(self.workers[wid])
        for record in found.values():
            view = self.workers.get(record.wid)
            if view is not None and view.gen != record.gen:
                await self.lose(view)
                view = None
            if view is None:
                view = self.workers[record.wid] = WorkerView(record.wid, record.gen)
            await self.judge_beat(view, record)

    async def judge_beat(self, view: WorkerView, record: WorkerRecord) -> None:
        view.quiet = view.quiet + 1 if view.beat == record.beat else 0
        view.beat = record.beat
        if view.quiet > QUIET_BEATS:
            await self.lose(view)

    async def lose(self, view: WorkerView) -> None:
        """Retire first, read the journals after."""
        here = [s for s in self.sequences.values() if s.where is view]
        present = sorted({s.rid for s in here if s.last_step > view.hinted})
        for rid in present:
            self.world.deaths[rid].add(view.gen)
        await self.bus.retire(self.epoch, view.wid, view.gen, present)
        self.world.stats["workers retired"] += 1
        self.workers.pop(view.wid, None)
        for sequence in here:
            sequence.where, sequence.table, sequence.lost = None, [], True

    # ------------------------------------------------------------ plans

    async def plan(self, view: WorkerView) -> None:
        rng, here = self.rng, [s for s in self.sequences.values() if s.where is view]
        plan = Plan(self.epoch, view.gen, view.step + 1, frees=[], ends=[], new=[])
        planned: list[Stay] = []
        for sequence in here:
            if sequence.cancel and not sequence.leaving and not sequence.ending:
                plan.ends.append((sequence.seat, sequence.cancel))
                sequence.ending = True
                planned.append(sequence)
        self.unsettle(here)
        waiting = [s for s in self.sequences.values() if s.where is None and not s.lost and not s.cancel]
        arriving = [s for s in waiting if rng.random() < 0.6][:3]
        plan.frees = list(view.frees)
        arriving = [sequence for sequence in arriving if self.place(sequence, view, plan)]
        rows = [
            s for s in here + arriving if s.where is view and not s.leaving and not s.ending and rng.random() < 0.85
        ]
        plan.seats = b"".join(s.seat.to_bytes(2, "little") for s in rows)
        if not (rows or plan.new or plan.ends or plan.frees):
            return
        plan.copies_out, plan.copies_in = view.blocks.take_copies(plan.step % 8)
        for sequence in [*rows, *arriving, *planned]:
            sequence.last_step = plan.step
        await self.bus.plan(self.epoch, view.wid, view.gen, plan)
        view.step = plan.step
        view.frees = view.frees[len(plan.frees) :]

    def unsettle(self, here: list[Stay]) -> None:
        """Preempt one as the rules say, or move one in haste, or move one that has just been read."""
        if not here or self.rng.random() > 0.5:
            return
        sequence = self.rng.choice(here)
        if sequence.ending:
            return
        if self.rng.random() < 0.5:
            sequence.leaving = True
            self.world.stats["preemptions"] += 1
        else:
            sequence.lost = self.rng.random() < 0.5
            self.leave(sequence)
            self.world.stats["hasty moves"] += 1

    def place(self, sequence: Stay, view: WorkerView, plan: Plan) -> bool:
        """Give it blocks, those of its prefix that are written or planned among them; False if there are too few."""
        known = [*PROMPT, *sequence.tokens]
        sequence.hashes = chain_hashes("", array("i", known[:-1]), BLOCK, [])
        shared = sequence.hashes[: view.blocks.match(sequence.hashes)]
        needed = view.blocks.blocks_for(len(PROMPT) + sequence.max_tokens + MOST_A_ROW)
        if not view.blocks.can_start(shared, needed):
            return False
        sequence.table = view.blocks.start(shared, needed)
        sequence.placement = sequence.top = sequence.top + 1
        sequence.where, sequence.seat, self.next_seat = view, self.next_seat, (self.next_seat + 1) % 65536
        sequence.leaving = sequence.ending = False
        view.seats[sequence.seat] = (sequence, sequence.placement)
        self.publish(sequence)
        self.world.stats["blocks shared"] += len(shared)
        sampling = SamplingParams(max_tokens=sequence.max_tokens)
        plan.new.append(NewSequence(
            sequence.seat, sequence.rid, sequence.choice, sequence.placement, pack_ids(known), len(PROMPT), sampling,
            1, sequence.cursor, pack_ids(sequence.table), len(shared) * BLOCK,
        ))  # fmt: skip
        return True

    # ------------------------------------------------------------ ends

    def end_row(self, sequence: Stay, reason: str) -> CommitRow:
        result = messages.encode(Terminal(rid=sequence.rid, choice=sequence.choice, finish_reason=reason))
        frames = messages.encode(Frame(None, "", reason))
        return CommitRow(sequence.rid, sequence.choice, sequence.placement, sequence.cursor, frames, reason, result)

    async def finish_waiting(self) -> None:
        """Cancelled where no worker runs it; and what has as many tokens as it may."""
        for sequence in list(self.sequences.values()):
            if sequence.where is not None or sequence.lost:
                continue
            reason = sequence.cancel or ("length" if len(sequence.tokens) >= sequence.max_tokens else None)
            if reason is None:
                continue
            verdict = await self.bus.finish(self.epoch, [self.end_row(sequence, reason)])
            self.world.stats[f"finish {verdict}"] += 1
            if verdict == messages.STALE:
                sequence.lost = True
            else:
                del self.sequences[sequence.rid, sequence.choice]


async def scheduler(world: World, name: str) -> None:
    await Scheduler(world, name).term()
