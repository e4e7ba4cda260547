"""The cache of answers: requests that must get the same answer get it once.

A hit is written into the new request's own journals, which ends it; one that arrives while another makes the same
answer joins that one (protocol/lua/join.lua), whose rows then land for both. So readers, results and takeovers see
nothing but requests with journals. What is kept: answers that ended as the model wanted, of requests that are
deterministic, under a key of all that shapes an answer.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from protocol.bus import LeaderBus
from protocol.formats.rules import sampling_of
from protocol.messages import ID_BYTES, LANDED, CommitRow, Frame, Job, Terminal, decode_frames, encode, unpack_ids
from protocol.records import RequestRecord
from scheduler.metrics import Metrics
from scheduler.recovery import UNREADABLE, read_message, terminal_row

log = logging.getLogger("headrace.scheduler")

KEPT_ENDS = ("stop", "length")
WITHOUT_MAXMEMORY = 256 << 20  # bytes of all answers, where the server has no limit to take a share of
SHARE = 0.1
LARGEST_SHARE = 0.125  # of all answers' bytes, that one may have
TIGHT = 0.95  # of maxmemory in use: cached answers go
SHED_AT_ONCE = 256
END_TRIES = 20
SAMPLES, SAMPLE_BYTES = 64, 4096


@dataclass(frozen=True)
class AnswerSettings:
    on: bool = False
    ttl_s: float = 3600.0
    memory: int | None = None  # bytes; None: a share of maxmemory
    shared: bool = False  # by all tenants


@dataclass(frozen=True)
class Answer:
    """The journals of an answer, and how each of its choices ended."""

    journals: list[bytes]
    ends: list[str]


class Answers:
    """The cache of one term."""

    def __init__(
        self,
        bus: LeaderBus,
        epoch: int,
        metrics: Metrics,
        settings: AnswerSettings,
        fingerprint: str,
        weights: Callable[[], str],
        context: Callable[[], int],
    ) -> None:
        """``fingerprint``: of the model's files. ``weights``: what all workers run now, "" where they differ.
        ``context``: most tokens of a sequence now."""
        self._bus = bus
        self._epoch = epoch
        self._metrics = metrics
        self._settings = settings
        self._fingerprint = fingerprint
        self._weights = weights
        self._context = context
        self._most = settings.memory or WITHOUT_MAXMEMORY
        self._making: dict[str, str] = {}  # rid -> the key of the answer that it makes
        self.joined: dict[str, int] = {}  # rid -> deadline in server ms, 0: none

    def key(self, job: Job, tenant: str, prompts: Sequence[bytes], weights: str | None = None) -> str | None:
        """The key of the answer to ``job`` by these weights (None: those of now); None if it is not to be cached."""
        sampling = job.sampling
        weights = self._weights() if weights is None else weights
        if not self._settings.on or job.cache == "off" or not weights:
            return None
        if not sampling.greedy and (sampling.seed is None or job.cache is None):
            return None
        shaped = sampling_of(job, unpack_ids(prompts[0]))
        if sampling.greedy:
            shaped = msgspec.structs.replace(shaped, seed=None)
        if not sampling.stop:  # then it tells only how a result is read
            shaped = msgspec.structs.replace(shaped, content=None)
        whose = "" if self._settings.shared else tenant
        length = (self._context(), job.default_max_tokens) if sampling.max_tokens is None else None
        told = encode((self._fingerprint, weights, whose, job.cache_salt, shaped, length, list(prompts)))
        return hashlib.sha256(told).hexdigest()

    async def find(self, job: Job, key: str | None) -> Answer | None:
        """The cached answer, if there is one and the request wants one."""
        if key is None or job.cache == "refresh":
            return None
        try:
            fields = await self._bus.read_answer(key)
            choices = range(job.choices)
            return Answer([fields[b"f%d" % i] for i in choices], [fields[b"e%d" % i].decode() for i in choices])
        except (KeyError, *UNREADABLE):
            return None

    async def settle(self, record: RequestRecord, key: str, answer: Answer | None) -> bool:
        """A request was admitted, untold unless ``answer`` is there. True: the core need not know it, since the answer
        ends it, or another request makes it."""
        if answer is not None:
            landed = await self._end(record, answer)
            self._metrics.answered("hit" if landed else "miss")
            return landed
        if record.job.cache == "refresh":
            self._making[record.rid] = key
            return False
        verdict = await self._bus.join(self._epoch, record, key)
        if verdict == "first":
            self._making[record.rid] = key
        if verdict == "joined":
            self.joined[record.rid] = record.deadline_ms
        self._metrics.answered("joined" if verdict == "joined" else "miss")
        return verdict in ("joined", "gone")

    def recovered(self, record: RequestRecord) -> bool:
        """A request is taken over. True: it has joined another one, and the core need not know it."""
        if record.joins is not None:
            self.joined[record.rid] = record.deadline_ms
            return True
        if record.flight is not None and self._settings.on:
            self._making[record.rid] = record.flight
        return False

    async def _end(self, record: RequestRecord, answer: Answer) -> bool:
        """Write a whole answer into the journals of a new request."""
        rows = [
            CommitRow(
                record.rid, i, record.placements[i], 0, raw, answer.ends[i], id=record.job.id,
                result=_result(record, i, raw, answer.ends[i]),
            )
            for i, raw in enumerate(answer.journals)
        ]  # fmt: skip
        verdicts = await self._bus.finish(self._epoch, rows)
        return set(verdicts) == {LANDED}

    # -------------------------------------------------------------- ends

    def makes(self, rid: str) -> bool:
        return rid in self._making

    async def keep(self, rid: str, ends: list[str]) -> None:
        """Request ``rid`` has ended: what it has made is kept, if it ended well."""
        key = self._making.pop(rid, None)
        if key is None or not set(ends) <= set(KEPT_ENDS):
            return
        try:
            record = await self._bus.read_request(rid)
            if record is None or key != self.key(record.job, record.tenant, record.prompts, record.fingerprint or ""):
                return  # it was made by other weights than were expected when it came
            journals = await self._bus.read_journals([(rid, choice) for choice in range(len(ends))])
            fields: dict[str, bytes] = {}
            for choice, raw in enumerate(journals):
                fields[f"f{choice}"] = _as_cached(raw or b"", len(record.prompts[choice // record.job.sampling.n]))
                fields[f"e{choice}"] = (record.ends[choice] or "").encode()
        except UNREADABLE:
            return
        if sum(map(len, fields.values())) <= self._most * LARGEST_SHARE:
            await self._bus.keep_answer(self._epoch, key, fields, self._settings.ttl_s, self._most)

    async def end_joined(self, rid: str, reason: str) -> bool:
        """End a request that waits for another's answer. False: it does not, or not any more."""
        for _ in range(END_TRIES):
            record = await self._bus.read_request(rid)
            if record is None or not record.open:
                self.joined.pop(rid, None)
                return True
            if record.joins is None:
                self.joined.pop(rid, None)
                return False
            left = [i for i, end in enumerate(record.ends) if end is None]
            journals = await self._bus.read_journals([(rid, i) for i in left])
            rows = [terminal_row(record, i, raw or b"", reason) for i, raw in zip(left, journals, strict=True)]
            if set(await self._bus.finish(self._epoch, rows)) == {LANDED}:
                self.joined.pop(rid, None)
                return True
        return True  # its journal grows at every try: the next look finds it

    # -------------------------------------------------------------- once a second

    async def look(self, now_ms: int) -> tuple[list[str], list[str]]:
        """End joined requests that are late; returns those that are to be taken up since nobody feeds them any more,
        and those that have ended. Keeps the answers' share of memory."""
        for rid in [rid for rid, deadline_ms in self.joined.items() if 0 < deadline_ms <= now_ms]:
            await self.end_joined(rid, "deadline")
        unfed, ended = await self._bus.look_at_joined(list(self.joined)) if self.joined else ([], [])
        for rid in unfed + ended:
            self.joined.pop(rid, None)
        if self._settings.on:
            await self._watch_memory()
        return unfed, ended

    async def _watch_memory(self) -> None:
        server = await self._bus.server()
        most = server.most_memory
        self._metrics.answer_bytes.set(await self._bus.answers_bytes())
        self._most = self._settings.memory or (int(most * SHARE) if most else WITHOUT_MAXMEMORY)
        if most and server.memory > most * TIGHT:
            await self._bus.shed(SHED_AT_ONCE)


def _as_cached(raw: bytes, prompt_bytes: int) -> bytes:
    """A journal whose first frame says that all of the prompt was cached."""
    frames = decode_frames(raw)
    if not frames:
        return raw
    first = frames[0]
    frames[0] = msgspec.structs.replace(first, extra={**(first.extra or {}), "cached": prompt_bytes // ID_BYTES})
    return b"".join(map(encode, frames))


def _result(record: RequestRecord, choice: int, raw: bytes, end: str) -> bytes | None:
    if record.job.results is None:
        return None
    frames: list[Frame] = decode_frames(raw)
    prompt_tokens = len(record.prompts[choice // record.job.sampling.n]) // ID_BYTES
    message = read_message(record, choice, frames)
    return encode(
        Terminal(
            rid=record.rid, id=record.job.id, choice=choice, finish_reason=message.finish(end) or end,
            text="".join(frame.text for frame in frames), prompt_tokens=prompt_tokens,
            completion_tokens=sum(frame.token is not None for frame in frames), cached_tokens=prompt_tokens,
            **message.fields,
        )
    )  # fmt: skip


def model_fingerprint(model: str) -> str:
    """What tells this model's files from another's under the same name: names, sizes and samples of their bytes."""
    folder = Path(model)
    digest = hashlib.sha256(b"" if folder.is_dir() else model.encode())
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.is_file():
            size = path.stat().st_size
            digest.update(f"\0{path.name}\0{size}\0".encode())
            with path.open("rb") as file:
                for sample in range(SAMPLES):
                    file.seek(size * sample // SAMPLES)
                    digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


async def fingerprint(model: str) -> str:
    return await asyncio.to_thread(model_fingerprint, model)
