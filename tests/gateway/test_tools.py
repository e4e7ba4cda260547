"""Tool calls and reasoning over HTTP, by the unmodified client: outputs are scripted, everything else is real."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import openai
import pytest

from protocol.formats.families import REASONING, TOOLS
from protocol.formats.message import call_id
from protocol.formats.spec import FormatSpec
from protocol.messages import Frame
from tests.gateway.backend import MODEL, Backend, Running
from tests.gateway.front import Front, event_id, payload, rid_of
from tests.waits import eventually

OPEN, CLOSE, THINK, THOUGHT = 300, 301, 302, 303
FORMAT = FormatSpec(
    name="hermes",
    tools=TOOLS["hermes"],
    reasoning=REASONING["think"],
    controls={"<tool_call>": OPEN, "</tool_call>": CLOSE, "<think>": THINK, "</think>": THOUGHT},
    opened=[[ord("?")]],  # a question is thought about
    ends=[310],
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ASK: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "tools": [WEATHER]}
CALLS: list[tuple[int, str]] = [
    (1, "Let me "), (1, "look.\n"), (OPEN, ""), (1, '\n{"na'), (1, 'me": "weather", "argu'), (1, 'ments": {"city'),
    (1, '": "Zür'), (1, 'ich"}}\n'), (CLOSE, ""), (1, "\n"), (OPEN, "<tool_call>"),
    (1, '{"name": "weather", "arguments": {"city": "Bern"}}'), (CLOSE, "</tool_call>"),
]  # fmt: skip
ARGUMENTS = ['{"city": "Zürich"}', '{"city": "Bern"}']


def script(tokens: list[tuple[int, str]], finish: str = "stop") -> Callable[[Any, int, int], Frame]:
    """Emits these tokens, then the end."""

    def make(record: Any, choice: int, index: int) -> Frame:
        if index < len(tokens):
            return Frame(*tokens[index])
        return Frame(5, "", finish)

    return make


@pytest.fixture
async def backend(redis_url: str, raw: Any) -> AsyncIterator[Backend]:
    async with Backend(redis_url, format=FORMAT) as running:
        yield running


async def test_calls_whole_and_streamed(client: openai.AsyncOpenAI, backend: Backend) -> None:
    backend.script = script(CALLS)
    whole = await client.chat.completions.create(**ASK)
    message = whole.choices[0].message
    assert whole.choices[0].finish_reason == "tool_calls"
    assert message.content == "Let me look."
    assert message.tool_calls is not None
    rid = whole.id.removeprefix("chatcmpl-")
    assert [c.id for c in message.tool_calls] == [call_id(rid, 0, 0), call_id(rid, 0, 1)]
    assert [(c.type, c.function.name, c.function.arguments) for c in message.tool_calls] == [
        ("function", "weather", arguments) for arguments in ARGUMENTS
    ]

    content, calls, finish = "", {}, None
    async for chunk in await client.chat.completions.create(**ASK, stream=True):
        delta = chunk.choices[0].delta
        content += delta.content or ""
        finish = chunk.choices[0].finish_reason or finish
        for call in delta.tool_calls or ():
            assert call.function is not None
            if call.id:
                calls[call.index] = [call.id, call.function.name, ""]
            calls[call.index][2] += call.function.arguments or ""
    assert (content, finish) == ("Let me look.", "tool_calls")
    assert [call[1:] for call in calls.values()] == [["weather", arguments] for arguments in ARGUMENTS]


async def test_the_clients_own_accumulation_agrees(client: openai.AsyncOpenAI, backend: Backend) -> None:
    backend.script = script(CALLS)
    async with client.chat.completions.stream(**ASK) as stream:
        final = await stream.get_final_completion()
    message = final.choices[0].message
    assert final.choices[0].finish_reason == "tool_calls"
    assert message.content == "Let me look."
    assert [call.function.arguments for call in message.tool_calls or ()] == ARGUMENTS


async def test_an_answer_of_a_schema_or_a_call(client: openai.AsyncOpenAI, backend: Backend) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    form: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    backend.script = script([(1, '{"a": 5}')])
    answer = await client.chat.completions.create(**ASK, response_format=form)
    assert answer.choices[0].message.content == '{"a": 5}'
    structure = backend.running[-1].record.job.sampling.structure
    assert structure is not None
    assert "answer: calls | final" in (structure.grammar or "")
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(**ASK, response_format=form, tool_choice="required")
    assert caught.value.param == "tool_choice"


async def test_what_no_grammar_can_hold_is_refused_where_it_is_promised(
    client: openai.AsyncOpenAI, backend: Backend
) -> None:
    properties = {f"property_{n}": {"type": "string", "description": "d" * 600} for n in range(120)}
    parameters = {"type": "object", "properties": properties}
    big: Any = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    ask: dict[str, Any] = {**ASK, "tools": big}
    await client.chat.completions.create(**ask)
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(**ask, tool_choice="required")
    assert "bytes" in caught.value.message
    assert caught.value.param == "tools"


async def test_arguments_come_as_they_are_written_where_a_grammar_rules(front: Front, backend: Backend) -> None:
    backend.script = script(CALLS[2:9])
    events = await front.events("POST", "/v1/chat/completions", json={**ASK, "stream": True, "tool_choice": "required"})
    deltas = [payload(e)["choices"][0]["delta"] for e in events if b"tool_calls" in e and b"[DONE]" not in e]
    pieces = [d["tool_calls"][0]["function"]["arguments"] for d in deltas if "tool_calls" in d]
    assert pieces == ["", '{"city', '": "Zür', 'ich"}']
    structure = backend.running[-1].record.job.sampling.structure
    assert structure is not None
    assert f"<[{OPEN}]>" in (structure.grammar or "")
    assert backend.running[-1].record.job.sampling.stop_token_ids == [310]


@pytest.mark.parametrize("asked", [{}, {"logprobs": True, "return_token_ids": True}])
async def test_a_stream_is_taken_up_after_any_event(front: Front, backend: Backend, asked: dict[str, Any]) -> None:
    """Several events of one frame, and frames without any: the rest is the same, byte for byte."""
    backend.script = script([*CALLS[:7], (1, 'ich"}} and more'), (CLOSE, ""), *CALLS[9:]])
    body = {**ASK, **asked, "stream": True, "stream_options": {"include_usage": True}, "n": 2}
    headers = {"X-Headrace-Resume": "60"}
    events = await front.events("POST", "/v1/chat/completions", json=body, headers=headers)
    assert any("." in (event_id(e) or "").partition("-")[2] for e in events), "no frame has several events"
    rid = rid_of(events)
    for number, event in enumerate(events):
        if (seen := event_id(event)) is None or seen.endswith("d"):
            continue
        rest = await front.events("GET", f"/v1/streams/{rid}", headers={"Last-Event-ID": seen})
        ours = _by_choice(events[number + 1 :])
        assert _by_choice(rest) == ours, seen


def _by_choice(events: list[bytes]) -> dict[Any, list[bytes]]:
    """Payloads by choice: how choices interleave depends on when their rows come."""
    found: dict[Any, list[bytes]] = {}
    for event in events:
        data = event.split(b"data: ", 1)[1]
        choices = json.loads(data)["choices"] if data.startswith(b"{") else []
        found.setdefault(choices[0]["index"] if choices else None, []).append(data)
    return found


async def test_a_lone_choice_goes_on_byte_for_byte(front: Front, backend: Backend) -> None:
    backend.script = script(CALLS)
    headers = {"X-Headrace-Resume": "60"}
    events = await front.events("POST", "/v1/chat/completions", json={**ASK, "stream": True}, headers=headers)
    rid = rid_of(events)
    for number, event in enumerate(events[:-1]):
        seen = event_id(event)
        assert seen is not None
        rest = await front.events("GET", f"/v1/streams/{rid}", headers={"Last-Event-ID": seen})
        assert b"".join(rest) == b"".join(events[number + 1 :]), seen
    status, _, _ = await front.ask("GET", f"/v1/streams/{rid}", headers={"Last-Event-ID": "1-00000000.0.1"})
    assert status in (400, 409, 500)
    _, record, _ = await front.ask("GET", f"/v1/requests/{rid}")
    assert record["response"]["choices"][0]["finish_reason"] == "tool_calls"


async def test_what_is_no_call_is_content(client: openai.AsyncOpenAI, backend: Backend) -> None:
    for tokens, text in [
        ([(1, "see <tool_call>"), (1, '{"name": "weather", "arguments": {}}</tool_call>')], None),  # typed letters
        ([(OPEN, ""), (1, '{"name": "unknown", "arguments": {}}'), (CLOSE, "")], None),
        ([(OPEN, ""), (1, '{"name": "weather", "arg')], None),  # cut off
        ([(OPEN, ""), (1, "no json"), (CLOSE, ""), (1, " after")], "<tool_call>no json</tool_call> after"),
    ]:
        backend.script = script(tokens)
        answer = await client.chat.completions.create(**ASK)
        names = {OPEN: "<tool_call>", CLOSE: "</tool_call>"}
        expected = text or "".join(names.get(token, "") + piece for token, piece in tokens)
        assert answer.choices[0].message.content == expected
        assert answer.choices[0].message.tool_calls is None
        assert answer.choices[0].finish_reason == "stop"


async def test_a_length_is_told_as_such(client: openai.AsyncOpenAI, backend: Backend) -> None:
    backend.script = script(CALLS[2:7], "length")
    answer = await client.chat.completions.create(**ASK, tool_choice="required")
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.tool_calls is not None
    assert answer.choices[0].message.tool_calls[0].function.arguments == '{"city": "Zür'


async def test_reasoning_apart_from_content(client: openai.AsyncOpenAI, front: Front, backend: Backend) -> None:
    ask: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "why?"}]}
    backend.script = script([(1, "\nWell, "), (1, "so\n"), (THOUGHT, "</think>"), (1, "\n\nBecause"), (1, ".\n")])
    answer = await client.chat.completions.create(**ask)
    message = answer.choices[0].message
    assert message.model_extra is not None
    assert message.model_extra["reasoning_content"] == message.model_extra["reasoning"] == "Well, so"
    assert message.content == "Because.\n"
    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is not None
    assert answer.usage.completion_tokens_details.reasoning_tokens == 3

    streamed: dict[str, str] = {}
    async for chunk in await client.chat.completions.create(**ask, stream=True):
        for field, value in chunk.choices[0].delta.model_dump(exclude_none=True).items():
            if field in ("content", "reasoning_content"):
                streamed[field] = streamed.get(field, "") + value
    assert streamed == {"reasoning_content": "Well, so", "content": "Because.\n"}

    hidden = await client.chat.completions.create(**ask, extra_body={"include_reasoning": False})
    assert "reasoning" not in (hidden.choices[0].message.model_extra or {})
    assert hidden.choices[0].message.content == "Because.\n"

    plain = {**ask, "messages": [{"role": "user", "content": "do"}]}  # no thought is opened by this prompt
    backend.script = script([(THINK, "<think>"), (1, "a"), (THOUGHT, "</think>"), (1, "b"), (1, " <think> c")])
    answer = await client.chat.completions.create(**plain)
    assert answer.choices[0].message.model_extra["reasoning"] == "a"  # type: ignore[index]
    assert answer.choices[0].message.content == "b <think> c"

    backend.script = script([(1, "never to an end")], "length")
    answer = await client.chat.completions.create(**ask)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("", "length")


async def test_history_with_calls_and_thoughts_is_taken(client: openai.AsyncOpenAI, backend: Backend) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    assistant = {
        "role": "assistant",
        "content": None,
        "tool_calls": [call],
        "reasoning": "hm",
        "provider_data": {"x": 1},
    }
    messages: Any = [
        {"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]},
        assistant,
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "rain"}]},
    ]
    await client.chat.completions.create(
        model=MODEL, messages=messages, tools=[WEATHER], reasoning_effort="low",
        extra_body={"enable_thinking": False, "tools": [WEATHER], "tool_choice": "none"},
    )  # fmt: skip
    job = backend.running[-1].record.job
    called = {**call, "function": {"name": "weather", "arguments": {"city": "Bern"}}}
    assert job.tools is None  # none: they are not told
    assert job.messages == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [called]},
        {"role": "tool", "content": "rain", "tool_call_id": "c1"},
    ]
    assert job.chat_template_kwargs == {"reasoning_effort": "low", "enable_thinking": False}


async def test_nothing_is_asked_of_tools_by_empty_fields(client: openai.AsyncOpenAI, backend: Backend) -> None:
    for extra in ({"tools": []}, {"tools": [], "tool_choice": "auto"}, {"tool_choice": "none"},
                  {"tools": None, "tool_choice": None, "parallel_tool_calls": None}, {"functions": []}):  # fmt: skip
        await client.chat.completions.create(model=MODEL, messages=ASK["messages"], extra_body=extra)
        assert backend.running[-1].record.job.tools is None


async def test_a_missed_notice_of_admission_is_read_up(front: Front, backend: Backend, raw: Any) -> None:
    """Frames that come before it is known whether the prompt opened a thought wait for the record."""
    backend.hold = True
    backend.admit = False
    backend.script = script([(1, "a thought"), (THOUGHT, ""), (1, "said")])

    async def run() -> list[bytes]:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "why?"}], "stream": True}
        return await front.events("POST", "/v1/chat/completions", json=body)

    reading = asyncio.create_task(run())
    await eventually(lambda: backend.entries)
    rid = backend.entries[0][1].rid
    channel = raw.hget(backend.bus.keys.live, rid)
    raw.hset(backend.bus.keys.live, rid, "")
    await backend.admit_next()
    raw.hset(backend.bus.keys.live, rid, channel)
    running: list[Running] = await backend.until_running()
    while not running[0].over:
        await backend.step()
    events = await reading
    text = b"".join(events)
    assert b'"reasoning_content":"a thought"' in text
    assert b'"content":"said"' in text
