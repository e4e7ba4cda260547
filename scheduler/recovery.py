"""From what Redis holds to what the core is told: the one rule of recovery, for a new leader and a lost worker alike.

Known tokens = stored prompt ids + journaled ids; a sequence continues at its journal's end.
"""

from __future__ import annotations

import asyncio
import logging
from array import array
from collections.abc import Iterable

import msgspec

from protocol.bus import LeaderBus
from protocol.errors import StoreFailed
from protocol.formats.message import ParsedMessage, functions_of, parsed_message
from protocol.formats.rules import sampling_of
from protocol.messages import ID_BYTES, CommitRow, Frame, Terminal, decode_frames, encode, unpack_ids
from protocol.records import RequestRecord
from scheduler.core.events import Arrive, ChoiceState
from scheduler.election import ServerClock

log = logging.getLogger("headrace.scheduler")

READS_AT_ONCE = 64  # reads in flight at once
# what reading a request raises if its keys hold values of another program
UNREADABLE = (StoreFailed, msgspec.DecodeError, ValueError)


def choice_state(journal: bytes, placement: int, end: str | None) -> ChoiceState:
    """The state of a choice, from the bytes of its journal."""
    frames = decode_frames(journal)
    finish = end or (frames[-1].finish if frames else None)
    output = array("i", (f.token for f in frames if f.token is not None))
    return ChoiceState(output=output, cursor=len(journal), placement=placement, finish=finish)


def arrive(record: RequestRecord, clock: ServerClock, choices: list[ChoiceState] | None = None) -> Arrive:
    """The event of an admitted request; ``choices`` None: nothing was generated yet."""
    job, prompts = record.job, [unpack_ids(p) for p in record.prompts]
    return Arrive(
        rid=record.rid,
        tenant=record.tenant,
        priority=job.priority,
        prompts=prompts,
        sampling=sampling_of(job, prompts[0]) if prompts else job.sampling,
        seed=record.seed or 0,
        arrived=clock.monotonic(record.created_ms),
        deadline=clock.monotonic(record.deadline_ms) if record.deadline_ms else None,
        id=job.id,
        wants_result=job.results is not None,
        cache_salt=job.cache_salt or "",
        attempts=record.attempts,
        choices=choices,
        default_max_tokens=job.default_max_tokens,
        fingerprint=record.fingerprint,
    )


async def read_choices(bus: LeaderBus, record: RequestRecord) -> list[ChoiceState]:
    """The states of all choices of ``record``. The journal of an ended choice is not read."""

    async def read(choice: int) -> ChoiceState:
        placement, end = record.placements[choice], record.ends[choice]
        if end is not None:
            return ChoiceState(placement=placement, finish=end)
        return choice_state(await bus.read_journal(record.rid, choice), placement, None)

    return list(await asyncio.gather(*(read(i) for i in range(len(record.placements)))))


async def read_state(bus: LeaderBus, rid: str, choice: int) -> ChoiceState:
    """The state of a choice in Redis. One whose request is gone, or whose keys are not ours, has ended."""
    try:
        record = await bus.read_request(rid)
        if record is None or choice >= len(record.placements):
            return ChoiceState(finish="abort")
        journal = await bus.read_journal(rid, choice)
        return choice_state(journal, record.placements[choice], record.ends[choice])
    except UNREADABLE as e:
        log.error("request %s cannot be read, it is given up: %s", rid, type(e).__name__)
        return ChoiceState(finish="error")


async def read_sequences(bus: LeaderBus, sequences: Iterable[tuple[str, int]]) -> dict[tuple[str, int], ChoiceState]:
    """The journaled state of each (rid, choice)."""
    gate = asyncio.Semaphore(READS_AT_ONCE)

    async def read(rid: str, choice: int) -> tuple[tuple[str, int], ChoiceState]:
        async with gate:
            return (rid, choice), await read_state(bus, rid, choice)

    return dict(await asyncio.gather(*(read(rid, choice) for rid, choice in sequences)))


def terminal_row(
    record: RequestRecord, choice: int, journal: bytes, reason: str, error: dict[str, str | None] | None = None
) -> CommitRow:
    """The row that ends a choice which no worker runs: held text comes out first, then the reason (and the error)."""
    frames = decode_frames(journal)
    held = (frames[-1].extra or {}).get("held", "") if frames else ""
    result = None
    if record.job.results is not None:
        result = encode(_terminal(record, choice, frames, held, reason, error))
    return CommitRow(
        rid=record.rid,
        choice=choice,
        placement=record.placements[choice],
        cursor=len(journal),
        frames=encode(Frame(None, held, reason, error)),
        finish=reason,
        result=result,
        id=record.job.id,
    )


def read_message(record: RequestRecord, choice: int, frames: list[Frame]) -> ParsedMessage:
    """What the frames of a whole choice hold, where its answer has a format; else nothing."""
    job = record.job
    if job.format is None or not record.prompts:
        return ParsedMessage()
    shown = [(frame.token, frame.text) for frame in frames]
    functions, ruled = functions_of(job.tools), job.sampling.ruled
    return parsed_message(record.rid, choice, job.format, functions, record.thinking, shown, eager=ruled)


def _terminal(
    record: RequestRecord, choice: int, frames: list[Frame], held: str, reason: str, error: dict[str, str | None] | None
) -> Terminal:
    prompts, message = record.prompts, read_message(record, choice, [*frames, Frame(None, held)])
    return Terminal(
        rid=record.rid,
        id=record.job.id,
        choice=choice,
        finish_reason=reason,
        text="".join(f.text for f in frames) + held,
        prompt_tokens=len(prompts[choice // record.job.sampling.n]) // ID_BYTES if prompts else 0,
        completion_tokens=sum(f.token is not None for f in frames),
        cached_tokens=(frames[0].extra or {}).get("cached", 0) if frames else 0,
        error=error,
        **message.fields,
    )
