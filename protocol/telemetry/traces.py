"""Spans to OpenTelemetry's SDK, where the extra `otel` is installed and the standard environment variables ask for it.

A span is made whole when its end is known, from times and ids that were plain numbers until then: there is no span
object on a token's way, and a leader that takes a request over can end what another began (context.py gives it the
same ids). So the SDK's own start and end are not used; its sampler, resource, batching and exporters are.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from protocol.levels import release
from protocol.telemetry.context import Place, new_span_id, parse

log = logging.getLogger("headrace")

Value = str | bool | int | float | Sequence[str]
ASKS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
CLOSE_S = 3.0  # how long an end waits for spans to be sent
MISSING = "traces are asked for by {}, but OpenTelemetry is not installed: pip install 'headrace[otel]'"


def wanted(environ: Mapping[str, str] = os.environ) -> str | None:
    """The environment variable that asks for traces; None: nothing does."""
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    exporter = environ.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    if exporter == "none":
        return None
    if exporter:
        return "OTEL_TRACES_EXPORTER"
    return next((name for name in ASKS if environ.get(name)), None)


def traces(role: str, environ: Mapping[str, str] = os.environ) -> Traces | None:
    """The traces of this process; None if none are asked for, or the extra is missing (the log says so)."""
    asked = wanted(environ)
    if asked is None:
        return None
    try:
        return Traces(role, environ)
    except ImportError:
        log.warning(MISSING.format(asked))
        return None


def nanoseconds(monotonic: float) -> int:
    """Wall clock of a moment of this process's monotonic clock."""
    return time.time_ns() - int((time.monotonic() - monotonic) * 1e9)


class Traces:
    """Makes spans and hands them to the SDK's batching exporter. ImportError without the extra.

    Not for use from several threads at once. A span costs some microseconds here; encoding and sending are done by the
    SDK's thread, which drops spans rather than memory when nobody takes them.
    """

    def __init__(self, role: str, environ: Mapping[str, str] = os.environ) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope
        from opentelemetry.trace import SpanContext, SpanKind, TraceFlags, TraceState
        from opentelemetry.trace.status import Status, StatusCode

        named = {"service.name": f"headrace-{role}"} if not environ.get("OTEL_SERVICE_NAME") else {}
        if "service.name=" in environ.get("OTEL_RESOURCE_ATTRIBUTES", ""):
            named = {}
        resource = Resource.create({**named, "service.version": release(), "headrace.role": role})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._processor = BatchSpanProcessor(_exporter(environ))
        self._provider.add_span_processor(self._processor)
        self._scope = InstrumentationScope("headrace", release())
        self._span, self._context, self._flags = ReadableSpan, SpanContext, TraceFlags
        self._kinds = {kind.name.lower(): kind for kind in SpanKind}
        self._status, self._codes = Status, StatusCode
        self._state = TraceState

    def sampled(self, trace_id: str, parent: str | None, name: str) -> bool:
        """Whether the span that begins here is recorded: by the client's decision where it sent one, else as
        OTEL_TRACES_SAMPLER says. The same for every process that asks, since samplers decide by the trace's id."""
        from opentelemetry.sdk.trace.sampling import Decision
        from opentelemetry.trace import NonRecordingSpan, set_span_in_context

        place = parse(parent)
        context = set_span_in_context(NonRecordingSpan(self._context_of(place, remote=True))) if place else None
        decided = self._provider.sampler.should_sample(context, int(trace_id, 16), name)
        return decided.decision is Decision.RECORD_AND_SAMPLE

    def add(
        self,
        place: Place,
        parent: Place | None,
        name: str,
        begin_ns: int,
        end_ns: int,
        attributes: Mapping[str, Value | None],
        *,
        kind: str = "internal",
        events: Sequence[tuple[str, int, Mapping[str, Value]]] = (),
        links: Sequence[Place] = (),
        error: str | None = None,
    ) -> None:
        """One span that has ended. Attributes that are None are left out. ``events``: name, time, attributes."""
        if not place.sampled:
            return
        from opentelemetry.sdk.trace import Event
        from opentelemetry.trace import Link

        given: dict[str, Any] = {key: value for key, value in attributes.items() if value is not None}
        if error is not None:
            given["error.type"] = error
        span = self._span(
            name,
            context=self._context_of(place),
            parent=self._context_of(parent, remote=True) if parent is not None else None,
            resource=self._provider.resource,
            attributes=given,
            events=[Event(title, dict(told), at) for title, at, told in events],
            links=[Link(self._context_of(one, remote=True)) for one in links],
            kind=self._kinds[kind],
            instrumentation_scope=self._scope,
            status=self._status(self._codes.ERROR) if error is not None else self._status(self._codes.UNSET),
            start_time=begin_ns,
            end_time=max(begin_ns, end_ns),
        )
        self._processor.on_end(span)

    def part(
        self, whole: Place, name: str, begin_ns: int, end_ns: int, attributes: Mapping[str, Value | None] | None = None,
        *, events: Sequence[tuple[str, int, Mapping[str, Value]]] = (), links: Sequence[Place] = (),
        error: str | None = None,
    ) -> None:  # fmt: skip
        """A span within ``whole``."""
        place = Place(whole.trace_id, new_span_id(), whole.sampled, whole.state)
        self.add(place, whole, name, begin_ns, end_ns, attributes or {}, events=events, links=links, error=error)

    def _context_of(self, place: Place, *, remote: bool = False) -> Any:
        flags = self._flags(self._flags.SAMPLED if place.sampled else self._flags.DEFAULT)
        state = self._state.from_header([place.state]) if place.state else None
        return self._context(int(place.trace_id, 16), int(place.span_id, 16), remote, flags, state)

    async def close(self) -> None:
        """Send what is left, for CLOSE_S at most: a collector that is away must not keep a process from its end."""
        done = asyncio.Event()
        loop = asyncio.get_running_loop()

        def flush() -> None:
            try:
                self._processor.force_flush(int(CLOSE_S * 1000))
            finally:
                loop.call_soon_threadsafe(done.set)

        threading.Thread(target=flush, name="traces", daemon=True).start()
        try:
            async with asyncio.timeout(CLOSE_S):
                await done.wait()
        except TimeoutError:
            log.warning("spans are left that could not be sent within %.0f s", CLOSE_S)


def _exporter(environ: Mapping[str, str]) -> Any:
    """By OTEL_TRACES_EXPORTER (otlp, console) and OTEL_EXPORTER_OTLP_[TRACES_]PROTOCOL (http/protobuf, grpc)."""
    if environ.get("OTEL_TRACES_EXPORTER", "otlp").strip().lower() == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        return ConsoleSpanExporter()
    general = environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    protocol = environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", general).strip().lower()
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as Grpc

        return Grpc()
    if protocol != "http/protobuf":
        log.warning("OTEL_EXPORTER_OTLP_PROTOCOL may be http/protobuf or grpc, not %s: http/protobuf is used", protocol)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as Http

    return Http()
