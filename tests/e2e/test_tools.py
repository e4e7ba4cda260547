"""The loop of a tool through real processes, by the unmodified client: a call that its schema rules, its result, an
answer. The model is the tree's own, whose chat template knows no tools."""

from __future__ import annotations

import json
import urllib.request
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


def called(choice: dict[str, Any]) -> dict[str, Any]:
    """Name -> arguments of the calls of a result or a message, each by its schema."""
    made = {one["function"]["name"]: json.loads(one["function"]["arguments"]) for one in choice["tool_calls"]}
    for tool in TOOLS:
        if tool["function"]["name"] in made:
            jsonschema.validate(made[tool["function"]["name"]], tool["function"]["parameters"])
    return made


NAMED = {"type": "function", "function": {"name": "forecast"}}


def test_calls_of_clients_are_parsed_as_over_http(stack: Stack) -> None:
    with Client(server_url(stack.run_dir / "data"), "demo") as queue:
        asked = queue.submit(messages=ASK["messages"], tools=TOOLS, tool_choice=NAMED, max_tokens=200, temperature=0)
        (choice,) = queue.result(asked).choices
    assert choice.finish_reason == "tool_calls"
    assert called({"tool_calls": choice.tool_calls}).keys() == {"forecast"}
    assert choice.content == ""


def pushed(stack: Stack, results: str, **fields: Any) -> dict[str, Any]:
    """The result of a job as a stranger pushes it."""
    job = {"messages": ASK["messages"], "tools": TOOLS, "results": results, **fields}
    with redis.Redis.from_url(server_url(stack.run_dir / "data")) as raw:
        raw.xadd("headrace:{demo}:jobs", {"job": json.dumps(job)})
        ((_, ((_, told),)),) = raw.xread({f"headrace:{{demo}}:results:{results}": "0"}, block=60_000)
    return msgspec.msgpack.decode(told[b"result"])  # type: ignore[no-any-return]


def shown(stack: Stack, rid: str) -> dict[str, Any]:
    """The choice of a pushed job's answer, as HTTP tells it."""
    with urllib.request.urlopen(f"{stack.url}/v1/requests/{rid}", timeout=60) as reply:
        return json.loads(reply.read())["response"]["choices"][0]  # type: ignore[no-any-return]


def test_a_pushed_job_names_the_function_that_is_called(stack: Stack) -> None:
    sampling = {"max_tokens": 200, "temperature": 0}
    result = pushed(stack, "named", tool_choice=NAMED, sampling=sampling)
    assert (result["finish_reason"], called(result).keys()) == ("tool_calls", {"forecast"})
    assert "content" not in result
    choice = shown(stack, result["rid"])
    assert (choice["finish_reason"], choice["message"]["tool_calls"]) == ("tool_calls", result["tool_calls"])
    one = pushed(stack, "one", tool_choice="required", parallel_tool_calls=False, sampling=sampling)
    assert len(called(one)) == 1
    quiet = pushed(stack, "quiet", tool_choice="none", sampling={"max_tokens": 4})
    assert "tool_calls" not in quiet
    refused = pushed(stack, "refused", tool_choice={"type": "function", "function": {"name": "else"}})
    assert (refused["error"]["code"], refused["error"]["param"]) == ("invalid_request", "tool_choice")


def test_text_before_a_call_of_a_pushed_job_is_its_content(stack: Stack) -> None:
    text = 'Wait.\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    # An answer with tools is a call or what the structure says: the bias makes it begin as the text does.
    (first, *_) = tokens_of(stack, text)
    sampling = {"max_tokens": 100, "structure": {"choice": [text]}, "logit_bias": {str(first): 100}}
    result = pushed(stack, "mine", sampling=sampling)
    assert (result["finish_reason"], result["text"], result["content"]) == ("tool_calls", text, "Wait.")
    (call,) = result["tool_calls"]
    assert call["function"] == {"name": "now", "arguments": "{}"}
    choice = shown(stack, result["rid"])
    assert (choice["finish_reason"], choice["message"]["tool_calls"]) == ("tool_calls", [call])


def tokens_of(stack: Stack, text: str) -> list[int]:
    asked = urllib.request.Request(
        stack.url + "/tokenize", json.dumps({"prompt": text}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(asked, timeout=60) as reply:
        return json.loads(reply.read())["tokens"]  # type: ignore[no-any-return]
