"""What the scheduler may do: lead, take in jobs, plan for workers, end requests, retire workers.

A little over 400 lines: one method for each script that a leader calls.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Any, ClassVar

import msgspec

from protocol import records
from protocol.bus.base import RequestReads, job_fingerprint, rejection, stream_entries
from protocol.connection import Argument, Link, OutOfMemory
from protocol.errors import StoreFailed
from protocol.keys import GROUP, REGISTRY
from protocol.levels import LEVEL
from protocol.messages import (
    ID_BYTES,
    WIRE,
    CommitRow,
    Job,
    ModelCard,
    Plan,
    Row,
    commit_arguments,
    encode,
    next_id,
)
from protocol.records import Event, InboxEntry, LeaderRecord, Origin, RequestRecord, ServerState

MOST_FOLLOWERS = 64  # requests that wait for one answer; further ones run by themselves
ANSWER_BYTES = 400  # that the server takes for a cached answer besides its text
MOST_RECOUNTED = 500  # requests in one script call
PAGE = 1000  # ids in one look at what is pending
STRANDED_MS = 60_000  # an entry read this long ago and not handed out has been lost on its way


class LeaderBus(RequestReads):
    """The calls of a scheduler, standing by or leading."""

    SCRIPTS: ClassVar[tuple[str, ...]] = (
        "admit",
        "collect",
        "depth",
        "divert",
        "finish",
        "join",
        "keep_answer",
        "lead",
        "plan",
        "receive",
        "recount",
        "reject",
        "release",
        "renew_lead",
        "requeue",
        "retire",
        "retire_shard",
        "shed",
        "trim",
        "void",
    )

    def __init__(self, url: str, model: str, *, patience: float | None = None, retention_s: float = 600.0) -> None:
        super().__init__(url, model, patience=patience, retention_s=retention_s)
        self._handed_out: set[str] = set()  # entries of jobs given to the scheduler and not yet answered
        self._missed_jobs = True  # the reply of a read of jobs may have been lost
        self._looked = float("-inf")  # when entries of such a read were last looked for

    async def lead(self, owner: str, seen: LeaderRecord) -> int | None:
        """Take the lead if (epoch, beat) are still as ``seen``. The new epoch, or None. ``owner`` must be unique
        to this process (two with the same would both take the lead)."""
        return await self._run("lead", seen.epoch, seen.beat, owner, WIRE, LEVEL) or None

    async def renew_lead(self, epoch: int, owner: str) -> int:
        """Renew the lead; returns server TIME in ms. Fenced("epoch")."""
        return int(await self._run("renew_lead", epoch, owner))

    async def release(self, epoch: int, owner: str) -> bool:
        """Hand the lead over: ``read_leader`` then shows no owner and a standby leads at once. False: not ours."""
        return bool(await self._run("release", epoch, owner))

    async def write_depth(self, epoch: int, depth: dict[str, int | float]) -> None:
        """Replace `depth`. Fields: requests, tokens, requests:<tenant>, tokens:<tenant>, rate (tokens per second); and
        for the dashboard running (sequences), kv_used:<wid>, kv_blocks:<wid>, led_at (Unix seconds), taken_over (1:
        from a silent leader), and once there is one workers_lost in this term, worker_lost_at."""
        await self._run("depth", epoch, *(part for field in depth.items() for part in field))

    async def collect(self, epoch: int, settled: int) -> tuple[int, list[bytes]]:
        """What tenants owe in the home slot for requests of this one: the number of a batch, and what `HomeBus.settle`
        takes; (0, []) where nothing is owed. ``settled``: the last batch that the home slot has; 0: none yet."""
        number, *owed = await self._run("collect", epoch, settled) or (0,)
        return int(number), owed

    async def publish_card(
        self, card: ModelCard, tokenizer_json: bytes | None, tokenizer_info: bytes | None = None
    ) -> None:
        """Enter the model into the registry. Out of memory: the old entry stays."""
        registry = Link(self.url, self._link.patience, REGISTRY)
        try:
            with contextlib.suppress(OutOfMemory):
                await registry.command("HSET", REGISTRY, card.model, encode(card))
                for key, told in ((self.keys.tokenizer, tokenizer_json), (self.keys.tokenizer_info, tokenizer_info)):
                    if told is not None:
                        await self._link.command("SET", key, told)
        finally:
            await registry.close()

    async def withdraw_card(self) -> None:
        """Take the model out of the registry: nobody is left to serve it. Its jobs stay, and wait for who does."""
        registry = Link(self.url, self._link.patience, REGISTRY)
        try:
            await registry.command("HDEL", REGISTRY, self.keys.model)
        finally:
            await registry.close()

    async def read_jobs(self, consumer: str, count: int, block_ms: int) -> list[InboxEntry]:
        """New entries; also those of an earlier read whose reply was lost. ``consumer`` names this term alone."""
        read = ("XREADGROUP", "GROUP", GROUP, consumer, "COUNT", count)
        if self._missed_jobs and (missed := await self._read_missed(read, count)):
            return missed
        lost = self._link.losses
        self._missed_jobs = True  # until this read returns: a cancelled one may have taken entries
        block = ("BLOCK", block_ms) if block_ms > 0 else ()
        reply = await self._link.command(*read, *block, "STREAMS", self.keys.jobs, ">", block_s=block_ms / 1000)
        self._missed_jobs = self._link.losses != lost
        return self._hand_out(stream_entries(reply))

    async def _read_missed(self, read: tuple[Argument, ...], count: int) -> list[InboxEntry]:
        """Entries that the server has given to this consumer and that were never handed out: the reply was lost."""
        start = b"0"
        while True:
            page = stream_entries(await self._link.command(*read, "STREAMS", self.keys.jobs, start))
            if entries := [e for e in page if e[1] and e[0].decode() not in self._handed_out]:
                return self._hand_out(entries)
            if len(page) < count:
                return []
            start = page[-1][0]

    async def claim_jobs(self, consumer: str, count: int) -> list[InboxEntry]:
        """Entries that another consumer (an earlier leader, or a deposed one that runs again) read and did not finish
        with, and our own whose reply was lost so late that `read_jobs` did not notice. Each is given once, so this may
        be called repeatedly, about once a second."""
        _, _, _, consumers = await self._link.command("XPENDING", self.keys.jobs, GROUP)
        for name, _ in consumers or ():
            while name != consumer.encode() and (stranded := await self._pending(count, name)):
                if claimed := await self._claim(consumer, stranded):
                    return claimed
        if time.monotonic() - self._looked < STRANDED_MS / 1000:
            return []
        start = b"-"
        while page := await self._pending(PAGE, consumer, start, STRANDED_MS):
            stranded = [entry for entry in page if entry.decode() not in self._handed_out][:count]
            if stranded and (claimed := await self._claim(consumer, stranded)):
                return claimed
            start = b"(" + page[-1]
        self._looked = time.monotonic()
        return []

    async def _pending(self, count: int, consumer: str | bytes, start: bytes = b"-", idle_ms: int = 0) -> list[bytes]:
        """Ids of entries that ``consumer`` has read and not finished with, for ``idle_ms`` at least."""
        found = await self._link.command(
            "XPENDING", self.keys.jobs, GROUP, "IDLE", idle_ms, start, "+", count, consumer
        )  # fmt: skip
        return [entry for entry, *_ in found]

    async def _claim(self, consumer: str, stranded: list[bytes]) -> list[InboxEntry]:
        """Those of ``stranded`` that are there; the others are struck off."""
        claimed = await self._link.command("XCLAIM", self.keys.jobs, GROUP, consumer, 0, *stranded)
        present = [entry for entry in claimed if entry and entry[1]]
        if gone := set(stranded) - {entry_id for entry_id, _ in present}:
            await self._link.command("XACK", self.keys.jobs, GROUP, *gone)
        return self._hand_out(present)

    async def weigh_requests(self, rids: Sequence[str]) -> dict[str, tuple[str, int, int, bool]]:
        """Of each accepted request tenant, bytes of its body, deadline in server ms (0: none), and whether it was
        cancelled, in one round trip. What is not there, or is not ours, weighs nothing."""
        commands: list[tuple[Argument, ...]] = []
        for rid in rids:
            key = self.keys.request(rid)
            commands += [("HMGET", key, "tenant", "deadline", "cancel"), ("HSTRLEN", key, "body")]
        replies = await self._link.pipeline(commands, tolerant=True)
        weights = {}
        for rid, fields, size in zip(rids, replies[::2], replies[1::2], strict=True):
            tenant, deadline, cancel = fields or (None, None, None)
            name = (tenant or b"").decode("utf-8", "replace")
            weights[rid] = (name, size or 0, int(deadline or 0), cancel is not None)
        return weights

    async def read_push(self, entry_id: str) -> bytes | None:
        """The payload of an entry of the inbox; None if it is there no more."""
        found = await self._link.command("XRANGE", self.keys.jobs, entry_id, entry_id)
        if not found:
            self._handed_out.discard(entry_id)
            return None
        return records.inbox_entry(*found[0]).payload

    def _hand_out(self, entries: list[tuple[bytes, list[bytes]]]) -> list[InboxEntry]:
        out = [records.inbox_entry(entry_id, flat) for entry_id, flat in entries]
        self._handed_out.update(entry.entry_id for entry in out)
        return out

    async def strays(self, rids: Sequence[str], older_ms: int) -> list[str]:
        """Those of these requests that were accepted before so many milliseconds and never admitted, though the inbox
        was read beyond the place where their entries stood."""
        group = records.fields_of((await self._link.command("XINFO", "GROUPS", self.keys.jobs))[0])
        last, latest = group[b"last-delivered-id"], await self.server_ms() - older_ms
        if await self._link.command("XRANGE", self.keys.jobs, b"(" + last, "+", "COUNT", 1):
            latest = min(latest, int(last.split(b"-")[0]))
        found = await self._link.pipeline(
            [("HMGET", self.keys.request(rid), "open", "seed", "created") for rid in rids], tolerant=True
        )
        return [
            rid
            for rid, (left, seed, created) in zip(rids, (f or (None, None, None) for f in found), strict=True)
            if left not in (None, b"0") and seed is None and int(created or 0) <= latest
        ]

    async def requeue(self, epoch: int, rid: str) -> bool:
        """Put a request back into the inbox. False: it was admitted or has ended. An entry too many does no harm."""
        return bool(await self._run("requeue", epoch, rid))

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
        payload_hash: str = "",
        reserved: int | None = None,
        origin: Origin | None = None,
        producer_id: str | None = None,
        thinking: bool = False,
        cache: str = "",
        tell: bool = True,
    ) -> tuple[str, str]:
        """(verdict, rid). verdict: "new"; "repeat" (admitted before: read the record); "cancelled" (marked before it
        was admitted: to be finished); "gone" (no such request, or it has ended). ``job`` is given for a producer's
        push, which becomes a request here (deadline from timeout_s and the time of the push); its id may name an
        earlier request: ("duplicate", that rid), or one of another body: ("conflict", that rid); the entry is then
        left to `reject`. "void": the claim of its id was freed, so it is to be claimed anew. ``payload_hash``: the
        push's own, which tells it from another one that was rejected under its id. ``reserved``: tokens of its
        reservation in the home slot. ``origin``: where a push was that has been moved. ``producer_id``: the id of an
        accepted job, repeated in the notice of admission, as is ``thinking`` (the prompt has opened a thought).
        ``cache``: "hit", where its answer is known; ``tell`` False: `join` will publish the notice."""
        args: list[Argument] = []
        if job is not None:
            pushed, unique = (origin.entry_id, origin.name) if origin is not None else (entry_id, entry_id)
            named = job.id or unique
            if job.id is None:
                job = msgspec.structs.replace(job, id=pushed)
            producer_id = job.id
            self._idempotency(job.tenant, job.id)  # both must be names
            args = [job.tenant, job.id or "", encode(job), job_fingerprint(job), job.choices]
            args += [int((job.timeout_s or 0) * 1000), job.reply_to or "", job.results or "", payload_hash]
            args += ["" if reserved is None else reserved, pushed, named]
        row = _notice(rid, prompts, thinking, cache, producer_id) if tell else b""
        verdict, owner = await self._run("admit", epoch, entry_id, rid, seed, row, cache, len(prompts), *prompts, *args)
        if verdict not in (b"cancelled", b"conflict"):
            self._handed_out.discard(entry_id)
        return verdict.decode(), owner.decode()

    async def join(self, epoch: int, record: RequestRecord, key: str) -> str:
        """Let a request that was admitted untold wait for the one that makes the answer ``key`` now ("joined"), or be
        that one ("first"). "alone": it runs by itself; "gone": it has ended. Publishes its notice of admission."""
        rid, told = record.rid, (record.prompts, record.thinking)
        notices = [_notice(rid, *told, cache, record.job.id) for cache in ("joined", "miss")]
        return str(await self._run("join", epoch, rid, key, MOST_FOLLOWERS, *notices), "ascii")

    async def divert(self, epoch: int, entry_id: str) -> None:
        """Take a push out of the inbox of this shard, which drains: `moving` has it from now on."""
        await self._run("divert", epoch, entry_id)
        self._handed_out.discard(entry_id)

    async def read_moving(self, count: int) -> list[tuple[str, str, bytes]]:
        """What was diverted and not moved yet, in its order: id, the id that it had in the inbox, payload."""
        entries = await self._link.command("XRANGE", self.keys.moving, "-", "+", "COUNT", count)
        found = [(entry_id.decode(), records.fields_of(flat)) for entry_id, flat in entries]
        return [(entry_id, fields[b"from"].decode(), fields[b"job"]) for entry_id, fields in found]

    async def moved(self, entry_id: str) -> None:
        """The first shard has it."""
        await self._link.command("XDEL", self.keys.moving, entry_id)

    async def receive(self, shard: int, entry_id: str, origin: str, payload: bytes) -> None:
        """In the first shard: take in a push that another one had."""
        await self._run("receive", shard, entry_id, origin, payload, key=self.keys.jobs)

    async def retire_shard(self) -> bool:
        """Close the inbox of this shard for good. False: there is work left."""
        return bool(await self._run("retire_shard", key=self.keys.jobs))

    async def read_answer(self, key: str) -> dict[bytes, bytes]:
        """The fields of a cached answer; {} if there is none."""
        return records.fields_of(await self._link.command("HGETALL", self.keys.answer(key)))

    async def keep_answer(self, epoch: int, key: str, fields: dict[str, bytes], stays_s: float, most: int) -> None:
        """Keep an answer for ``stays_s``; answers that expire first make room within ``most`` bytes. Without memory
        nothing is kept."""
        size = sum(map(len, fields.values())) + ANSWER_BYTES
        parts = [part for field in fields.items() for part in field]
        with contextlib.suppress(OutOfMemory):
            await self._run("keep_answer", epoch, key, int(stays_s * 1000), size, most, *parts)

    async def answers_bytes(self) -> int:
        """Bytes of all cached answers."""
        return int(await self._link.command("HGET", self.keys.prefix + "answers:sizes", "*") or 0)

    async def server(self) -> ServerState:
        """The server that holds the model's keys."""
        parts = await self._link.pipeline([("INFO", "memory"), ("INFO", "debug")])
        told = dict(line.split(":", 1) for part in parts for line in part.decode().splitlines() if ":" in line)
        log_us = int(told.get("eventloop_duration_aof_sum", 0))
        return ServerState(int(told.get("used_memory", 0)), int(told.get("maxmemory", 0)), log_us / 1e6)

    async def look_at_joined(self, rids: Sequence[str]) -> tuple[list[str], list[str]]:
        """Of requests that have joined others: those whose other is not there any more, so that nothing lands for
        them, and those that have ended."""
        found = await self._link.pipeline([("HMGET", self.keys.request(rid), "joins", "open") for rid in rids])
        owners = [self.keys.request((joined or b"").decode()) for joined, _ in found]
        makers = await self._link.pipeline([("HGET", owner, "open") for owner in owners])
        over = (None, b"0")
        ended = [rid for rid, (_, left) in zip(rids, found, strict=True) if left in over]
        unfed = [rid for rid, left in zip(rids, makers, strict=True) if left in over and rid not in ended]
        return unfed, ended

    async def reject(
        self,
        epoch: int,
        entry_id: str,
        **told: Any,
    ) -> None:
        """End a push that can be no request: see `rejection`."""
        await self._run("reject", epoch, entry_id, self._retention_ms, *rejection(entry_id, **told))
        self._handed_out.discard(entry_id)

    async def plan(self, epoch: int, wid: str, gen: int, *plans: Plan, fingerprint: str = "") -> None:
        """Fence; record the placement of each of plan.new; XADD. Fenced("epoch") or Fenced("gen"). A worker's plans are
        sent one after another, several in one round trip where they are at hand: a step that is not above the last one
        sent counts as a repeat. A sequence whose journal is not as long as its cursor says is not placed: its rows
        will come back STALE; nor is a request that has begun with another ``fingerprint`` than this worker's."""
        calls: list[list[Argument]] = []
        for plan in plans:
            call: list[Argument] = [self.keys.prefix, epoch, wid, gen, plan.step, encode(plan), fingerprint]
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
        """Fence worker session ``gen`` permanently, drop its plans, raise `attempts` of these rids."""
        await self._run("retire", epoch, wid, gen, *attempts)

    async def recount(self, epoch: int, unfinished: Sequence[tuple[str, str]]) -> int:
        """Make the sets of running requests true, given (rid, tenant) of unfinished ones. Returns what was mended."""
        changed = 0
        for start in range(0, max(1, len(unfinished)), MOST_RECOUNTED):
            part = unfinished[start : start + MOST_RECOUNTED]
            changed += int(await self._run("recount", epoch, *(name for pair in part for name in pair)))
        return changed

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
        """Delete events up to ``upto``. With ``epoch`` fenced: a deposed leader may not trim what another needs."""
        first = next_id(upto)
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


def _notice(rid: str, prompts: Sequence[bytes], thinking: bool, cache: str, producer_id: str | None) -> bytes:
    """The row that tells of the admission, as short as it can be: older gateways read the first two."""
    prompt_tokens = sum(len(p) for p in prompts) // ID_BYTES
    told: tuple[Any, ...] = (
        (prompt_tokens, thinking, cache) if cache else (prompt_tokens, True) if thinking else (prompt_tokens,)
    )
    return encode(Row(rid, -1, 0, encode(told), producer_id))
