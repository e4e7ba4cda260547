"""Intake: every entry of `jobs` is admitted or ends with one error. One bad job never stops the loop."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from protocol.bus import HomeBus, LeaderBus
from protocol.errors import (
    DeadlineExceeded,
    EngineFailed,
    Fenced,
    InvalidRequest,
    NotFound,
    Overloaded,
    RequestError,
    ServiceError,
    TooLarge,
)
from protocol.jobs import MAX_TIMEOUT_S
from protocol.keys import NAME
from protocol.messages import DEFAULT_TENANT, ID_BYTES, MAX_JOB_BYTES, Job, body_hash, encode, unpack_ids
from protocol.records import InboxEntry, RequestRecord
from scheduler.answers import Answer, Answers
from scheduler.claims import CONFLICT, Elsewhere, claim_and_reserve
from scheduler.core.events import Arrive
from scheduler.election import ServerClock
from scheduler.metrics import Metrics
from scheduler.prompts.tokenizer_pool import TokenizerPool
from scheduler.recovery import UNREADABLE, arrive, terminal_row
from scheduler.tracing import RequestTraces

log = logging.getLogger("headrace.scheduler")


AGAIN_S = 0.1  # pause before a push is claimed anew
MAX_ADDRESS_BYTES = 16 << 20  # a larger payload is rejected without being decoded

NEITHER = InvalidRequest("an entry holds a rid (written by accept) or a job, never both")
UNKNOWN = NotFound("no request has the rid of this entry", param="rid")
UNFORESEEN = EngineFailed("the job could not be read or prepared")


class Intake:
    """Takes entries, many at once. ``admit`` is called with each new request, ``recover`` with the id of one that
    was admitted before (a repeat after a lost reply, or by an earlier leader)."""

    def __init__(
        self,
        bus: LeaderBus,
        tokenizers: TokenizerPool,
        epoch: int,
        clock: ServerClock,
        metrics: Metrics,
        traces: RequestTraces,
        answers: Answers,
        admit: Callable[[Arrive], None],
        recover: Callable[[str], Awaitable[None]],
        home: HomeBus | None = None,
        drains: Callable[[], bool] = lambda: False,
    ) -> None:
        self._bus = bus
        self._tokenizers = tokenizers
        self._epoch = epoch
        self._clock = clock
        self._metrics = metrics
        self._traces = traces
        self._answers = answers
        self._admit = admit
        self._recover = recover
        self._home = home
        self._drains = drains  # whether this shard takes no new pushes

    async def take(self, entry: InboxEntry) -> float:
        """Admit or end one entry; returns 0, or for how many seconds a push has to wait whose tenant is at a limit.
        Raises only Fenced (another scheduler leads)."""
        started, wait_s = time.monotonic(), 0.0
        try:
            if entry.rid is not None and entry.payload is not None:
                await self._reject(entry, entry.payload, NEITHER)
            elif entry.rid is not None:
                await self._take_accepted(entry, entry.rid)
            else:
                wait_s = await self._take_push(entry, entry.payload or b"")
        except Fenced:
            raise
        except Exception as e:
            log.error("job %s could not be taken: %s", entry.entry_id, type(e).__name__)
            await self._end_unforeseen(entry)
        if not wait_s:
            self._metrics.admission_time.observe(time.monotonic() - started)
        return wait_s

    async def _end_unforeseen(self, entry: InboxEntry) -> None:
        """After an unexpected exception: end an accepted request by error frames, anything else by a dead letter."""
        try:
            if entry.rid is not None and (record := await self._bus.read_request(entry.rid)) is not None:
                await self._end(entry, record, "error", UNFORESEEN)
                return
        except UNREADABLE:
            pass
        payload_hash = body_hash(entry.payload or (entry.rid or "").encode())
        try:
            await self._bus.reject(
                self._epoch, entry.entry_id, payload_hash=payload_hash, error=_error_fields(UNFORESEEN)
            )
        except UNREADABLE as e:
            log.error("job %s stays in the inbox: %s", entry.entry_id, type(e).__name__)

    # -------------------------------------------------------------- accepted by a gateway or a client

    async def _take_accepted(self, entry: InboxEntry, rid: str) -> None:
        began = time.monotonic()
        record = await self._bus.read_request(rid)
        if record is None:  # none of ours wrote this, or it is long over
            await self._reject(entry, rid.encode(), UNKNOWN)
        if record is None or record.prompts or not record.open:
            # gone, or admitted or ended before: the script removes the entry
            stored, seed = (record.prompts, record.seed or 0) if record else ([], 0)
            await self._bus.admit(self._epoch, entry.entry_id, rid=rid, prompts=stored, seed=seed)
            await self._recover(rid)
            return
        try:
            if record.cancel is not None:
                await self._end(entry, record, record.cancel, began=began)
                return
            if record.deadline_ms and record.deadline_ms <= self._clock.now_ms():
                await self._end(entry, record, "deadline", began=began)
                return
            prepared = await self._tokenizers.accepted(encode(record.job))
        except (RequestError, ServiceError) as e:
            await self._end(entry, record, "error", e, began=began)
            return
        made = time.monotonic()
        seed = _seed(record.job)
        key = None if record.job.tokenize else self._answers.key(record.job, record.tenant, prepared.prompts)
        answer = await self._answers.find(record.job, key)
        verdict, _ = await self._bus.admit(
            self._epoch, entry.entry_id, rid=rid, prompts=prepared.prompts, seed=seed, producer_id=record.job.id,
            thinking=record.job.thinking(unpack_ids(prepared.prompts[0])),
            cache="hit" if answer else "", tell=_told_at_once(record.job, key, answer),
        )  # fmt: skip
        if verdict == "new":
            record.prompts, record.seed = prepared.prompts, seed
            self._traces.admitted(rid, record.job, record.tenant, record.created_ms, began, made)
            if record.job.tokenize:
                await self._bus.finish(self._epoch, [terminal_row(record, 0, b"", "stop")])
            elif key is None or not await self._settled(record, key, answer):
                self._admit(arrive(record, self._clock))
        elif verdict == "cancelled":
            marked = await self._bus.read_request(rid)
            await self._end(entry, record, (marked and marked.cancel) or "abort", began=began)
        else:
            await self._recover(rid)

    async def _settled(self, record: RequestRecord, key: str, answer: Answer | None) -> bool:
        settled = await self._answers.settle(record, key, answer)
        if settled and answer is not None:
            await self._traces.answered(record.rid)
        return settled

    async def _end(
        self, entry: InboxEntry, record: RequestRecord, reason: str, error: RequestError | ServiceError | None = None,
        *, began: float | None = None,
    ) -> None:  # fmt: skip
        """One terminal frame for every choice of a request that was never admitted."""
        fields = _error_fields(error) if error else None
        rows = [terminal_row(record, i, b"", reason, fields) for i in range(len(record.placements))]
        await self._bus.finish(self._epoch, rows, entry_id=entry.entry_id)
        code, began = error.wire_code if error else None, time.monotonic() if began is None else began
        self._metrics.request_refused(record.rid, record.tenant, reason, code, len(rows))
        self._traces.refused(record.rid, record.job, record.tenant, record.created_ms, began, reason, code)

    # -------------------------------------------------------------- pushed by a producer

    async def _take_push(self, entry: InboxEntry, payload: bytes) -> float:
        began = time.monotonic()
        if self._drains():
            await self._bus.divert(self._epoch, entry.entry_id)
            return 0.0
        try:
            if len(payload) > MAX_JOB_BYTES:
                raise TooLarge(f"a job may have at most {MAX_JOB_BYTES} bytes")
            seconds = address(payload).timeout_s
            if seconds is not None and entry_ms(entry) + seconds * 1000 <= self._clock.now_ms():
                raise DeadlineExceeded(f"the job lay in the inbox for longer than its timeout_s ({seconds})")
            prepared = await self._tokenizers.push(payload)
        except (RequestError, ServiceError) as e:
            await self._reject(entry, payload, e)
            return 0.0
        made, job = time.monotonic(), prepared.job
        assert job is not None
        key = self._answers.key(job, job.tenant, prepared.prompts)
        answer = await self._answers.find(job, key)
        try:
            tokens = sum(map(len, prepared.prompts)) // ID_BYTES
            rid, held, claim = await claim_and_reserve(self._bus, self._home, job, tokens)
        except Elsewhere:
            await self._bus.finish(self._epoch, [], entry_id=entry.entry_id)
            return 0.0
        except (RequestError, Overloaded) as e:
            if isinstance(e, Overloaded):
                return e.retry_after or 1.0
            await self._reject(entry, payload, e)
            return 0.0
        verdict, owner = await self._bus.admit(
            self._epoch,
            entry.entry_id,
            rid=rid,
            prompts=prepared.prompts,
            seed=_seed(job),
            job=job,
            payload_hash=body_hash(payload),
            reserved=held.tokens,
            origin=entry.origin,
            cache="hit" if answer else "",
            tell=_told_at_once(job, key, answer),
        )
        if self._home is not None and owner != rid:
            await self._home.withdraw(self._bus, job.tenant, rid, held, claim)
        rid = owner
        if verdict == "void":
            return AGAIN_S
        if verdict == "new":
            self._traces.admitted(rid, job, job.tenant, entry_ms(entry), began, made)
            record = await self._bus.read_request(rid) if key is not None else None
            if record is not None and key is not None and await self._settled(record, key, answer):
                return 0.0
        if verdict in ("new", "repeat"):
            await self._recover(rid)
        elif verdict == "conflict":
            await self._reject(entry, payload, CONFLICT)
        return 0.0

    async def _reject(self, entry: InboxEntry, payload: bytes, error: RequestError | ServiceError) -> None:
        """Write a dead letter, and one error result if the payload names a producer that can be told."""
        found = address(payload)
        await self._bus.reject(
            self._epoch,
            entry.entry_id,
            payload_hash=body_hash(payload),
            error=_error_fields(error),
            reply_to=found.reply_to,
            results=found.results,
            tenant=found.tenant or DEFAULT_TENANT,
            id=found.id,
            origin=entry.origin,
        )
        self._metrics.request_refused(None, found.tenant, "error", error.wire_code)


class Address(msgspec.Struct):
    """The fields of a push that say whose it is, where an answer goes and until when, unchecked."""

    id: Any = None
    tenant: Any = None
    reply_to: Any = None
    results: Any = None
    timeout_s: Any = None


def address(payload: bytes) -> Address:
    """The address fields that can be read from a payload that is no valid job; what is
    invalid becomes None."""
    decode = msgspec.json.decode if payload[:64].lstrip()[:1] == b"{" else msgspec.msgpack.decode
    try:
        found = decode(payload if len(payload) <= MAX_ADDRESS_BYTES else b"", type=Address)
    except (msgspec.DecodeError, UnicodeError, ValueError, RecursionError):
        return Address()
    seconds = found.timeout_s
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= MAX_TIMEOUT_S:
        found.timeout_s = None
    for field in ("id", "tenant", "reply_to", "results"):
        value = getattr(found, field)
        if not isinstance(value, str) or not NAME.fullmatch(value):
            setattr(found, field, None)
    return found


def _error_fields(error: RequestError | ServiceError) -> dict[str, str | None]:
    return {"code": error.wire_code, "message": error.message, "param": error.param}


def _seed(job: Job) -> int:
    """The request's own seed, or a random int64; stored at admission, so that a rerun draws the same tokens."""
    return secrets.randbits(64) - 2**63 if job.sampling.seed is None else job.sampling.seed


def entry_ms(entry: InboxEntry) -> int:
    """Server time of the push."""
    return int((entry.origin or entry).entry_id.split("-")[0])


def _told_at_once(job: Job, key: str | None, answer: Answer | None) -> bool:
    """Whether the admission itself tells of it: else it is `join` that knows what the cache says."""
    return key is None or answer is not None or job.cache == "refresh"
