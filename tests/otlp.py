"""A real receiver of OTLP, over HTTP and gRPC, as collectors speak it: keeps the spans that arrive."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Callable
from concurrent import futures
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as service
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as service_grpc

PATIENCE_S = 60.0


@dataclass(frozen=True)
class Span:
    """One span as it was received. Ids in hex, times in nanoseconds."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    kind: str
    begin: int
    end: int
    attributes: dict[str, Any]
    events: list[tuple[str, int, dict[str, Any]]]
    links: list[tuple[str, str]]
    state: str
    error: bool
    resource: dict[str, Any]


class Receiver(service_grpc.TraceServiceServicer):
    """Use as a context manager. ``http`` and ``grpc`` are endpoints; ``bodies`` the bytes that came."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.bodies: list[bytes] = []
        self.calls: list[tuple[str, dict[str, str]]] = []  # path and headers of those over HTTP
        self._lock = threading.Lock()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                receiver.calls.append((self.path, dict(self.headers)))
                receiver.take(service.ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._grpc = grpc.server(futures.ThreadPoolExecutor(2))
        service_grpc.add_TraceServiceServicer_to_server(self, self._grpc)
        self.http = f"http://127.0.0.1:{self._server.server_port}"
        self.grpc = f"http://127.0.0.1:{self._grpc.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self) -> Receiver:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self._grpc.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._grpc.stop(None).wait()

    def Export(self, request: Any, context: Any) -> Any:
        self.take(request)
        return service.ExportTraceServiceResponse()

    def take(self, request: Any) -> None:
        found = []
        for group in request.resource_spans:
            resource = _plain(group.resource.attributes)
            for scope in group.scope_spans:
                found += [_span(span, resource) for span in scope.spans]
        with self._lock:
            self.bodies.append(request.SerializeToString())
            self.spans += found

    def environment(self, protocol: str = "http/protobuf") -> dict[str, str]:
        """The standard variables that send traces here, soon."""
        return {
            "OTEL_EXPORTER_OTLP_ENDPOINT": self.grpc if protocol == "grpc" else self.http,
            "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
            "OTEL_BSP_SCHEDULE_DELAY": "50",
        }

    def of(self, trace_id: str) -> dict[str, list[Span]]:
        """The spans of one trace by name."""
        named: dict[str, list[Span]] = {}
        with self._lock:
            for span in self.spans:
                if span.trace_id == trace_id:
                    named.setdefault(span.name, []).append(span)
        return named

    def until(self, condition: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + PATIENCE_S
        while not (value := condition()):
            assert time.monotonic() < deadline, sorted((s.trace_id, s.name) for s in self.spans)
            time.sleep(0.02)
        return value


def _plain(attributes: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in attributes}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(one) for one in value.array_value.values]
    return getattr(value, kind) if kind else None


def _span(span: Any, resource: dict[str, Any]) -> Span:
    return Span(
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        kind=type(span).SpanKind.Name(span.kind).removeprefix("SPAN_KIND_").lower(),
        begin=span.start_time_unix_nano,
        end=span.end_time_unix_nano,
        attributes=_plain(span.attributes),
        events=[(event.name, event.time_unix_nano, _plain(event.attributes)) for event in span.events],
        links=[(link.trace_id.hex(), link.span_id.hex()) for link in span.links],
        state=span.trace_state,
        error=span.status.code == span.status.STATUS_CODE_ERROR,
        resource=resource,
    )
