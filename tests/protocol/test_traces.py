"""Where spans stand, what asks for traces, and what a receiver gets; older leaders are sent no trace."""

from __future__ import annotations

import builtins
import logging
import re
import time
from pathlib import Path
from typing import Any

import pytest

from protocol.bus.base import job_fingerprint
from protocol.errors import InvalidRequest
from protocol.jobs import decode_job
from protocol.levels import job_level, plainer
from protocol.messages import Job, encode, new_rid
from protocol.telemetry.context import Place, parse, request_place
from protocol.telemetry.traces import Traces, traces, wanted
from tests.bus import Bus
from tests.otlp import Receiver

DOCUMENT = Path(__file__).parents[2] / "docs" / "traces.md"
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
HEADER = f"00-{TRACE}-{SPAN}-01"


def test_a_traceparent_is_read_and_written() -> None:
    assert parse(HEADER) == Place(TRACE, SPAN, True)
    assert parse(HEADER[:-1] + "0") == Place(TRACE, SPAN, False)
    place = parse(HEADER)
    assert place is not None
    assert place.traceparent == HEADER
    assert parse(f"cc-{TRACE}-{SPAN}-01-what-a-later-version-adds") == place


@pytest.mark.parametrize(
    "header",
    [
        None, "", "garbage", HEADER.upper(), HEADER + "-more", HEADER[:-1], f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01", f"00-{TRACE}-{'0' * 16}-01", HEADER + "\n",
    ],
)  # fmt: skip
def test_what_is_no_traceparent_begins_a_trace_by_the_requests_id(header: str | None) -> None:
    rid = new_rid()
    assert parse(header) is None
    assert request_place(rid, header) == Place(rid, rid[16:])


def test_a_request_has_one_place_whatever_its_id_looks_like() -> None:
    assert request_place("ab" * 16, HEADER) == Place(TRACE, "ab" * 8)
    place = request_place("made-by-another-client", None)
    assert parse(place.traceparent) == place == request_place("made-by-another-client", None)


@pytest.mark.parametrize("trace", ["garbage", HEADER + "-more", "0" * 1000])
def test_a_pushed_job_with_another_trace_is_refused_by_name(trace: str) -> None:
    with pytest.raises(InvalidRequest, match="55 characters") as refused:
        decode_job(encode({"prompt": "x", "trace": trace}))
    assert refused.value.param == "trace"
    assert decode_job(encode({"prompt": "x", "trace": HEADER})).trace == HEADER


async def test_an_older_leader_is_given_the_job_without_its_trace(bus: Bus, raw: Any) -> None:
    await bus.lead("old", await bus.read_leader())
    raw.hset(bus.keys.leader, "level", "1:1")
    rid = new_rid()
    await bus.accept(Job(prompt="x", trace=HEADER), rid=rid)
    record = await bus.read_request(rid)
    assert record is not None
    assert record.job == Job(prompt="x")


def test_a_trace_is_no_part_of_what_is_asked() -> None:
    traced = Job(prompt="x", trace=HEADER)
    assert job_fingerprint(traced) == job_fingerprint(Job(prompt="x"))
    assert (job_level(traced), job_level(plainer(traced))) == (3, 0)


@pytest.mark.parametrize(
    ("environ", "asked"),
    [
        ({}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, "OTEL_EXPORTER_OTLP_ENDPOINT"),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318"}, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, "OTEL_TRACES_EXPORTER"),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, None),
        ({"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, None),
    ],
)
def test_the_standard_variables_ask_for_traces(environ: dict[str, str], asked: str | None) -> None:
    assert wanted(environ) == asked


def test_without_the_extra_a_warning_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with caplog.at_level(logging.WARNING):
        assert traces("gateway", {"OTEL_TRACES_EXPORTER": "otlp"}) is None
    assert "pip install 'headrace[otel]'" in caplog.text


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
async def test_spans_arrive_over_both_protocols(monkeypatch: pytest.MonkeyPatch, protocol: str) -> None:
    with Receiver() as receiver:
        environ = receiver.environment(protocol)
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("OTEL_SERVICE_NAME", "ours")
        made = Traces("gateway", {**environ, "OTEL_SERVICE_NAME": "ours"})
        now = time.time_ns()
        whole = Place(TRACE, SPAN)
        made.part(whole, "accept", now, now + 5, {"a": 1, "left out": None}, events=[("seen", now, {"b": "c"})])
        made.add(
            whole, None, "POST /x", now, now + 9, {}, kind="server", links=[Place("ab" * 16, "cd" * 8)], error="500"
        )
        await made.close()
        spans = {span.name: span for span in receiver.spans}
    assert {path for path, _ in receiver.calls} == ({"/v1/traces"} if protocol == "http/protobuf" else set())
    part, request = spans["accept"], spans["POST /x"]
    assert (part.trace_id, part.parent_id, part.end - part.begin) == (TRACE, SPAN, 5)
    assert (part.attributes, part.events) == ({"a": 1}, [("seen", now, {"b": "c"})])
    assert (request.span_id, request.parent_id, request.kind) == (SPAN, "", "server")
    assert request.links == [("ab" * 16, "cd" * 8)]
    assert request.error
    assert request.attributes["error.type"] == "500"
    assert request.resource["service.name"] == "ours"


@pytest.mark.parametrize(
    ("section", "path", "headers", "resource"),
    [
        ("LangSmith", "/otel/v1/traces", {"x-api-key": "YOUR_KEY", "langsmith-project": "headrace"}, {}),
        ("W&B Weave", "/otel/v1/traces", {"wandb-api-key": "YOUR_KEY"},
         {"wandb.entity": "YOUR_TEAM", "wandb.project": "headrace"}),
    ],
)  # fmt: skip
async def test_the_lines_of_the_documents_send_what_a_service_asks_for(
    monkeypatch: pytest.MonkeyPatch, section: str, path: str, headers: dict[str, str], resource: dict[str, str]
) -> None:
    """Paths, headers and resource are those of the service's own documents; only the host is ours here."""
    text = DOCUMENT.read_text().partition(f"## {section}\n")[2].partition("\n## ")[0]
    lines = dict(re.findall(r'^export (\w+)="?([^"\n]+)"?$', text, re.M))
    with Receiver() as receiver:
        environ = {name: re.sub(r"^https://[^/]+", receiver.http, value) for name, value in lines.items()}
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        made = Traces("gateway", environ)
        now = time.time_ns()
        made.part(Place(TRACE, SPAN), "accept", now, now + 5, {})
        await made.close()
        ((called, told),) = receiver.calls
        (span,) = receiver.spans
    assert called == path
    sent = {name.lower(): value for name, value in told.items()}
    assert sent.items() >= {**headers, "content-type": "application/x-protobuf"}.items()
    assert span.resource.items() >= resource.items()


def test_the_sampler_of_the_environment_decides_by_the_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.5")
    first, second = (Traces("x", {"OTEL_TRACES_EXPORTER": "console"}) for _ in range(2))
    ids = [new_rid() for _ in range(100)]
    decided = [first.sampled(one, None, "n") for one in ids]
    assert decided == [second.sampled(one, None, "n") for one in ids]
    assert 20 < sum(decided) < 80
    assert all(first.sampled(TRACE, HEADER, "n") for _ in range(3))
    assert not first.sampled(TRACE, HEADER[:-1] + "0", "n")
