"""Where a span stands: ids as the W3C's traceparent header writes them, and the tracestate that came with them, which
is passed on as it is. As one text (`Job.trace`) it is the traceparent, then a space and the state. Needs no
OpenTelemetry.

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
MAX_TRACESTATE, MAX_MEMBERS = 512, 32
_MEMBER = re.compile(r"[a-z0-9][a-z0-9_*/@-]{0,255}=[!-+\--<>-~ ]{0,255}[!-+\--<>-~]")
SAMPLED = 1


@dataclass(frozen=True)
class Place:
    """One span: its ids in hex, and whether its trace is recorded."""

    trace_id: str
    span_id: str
    sampled: bool = True
    state: str = ""  # a tracestate

    @property
    def text(self) -> str:
        """With its state, as a job carries it."""
        return f"{self.traceparent} {self.state}" if self.state else self.traceparent

    @property
    def traceparent(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{SAMPLED if self.sampled else 0:02x}"


def joined(traceparent: str | None, tracestate: str | None) -> str | None:
    """The two headers as one text. A state that is not well-formed is left out, as the W3C says."""
    if traceparent is None or not tracestate:
        return traceparent
    state = known_state(tracestate)
    return f"{traceparent} {state}" if state else traceparent


def known_state(tracestate: str) -> str:
    """A well-formed tracestate, its members without spaces around; "" for any other."""
    members = [member.strip() for member in tracestate.split(",") if member.strip()]
    state = ",".join(members)
    well = len(members) <= MAX_MEMBERS and all(map(_MEMBER.fullmatch, members))
    return state if well and len(state) <= MAX_TRACESTATE else ""


def parse(traced: str | None) -> Place | None:
    """The place that a header or a job names; None if it names none (the W3C says: then begin a trace)."""
    text, _, state = (traced or "").partition(" ")
    found = _TRACEPARENT.fullmatch(text)
    if found is None or (text.startswith("00") and len(text) != MAX_TRACEPARENT):
        return None
    trace_id, span_id, flags = found.groups()
    if not int(trace_id, 16) or not int(span_id, 16):
        return None
    return Place(trace_id, span_id, bool(int(flags, 16) & SAMPLED), known_state(state) if state else "")


def new_span_id() -> str:
    return secrets.token_hex(8)


def request_place(rid: str, traceparent: str | None, sampled: bool = True) -> Place:
    """The span of request ``rid``, within the trace of ``traceparent`` if that names one, else in one of its own."""
    parent = parse(traceparent)
    ids = rid if _IDS.fullmatch(rid) else hashlib.sha256(rid.encode()).hexdigest()  # other clients may have other rids
    if parent is None:
        return Place(ids[:32], ids[16:32], sampled)
    return Place(parent.trace_id, ids[16:32], parent.sampled, parent.state)


def commit_place(wid: str, gen: int, step: int) -> Place:
    """The span of a worker's commit, in a trace of its own: it serves many requests."""
    ids = hashlib.sha256(f"{wid} {gen} {step}".encode()).hexdigest()
    return Place(ids[:32], ids[32:48])


def trace_id_of(rid: str, traceparent: str | None) -> str:
    """The id under which a request is found in traces; also where none are made, for logs."""
    return request_place(rid, traceparent).trace_id
