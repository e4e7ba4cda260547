"""The only module that talks to Redis: the atomic operations, the reads and the live tail of one model.

Each operation of the design is one method here and one Lua file in protocol/lua. What holds them together: every
script is safe to repeat, so a lost reply is answered by asking again (protocol/connection.py). The file is long
because the table of operations is: it holds no algorithm.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence
from typing import Any

import msgspec

from protocol import records
from protocol.connection import Argument, Link, OutOfMemory
from protocol.durability import weaknesses
from protocol.errors import Conflict, Fenced, NotFound, Overloaded, ServiceError, StartError, StoreFailed
from protocol.keys import GROUP, REGISTRY, Keys, check_name
from protocol.messages import (
    WIRE,
    Admitted,
    Capacity,
    Frame,
    Hint,
    Job,
    ModelCard,
    Plan,
    Row,
    Terminal,
    body_hash,
    encode,
    row_edges,
)
from protocol.records import (
    Accepted,
    CommitRow,
    Event,
    InboxEntry,
    LeaderRecord,
    Limits,
    RequestRecord,
    WorkerRecord,
)
from protocol.scripts import load
from protocol.subscription import Subscription

__all__ = [
    "Accepted", "Bus", "CommitRow", "Event", "Fenced", "InboxEntry", "LeaderRecord", "Limits", "RequestRecord",
    "Subscription", "WorkerRecord", "commit_arguments",
]  # fmt: skip

MOST_COMMIT_ROWS = 256  # rows in one script call
OLDEST_SERVER = (6, 2)
OLDEST_IN_CLUSTER = (7, 0)  # sharded pub/sub
STRANDED_MS = 60_000  # an entry read this long ago and not handed out has been lost on its way

_plan_decoder = msgspec.msgpack.Decoder(Plan)
_card_decoder = msgspec.msgpack.Decoder(ModelCard)


class Bus:
    """All of Redis for one model. One instance per process; every method may be awaited concurrently.

    Calls that meet a lost connection are repeated with jittered backoff for ``patience`` seconds (every
    script is safe to repeat), then raise Unavailable; ``patience=None`` repeats for ever. Out of memory
    raises Unavailable from accept only. StoreFailed: the server refused the operation for good (a key of a
    wrong type). Blocking reads use connections of their own, without timeouts.
    """

    keys: Keys

    def __init__(self, url: str, model: str, *, patience: float | None = None, retention_s: float = 600.0) -> None:
        self.url = url
        self.keys = Keys(model)
        self._retention_ms = int(retention_s * 1000)
        self._link = Link(url, patience, self.keys.leader)
        self._scripts = load(sharded=self._link.in_cluster)
        self._handed_out: set[str] = set()  # inbox entries given to the scheduler and not yet answered
        self._missed_jobs = True  # a read of the inbox may have been lost on its way to us

    async def connect(self) -> None:
        """Ping the server, check its version (>= 6.2) and load the scripts. StartError says what to do."""
        try:
            text = (await self._link.command("INFO", "server")).decode()
            await self._link.pipeline([("SCRIPT", "LOAD", s.source) for s in self._scripts.values()])
        except ServiceError as error:
            raise StartError(f"cannot use the Redis server: {error.message}") from None
        version = dict(line.split(":", 1) for line in text.splitlines() if ":" in line).get("redis_version", "0.0")
        oldest = OLDEST_IN_CLUSTER if self._link.in_cluster else OLDEST_SERVER
        if tuple(int(part) for part in version.split(".")[:2]) < oldest:
            needed = "Redis {}.{}".format(*oldest)
            raise StartError(f"the Redis server is version {version}; {needed} or Valkey 7.2 at least is needed")

    async def close(self) -> None:
        await self._link.close()

    async def server_ms(self) -> int:
        """Server TIME in milliseconds."""
        seconds, micros = await self._link.command("TIME")
        return int(seconds) * 1000 + int(micros) // 1000

    @staticmethod
    async def durability(url: str, *, patience: float | None = None) -> list[str]:
        """Settings by which this server is weaker than ours (appendonly, appendfsync always, noeviction), named."""
        return await weaknesses(url, patience)

    async def _run(self, name: str, *args: Argument, key: str | None = None) -> Any:
        return await self._link.script(self._scripts[name], key or self.keys.leader, (self.keys.prefix, *args))

    # -------------------------------------------------------------- gateway, client

    async def accept(
        self,
        job: Job,
        *,
        rid: str,
        idempotency: str | None = None,
        reply_to: str | None = None,
        limits: Limits = Limits(),  # noqa: B008 (immutable)
        prompt_tokens: int = 0,
        fingerprint: str | None = None,
    ) -> Accepted:
        """Make ``job`` durable. Raises Overloaded (with retry_after), Conflict (same key, other body), Unavailable.

        Safe to repeat with the same ``rid``. ``fingerprint`` tells whether two bodies under one idempotency key are
        the same; by default it is the hash of the job without its view and reply channel.
        """
        channel = reply_to or job.reply_to or ""
        idem = self._idempotency(job.tenant, idempotency) if idempotency else ""
        bounds = (limits.requests, limits.tokens, limits.tenant_requests, limits.tenant_tokens)
        reply = await self._run(
            "accept",
            *(rid, job.choices, job.tenant, encode(job), fingerprint or _fingerprint(job)),
            *(int((job.timeout_s or 0) * 1000), channel, job.results or "", job.id or "", idem, prompt_tokens),
            *("" if bound is None else bound for bound in bounds),
            key=self.keys.live,
        )
        match reply:
            case [b"ok", _]:
                return Accepted(rid, joined=False)
            case [b"joined", owner, attached]:
                return Accepted(owner.decode(), joined=True, attached=attached)
            case [b"conflict"]:
                raise Conflict("this idempotency key was used with another body", param="Idempotency-Key")
            case [b"full"]:
                raise Overloaded("this request has as many readers as it may", retry_after=1.0)
            case [b"busy", waiting, rate]:
                raise Overloaded("too much work is waiting", retry_after=_retry_after(float(waiting), float(rate)))
        raise AssertionError(f"accept replied {reply!r}")

    async def cancel(self, rid: str, tenant: str, *, reason: str = "abort", attached: int | None = None) -> bool:
        """Mark for ending + hint. With ``attached``: void if the attach count has grown. False: nothing to cancel.
        NotFound if there is no such request of this tenant."""
        seen = "" if attached is None else attached
        marked = await self._run("cancel", rid, tenant, reason, seen, key=self.keys.live)
        if marked < 0:
            raise NotFound("no such request", param="id")
        return bool(marked)

    async def attach(self, rid: str, tenant: str, name: str) -> RequestRecord:
        """Add reply channel ``name`` (an ended request needs none). NotFound, or Overloaded at the fifth channel that
        somebody listens to."""
        reply = await self._run("attach", rid, tenant, check_name(name, "reply_to"), key=self.keys.live)
        if reply == b"full":
            raise Overloaded("this request has as many readers as it may", retry_after=1.0)
        record = records.request_record(rid, reply) if isinstance(reply, list) else None
        if record is None:
            raise NotFound("no such request", param="id")
        return record

    async def read_request(self, rid: str) -> RequestRecord | None:
        return records.request_record(rid, await self._link.command("HGETALL", self.keys.request(rid)))

    async def read_requests(self, rids: Sequence[str]) -> list[RequestRecord | None]:
        """Many records in one round trip; None where there is none, or none that can be read."""
        replies = await self._link.pipeline([("HGETALL", self.keys.request(rid)) for rid in rids], tolerant=True)
        found: list[RequestRecord | None] = []
        for rid, reply in zip(rids, replies, strict=True):
            try:
                found.append(records.request_record(rid, reply or []))
            except StoreFailed:
                found.append(None)
        return found

    async def find_request(self, tenant: str, key: str) -> str | None:
        """The rid behind an idempotency key or a producer's id; None if unknown, expired or rejected."""
        value = await self._link.command("GET", self.keys.idempotency(tenant, key))
        rid = value.split(b" ")[0].decode() if value else "-"
        return None if rid == "-" else rid

    async def read_journal(self, rid: str, choice: int, cursor: int = 0) -> bytes:
        """All frames from byte ``cursor`` on."""
        raw: bytes = await self._link.command("GETRANGE", self.keys.journal(rid, choice), cursor, -1)
        return raw

    async def read_journals(self, journals: Sequence[tuple[str, int]]) -> list[bytes]:
        """Whole journals of many (rid, choice), in one round trip."""
        return await self._link.pipeline([("GET", self.keys.journal(*j)) for j in journals])

    async def journal_lengths(self, journals: Sequence[tuple[str, int]]) -> list[int]:
        return await self._link.pipeline([("STRLEN", self.keys.journal(*j)) for j in journals])

    def subscribe(self, name: str) -> Subscription:
        return Subscription(self._link, self.keys.out(check_name(name, "reply_to")))

    async def read_results(
        self, name: str, after: str = "0-0", block_ms: int | None = None
    ) -> list[tuple[str, Terminal]]:
        """Terminal entries after stream id ``after``; without ``block_ms`` it does not wait."""
        key = self.keys.results(check_name(name, "results"))
        while entries := await self._read_stream(key, after, 1000, block_ms):
            results = [
                (entry_id.decode(), terminal) for entry_id, flat in entries if (terminal := records.terminal(flat))
            ]
            if results:
                return results
            after = entries[-1][0].decode()  # none of them ours: pass over them
        return []

    @staticmethod
    async def models(url: str, *, patience: float | None = 5.0) -> dict[str, ModelCard]:
        """The registry."""
        link = Link(url, patience, REGISTRY)
        try:
            found = records.fields_of(await link.command("HGETALL", REGISTRY))
        finally:
            await link.close()
        return {name.decode(): _card_decoder.decode(card) for name, card in found.items()}

    async def publish_card(self, card: ModelCard, tokenizer_json: bytes | None) -> None:
        """Enter the model into the registry. Out of memory leaves what was there."""
        registry = Link(self.url, self._link.patience, REGISTRY)
        try:
            with contextlib.suppress(OutOfMemory):
                await registry.command("HSET", REGISTRY, card.model, encode(card))
                if tokenizer_json is not None:
                    await self._link.command("SET", self.keys.tokenizer, tokenizer_json)
        finally:
            await registry.close()

    async def read_tokenizer(self) -> bytes | None:
        raw: bytes | None = await self._link.command("GET", self.keys.tokenizer)
        return raw

    async def push(self, payload: bytes) -> str:
        """XADD jobs * job payload: what a bare producer does. Returns the entry id. Repeated if the reply is lost:
        give the job an ``id``, and it runs once all the same."""
        entry: bytes = await self._link.command("XADD", self.keys.jobs, "*", "job", payload)
        return entry.decode()

    # -------------------------------------------------------------- scheduler: the lead

    async def read_leader(self) -> LeaderRecord:
        epoch, owner, beat, wire = await self._link.command("HMGET", self.keys.leader, "epoch", "owner", "beat", "wire")
        return LeaderRecord(int(epoch or 0), (owner or b"").decode(), int(beat or 0), int(wire or 0))

    async def lead(self, owner: str, seen: LeaderRecord) -> int | None:
        """Take the lead if (epoch, beat) are still as ``seen``. The new epoch, or None. ``owner`` names this process
        alone (two that share it would both believe)."""
        return await self._run("lead", seen.epoch, seen.beat, owner, WIRE) or None

    async def renew_lead(self, epoch: int, owner: str) -> int:
        """Renew the lead; returns server TIME in ms. Fenced("epoch")."""
        return int(await self._run("renew_lead", epoch, owner))

    async def release(self, epoch: int, owner: str) -> bool:
        """Hand the lead over: ``read_leader`` then shows no owner and a standby leads at once. False: not ours."""
        return bool(await self._run("release", epoch, owner))

    async def write_depth(self, epoch: int, depth: dict[str, int | float]) -> None:
        """Replace `depth`. Fields: requests, tokens, requests:<tenant>, tokens:<tenant>, rate (tokens per second)."""
        await self._run("depth", epoch, *(part for field in depth.items() for part in field))

    # -------------------------------------------------------------- scheduler: the inbox

    async def read_jobs(self, consumer: str, count: int, block_ms: int) -> list[InboxEntry]:
        """New entries; also those of an earlier read whose reply was lost. ``consumer`` names this term alone."""
        read = ("XREADGROUP", "GROUP", GROUP, consumer, "COUNT", count)
        if self._missed_jobs:
            reply = await self._link.command(*read, "STREAMS", self.keys.jobs, "0")
            entries = [e for e in _stream_entries(reply) if e[0].decode() not in self._handed_out]
            self._missed_jobs = len(entries) >= count
            if entries:
                return self._hand_out(entries)
        lost = self._link.losses
        self._missed_jobs = True  # until this read has come through: a cancelled one may have taken entries
        block = ("BLOCK", block_ms) if block_ms > 0 else ()
        reply = await self._link.command(*read, *block, "STREAMS", self.keys.jobs, ">", block_s=block_ms / 1000)
        self._missed_jobs = self._link.losses != lost
        return self._hand_out(_stream_entries(reply))

    async def claim_jobs(self, consumer: str, count: int) -> list[InboxEntry]:
        """Entries that another consumer (an earlier leader, or a deposed one that woke) read and did not finish with,
        and our own whose reply was lost so late that `read_jobs` did not notice. Each is given once, so this may be
        called again and again; once a second or so is right."""
        jobs, start, me = self.keys.jobs, "-", consumer.encode()
        while True:
            pending = await self._link.command("XPENDING", jobs, GROUP, start, "+", count)
            stranded = [
                entry
                for entry, owner, idle, _ in pending
                if owner != me or (idle >= STRANDED_MS and entry.decode() not in self._handed_out)
            ]
            if stranded:
                claimed = await self._link.command("XCLAIM", jobs, GROUP, consumer, 0, *stranded)
                present = [entry for entry in claimed if entry and entry[1]]
                gone = set(stranded) - {entry_id for entry_id, _ in present}
                if gone:
                    await self._link.command("XACK", jobs, GROUP, *gone)
                if present:
                    return self._hand_out(present)
            if len(pending) < count:
                return []
            start = "(" + pending[-1][0].decode()

    def _hand_out(self, entries: list[tuple[bytes, list[bytes]]]) -> list[InboxEntry]:
        out = [records.inbox_entry(entry_id, flat) for entry_id, flat in entries]
        self._handed_out.update(entry.entry_id for entry in out)
        return out

    async def inbox_length(self) -> int:
        length: int = await self._link.command("XLEN", self.keys.jobs)
        return length

    async def admit(
        self,
        epoch: int,
        entry_id: str,
        *,
        rid: str,
        prompts: list[bytes],
        seed: int,
        job: Job | None = None,
        producer_id: str | None = None,
    ) -> tuple[str, str]:
        """(verdict, rid). verdict: "new"; "repeat" (admitted before: read the record); "cancelled" (marked before it
        was admitted: to be finished); "gone" (no such request, or it has ended). ``job`` is given for a producer's
        push, which becomes a request here (deadline from timeout_s and the time of the push); its id may name an
        earlier request: ("duplicate", that rid). ``producer_id``: the id of an accepted job, repeated in the notice
        of admission."""
        args: list[Argument] = []
        if job is not None:
            if job.id is None:
                job = msgspec.structs.replace(job, id=entry_id)
            producer_id = job.id
            self._idempotency(job.tenant, job.id)  # both must be names
            args = [job.tenant, job.id or "", encode(job), _fingerprint(job), job.choices]
            args += [int((job.timeout_s or 0) * 1000), job.reply_to or "", job.results or ""]
        admitted = encode(Admitted(sum(len(p) for p in prompts) // 4))
        row = encode(Row(rid, -1, 0, admitted, producer_id))
        verdict, owner = await self._run("admit", epoch, entry_id, rid, seed, row, len(prompts), *prompts, *args)
        if verdict != b"cancelled":
            self._handed_out.discard(entry_id)
        return verdict.decode(), owner.decode()

    async def reject(
        self,
        epoch: int,
        entry_id: str,
        *,
        payload_hash: str,
        error: dict[str, Any],
        reply_to: str | None = None,
        results: str | None = None,
        tenant: str | None = None,
        id: str | None = None,
    ) -> None:
        """End a push that can be no request: dead letter, and where ``tenant`` is known one error result under ``id``
        (default: the entry id). ``error``: code, message, param."""
        producer_id = id or entry_id
        frames = encode(Frame(None, "", "error", error))
        row = encode(Row("", 0, 0, frames, producer_id))
        result = encode(Terminal(rid="", id=producer_id, finish_reason="error", error=error))
        dead = {"entry": entry_id, "hash": payload_hash, "code": str(error.get("code", "")), "id": id or ""}
        args: list[Argument] = [tenant or "", producer_id, payload_hash, reply_to or "", row, results or "", result]
        await self._run(
            "reject", epoch, entry_id, self._retention_ms, *args, *(part for field in dead.items() for part in field)
        )
        self._handed_out.discard(entry_id)

    # -------------------------------------------------------------- scheduler: workers and requests

    async def plan(self, epoch: int, wid: str, gen: int, *plans: Plan) -> None:
        """Fence; record the placement of each of plan.new; XADD. Fenced("epoch") or Fenced("gen"). A worker's plans are
        sent one after another, several in one round trip where they are at hand: a step that is not above the last one
        sent counts as a repeat. A sequence whose journal is not as long as its cursor says is not placed: its rows
        will come back STALE."""
        calls: list[list[Argument]] = []
        for plan in plans:
            call: list[Argument] = [self.keys.prefix, epoch, wid, gen, plan.step, encode(plan)]
            for sequence in plan.new:
                call += (sequence.rid, sequence.choice, sequence.placement, sequence.cursor)
            calls.append(call)
        await self._link.script_each(self._scripts["plan"], self.keys.leader, calls)

    async def finish(
        self,
        epoch: int,
        rows: Sequence[CommitRow],
        *,
        entry_id: str | None = None,
        dead: dict[str, str] | None = None,
    ) -> str:
        """End choices that no worker runs (row.finish set; one terminal frame). Verdicts as commit. ``entry_id``: an
        inbox entry that this answers; ``dead``: fields of a dead letter."""
        letter = [part for field in (dead or {}).items() for part in field]
        args: list[Argument] = [epoch, self._retention_ms, entry_id or "", len(letter), *letter]
        verdicts = await self._run("finish", *args, *commit_arguments(rows))
        if entry_id:
            self._handed_out.discard(entry_id)
        return str(verdicts, "ascii")

    async def retire(self, epoch: int, wid: str, gen: int, attempts: Sequence[str] = ()) -> None:
        """Fence worker session ``gen`` for ever, drop its plans, raise `attempts` of these rids."""
        await self._run("retire", epoch, wid, gen, *attempts)

    async def read_events(self, after: str, count: int, block_ms: int) -> list[Event]:
        """Events after stream id ``after``, in order."""
        entries = await self._read_stream(self.keys.events, after, count, block_ms)
        found = [records.event(entry_id, flat) for entry_id, flat in entries]
        return [e for e in found if e is not None]

    async def last_event_id(self) -> str:
        try:
            reply = records.fields_of(await self._link.command("XINFO", "STREAM", self.keys.events))
        except StoreFailed:  # no such key
            return "0-0"
        return reply[b"last-generated-id"].decode()

    async def trim_events(self, upto: str, *, epoch: int | None = None) -> None:
        """Forget events up to ``upto``. With ``epoch`` fenced: a deposed leader may not trim what another needs."""
        first = records.next_id(upto)
        if epoch is None:
            await self._link.command("XTRIM", self.keys.events, "MINID", first)
        else:
            await self._run("trim", epoch, first)

    async def scan_live(self) -> dict[str, list[str]]:
        """rid -> reply channels, of every unfinished request."""
        live: dict[str, list[str]] = {}
        cursor = b"0"
        while True:
            cursor, flat = await self._link.command("HSCAN", self.keys.live, cursor, "COUNT", 1000)
            live.update((rid.decode(), names.decode().split()) for rid, names in records.fields_of(flat).items())
            if cursor == b"0":
                return live

    async def list_workers(self) -> list[WorkerRecord]:
        wids = sorted(wid.decode() for wid in await self._link.command("SMEMBERS", self.keys.workers))
        replies = await self._link.pipeline([("HGETALL", self.keys.worker(wid)) for wid in wids], tolerant=True)
        found = [records.worker_record(wid, reply or []) for wid, reply in zip(wids, replies, strict=True)]
        return [worker for worker in found if worker is not None]

    # -------------------------------------------------------------- worker

    async def register(self, wid: str, capacity: Capacity | None, state: str) -> int:
        """Draw a gen and write `w:<wid>`. Plans are then read from 0-0; those of another (epoch, gen) are skipped."""
        packed = encode(capacity) if capacity is not None else b""
        gen: int = await self._run("register", check_name(wid, "name"), state, packed, WIRE)
        return gen

    async def heartbeat(self, wid: str, gen: int, state: str | None = None, capacity: Capacity | None = None) -> int:
        """A beat that no commit carries; changes state if given (within a gen only forward: loading, warming, serving,
        draining). Returns the current epoch. Fenced("gen")."""
        packed = encode(capacity) if capacity is not None else b""
        epoch: int = await self._run("heartbeat", wid, gen, state or "", packed)
        return epoch

    async def read_plans(self, wid: str, after: str, block_ms: int) -> list[tuple[str, Plan]]:
        """Plans after stream id ``after``, in order."""
        entries = await self._read_stream(self.keys.plans(wid), after, 64, block_ms)
        return [(entry_id.decode(), _plan_decoder.decode(flat[1])) for entry_id, flat in entries]

    async def commit(
        self,
        wid: str,
        epoch: int,
        gen: int,
        rows: Sequence[CommitRow],
        hint: Hint,
        *,
        executed: str | None = None,
    ) -> str:
        """Journal and publish rows, hint once, beat, trim plans up to stream id ``executed``. Returns one verdict per
        row. More than 256 rows go as several calls, the hint in the last. Fenced("epoch") or Fenced("gen")."""
        trim = records.next_id(executed) if executed else ""
        verdicts, packed_hint = "", encode(hint)
        for start in range(0, max(len(rows), 1), MOST_COMMIT_ROWS):
            part = rows[start : start + MOST_COMMIT_ROWS]
            last = start + MOST_COMMIT_ROWS >= len(rows)
            tail: list[Argument] = [packed_hint, verdicts, trim] if last else ["", "", ""]
            reply = await self._run("commit", epoch, wid, gen, self._retention_ms, *tail, *commit_arguments(part))
            verdicts += str(reply, "ascii")
        return verdicts

    # -------------------------------------------------------------- shared

    def _idempotency(self, tenant: str, key: str | None) -> str:
        """The key's name without the prefix; both parts must be names."""
        check_name(tenant, "tenant")
        return self.keys.idempotency(tenant, check_name(key or "", "id")).removeprefix(self.keys.prefix)

    async def _read_stream(
        self, key: str, after: str, count: int, block_ms: int | None
    ) -> list[tuple[bytes, list[bytes]]]:
        block = ("BLOCK", block_ms) if block_ms else ()
        reply = await self._link.command(
            "XREAD", "COUNT", count, *block, "STREAMS", key, after, block_s=(block_ms or 0) / 1000
        )
        return _stream_entries(reply)


def commit_arguments(rows: Sequence[CommitRow]) -> list[Argument]:
    """Rows as the flat arguments of the scripts: rid, choice, placement, cursor, finish, result, head, frames, tail."""
    args: list[Argument] = []
    for row in rows:
        head, tail = row_edges(row.rid, row.choice, row.cursor, len(row.frames), row.id)
        args += (
            row.rid,
            row.choice,
            row.placement,
            row.cursor,
            row.finish or b"",
            row.result or b"",
            head,
            row.frames,
            tail,
        )
    return args


def _stream_entries(reply: Any) -> list[tuple[bytes, list[bytes]]]:
    """Entries of an XREAD or XREADGROUP reply for one stream; those deleted meanwhile are left out."""
    if not reply:
        return []
    return [(entry_id, flat) for entry_id, flat in reply[0][1] if flat]


def _fingerprint(job: Job) -> str:
    """What two pushes under one id must share: all but where the answer goes and how it is rendered."""
    return body_hash(encode(msgspec.structs.replace(job, view=None, reply_to=None)))


def _retry_after(waiting_tokens: float, rate: float) -> float:
    """Seconds until a busy service may have room: waiting tokens over measured rate, 1 to 60, jittered by a tenth."""
    seconds = waiting_tokens / rate if rate > 0 else 1.0
    return min(60.0, max(1.0, seconds * random.uniform(0.9, 1.1)))
