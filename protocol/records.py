"""Arguments and results of the bus: plain records, and how they are read from Redis replies."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from protocol.errors import NO_RATES, RatesLeft, StoreFailed
from protocol.messages import Capacity, Hint, Job, Terminal, unpack_ids

MOVED = re.compile(r"([0-9]{1,4})\.([0-9]{1,19}-[0-9]{1,19})")
Reply = Any  # a decoded Redis reply: bytes, int, None, or a list of these


@dataclass(frozen=True)
class Limits:
    """Bounds that accept enforces against `depth` + the inbox. None: unbounded."""

    requests: int | None = None
    tokens: int | None = None  # waiting prompt tokens
    tenant_requests: int | None = None
    tenant_tokens: int | None = None


@dataclass(frozen=True)
class Accepted:
    rid: str
    joined: bool  # an idempotency key named a request that exists already
    attached: int = 0  # the attach count to pass to a later cancel
    left: RatesLeft = NO_RATES


@dataclass(frozen=True)
class Claim:
    """What stands behind an idempotency key: the request ``rid`` of ``model``, accepted or about to be."""

    name: str  # protocol.keys.claim_name
    model: str
    rid: str
    body: str  # hash of the body
    mine: bool = True  # made by this call; else by an earlier one, whose request may be there or not


@dataclass(frozen=True)
class Reservation:
    """What a request holds of its tenant's limits; ``tokens`` None: the tenant has none."""

    tokens: int | None
    left: RatesLeft = NO_RATES


@dataclass(frozen=True)
class Hold:
    """A reservation as the sweep finds it."""

    tenant: str
    rid: str


@dataclass
class RequestRecord:
    """`r:<rid>` decoded. ``prompts`` is empty until admission. Lists have one entry per choice."""

    rid: str
    job: Job
    tenant: str
    seed: int | None
    prompts: list[bytes]  # int32 bytes, one per prompt
    created_ms: int  # server time
    deadline_ms: int  # server time; 0: none
    attempts: int
    cancel: str | None  # finish reason asked for
    open: int  # choices not ended; 0: the request has ended
    attached: int  # attach count
    placements: list[int]
    ends: list[str | None]  # finish reasons
    ended_ms: int = 0  # server time; 0: not ended
    cache: str = ""  # what the cache of answers said
    flight: str | None = None  # key of the answer that it makes, for others too
    joins: str | None = None  # rid of the request whose rows land for it as well
    fingerprint: str = ""  # of the worker that it was placed on last (Capacity.fingerprint)
    moved: tuple[str, str] | None = None  # model and rid of the request that took its place: this one says nothing

    @property
    def thinking(self) -> bool:
        """Whether the prompt has opened a thought, so that the answer begins within it."""
        return bool(self.prompts) and self.job.thinking(unpack_ids(self.prompts[0]))


@dataclass(frozen=True)
class TenantLimits:
    """What one tenant may use of all models, over all gateways. None: as much as it likes."""

    concurrent: int | None = None  # requests that have not ended, detached ones included
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # of prompts and answers


@dataclass(frozen=True)
class ServerState:
    """What the server tells of itself. ``log_s``: seconds that its main thread has spent in writing its append-only
    file, fsyncs included where each write waits for one; 0 from servers that do not count it (before Redis 7.2)."""

    memory: int  # bytes in use
    most_memory: int  # maxmemory; 0: no limit
    log_s: float


@dataclass(frozen=True)
class Origin:
    """Where a push was before it was moved: in the inbox of another shard, which drains."""

    shard: int
    entry_id: str

    @property
    def name(self) -> str:
        """Of a push without an id: no entry of the shard that it is in now has it, nor can an id be so."""
        return f"{self.shard}.{self.entry_id}"


@dataclass
class InboxEntry:
    """One entry of `jobs`: ``rid`` if it went through accept, else ``payload``."""

    entry_id: str
    rid: str | None
    payload: bytes | None
    origin: Origin | None = None


@dataclass
class Event:
    """One entry of `events`. kind: "hint", "worker" (registered or changed state), "cancel", "attach",
    "freed" (it has joined another request's answer and goes on by itself)."""

    event_id: str
    kind: str
    hint: Hint | None = None
    verdicts: str = ""  # per hint row LANDED / CLOSED / STALE; "" = all landed
    wid: str | None = None
    gen: int = 0
    rid: str | None = None


@dataclass
class WorkerRecord:
    wid: str
    gen: int
    beat: int
    state: str  # loading, warming, serving, draining
    capacity: Capacity | None
    wire: int


@dataclass(frozen=True)
class LeaderRecord:
    epoch: int
    owner: str  # "": none, or handed over: a standby may lead at once
    beat: int
    wire: int = field(default=0, compare=False)


_job_decoder = msgspec.msgpack.Decoder(Job)
_hint_decoder = msgspec.msgpack.Decoder(Hint)
_terminal_decoder = msgspec.msgpack.Decoder(Terminal)
_capacity_decoder = msgspec.msgpack.Decoder(Capacity)
_EVENT_KINDS = {b"h": "hint", b"w": "worker", b"c": "cancel", b"a": "attach", b"j": "freed"}


def fields_of(flat: Sequence[bytes]) -> dict[bytes, bytes]:
    """A flat field, value, field, value reply as a dict."""
    return dict(zip(flat[::2], flat[1::2], strict=True))


def request_record(rid: str, flat: Sequence[bytes]) -> RequestRecord | None:
    """None if there is no such request. StoreFailed if the key holds something else."""
    if not flat:
        return None
    try:
        return _request_record(rid, fields_of(flat))
    except (KeyError, ValueError, msgspec.DecodeError):
        raise StoreFailed("the record of a request cannot be read") from None


def _request_record(rid: str, fields: dict[bytes, bytes]) -> RequestRecord:
    choices = range(int(fields[b"n"]))
    prompts: list[bytes] = []
    while (prompt := fields.get(b"prompt:%d" % len(prompts))) is not None:
        prompts.append(prompt)
    ends = [fields.get(b"e%d" % i) for i in choices]
    seed, cancel = fields.get(b"seed"), fields.get(b"cancel")
    return RequestRecord(
        rid=rid,
        job=_job_decoder.decode(fields[b"body"]),
        tenant=fields[b"tenant"].decode(),
        seed=int(seed) if seed is not None else None,
        prompts=prompts,
        created_ms=int(fields[b"created"]),
        deadline_ms=int(fields[b"deadline"]),
        attempts=int(fields[b"attempts"]),
        cancel=cancel.decode() if cancel else None,
        open=int(fields[b"open"]),
        attached=int(fields[b"attached"]),
        placements=[int(fields.get(b"p%d" % i, 0)) for i in choices],
        ends=[end.decode() if end is not None else None for end in ends],
        ended_ms=int(fields.get(b"ended", 0)),
        cache=fields.get(b"cache", b"").decode(),
        flight=flight.decode() if (flight := fields.get(b"flight")) else None,
        joins=joins.decode() if (joins := fields.get(b"joins")) else None,
        fingerprint=fields.get(b"fingerprint", b"").decode(),
        moved=(to[0], to[1]) if (to := fields.get(b"moved", b"").decode().split(" "))[1:] else None,
    )


def inbox_entry(entry_id: bytes, flat: Sequence[bytes]) -> InboxEntry:
    fields = fields_of(flat)
    rid, origin = fields.get(b"rid"), MOVED.fullmatch(fields.get(b"from", b"").decode("utf-8", "replace"))
    return InboxEntry(
        entry_id.decode(),
        rid.decode("utf-8", "replace") if rid is not None else None,
        fields.get(b"job"),
        Origin(int(origin[1]), origin[2]) if origin else None,
    )


def event(event_id: bytes, flat: Sequence[bytes]) -> Event | None:
    """None for an entry of another program, or of a kind that this version does not know."""
    fields = fields_of(flat)
    out = Event(event_id.decode(), _EVENT_KINDS.get(fields.get(b"k", b""), ""))
    try:
        match out.kind:
            case "hint":
                out.hint = _hint_decoder.decode(fields[b"h"])
                out.wid, out.gen = out.hint.wid, out.hint.gen
                out.verdicts = fields.get(b"v", b"").decode()
            case "worker":
                out.wid, out.gen = fields[b"w"].decode(), int(fields[b"g"])
            case "cancel" | "attach" | "freed":
                out.rid = fields[b"r"].decode()
            case _:
                return None
    except (KeyError, ValueError, msgspec.DecodeError):
        return None
    return out


def worker_record(wid: str, flat: Sequence[bytes]) -> WorkerRecord | None:
    """None if there is no such worker, or the key holds something else."""
    fields = fields_of(flat)
    try:
        capacity = fields.get(b"capacity")
        return WorkerRecord(
            wid=wid,
            gen=int(fields[b"gen"]),
            beat=int(fields[b"beat"]),
            state=fields[b"state"].decode(),
            capacity=_capacity_decoder.decode(capacity) if capacity else None,
            wire=int(fields[b"wire"]),
        )
    except (KeyError, ValueError, msgspec.DecodeError):
        return None


def terminal(flat: Sequence[bytes]) -> Terminal | None:
    """An entry of a results stream; None if another program wrote it."""
    try:
        return _terminal_decoder.decode(fields_of(flat)[b"result"])
    except (KeyError, msgspec.DecodeError):
        return None
