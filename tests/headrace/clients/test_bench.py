"""The load generator against a small server of its own: what it sends, what it counts, from when it counts."""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from headrace.clients.bench import Result, Target, drive, quantile, summarize
from headrace.clients.workload import Vocabulary, Workload


@dataclass
class Recorder:
    """An OpenAI-shaped server that notes what it is asked and answers with as many tokens."""

    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    open: int = 0
    most_open: int = 0

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "m1", "vocab_size": 500}, {"id": "m2"}]})

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if body.get("seed") == 13:
            return web.json_response({"error": {"message": "unlucky"}}, status=500)
        chat = "messages" in body
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        events = [{"choices": [{"delta": {"role": "assistant", "content": ""}}]}] if chat else []
        for k in range(body["max_tokens"]):
            events.append({"choices": [{"delta": {"content": "x"}} if chat else {"text": "x" if k else ""}]})
        events.append({"choices": [{"delta": {}, "text": "", "finish_reason": "length"}]})
        if body.get("seed") == 14:
            events = [*events[:1], {"error": {"message": "broken"}}]
        usage = {"prompt_tokens": 7, "completion_tokens": body["max_tokens"]}
        events.append({"choices": [], "usage": usage})
        for event in events:
            await answer.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            await asyncio.sleep(0)
        if body.get("seed") != 15:
            await answer.write(b"data: [DONE]\n\n")
        self.open -= 1
        return answer


@pytest.fixture
async def server() -> AsyncIterator[Recorder]:
    recorder = Recorder()
    app = web.Application()
    app.router.add_get("/v1/models", recorder.models)
    app.router.add_post("/v1/completions", recorder.complete)
    app.router.add_post("/v1/chat/completions", recorder.complete)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    recorder.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield recorder
    await runner.cleanup()


async def bench(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "headrace", "bench", *args]
    return await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=240)


async def test_a_whole_run(server: Recorder, tmp_path: Path) -> None:
    report_file = tmp_path / "report.json"
    ended = await bench(
        "--url", server.url + "/v1", "--requests", "12", "--concurrency", "3", "--output-len", "5",
        "--prompt-len", "4:9", "--warmup", "1", "--ignore-eos", "--json", str(report_file), "--body", '{"top_k": 4}',
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "time to first token" in ended.stdout
    assert "12/12 requests" in ended.stderr
    report = json.loads(report_file.read_text())
    assert (report["completed"], report["failed"], report["shorter_than_asked"]) == (12, 0, 0)
    assert (report["output_tokens"], report["prompt_tokens"]) == (60, 84)  # the server's own usage figures
    assert report["config"]["model"] == "m1"
    assert set(report["ttft_ms"]) == set(report["itl_ms"]) == {"p50", "p90", "p99", "mean", "max"}
    assert len(server.bodies) == 13
    assert server.most_open <= 3
    for body in server.bodies:
        assert body["ignore_eos"] is True
        assert body["top_k"] == 4
        assert 4 <= len(body["prompt"]) <= 9
        assert all(0 <= token < 500 for token in body["prompt"])


async def test_chat_sends_text(server: Recorder) -> None:
    ended = await bench(
        "--url", server.url, "--model", "m2", "--api", "chat", "--requests", "3", "--warmup", "0", "--output-len", "2"
    )
    assert ended.returncode == 0, ended.stderr
    assert [b["model"] for b in server.bodies] == ["m2"] * 3
    assert all(isinstance(b["messages"][0]["content"], str) for b in server.bodies)


@pytest.mark.parametrize(("seed", "says"), [(13, "HTTP 500"), (14, "in the stream"), (15, "broke off")])
async def test_failures_are_counted_and_shown(server: Recorder, seed: int, says: str) -> None:
    ended = await bench("--url", server.url, "--requests", "2", "--warmup", "0", "--body", json.dumps({"seed": seed}))
    assert ended.returncode == 1
    assert "2 failed" in ended.stdout
    assert says in ended.stdout


@pytest.mark.parametrize(
    ("args", "says"), [(["--model", "m9"], "which serves m1, m2"), (["--tokenizer", "/no"], "/no")]
)
async def test_what_cannot_be_measured_is_said(server: Recorder, args: list[str], says: str) -> None:
    ended = await bench("--url", server.url, *args)
    assert ended.returncode == 78
    assert says in ended.stderr


async def test_no_server_is_said() -> None:
    ended = await bench("--url", "http://127.0.0.1:1")
    assert ended.returncode == 78
    assert "no OpenAI-compatible server" in ended.stderr


async def test_open_loop_counts_from_the_scheduled_arrival(server: Recorder) -> None:
    """No coordinated omission: a late send is latency, not a later start."""
    workload = Workload(requests=8, prompt_len=(3, 3), output_len=(2, 2), rate=200.0, seed=4)
    requests = workload.build(Vocabulary())
    async with aiohttp.ClientSession() as session:
        results, begin = await drive(session, Target(server.url, "m1"), requests, None)
    assert [r.start for r in results] == [begin + r.arrival for r in requests]
    assert all(r.sent >= r.start for r in results)
    assert all(r.ok for r in results)


async def test_closed_loop_counts_from_the_send(server: Recorder) -> None:
    requests = Workload(requests=6, prompt_len=(3, 3), output_len=(2, 2)).build(Vocabulary())
    async with aiohttp.ClientSession() as session:
        results, _ = await drive(session, Target(server.url, "m1"), requests, 2)
    assert [r.start for r in results] == [r.sent for r in results]
    assert server.most_open == 2


# ------------------------------------------------------------------ workloads and figures


def test_workloads_repeat_by_seed_and_share_prefixes() -> None:
    workload = Workload(requests=40, prompt_len=(2, 5), output_len=(1, 9), shared_prefix=10, prefix_groups=2, rate=3.0)
    first, again = (workload.build(Vocabulary()) for _ in range(2))
    assert first == again
    assert workload.build(Vocabulary()) != Workload(seed=1).build(Vocabulary())
    prefixes = [tuple(r.prompt[:10]) for r in first]
    assert len(set(prefixes)) == 2
    assert prefixes[0::2] == [prefixes[0]] * 20
    assert {r.prompt_tokens for r in first} == {12, 13, 14, 15}
    assert {r.max_tokens for r in first} <= set(range(1, 10))
    assert [r.arrival for r in first] == sorted(r.arrival for r in first)
    assert first[0].arrival == 0.0
    assert all(r.arrival == 0.0 for r in Workload(rate=math.inf).build(Vocabulary()))


def test_text_prompts_of_a_tokenizer_have_the_length_asked_for(model_dir: Path) -> None:
    with pytest.raises(ValueError, match="no tokens"):  # a tokenizer of bytes has no whole words
        Vocabulary(text=True, tokenizer=model_dir)
    words = Workload(requests=3, prompt_len=(6, 6)).build(Vocabulary(text=True))
    assert all(isinstance(r.prompt, str) and len(r.prompt.split()) == 6 for r in words)


def test_quantiles_are_numpys() -> None:
    import numpy

    values = [5.0, 1.0, 4.0, 9.0, 2.5, 7.0]
    for percent in (0, 50, 90, 99, 100):
        assert quantile(values, percent) == pytest.approx(numpy.percentile(values, percent))


def test_figures_of_a_run() -> None:
    good = Result(0, 10, 3, start=100.0, sent=100.5, chunks=[101.0, 102.0, 104.0], end=104.5, output_tokens=3)
    short = Result(1, 10, 9, start=101.0, sent=101.0, chunks=[106.0], end=106.0, output_tokens=1)
    failed = Result(2, 10, 3, start=100.0, error="RuntimeError: HTTP 500")
    figures = summarize([good, short, failed], begin=100.0)
    assert (figures["completed"], figures["failed"], figures["shorter_than_asked"]) == (2, 1, 1)
    assert figures["duration_s"] == 6.0  # to the last token
    assert figures["output_tokens_per_s"] == pytest.approx(4 / 6, abs=1e-3)
    assert figures["ttft_ms"]["max"] == 5000.0
    assert figures["ttft_ms"]["p50"] == 3000.0  # from the scheduled arrival: 1 s and 5 s
    assert figures["itl_ms"]["mean"] == 1500.0
    assert figures["tpot_ms"]["p50"] == 1500.0
    assert figures["e2e_ms"]["p50"] == 4750.0
    assert figures["errors"] == {"RuntimeError: HTTP 500": 1}
    assert summarize([failed], begin=0.0)["ttft_ms"] is None
