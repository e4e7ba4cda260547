"""What every role shares: the link to Redis, its scripts, and reads that any role may make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import msgspec

from protocol import records
from protocol.connection import Argument, Link
from protocol.durability import weaknesses
from protocol.errors import ServiceError, StartError
from protocol.keys import Keys, check_name
from protocol.messages import Frame, Job, Row, Terminal, body_hash, encode
from protocol.records import LeaderRecord, Origin, RequestRecord, WorkerRecord
from protocol.scripts import load

OLDEST_SERVER = (6, 2)
VOID_STAYS_MS = 86_400_000  # longer than any accept is under way
OLDEST_IN_CLUSTER = (7, 0)  # sharded pub/sub


class Base:
    """All of Redis for one model, as far as one role may use it. One instance per process; every method may be awaited
    concurrently.

    Calls that meet a lost connection are repeated with jittered backoff for ``patience`` seconds (every script is safe
    to repeat), then raise Unavailable; ``patience=None`` repeats for ever. Out of memory raises Unavailable from accept
    only. StoreFailed: the server refused the operation for good (a key of a wrong type). Blocking reads use connections
    of their own, without timeouts.
    """

    SCRIPTS: ClassVar[tuple[str, ...]] = ()  # the scripts of protocol/lua that this role calls
    keys: Keys

    def __init__(self, url: str, model: str, *, patience: float | None = None, retention_s: float = 600.0) -> None:
        self.url = url
        self.keys = Keys(model)
        self._retention_ms = int(retention_s * 1000)  # how long an ended request's keys stay
        self._link = Link(url, patience, self.keys.leader)
        self._scripts = load(self.SCRIPTS, sharded=self._link.in_cluster)

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

    async def shed(self, answers: int) -> int:
        """Drop cached answers, at most so many, those that expire first. Returns how many."""
        return int(await self._run("shed", answers, key=self.keys.live))

    async def read_journal(self, rid: str, choice: int, cursor: int = 0) -> bytes:
        """All frames from byte ``cursor`` on."""
        raw: bytes = await self._link.command("GETRANGE", self.keys.journal(rid, choice), cursor, -1)
        return raw

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
        return stream_entries(reply)


class RequestReads(Base):
    """Reads of requests, leader and workers: for roles that may see other tenants' records."""

    async def read_request(self, rid: str) -> RequestRecord | None:
        return records.request_record(rid, await self._link.command("HGETALL", self.keys.request(rid)))

    async def void(self, rid: str) -> bool:
        """See to it that ``rid``, which was claimed (HomeBus), is never accepted any more. False: there is such a
        request."""
        return (await self.void_each([rid]))[0] is None

    async def void_each(self, rids: Sequence[str]) -> list[int | None]:
        """`void` of several. None: it is void; else when its request's record goes (server time in milliseconds), 0 if
        it has not ended."""
        calls = [(self.keys.prefix, rid, VOID_STAYS_MS) for rid in rids]
        found: list[int] = await self._link.script_each(self._scripts["void"], self.keys.live, calls) if rids else []
        return [None if gone < 0 else gone for gone in found]

    async def ended(self, rids: Sequence[str]) -> list[str]:
        """Those of these requests that have ended and are still kept."""
        found = await self._link.pipeline([("HGET", self.keys.request(rid), "open") for rid in rids])
        return [rid for rid, left in zip(rids, found, strict=True) if left == b"0"]

    async def read_journals(self, journals: Sequence[tuple[str, int]]) -> list[bytes]:
        """Whole journals of many (rid, choice), in one round trip."""
        return await self._link.pipeline([("GET", self.keys.journal(*j)) for j in journals])

    async def read_leader(self) -> LeaderRecord:
        epoch, owner, beat, wire = await self._link.command("HMGET", self.keys.leader, "epoch", "owner", "beat", "wire")
        return LeaderRecord(int(epoch or 0), (owner or b"").decode(), int(beat or 0), int(wire or 0))

    async def unfinished(self) -> int:
        """Requests that have not ended: in `live` from accept or admission on, before that pushes in `jobs`."""
        live, jobs = await self._link.pipeline([("HLEN", self.keys.live), ("XLEN", self.keys.jobs)])
        return max(int(live), int(jobs))

    async def list_workers(self) -> list[WorkerRecord]:
        wids = sorted(wid.decode() for wid in await self._link.command("SMEMBERS", self.keys.workers))
        replies = await self._link.pipeline([("HGETALL", self.keys.worker(wid)) for wid in wids], tolerant=True)
        found = [records.worker_record(wid, reply or []) for wid, reply in zip(wids, replies, strict=True)]
        return [worker for worker in found if worker is not None]


def stream_entries(reply: Any) -> list[tuple[bytes, list[bytes]]]:
    """Entries of an XREAD or XREADGROUP reply for one stream; those deleted meanwhile are left out."""
    if not reply:
        return []
    return [(entry_id, flat) for entry_id, flat in reply[0][1] if flat]


def rejection(
    entry_id: str,
    *,
    payload_hash: str,
    error: dict[str, Any],
    reply_to: str | None = None,
    results: str | None = None,
    tenant: str | None = None,
    id: str | None = None,
    origin: Origin | None = None,
) -> list[Argument]:
    """What script reject is told of a push that can be no request: dead letter, and where ``tenant`` is known one error
    result, without a rid, under ``id`` (default: the entry id). ``error``: code, message, param. The same payload
    again, under the same id, is told nothing more."""
    told, unique = (origin.entry_id, origin.name) if origin is not None else (entry_id, entry_id)
    producer_id = id or told
    frames = encode(Frame(None, "", "error", error))
    row = encode(Row("", 0, 0, frames, producer_id))
    result = encode(Terminal(rid="", id=producer_id, finish_reason="error", error=error))
    texts = {name: str(error.get(name) or "") for name in ("code", "message")}
    dead = {"entry": entry_id, "hash": payload_hash, **texts, "id": id or ""}
    args: list[Argument] = [tenant or "", id or unique, payload_hash, reply_to or "", row, results or "", result]
    return [*args, *(part for field in dead.items() for part in field)]


def job_fingerprint(job: Job) -> str:
    """What two pushes under one id must share: all but where the answer goes, how it is rendered, who traces it, what
    the cache may do, and defaults."""
    unsaid = dict.fromkeys(("view", "reply_to", "default_max_tokens", "trace", "cache"))
    return body_hash(encode(msgspec.structs.replace(job, **unsaid)))
