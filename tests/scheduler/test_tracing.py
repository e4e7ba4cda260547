"""A scheduler's spans: moves, refusals, and prompts and answers only where they are asked for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import pytest

from protocol.messages import Job, encode
from tests.otlp import Receiver, Span
from tests.scheduler.conftest import Stage

WORDS = "what was asked"


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    with Receiver() as running:
        for name, value in running.environment().items():
            monkeypatch.setenv(name, value)
        yield running


async def request_span(receiver: Receiver, rid: str) -> Span:
    def found() -> list[Span]:
        return [span for span in receiver.spans if span.span_id == rid[16:]]

    return (await asyncio.to_thread(receiver.until, found))[0]


@pytest.mark.parametrize("content", [False, True])
async def test_content_stands_in_spans_only_where_it_is_asked_for(
    stage: Stage, receiver: Receiver, content: bool
) -> None:
    stage.scheduler(trace_content=content)
    stage.worker()
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": WORDS}]
    rid = await stage.accept(job={"messages": messages}, max_tokens=3)
    frames = await stage.frames(rid)
    answer = "".join(frame.text for frame in frames)
    told = (await request_span(receiver, rid)).attributes
    if not content:
        assert not [key for key in told if key.startswith(("gen_ai.prompt", "gen_ai.completion", "gen_ai.input"))]
        assert not any(WORDS.encode() in body for body in receiver.bodies)
        return
    assert [told[f"gen_ai.prompt.1.{field}"] for field in ("role", "content")] == ["user", WORDS]
    assert [told[f"gen_ai.completion.0.{field}"] for field in ("role", "content")] == ["assistant", answer]
    assert json.loads(told["gen_ai.input.messages"])[0] == {
        "role": "system", "parts": [{"type": "text", "content": "be brief"}],
    }  # fmt: skip
    assert json.loads(told["gen_ai.output.messages"]) == [
        {"role": "assistant", "parts": [{"type": "text", "content": answer}], "finish_reason": "length"}
    ]


async def test_moves_are_told_where_they_happen(stage: Stage, receiver: Receiver) -> None:
    """A small pool: sequences are preempted and placed again while they decode."""
    stage.scheduler()
    stage.worker(blocks=8, block_size=8, token_budget=24, max_num_seqs=6)
    rids = [await stage.accept("abcdefgh" * (1 + k), max_tokens=30, seed=k) for k in range(4)]
    for rid in rids:
        await stage.frames(rid)
        await request_span(receiver, rid)
    events = [name for span in receiver.spans for name, *_ in span.events]
    assert events.count("placed") == 4
    assert "moved" in events
    decodes = [span for span in receiver.spans if span.name == "decode"]
    assert sum(span.attributes["headrace.preemptions"] for span in decodes) > 0


async def test_a_refused_request_has_a_span_with_its_error(stage: Stage, receiver: Receiver) -> None:
    stage.scheduler()
    rid = await stage.accept([10**6])
    span = await request_span(receiver, rid)
    assert span.error
    assert span.attributes["error.type"] == ((await stage.frames(rid))[-1].extra or {})["code"]
    assert span.attributes["gen_ai.response.finish_reasons"] == ["error"]


async def test_a_push_has_a_trace_of_its_own(stage: Stage, receiver: Receiver) -> None:
    stage.scheduler()
    stage.worker()
    await stage.bus.push(encode(Job(id="p1", prompt=WORDS, results="r")))

    async def rid() -> str | None:
        return await stage.bus.find_request("default", "p1")

    span = await request_span(receiver, await stage.until(rid))
    assert (span.kind, span.parent_id) == ("consumer", "")
