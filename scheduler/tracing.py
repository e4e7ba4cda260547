"""A request's spans: its own, with what gen_ai conventions say of a model's answer, and the parts of its life.

All are made when a request is admitted or ends, never in a step. A leader that takes a request over makes what it sees
itself: the request's span from its beginning, and parts from the takeover on; ids are a function of the request
(protocol/telemetry/context.py), so all of it is one trace.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from protocol.bus import LeaderBus
from protocol.messages import Hint, Job, Plan, decode_frames
from protocol.records import RequestRecord
from protocol.telemetry.context import Place, commit_place, parse, request_place
from protocol.telemetry.traces import Traces, Value, nanoseconds
from scheduler.core.events import RequestDone
from scheduler.recovery import UNREADABLE

log = logging.getLogger("headrace.scheduler")

MAX_CONTENT = 128 << 10  # characters of prompts in one span, and of answers; of longer chats the last messages are kept
UNKNOWN_ERROR = "_OTHER"  # as the conventions call it
Moment = tuple[str, int, Mapping[str, Value]]


@dataclass(slots=True)
class _Followed:
    place: Place
    parent: Place | None
    name: str
    attributes: dict[str, Value | None]
    created_ns: int
    since_ns: int  # when this leader took it up
    moments: list[Moment] = field(default_factory=list)
    placed: bool = False
    error: str | None = None
    commits: list[Place] = field(default_factory=list)  # the batches that it began with, at each worker


class RequestTraces:
    """The spans of one term's requests. ``traces`` None: nothing is done, nothing is kept."""

    def __init__(self, traces: Traces | None, bus: LeaderBus, model: str, epoch: int, content: bool) -> None:
        self._traces = traces
        self._bus = bus
        self._model = model
        self._epoch = epoch
        self.content = content and traces is not None
        self._followed: dict[str, _Followed] = {}
        self._awaited: dict[str, deque[tuple[int, int, str]]] = {}  # worker -> gen, step and rid of what was placed
        self._told: dict[str, tuple[int, int]] = {}  # worker -> gen and step of the last commit with a span

    # -------------------------------------------------------------- beginnings

    @property
    def on(self) -> bool:
        return self._traces is not None

    def follow(self, record: RequestRecord) -> None:
        """A request was admitted, or taken over."""
        if self._traces is not None and record.rid not in self._followed:
            self._keep(record.rid, self._begin(record.rid, record.job, record.tenant, record.created_ms))

    def admitted(self, rid: str, job: Job, tenant: str, created_ms: int, began: float, prepared: float) -> None:
        """It lay in the inbox until ``began``, and its prompt was made until ``prepared`` (monotonic seconds)."""
        if self._traces is None:
            return
        followed = self._begin(rid, job, tenant, created_ms)
        self._keep(rid, followed)
        self._before_admission(followed, began, prepared)

    def refused(
        self, rid: str, job: Job, tenant: str, created_ms: int, began: float, reason: str, code: str | None
    ) -> None:
        """It ended before it was admitted: cancelled, late, or with error ``code``."""
        if self._traces is None:
            return
        followed = self._begin(rid, job, tenant, created_ms)
        self._before_admission(followed, began, time.monotonic())
        followed.error = code
        self._end(followed, time.time_ns(), {"gen_ai.response.finish_reasons": [reason]})

    def _begin(self, rid: str, job: Job, tenant: str, created_ms: int) -> _Followed:
        traces = self._traces
        assert traces is not None
        operation = "chat" if job.messages is not None else "text_completion"
        name = f"{operation} {self._model}"
        place = request_place(rid, job.trace)
        if not traces.sampled(place.trace_id, job.trace, name):
            place = Place(place.trace_id, place.span_id, False)
        attributes = {
            "gen_ai.operation.name": operation,
            "gen_ai.response.id": rid,
            "headrace.tenant": tenant,
            "headrace.priority": job.priority,
            **_asked(job, self._model),
        }
        now = time.time_ns()
        return _Followed(place, parse(job.trace), name, attributes, min(created_ms * 1_000_000, now), now)

    def _keep(self, rid: str, followed: _Followed) -> None:
        if followed.place.sampled:
            self._followed[rid] = followed

    def _before_admission(self, followed: _Followed, began: float, prepared: float) -> None:
        assert self._traces is not None
        began_ns, prepared_ns = nanoseconds(began), nanoseconds(prepared)
        self._traces.part(followed.place, "wait", min(followed.created_ns, began_ns), began_ns)
        self._traces.part(followed.place, "tokenize", began_ns, prepared_ns)

    # -------------------------------------------------------------- what happens to it

    def placed(self, wid: str, plan: Plan) -> None:
        """New sequences of a plan: all but a request's first are moves, or come back after a preemption."""
        for sequence in plan.new:
            followed = self._followed.get(sequence.rid)
            if followed is None:
                continue
            told: dict[str, Value] = {"headrace.worker": wid, "headrace.choice": sequence.choice}
            followed.moments.append(("moved" if followed.placed else "placed", time.time_ns(), told))
            followed.placed = followed.placed or sequence.choice == 0
            self._awaited.setdefault(wid, deque()).append((plan.gen, plan.step, sequence.rid))

    def committed(self, hint: Hint) -> None:
        """A worker's commit. One that a followed request begins with has a span, to which the request's own link."""
        awaited, begun = self._awaited.get(hint.wid), []
        while awaited and awaited[0][:2] <= (hint.gen, hint.step):
            gen, _, rid = awaited.popleft()
            if gen == hint.gen and rid in self._followed:
                begun.append(self._followed[rid])
        if begun:
            place = self._commit(hint)
            for followed in begun:
                followed.commits.append(place)

    def _commit(self, hint: Hint) -> Place:
        """The span of a commit, made once."""
        place = commit_place(hint.wid, hint.gen, hint.step)
        if self._traces is not None and self._told.get(hint.wid) != (hint.gen, hint.step):
            self._told[hint.wid] = hint.gen, hint.step
            now = time.time_ns()
            told: dict[str, Value | None] = {
                "headrace.worker": hint.wid, "headrace.gen": hint.gen, "headrace.step": hint.step,
                "headrace.rows": len(hint.rows),
            }  # fmt: skip
            self._traces.add(place, None, "commit", now - hint.exec_us * 1000, now, told)
        return place

    def failed(self, rid: str, code: str | None) -> None:
        """A choice is to end with an error of this code."""
        followed = self._followed.get(rid)
        if followed is not None:
            followed.error = followed.error or code

    # -------------------------------------------------------------- ends

    async def done(self, done: RequestDone, hint: Hint | None = None) -> None:
        """``hint``: the commit that it ended with, if one did."""
        followed = self._followed.pop(done.rid, None)
        if followed is None or self._traces is None:
            return
        ended = [self._commit(hint)] if hint is not None and followed.moments else []
        end_ns = time.time_ns()
        first_token_ns = end_ns - int(done.decode_s * 1e9)
        planned_ns = first_token_ns - int(done.prefill_s * 1e9)
        loaded: dict[str, Value | None] = {"headrace.load_s": round(done.load_s, 4)} if done.load_s else {}
        self._traces.part(followed.place, "queue", min(followed.since_ns, planned_ns), planned_ns, loaded)
        if followed.moments:  # else it has never been on a worker
            early = [moment for moment in followed.moments if moment[1] < first_token_ns or not done.output_tokens]
            late = followed.moments[len(early) :]
            self._traces.part(followed.place, "prefill", planned_ns, first_token_ns, events=early)
            if done.output_tokens:
                begun: list[Moment] = [("first token", first_token_ns, {})]
                told: dict[str, Value | None] = {
                    "gen_ai.usage.output_tokens": done.output_tokens,
                    "headrace.preemptions": done.preemptions,
                }
                links = list(dict.fromkeys([*followed.commits, *ended]))
                self._traces.part(followed.place, "decode", first_token_ns, end_ns, told,
                                  events=begun + late, links=links)  # fmt: skip
        if "error" in done.finish_reasons:
            followed.error = followed.error or UNKNOWN_ERROR
        told_of_answer: dict[str, Value | None] = {
            "gen_ai.usage.input_tokens": done.prompt_tokens,
            "gen_ai.usage.output_tokens": done.output_tokens,
            "gen_ai.usage.cache_read.input_tokens": done.cached_tokens,
            "gen_ai.response.finish_reasons": done.finish_reasons,
            "headrace.epoch": self._epoch,
        }
        if self.content and followed.place.sampled:
            told_of_answer.update(await self._content(done.rid))
        self._end(followed, end_ns, told_of_answer)

    async def answered(self, rid: str) -> None:
        """It has ended without a place in any step: the cache knew the answer, or another request made it."""
        followed = self._followed.pop(rid, None)
        if followed is None:
            return
        try:
            record = await self._bus.read_request(rid)
        except UNREADABLE:
            record = None
        told: dict[str, Value | None] = {"headrace.epoch": self._epoch}
        end_ns = time.time_ns()
        if record is not None:
            told["headrace.cache"] = record.cache
            told["gen_ai.response.finish_reasons"] = [end or "" for end in record.ends]
            if record.ended_ms:
                end_ns = min(end_ns, max(followed.created_ns, record.ended_ms * 1_000_000))
        if self.content:
            told.update(await self._content(rid))
        self._end(followed, end_ns, told)

    def _end(self, followed: _Followed, end_ns: int, attributes: Mapping[str, Value | None]) -> None:
        assert self._traces is not None
        told = {**followed.attributes, **attributes}
        kind = "internal" if followed.parent is not None else "consumer"
        self._traces.add(
            followed.place, followed.parent, followed.name, followed.created_ns, end_ns, told,
            kind=kind, error=followed.error,
        )  # fmt: skip

    async def _content(self, rid: str) -> dict[str, Value]:
        """Prompt and answer as attributes: by the conventions (messages of parts), and by number, which LangSmith
        reads. The answer is the text as the model wrote it, calls and thoughts included."""
        try:
            record = await self._bus.read_request(rid)
            if record is None:
                return {}
            journals = await self._bus.read_journals([(rid, choice) for choice in range(len(record.ends))])
            texts = ["".join(frame.text for frame in decode_frames(raw or b"")) for raw in journals]
        except UNREADABLE:
            return {}
        answers = [("assistant", text[:MAX_CONTENT]) for text in texts]
        ends = [end or "" for end in record.ends]
        return {**_said("prompt", "input", _kept(_prompts(record.job))), **_said("completion", "output", answers, ends)}


def _asked(job: Job, model: str) -> dict[str, Value | None]:
    """What the request asks for. Two more names for its kind are there for LangSmith and for OpenInference's readers,
    Weave among them."""
    params = job.sampling
    return {
        "gen_ai.provider.name": "headrace",
        "gen_ai.system": "headrace",
        "langsmith.span.kind": "llm",
        "openinference.span.kind": "LLM",
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.top_k": params.top_k or None,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.seed": params.seed,
        "gen_ai.request.frequency_penalty": params.frequency_penalty or None,
        "gen_ai.request.presence_penalty": params.presence_penalty or None,
        "gen_ai.request.choice.count": job.choices if job.choices > 1 else None,
    }


def _prompts(job: Job) -> list[tuple[str, str]]:
    """(role, text) of what was sent. Token ids are told as their number."""
    if job.messages is not None:
        return [(str(m.get("role")), _text_of(m)) for m in job.messages]
    return [("user", p if isinstance(p, str) else f"[{len(p)} token ids]") for p in job.prompts()]


def _text_of(message: dict[str, Any]) -> str:
    content = message.get("content")
    if not isinstance(content, str):
        content = "" if content is None else _json(content)
    calls = message.get("tool_calls")
    return content + (_json(calls) if calls else "")


def _kept(said: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The last messages that fit, the longest text cut."""
    kept: list[tuple[str, str]] = []
    room = MAX_CONTENT
    for role, text in reversed(said):
        if room <= 0:
            break
        kept.append((role, text[:room]))
        room -= len(text)
    return kept[::-1]


def _said(old: str, new: str, said: list[tuple[str, str]], ends: list[str] | None = None) -> dict[str, Value]:
    messages: list[dict[str, Any]] = [{"role": r, "parts": [{"type": "text", "content": t}]} for r, t in said]
    for message, end in zip(messages, ends or [], strict=False):
        message["finish_reason"] = end
    told: dict[str, Value] = {f"gen_ai.{new}.messages": _json(messages)}
    for number, (role, text) in enumerate(said):
        told[f"gen_ai.{old}.{number}.role"] = role
        told[f"gen_ai.{old}.{number}.content"] = text
    return told


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
