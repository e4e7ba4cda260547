"""One span for each answer: from the request's arrival to its last byte, with the part that accept took.

What the model does is told by the scheduler, as a span within this one (scheduler/tracing.py): the job carries this
span's traceparent. An answer that resumes a request, on whichever gateway, stands in the request's own trace.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from protocol.messages import Job
from protocol.telemetry.context import Place, new_span_id, parse, request_place
from protocol.telemetry.traces import Traces, Value, nanoseconds


@dataclass
class AnswerTrace:
    """``caller``: traceparent and tracestate of the HTTP request; ``place``: of the answer's span, if one is made."""

    traces: Traces | None
    route: str
    caller: str | None
    place: Place | None = None
    parent: Place | None = None
    arrived: float = 0.0  # monotonic seconds

    @property
    def id(self) -> str | None:
        """Of the trace, if this answer is recorded in one."""
        return self.place.trace_id if self.place is not None and self.place.sampled else None

    def begin(self, job: Job, rid: str, arrived: float) -> None:
        """A new request, to be accepted as ``rid``: its job learns where it stands. Without a trace of the caller's the
        request's id is the trace's."""
        self.arrived = arrived
        self.parent = parse(self.caller)
        if self.traces is None:
            job.trace = self.parent.text if self.parent is not None else None
            return
        trace_id = self.parent.trace_id if self.parent is not None else rid
        sampled = self.traces.sampled(trace_id, self.caller, self.route)
        self.place = Place(trace_id, new_span_id(), sampled, self.parent.state if self.parent is not None else "")
        job.trace = self.place.text

    def resume(self, job: Job, rid: str, arrived: float) -> None:
        """Another answer of a request that was accepted before."""
        if self.traces is not None:
            self.arrived = arrived
            self.parent = parse(job.trace) or request_place(rid, None)
            sampled = self.parent.sampled and (job.trace is not None or self.traces.sampled(rid, None, self.route))
            self.place = Place(self.parent.trace_id, new_span_id(), sampled, self.parent.state)

    def accepted(self, began: float) -> None:
        if self.traces is not None and self.place is not None:
            self.traces.part(self.place, "accept", nanoseconds(began), time.time_ns())

    def end(self, job: Job, rid: str, status: int, tenant: str, first_token_s: float | None) -> None:
        if self.traces is None or self.place is None:
            return
        begin_ns = nanoseconds(self.arrived)
        method, _, path = self.route.partition(" ")
        told: dict[str, Value | None] = {
            "http.request.method": method,
            "http.route": path,
            "http.response.status_code": status or None,
            "headrace.request": rid or None,
            "headrace.tenant": tenant,
        }
        events: list[tuple[str, int, dict[str, Value]]] = []
        if first_token_s is not None:
            events.append(("first token", begin_ns + int(first_token_s * 1e9), {}))
        links = [place for place in (self._joined(job, rid), self._resumed_by()) if place is not None]
        self.traces.add(
            self.place, self.parent, self.route, begin_ns, time.time_ns(), told,
            kind="server", events=events, links=links, error=str(status) if status >= 500 else None,
        )  # fmt: skip

    def _joined(self, job: Job, rid: str) -> Place | None:
        """The span of a request in another trace: an idempotency key named it."""
        assert self.place is not None
        place = request_place(rid, job.trace) if rid else None
        return place if place is not None and place.trace_id != self.place.trace_id else None

    def _resumed_by(self) -> Place | None:
        """The caller's span, where it is in another trace: that of a reader who resumes."""
        caller = parse(self.caller)
        assert self.place is not None
        return caller if caller is not None and caller.trace_id != self.place.trace_id else None
