"""Where a span stands: ids as the W3C's traceparent header writes them. Needs no OpenTelemetry.

A request has one span of its own, whoever makes it. Its ids come from the request's id, so every leader that follows,
and every gateway that resumes, names the same one: nothing about traces has to be handed over but what the client sent.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass

_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")
_IDS = re.compile(r"[0-9a-f]{32}")
MAX_TRACEPARENT = 55  # characters, of the version that we write
SAMPLED = 1


@dataclass(frozen=True)
class Place:
    """One span: its ids in hex, and whether its trace is recorded."""

    trace_id: str
    span_id: str
    sampled: bool = True

    @property
    def traceparent(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{SAMPLED if self.sampled else 0:02x}"


def parse(traceparent: str | None) -> Place | None:
    """The place that a header or a job names; None if it names none (the W3C says: then begin a trace)."""
    text = traceparent or ""
    found = _TRACEPARENT.fullmatch(text)
    if found is None or (text.startswith("00") and len(text) != MAX_TRACEPARENT):
        return None
    trace_id, span_id, flags = found.groups()
    if not int(trace_id, 16) or not int(span_id, 16):
        return None
    return Place(trace_id, span_id, bool(int(flags, 16) & SAMPLED))


def new_span_id() -> str:
    return secrets.token_hex(8)


def request_place(rid: str, traceparent: str | None, sampled: bool = True) -> Place:
    """The span of request ``rid``, within the trace of ``traceparent`` if that names one, else in one of its own."""
    parent = parse(traceparent)
    ids = rid if _IDS.fullmatch(rid) else hashlib.sha256(rid.encode()).hexdigest()  # other clients may have other rids
    if parent is None:
        return Place(ids[:32], ids[16:32], sampled)
    return Place(parent.trace_id, ids[16:32], parent.sampled)


def trace_id_of(rid: str, traceparent: str | None) -> str:
    """The id under which a request is found in traces; also where none are made, for logs."""
    return request_place(rid, traceparent).trace_id
