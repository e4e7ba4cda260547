"""Traces over all processes of a running service, received as a collector receives them."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from headrace.serve.embedded import server_url
from protocol.bus import GatewayBus
from protocol.messages import Job, encode
from protocol.sampling import SamplingParams
from protocol.telemetry.context import trace_id_of
from tests.otlp import PATIENCE_S, Receiver, Span
from tests.stack import Stack

pytestmark = pytest.mark.timeout(600)
MODEL = "org/tiny"
WORDS = "a secret that no trace may tell"
PARTS = {"wait", "tokenize", "queue", "prefill", "decode"}


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with Receiver() as running:
        yield running


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory, model_dir: Path, receiver: Receiver) -> Iterator[Stack]:
    with Stack(
        tmp_path_factory.mktemp("traced"), "--model", str(model_dir), "--served-model-name", MODEL,
        "--engine", "simulated", "--engine-options", '{"step_us": 10000}', "--schedulers", "2",
        env=receiver.environment(),
    ) as running:  # fmt: skip
        yield running


def caller() -> tuple[str, str, dict[str, str]]:
    """Trace id, span id and the header of a client that traces."""
    trace_id, span_id = secrets.token_hex(16), secrets.token_hex(8)
    return trace_id, span_id, {"traceparent": f"00-{trace_id}-{span_id}-01"}


def post(stack: Stack, path: str, body: dict[str, Any], headers: dict[str, str]) -> tuple[dict[str, str], bytes]:
    ask = urllib.request.Request(
        stack.url + path, json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
    )
    with urllib.request.urlopen(ask, timeout=120) as reply:
        return {key.lower(): value for key, value in reply.headers.items()}, reply.read()


def whole(receiver: Receiver, trace_id: str, names: set[str]) -> dict[str, Span]:
    """The spans of these names, once all are there, each once."""
    receiver.until(lambda: names <= receiver.of(trace_id).keys())
    found = receiver.of(trace_id)
    assert {name: len(found[name]) for name in names} == dict.fromkeys(names, 1)
    return {name: found[name][0] for name in names}


def test_one_trace_tells_a_chat_over_all_processes(traced: Stack, receiver: Receiver) -> None:
    trace_id, span_id, headers = caller()
    body = {"model": MODEL, "messages": [{"role": "user", "content": WORDS}], "max_tokens": 6, "stream": True,
            "temperature": 0.5, "seed": 3, "ignore_eos": True}  # fmt: skip
    told, _ = post(traced, "/v1/chat/completions", body, {**headers, "tracestate": "vendor=a, other=b"})
    http, model = "POST /v1/chat/completions", f"chat {MODEL}"
    spans = whole(receiver, trace_id, {http, model, "accept", *PARTS})
    assert (spans[http].kind, spans[http].parent_id) == ("server", span_id)
    assert spans["accept"].parent_id == spans[model].parent_id == spans[http].span_id
    assert {spans[part].parent_id for part in PARTS} == {spans[model].span_id}
    assert spans[http].attributes["http.response.status_code"] == 200
    assert [name for name, *_ in spans["prefill"].events] == ["placed"]
    assert [name for name, *_ in spans["decode"].events] == ["first token"]
    assert {span.state for span in spans.values()} == {"vendor=a,other=b"}
    commits = [found for link in spans["decode"].links for found in receiver.of(link[0])["commit"]]
    assert [commit.attributes["headrace.worker"] for commit in commits] == ["worker-0"] * 2
    assert commits[0].attributes["headrace.step"] < commits[1].attributes["headrace.step"]
    names = [spans[name].resource["service.name"] for name in (http, model)]
    assert names == ["headrace-gateway", "headrace-scheduler"]
    given = spans[model].attributes
    expected = {
        "gen_ai.operation.name": "chat", "gen_ai.provider.name": "headrace", "gen_ai.request.model": MODEL,
        "gen_ai.response.model": MODEL, "gen_ai.request.max_tokens": 6, "gen_ai.request.temperature": 0.5,
        "gen_ai.request.seed": 3, "gen_ai.usage.output_tokens": 6, "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.response.id": told["x-request-id"], "headrace.tenant": "default", "langsmith.span.kind": "llm",
    }  # fmt: skip
    assert given.items() >= {k: v for k, v in expected.items() if not isinstance(v, list)}.items()
    assert given["gen_ai.response.finish_reasons"] == ["length"]
    assert given["gen_ai.usage.input_tokens"] > len(WORDS) // 2
    times = [spans[part].begin for part in ("wait", "tokenize", "queue", "prefill", "decode")]
    assert times == sorted(times)
    assert not any(WORDS.encode() in body for body in receiver.bodies)


def test_a_request_without_a_traceparent_is_found_by_its_id(traced: Stack, receiver: Receiver) -> None:
    told, _ = post(traced, "/v1/completions", {"model": MODEL, "prompt": WORDS, "max_tokens": 2}, {})
    spans = whole(receiver, told["x-request-id"], {"POST /v1/completions", f"text_completion {MODEL}", *PARTS})
    assert spans["POST /v1/completions"].parent_id == ""
    line = next(
        json.loads(line)
        for log in (traced.run_dir / "run" / "logs").glob("gateway*.log")
        for line in log.read_text().splitlines()
        if told["x-request-id"] in line and line.startswith("{")
    )
    assert line["trace"] == told["x-request-id"]


def test_a_caller_that_does_not_sample_gets_no_spans(traced: Stack, receiver: Receiver) -> None:
    trace_id, span_id, _ = caller()
    body = {"model": MODEL, "prompt": WORDS, "max_tokens": 2}
    post(traced, "/v1/completions", body, {"traceparent": f"00-{trace_id}-{span_id}-00"})
    after, _ = post(traced, "/v1/completions", body, {})
    whole(receiver, after["x-request-id"], {"POST /v1/completions", f"text_completion {MODEL}"})
    assert receiver.of(trace_id) == {}


async def test_a_pushed_job_goes_on_in_its_trace_when_the_leader_dies(traced: Stack, receiver: Receiver) -> None:
    """The span of the request is the same, made by the leader that saw its end."""
    trace_id, span_id, headers = caller()
    url = server_url(traced.run_dir / "data")
    job = Job(
        id="traced-1", prompt=WORDS, sampling=SamplingParams(max_tokens=200, ignore_eos=True), results="traced",
        trace=headers["traceparent"],
    )  # fmt: skip
    bus = GatewayBus(url, MODEL, patience=30.0)
    await bus.connect()
    try:
        await bus.push(encode(job))
        async with asyncio.timeout(PATIENCE_S):
            while not (rid := await bus.find_request("default", "traced-1")) or not await bus.read_journal(rid, 0):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            leader = (await bus.read_leader()).owner.partition(".")[0]
        await asyncio.to_thread(receiver.until, lambda: {"wait", "tokenize"} <= receiver.of(trace_id).keys())
        traced.kill("scheduler", leader)
        async with asyncio.timeout(PATIENCE_S):
            results = await bus.read_results("traced", block_ms=60_000)
        assert [result.finish_reason for _, result in results] == ["length"]
    finally:
        await bus.close()
    names = {f"text_completion {MODEL}", *PARTS}
    spans = await asyncio.to_thread(whole, receiver, trace_id, names)
    request = spans[f"text_completion {MODEL}"]
    assert trace_id_of(rid, headers["traceparent"]) == trace_id
    assert (request.parent_id, request.span_id) == (span_id, rid[16:32])
    assert {spans[part].parent_id for part in PARTS} == {request.span_id}
    assert request.attributes["headrace.epoch"] > 1
    assert request.attributes["gen_ai.usage.output_tokens"] == 200
    assert request.begin <= spans["wait"].begin
    assert spans["queue"].begin > spans["tokenize"].end  # this leader's own, from the takeover on


async def test_an_ended_stream_resumed_stands_in_its_trace(traced: Stack, receiver: Receiver) -> None:
    trace_id, _, headers = caller()
    body = {"model": MODEL, "prompt": WORDS, "max_tokens": 2, "stream": True}
    told, _ = await asyncio.to_thread(
        post, traced, "/v1/completions", body, headers | {"X-Headrace-Detached": "true"}
    )  # fmt: skip
    reader_trace, reader_span, reader = caller()
    ask = urllib.request.Request(f"{traced.url}/v1/streams/{told['x-request-id']}", headers=reader)
    await asyncio.to_thread(lambda: urllib.request.urlopen(ask, timeout=60).read())
    spans = await asyncio.to_thread(whole, receiver, trace_id, {"GET /v1/streams/{id}", "POST /v1/completions"})
    assert spans["GET /v1/streams/{id}"].links == [(reader_trace, reader_span)]


def test_a_collector_that_is_away_keeps_nobody(tmp_path: Path, model_dir: Path) -> None:
    """Nothing listens there: requests are answered, and the end comes soon."""
    away = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_BSP_SCHEDULE_DELAY": "50"}
    args = ("--model", str(model_dir), "--served-model-name", MODEL, "--engine", "simulated")
    with Stack(tmp_path / "away", *args, env=away) as stack:
        post(stack, "/v1/completions", {"model": MODEL, "prompt": "x", "max_tokens": 2}, {})
        began = time.monotonic()
        assert stack.stop() == 0
        assert time.monotonic() - began < PATIENCE_S


def test_metrics_name_a_trace_where_openmetrics_is_asked_for(traced: Stack, receiver: Receiver) -> None:
    trace_id, _, headers = caller()
    body = {"model": MODEL, "prompt": WORDS, "max_tokens": 2, "stream": True}
    post(traced, "/v1/completions", body, headers)
    asked = urllib.request.Request(traced.url + "/metrics", headers={"Accept": "application/openmetrics-text"})
    with urllib.request.urlopen(asked, timeout=60) as reply:
        assert reply.headers["Content-Type"].startswith("application/openmetrics-text")
        families = {f.name: f for f in text_string_to_metric_families(reply.read().decode())}
    for name in ("headrace_time_to_first_token_seconds", "llm_request_duration_seconds"):
        told = [sample.exemplar.labels["trace_id"] for sample in families[name].samples if sample.exemplar]
        assert trace_id in told
    with urllib.request.urlopen(traced.url + "/metrics", timeout=60) as reply:
        assert b"trace_id" not in reply.read()
