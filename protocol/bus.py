"""The only module that talks to Redis: connections, the atomic operations, the reads.

STUB OF THE CONTRACT: signatures and meaning are final, bodies are being written.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from protocol.keys import Keys
from protocol.messages import Capacity, Frame, Hint, Job, ModelCard, Plan, Row, Terminal

# ------------------------------------------------------------------ what goes in and comes out


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


@dataclass
class RequestRecord:
    """`r:<rid>` decoded. ``prompts`` is empty until ingest. Lists have one entry per choice."""

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


@dataclass
class InboxEntry:
    """One entry of `jobs`: ``rid`` if it went through accept, else ``payload``."""

    entry_id: str
    rid: str | None
    payload: bytes | None


@dataclass
class Event:
    """One entry of `events`. kind: "hint", "worker" (registered or changed state), "cancel", "attach"."""

    event_id: str
    kind: str
    hint: Hint | None = None
    verdicts: str = ""  # per hint row LANDED / CLOSED / STALE; "" = all landed
    wid: str | None = None
    gen: int = 0
    rid: str | None = None


@dataclass(frozen=True)
class CommitRow:
    """One row to journal: ``frames`` end to end, appended if the journal is ``cursor`` bytes long."""

    rid: str
    choice: int
    placement: int
    cursor: int
    frames: bytes
    finish: str | None = None
    result: bytes | None = None  # encoded Terminal, written to results:<name> when the row ends the choice
    id: str | None = None


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
    owner: str
    beat: int


class Bus:
    """All of Redis for one model. One instance per process; every method may be awaited concurrently.

    Calls that meet a lost connection are repeated with jittered backoff for ``patience`` seconds (every
    script is safe to repeat), then raise Unavailable; ``patience=None`` repeats for ever. Out of memory
    raises Unavailable from accept only. Blocking reads use connections of their own, without timeouts.
    """

    keys: Keys

    def __init__(self, url: str, model: str, *, patience: float | None = None, retention_s: float = 600.0) -> None: ...
    async def connect(self) -> None:
        """Ping the server, check its version (>= 6.2) and load the scripts. StartError says what to do."""
    async def close(self) -> None: ...
    async def server_ms(self) -> int:
        """Server TIME in milliseconds."""
    async def durability(self) -> list[str]:
        """Settings of the server that are weaker than ours (appendonly, appendfsync always, noeviction), named."""

    # -------------------------------------------------------------- gateway, client
    async def accept(
        self, job: Job, *, rid: str, idempotency: str | None = None, reply_to: str | None = None,
        limits: Limits = Limits(), prompt_tokens: int = 0,
    ) -> Accepted:
        """Make ``job`` durable. Raises Overloaded (with retry_after), Conflict (same key, other body), Unavailable."""
    async def cancel(self, rid: str, tenant: str, *, reason: str = "abort", attached: int | None = None) -> bool:
        """Mark for ending + hint. With ``attached``: void if the attach count has grown. False: nothing to cancel.
        NotFound if there is no such request of this tenant."""
    async def attach(self, rid: str, tenant: str, name: str) -> RequestRecord:
        """Add reply channel ``name`` (a ended request needs none). NotFound, or Overloaded at the fifth channel."""
    async def read_request(self, rid: str) -> RequestRecord | None: ...
    async def read_journal(self, rid: str, choice: int, cursor: int = 0) -> bytes: ...
    async def journal_lengths(self, journals: Sequence[tuple[str, int]]) -> list[int]: ...
    def subscribe(self, name: str) -> Subscription: ...
    async def read_results(self, name: str, after: str = "0-0", block_ms: int | None = None) -> list[tuple[str, Terminal]]: ...
    @staticmethod
    async def models(url: str) -> dict[str, ModelCard]:
        """The registry."""
    async def publish_card(self, card: ModelCard, tokenizer_json: bytes | None) -> None: ...
    async def read_tokenizer(self) -> bytes | None: ...
    async def push(self, payload: bytes) -> str:
        """XADD jobs * job payload: what a bare producer does. Returns the entry id."""

    # -------------------------------------------------------------- scheduler
    async def read_leader(self) -> LeaderRecord: ...
    async def lead(self, owner: str, seen: LeaderRecord) -> int | None:
        """Take the lead if (epoch, beat) are still as ``seen``. The new epoch, or None."""
    async def beat(self, epoch: int, owner: str) -> int:
        """Renew the lead; returns server TIME in ms. Fenced("epoch")."""
    async def write_depth(self, epoch: int, depth: dict[str, int | float]) -> None: ...
    async def read_jobs(self, consumer: str, count: int, block_ms: int) -> list[InboxEntry]: ...
    async def claim_jobs(self, consumer: str, count: int) -> list[InboxEntry]:
        """Entries that an earlier leader read and did not finish with."""
    async def ingest(
        self, epoch: int, entry_id: str, *, rid: str, prompts: list[bytes], seed: int, job: Job | None = None,
    ) -> tuple[str, str]:
        """(verdict, rid). verdict: "new"; "repeat" (ingested before: read the record); "cancelled" (marked before it was
        ingested: to be finished); "gone" (no such request). ``job`` is given for a producer's push, which becomes a
        request here (deadline from timeout_s); its id may name an earlier request: ("duplicate", that rid)."""
    async def reject(self, epoch: int, entry_id: str, *, payload_hash: str, error: dict, reply_to: str | None = None,
        results: str | None = None, tenant: str | None = None, id: str | None = None) -> None:
        """End a push that can be no request: dead letter, and where an id is known one error result."""
    async def plan(self, epoch: int, wid: str, gen: int, plan: Plan) -> None:
        """Fence; record the placement of each of plan.new; XADD. Fenced("epoch") or Fenced("gen")."""
    async def finish(self, epoch: int, rows: Sequence[CommitRow], *, entry_id: str | None = None,
        dead: dict[str, str] | None = None) -> str:
        """End choices that no worker runs (row.finish set; one terminal frame). Verdicts as commit. ``entry_id``: an inbox
        entry that this answers; ``dead``: fields of a dead letter."""
    async def retire(self, epoch: int, wid: str, gen: int, attempts: Sequence[str] = ()) -> None:
        """Fence worker incarnation ``gen`` for ever, drop its plans, raise `attempts` of these rids."""
    async def read_events(self, after: str, count: int, block_ms: int) -> list[Event]: ...
    async def last_event_id(self) -> str: ...
    async def trim_events(self, upto: str) -> None: ...
    async def scan_live(self) -> dict[str, list[str]]:
        """rid -> reply channels, of every unfinished request."""
    async def list_workers(self) -> list[WorkerRecord]: ...
    async def inbox_length(self) -> int: ...

    # -------------------------------------------------------------- worker
    async def register(self, wid: str, capacity: Capacity | None, state: str) -> int:
        """Draw a gen and write `w:<wid>`. Plans are then read from 0-0; those of another (epoch, gen) are skipped."""
    async def pulse(self, wid: str, gen: int, state: str | None = None, capacity: Capacity | None = None) -> int:
        """A beat that no commit carries; changes state if given. Returns the current epoch. Fenced("gen")."""
    async def read_plans(self, wid: str, after: str, block_ms: int) -> list[tuple[str, Plan]]: ...
    async def commit(self, wid: str, epoch: int, gen: int, rows: Sequence[CommitRow], hint: Hint, *,
        executed: str | None = None) -> str:
        """Journal and publish rows, hint once, beat, trim plans up to stream id ``executed``. Returns one verdict per
        row. More than 256 rows go as several calls, the hint in the last. Fenced("epoch") or Fenced("gen")."""


class Subscription:
    """``async for rows in subscription`` yields list[Row] per message; [] tells that the subscription was lost and is
    up again (publications may be missing: resync from the journals). ``start`` returns once SUBSCRIBE is acknowledged."""

    async def start(self) -> None: ...
    async def close(self) -> None: ...
    def __aiter__(self) -> AsyncIterator[list[Row]]: ...
