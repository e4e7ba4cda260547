"""What the clients saw, and the judge of it: every check of the promise, against the journals.

A client's view of one choice is a list of (token id, text); its journal is the truth. A view that
followed a choice to its end must equal the journal, whatever died in between; any other must be a prefix of it.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from jsonschema import Draft202012Validator, ValidationError

from protocol.keys import HOME
from protocol.messages import Frame, Terminal, decode_frames
from protocol.records import RequestRecord
from tests.bus import Bus
from tests.chaos.calls import CallsSeen, call_faults, message_in
from tests.chaos.shards import Shards

AT_REST_TOO = (b"rate", b"led_at", b"taken_over", b"workers_lost", b"worker_lost_at")  # fields of `depth`


@dataclass
class View:
    """What one reader saw of one request."""

    reader: str
    rid: str
    choices: int
    tokens: dict[int, list[tuple[int | None, str]]] = field(default_factory=lambda: defaultdict(list))
    finish: dict[int, str] = field(default_factory=dict)
    terminals: Counter[int] = field(default_factory=Counter)
    after_end: int = 0  # pieces that came after a choice's end
    whole: bool = False  # followed to the end of every choice
    usage: dict[str, int] | None = None
    calls: CallsSeen | None = None  # instead of tokens, of a chat that must call

    def saw(self, choice: int, ids: list[int], text: str, finish: str | None) -> None:
        if choice in self.finish and (ids or text or finish):
            self.after_end += 1
        if ids or text:
            self.tokens[choice].append((ids[0] if ids else None, text))
        if finish is not None:
            self.finish[choice] = finish
            self.terminals[choice] += 1


@dataclass
class Results:
    """Terminal entries that a producer read, per (rid, choice)."""

    entries: dict[tuple[str, int], list[Terminal]] = field(default_factory=lambda: defaultdict(list))
    rids: dict[str, str] = field(default_factory=dict)  # producer's id -> rid


@dataclass
class History:
    accepted: dict[str, int] = field(default_factory=dict)  # rid -> choices
    views: list[View] = field(default_factory=list)
    answers: list[tuple[str, dict[str, Any]]] = field(default_factory=list)  # (rid, body) of those not streamed
    results: Results = field(default_factory=Results)
    wants_result: set[str] = field(default_factory=set)
    epochs: list[int] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)  # requests refused before they were accepted: no violation
    violations: list[str] = field(default_factory=list)
    judged: set[tuple[str, int]] = field(default_factory=set)  # of those, once each
    structured: Counter[str] = field(default_factory=Counter)  # choices with a grammar: their ends, and how many moved
    watched: set[str] = field(default_factory=set)  # rids of streams that are kept to a grammar, until they end
    halfway: set[tuple[str, int]] = field(default_factory=set)  # (rid, choice) that moved with tokens journaled
    messages: dict[str, Any] = field(default_factory=dict)  # rid -> what the journal of a chat with tools says
    _seen: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)  # placement, bytes of the journal

    def accept(self, rid: str, choices: int) -> None:
        if self.accepted.setdefault(rid, choices) != choices:
            self.violations.append(f"{rid}: accepted with two numbers of choices")

    def blame(self, message: str) -> None:
        self.violations.append(message)

    async def watch_moves(self, bus: Shards) -> None:
        """Note which of the watched moved since the last call and had tokens before: in the middle of their object."""
        for rid in list(self.watched):
            record = await bus.read_request(rid)
            if record is None:
                continue
            lengths = await bus.journal_lengths(rid, len(record.placements))
            for choice, (placement, length) in enumerate(zip(record.placements, lengths, strict=True)):
                before, written = self._seen.get((rid, choice), (placement, 0))
                if placement > before and written:
                    self.halfway.add((rid, choice))
                self._seen[rid, choice] = placement, length
            if not record.open:
                self.watched.discard(rid)

    async def judge(self, bus: Shards) -> None:
        """Compare everything seen with the journals. Call at rest, before the journals expire."""
        for before, after in zip(self.epochs, self.epochs[1:], strict=False):
            if after < before:
                self.blame(f"epoch fell from {before} to {after}")
        journals = {rid: await self._journals(bus, rid, n) for rid, n in self.accepted.items()}
        for view in self.views:
            self._judge_view(view, journals.get(view.rid) or await self._journals(bus, view.rid, view.choices))
        for rid, answer in self.answers:
            if not journals[rid]:
                continue  # blamed already
            for choice, frames in zip(answer["choices"], journals[rid], strict=True):
                if choice["text"] != "".join(f.text for f in frames) or choice["token_ids"] != _tokens(frames):
                    self.blame(f"{rid}/{choice['index']}: the answer differs from the journal")
        for rid in self.wants_result:
            for choice, frames in enumerate(journals[rid]):
                entries = self.results.entries[(rid, choice)]
                if len(entries) != 1:
                    self.blame(f"{rid}/{choice}: {len(entries)} results")
                elif entries[0].text != "".join(f.text for f in frames):
                    self.blame(f"{rid}/{choice}: the result differs from the journal")
                elif rid in self.messages and (entries[0].tool_calls or []) != self.messages[rid].calls:
                    self.blame(f"{rid}/{choice}: the result's calls differ from the journal's")

    async def _journals(self, bus: Shards, rid: str, choices: int) -> list[list[Frame]]:
        record = await bus.read_request(rid)
        if record is None:
            self.blame(f"{rid}: accepted, but its record is gone")
            return []
        if record.open:
            self.blame(f"{rid}: not ended ({record.open} choices open)")
        journals = []
        for choice in range(choices):
            frames = decode_frames(await bus.read_journal(rid, choice))
            ends = [i for i, frame in enumerate(frames) if frame.finish is not None]
            if ends != [len(frames) - 1]:
                self.blame(f"{rid}/{choice}: terminal frames at {ends} of {len(frames)}")
            journals.append(frames)
            if record.job.sampling.structure is not None and ends and (rid, choice) not in self.judged:
                self.judged.add((rid, choice))
                self._judge_structure(record, choice, frames)
        return journals

    def _judge_structure(self, record: RequestRecord, choice: int, frames: list[Frame]) -> None:
        """What ended by itself must parse and validate, wherever it ran in between."""
        where, structure = f"{record.rid}/{choice}", record.job.sampling.structure
        assert structure is not None
        if record.job.tools:
            self.messages[record.rid] = message_in(record, choice, frames)
        finish, text = frames[-1].finish, "".join(frame.text for frame in frames)
        self.structured[f"ended by {finish}"] += 1
        if finish == "error":
            self.blame(f"{where}: a constrained choice failed: {(frames[-1].extra or {}).get('code')}")
        if finish != "stop":
            return
        self.structured["moved"] += record.placements[choice] > 1
        self.structured["moved in mid-object"] += (record.rid, choice) in self.halfway
        if record.job.tools:
            for fault in call_faults(self.messages[record.rid], self.structured):
                self.blame(f"{where}: {fault}")
            return
        try:
            Draft202012Validator(structure.schema()).validate(json.loads(text))
        except (ValueError, ValidationError) as error:
            self.blame(f"{where}: not what its schema asks for: {str(error)[:100]}")

    def _judge_view(self, view: View, journals: list[list[Frame]]) -> None:
        where = f"{view.rid} seen by {view.reader}"
        if view.after_end:
            self.blame(f"{where}: {view.after_end} pieces after the end")
        if view.calls is not None and view.rid in self.messages:  # else it is blamed already
            for fault in view.calls.faults(self.messages[view.rid], view.whole):
                self.blame(f"{where}: {fault}")
            if view.whole and (view.terminals[0] != 1 or view.calls.ids != _tokens(journals[0])):
                self.blame(f"{where}: {view.terminals[0]} terminals, {len(view.calls.ids)} ids")
        for choice, frames in enumerate(journals if view.calls is None else ()):
            truth = [(f.token, f.text) for f in frames if f.token is not None or f.text]
            seen = view.tokens[choice]
            if seen != truth[: len(seen)]:
                first = next(i for i, (a, b) in enumerate(zip(seen, [*truth, None], strict=False)) if a != b)
                self.blame(f"{where}/{choice}: differs from the journal at {first} of {len(truth)}")
            if view.whole and len(seen) != len(truth):
                self.blame(f"{where}/{choice}: {len(seen)} pieces of {len(truth)}")
            if view.whole and view.terminals[choice] != 1:
                self.blame(f"{where}/{choice}: {view.terminals[choice]} terminals")
        if view.usage is not None:
            counted = sum(f.token is not None for frames in journals for f in frames)
            if view.usage["completion_tokens"] != counted:
                self.blame(f"{where}: usage says {view.usage['completion_tokens']}, the journals {counted}")


def _tokens(frames: list[Frame]) -> list[int]:
    return [f.token for f in frames if f.token is not None]


async def leftovers(bus: Bus, redis_client: object) -> list[str]:
    """What is not as it should be at rest: names of keys without a TTL that should have one, and the like."""
    keys, found = bus.keys, []
    allowed = {keys.jobs, keys.leader, keys.depth, keys.events, keys.dead, keys.workers, keys.tokenizer}
    allowed.add(keys.tokenizer_info)
    workers = await bus.list_workers()
    for worker in workers:
        allowed |= {keys.worker(worker.wid), keys.plans(worker.wid)}
    client = redis_client
    async for raw in client.scan_iter(match=f"{keys.prefix}*", count=1000):  # type: ignore[attr-defined]
        name = raw.decode()
        if name in allowed or name.startswith(keys.results("")):
            continue
        if await client.ttl(raw) == -1:  # type: ignore[attr-defined]
            found.append(f"no TTL: {name}")
    # a claim of an idempotency key is looked at by the sweep, until its request has ended and both expire
    async for raw in client.scan_iter(match=f"{HOME}claim:*", count=1000):  # type: ignore[attr-defined]
        slot, name = (await client.get(raw) or b"").decode().partition(" ")[0], raw.decode().removeprefix(HOME)  # type: ignore[attr-defined]
        looks = await client.zscore(f"{HOME}sweep:{slot}", name)  # type: ignore[attr-defined]
        if slot == keys.model and looks is None and await client.ttl(raw) == -1:  # type: ignore[attr-defined]
            found.append(f"never swept: {name}")
    if live := await bus.scan_live():
        found.append(f"live: {len(live)}")
    pending = await client.xpending(keys.jobs, "scheduler")  # type: ignore[attr-defined]
    if pending["pending"] or await bus.inbox_length():
        found.append(f"inbox: {pending['pending']} pending, {await bus.inbox_length()} long")
    depth = await client.hgetall(keys.depth)  # type: ignore[attr-defined]
    for name, value in depth.items():
        at_rest_too = name in AT_REST_TOO or name.startswith(b"kv_blocks:")
        if not at_rest_too and float(value) != 0:
            found.append(f"depth {name.decode()} = {value.decode()}")
    return found
