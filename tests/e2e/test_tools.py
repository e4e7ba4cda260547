"""The loop of a tool through real processes, by the unmodified client: a call that its schema rules, its result, an
answer. The model is the tree's own, whose chat template knows no tools."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import openai
import pytest
import redis

from headrace import Client
from headrace.serve.embedded import server_url
from tests.stack import Stack

MODEL = Path(__file__).parents[2] / "examples" / "demo-model"
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Zürich", "Bern", 'St. "Gallen"']},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "units": {"anyOf": [{"const": "C"}, {"type": "null"}]},
    },
    "required": ["city", "days", "units"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "forecast", "description": "the weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {},
                                                                    "additionalProperties": False}}},
]  # fmt: skip
ASK: Any = {
    "model": "demo",
    "messages": [{"role": "user", "content": "Will it rain?"}],
    "tools": TOOLS,
    "max_tokens": 200,
}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with Stack(
        tmp_path_factory.mktemp("stack"), "--model", str(MODEL), "--served-model-name", "demo", "--dtype", "float32"
    ) as running:
        yield running


@pytest.fixture
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=stack.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


def forecast(city: str, days: int, units: str | None) -> str:
    return f"{days} days of rain in {city}, in {units}"


def test_the_loop_of_a_tool(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(**ASK, tool_choice={"type": "function", "function": {"name": "forecast"}})
    message = first.choices[0].message
    assert first.choices[0].finish_reason == "tool_calls"
    assert message.content is None
    assert message.tool_calls is not None
    (call,) = message.tool_calls
    arguments = json.loads(call.function.arguments)
    jsonschema.validate(arguments, SCHEMA)
    history: Any = [
        *ASK["messages"], message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": forecast(**arguments)},
    ]  # fmt: skip
    last = client.chat.completions.create(**{**ASK, "messages": history, "max_tokens": 12}, tool_choice="none")
    assert last.choices[0].message.tool_calls is None
    assert last.usage is not None
    assert first.usage is not None
    assert last.usage.prompt_tokens > 20


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_required_calls_stream_as_argument_deltas(client: openai.OpenAI, temperature: float) -> None:
    for seed in range(4):
        asked = {
            **ASK,
            "tool_choice": "required",
            "parallel_tool_calls": False,
            "temperature": temperature,
            "seed": seed,
        }
        whole = client.chat.completions.create(**asked)
        assert whole.choices[0].message.tool_calls is not None
        (expected,) = whole.choices[0].message.tool_calls
        pieces, name, finish = [], "", None
        for chunk in client.chat.completions.create(**asked, stream=True):
            choice = chunk.choices[0]
            finish = choice.finish_reason or finish
            for delta in choice.delta.tool_calls or ():
                assert delta.function is not None
                name = delta.function.name or name
                pieces.append(delta.function.arguments or "")
        assert finish == "tool_calls"
        assert (name, "".join(pieces)) == (expected.function.name, expected.function.arguments)
        parameters = next(t["function"]["parameters"] for t in TOOLS if t["function"]["name"] == name)
        jsonschema.validate(json.loads("".join(pieces)), parameters)


def test_several_calls_and_free_answers(client: openai.OpenAI) -> None:
    many = client.chat.completions.create(**ASK, tool_choice="required", temperature=1.0, n=3, seed=1)
    for choice in many.choices:
        for call in choice.message.tool_calls or ():
            if choice.finish_reason == "tool_calls":
                parameters = next(
                    t["function"]["parameters"] for t in TOOLS if t["function"]["name"] == call.function.name
                )
                jsonschema.validate(json.loads(call.function.arguments), parameters)
    free = client.chat.completions.create(**{**ASK, "max_tokens": 8})
    assert free.choices[0].message.content or free.choices[0].message.tool_calls


@pytest.mark.parametrize("victim", ["worker", "scheduler"])
def test_a_call_goes_on_where_a_process_died_in_its_middle(stack: Stack, client: openai.OpenAI, victim: str) -> None:
    """The grammar's state is rebuilt from the journal: the call ends in the tokens of an undisturbed one."""
    items = {"type": "integer", "minimum": 0, "maximum": 999}
    schema = {
        "type": "object", "required": ["numbers"], "additionalProperties": False,
        "properties": {"numbers": {"type": "array", "items": items, "minItems": 80, "maxItems": 80}},
    }  # fmt: skip
    tool: Any = [{"type": "function", "function": {"name": "add", "parameters": schema}}]
    asked = {
        **ASK,
        "tools": tool,
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "max_tokens": 900,
        "seed": 4,
    }
    undisturbed = client.chat.completions.create(**asked)
    assert undisturbed.choices[0].message.tool_calls is not None
    pieces: list[str] = []
    killed = 0
    for chunk in client.chat.completions.create(**asked, stream=True):
        for delta in chunk.choices[0].delta.tool_calls or ():
            assert delta.function is not None
            pieces.append(delta.function.arguments or "")
        if len(pieces) == 20 and not killed:
            killed = stack.kill(victim)
    assert killed
    arguments = "".join(pieces)
    jsonschema.validate(json.loads(arguments), schema)
    assert arguments == undisturbed.choices[0].message.tool_calls[0].function.arguments


def test_what_cannot_be_is_a_400(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{**ASK, "messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]})
    assert caught.value.param == "messages[0].tool_calls[0].function"
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    refused: Any = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{**ASK, "tools": refused}, tool_choice="required")
    assert "uniqueItems" in caught.value.message


def test_tokenize_tells_the_prompt_that_a_chat_would_have(stack: Stack, client: openai.OpenAI) -> None:
    """By the scheduler: as the answer's prompt_token_ids, and no token is computed for it."""

    def get(path: str) -> Any:
        with urllib.request.urlopen(stack.url + path, timeout=60) as reply:
            return json.loads(reply.read())

    for more in ({}, {"tools": TOOLS}, {"add_generation_prompt": False}):
        answer = client.chat.completions.create(
            **{**ASK, "tools": [], "max_tokens": 1}, extra_body={"return_token_ids": True, **more}
        )
        body = {"messages": ASK["messages"], "return_token_strs": True, **more}
        asked = urllib.request.Request(
            stack.url + "/tokenize", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(asked, timeout=60) as reply:
            told, rid = json.loads(reply.read()), reply.headers["X-Request-Id"]
        assert told["tokens"] == answer.model_extra["prompt_token_ids"]  # type: ignore[index]
        assert told["count"] == len(told["tokens"]) == len(told["token_strs"])
        assert told["max_model_len"] > told["count"]
        assert get(f"/v1/requests/{rid}")["response"]["usage"]["completion_tokens"] == 0
    info = get("/tokenizer_info")
    assert info["eos_token"] in {token["content"] for token in info["added_tokens_decoder"].values()}
    assert "message" in info["chat_template"]
    assert str(MODEL) not in json.dumps(info)
    for field, body in {"suffix": {"prompt": "a", "suffix": "b"}, "best_of": {"prompt": "a", "best_of": 2}}.items():
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="demo", **body)  # type: ignore[arg-type]
        assert (caught.value.param, caught.value.code) == (field, "unsupported_parameter")


def test_calls_of_clients_and_of_pushed_jobs_are_parsed_as_over_http(stack: Stack) -> None:
    url = server_url(stack.run_dir / "data")
    with Client(url, "demo") as queue:
        named = {"type": "function", "function": {"name": "forecast"}}
        asked = queue.submit(messages=ASK["messages"], tools=TOOLS, tool_choice=named, max_tokens=200, temperature=0)
        (choice,) = queue.result(asked).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.tool_calls is not None
    assert choice.tool_calls[0]["function"]["name"] == "forecast"
    jsonschema.validate(json.loads(choice.tool_calls[0]["function"]["arguments"]), SCHEMA)
    assert choice.content == ""
    text = 'Wait.\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    job = {
        "messages": ASK["messages"], "tools": TOOLS, "results": "mine",
        "sampling": {"max_tokens": 100, "structure": {"choice": [text]}},
    }  # fmt: skip
    with redis.Redis.from_url(url) as raw:
        raw.xadd("headrace:{demo}:jobs", {"job": json.dumps(job)})
        ((_, ((_, fields),)),) = raw.xread({"headrace:{demo}:results:mine": "0"}, block=60_000)
    result = msgspec.msgpack.decode(fields[b"result"])
    assert (result["finish_reason"], result["text"], result["content"]) == ("tool_calls", text, "Wait.")
    (call,) = result["tool_calls"]
    assert call["function"] == {"name": "now", "arguments": "{}"}
    with urllib.request.urlopen(f"{stack.url}/v1/requests/{result['rid']}", timeout=60) as reply:
        shown = json.loads(reply.read())["response"]["choices"][0]
    assert (shown["finish_reason"], shown["message"]["tool_calls"]) == ("tool_calls", [call])
