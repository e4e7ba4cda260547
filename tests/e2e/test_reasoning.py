"""Thoughts through real processes: what is asked for begins after them, whoever opens them and wherever they move."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from jsonschema import Draft202012Validator

from tests.models import THINK, THOUGHT, save_thinking_model
from tests.stack import Stack

SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["function", "class"]}, "lines": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["kind", "lines"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
TOOLS: Any = [{"type": "function", "function": {"name": "note", "parameters": SCHEMA}}]
BUDGET = 12
# who opens the thought: the fields that make it so
OPENED: dict[str, dict[str, Any]] = {
    "the prompt": {},
    "the model": {"chat_template_kwargs": {"opens": False}, "logit_bias": {str(THINK): 100}},
    "nobody": {"chat_template_kwargs": {"opens": False}, "logit_bias": {str(THINK): -100}},
    "nobody, it was closed": {"enable_thinking": False},
    "nobody, by effort": {"reasoning_effort": "none"},
}


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    model = tmp_path_factory.mktemp("model")
    save_thinking_model(model)
    with Stack(
        tmp_path_factory.mktemp("thinker"), "--model", str(model), "--served-model-name", "thinker",
        "--dtype", "float32", "--tool-format", "hermes", "--max-num-seqs", "8", "--kv-cache-memory", "32MiB",
    ) as running:  # fmt: skip
        yield running


@pytest.fixture
def client(thinker: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=thinker.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


def body_of(**fields: Any) -> dict[str, Any]:
    return {
        "model": "thinker", "messages": [{"role": "user", "content": "Why?"}], "max_tokens": 200, "seed": 3,
        "thinking_token_budget": BUDGET, "return_token_ids": True, **fields,
    }  # fmt: skip


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    body = body_of(**fields)
    return client.chat.completions.create(
        model=body.pop("model"), messages=body.pop("messages"), extra_body=body, stream=body.pop("stream", False)
    )


def thought_of(choice: Any) -> list[int]:
    """The ids of a choice up to the end of its thought; none where there is no such end."""
    ids = choice.model_extra["token_ids"]
    return ids[: ids.index(THOUGHT) + 1] if THOUGHT in ids else []


@pytest.mark.parametrize("asked", [
    {"response_format": FORMAT}, {"structured_outputs": {"grammar": "start: /[ab]{3}/"}}, {"guided_choice": ["ja"]},
])  # fmt: skip
@pytest.mark.parametrize("opened", OPENED)
def test_what_is_asked_for_begins_after_the_thought(client: openai.OpenAI, opened: str, asked: dict[str, Any]) -> None:
    answer = ask(client, **OPENED[opened], **asked)
    choice, thought = answer.choices[0], thought_of(answer.choices[0])
    content = choice.message.content
    assert choice.finish_reason == "stop", choice
    if "response_format" in asked:
        Draft202012Validator(SCHEMA).validate(json.loads(content))
    else:
        assert re.fullmatch("[ab]{3}|ja", content)
    most = {"the prompt": BUDGET, "the model": BUDGET + 1}.get(opened, -1)
    assert len(thought) <= most + 1  # and the id that ends it
    assert bool(thought) == bool(choice.message.model_extra.get("reasoning")) == (most > 0)
    assert answer.usage.completion_tokens_details.reasoning_tokens == len(thought)
    assert answer.usage.completion_tokens == len(choice.model_extra["token_ids"])


@pytest.mark.parametrize("opened", [name for name in OPENED if name.startswith("nobody")])
def test_a_budget_breaks_no_answer_without_a_thought(client: openai.OpenAI, opened: str) -> None:
    """Neither is the end of a thought forced into it, nor an end kept from it."""
    free = ask(client, **OPENED[opened], max_tokens=40, seed=5, thinking_token_budget=0)
    plain = ask(client, **OPENED[opened], max_tokens=40, seed=5, thinking_token_budget=None)
    assert free.choices[0].model_extra["token_ids"] == plain.choices[0].model_extra["token_ids"]


def test_an_end_within_the_thought_is_a_length(client: openai.OpenAI) -> None:
    never = {"logit_bias": {str(THOUGHT): -100}, "thinking_token_budget": None, "max_tokens": 8, "ignore_eos": True}
    for asked in ({"response_format": FORMAT}, {}, {"tools": TOOLS, "tool_choice": "required"}):
        answer = ask(client, **never, **asked)
        (choice,) = answer.choices
        assert (choice.finish_reason, choice.message.content) == ("length", "")
        assert choice.message.tool_calls is None
        assert choice.message.model_extra["reasoning_content"]
        assert answer.usage.completion_tokens_details.reasoning_tokens == 8


@pytest.mark.parametrize("opened", ["the prompt", "the model"])
def test_streamed_as_whole_and_hidden_where_it_is_not_wanted(client: openai.OpenAI, opened: str) -> None:
    asked = {**OPENED[opened], "tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    whole = ask(client, **asked).choices[0].message
    (call,) = whole.tool_calls
    Draft202012Validator(SCHEMA).validate(json.loads(call.function.arguments))
    assert whole.model_extra["reasoning"] == whole.model_extra["reasoning_content"] != ""
    for include in (None, False):
        fields, arguments, usage = list[str](), "", None
        seen: dict[str, str] = {}
        for chunk in ask(
            client, **asked, stream=True, stream_options={"include_usage": True}, include_reasoning=include
        ):
            usage = chunk.usage or usage
            for choice in chunk.choices:
                for field in ("reasoning_content", "reasoning"):
                    if text := (choice.delta.model_extra or {}).get(field):
                        fields.append(field)
                        seen[field] = seen.get(field, "") + text
                for one in choice.delta.tool_calls or ():
                    fields.append("call")
                    arguments += one.function.arguments or ""
        assert arguments == call.function.arguments
        assert usage.completion_tokens_details.reasoning_tokens > 1
        if include is None:
            assert seen == dict.fromkeys(("reasoning_content", "reasoning"), whole.model_extra["reasoning"])
            assert fields == sorted(fields, key="call".__eq__)  # the thought first
        else:
            assert seen == {}
    hidden = ask(client, **asked, include_reasoning=False).choices[0].message
    assert not {"reasoning", "reasoning_content"} & set(hidden.model_extra)
    assert hidden.tool_calls[0].function.arguments == call.function.arguments


def test_history_with_a_thought_reaches_the_template(client: openai.OpenAI) -> None:
    for field in ("reasoning_content", "reasoning"):
        history = [
            {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So.", field: "hm, well"},
            {"role": "user", "content": "And?"},
        ]  # fmt: skip
        answer = ask(client, messages=history, max_tokens=1)
        ids = answer.model_extra["prompt_token_ids"]
        at = ids.index(THINK)
        assert bytes(ids[at + 1 : ids.index(THOUGHT)]) == b"\nhm, well\n"
        assert ids[-2:] == [THINK, ord("\n")]  # and the next one is opened


def test_an_answer_that_is_begun_within_its_thought(client: openai.OpenAI) -> None:
    """The rest of the thought, up to its end, then what is asked for."""
    begun = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "<think>\nhm"}]
    answer = ask(client, messages=begun, continue_final_message=True, response_format=FORMAT)
    (choice,) = answer.choices
    assert answer.model_extra["prompt_token_ids"][-4:] == [THINK, *b"\nhm"]
    assert 1 < len(thought_of(choice)) <= BUDGET + 1
    assert choice.message.model_extra["reasoning"]
    Draft202012Validator(SCHEMA).validate(json.loads(choice.message.content))


def events_of(stack: Stack, path: str, headers: dict[str, str], body: Any = None) -> list[bytes]:
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(stack.url + path, data, {"Content-Type": "application/json", **headers})
    with urllib.request.urlopen(asked, timeout=60) as reply:
        return [event + b"\n\n" for event in reply.read().split(b"\n\n") if event.strip()]


@pytest.mark.parametrize("shown", [True, False])
def test_a_stream_is_taken_up_within_the_thought(thinker: Stack, shown: bool) -> None:
    body = body_of(
        response_format=FORMAT, stream=True, stream_options={"include_usage": True}, return_token_ids=None,
        include_reasoning=shown,
    )  # fmt: skip
    events = events_of(thinker, "/v1/chat/completions", {"X-Headrace-Resume": "60"}, body)
    rid = json.loads(events[0].split(b"data: ", 1)[1])["id"].removeprefix("chatcmpl-")
    assert any(b"reasoning_content" in event for event in events) is shown
    for number, event in enumerate(events[:-1]):
        seen = event.split(b"id: ", 1)[1].split(b"\n", 1)[0].decode()
        rest = events_of(thinker, f"/v1/streams/{rid}", {"Last-Event-ID": seen})
        assert b"".join(rest) == b"".join(events[number + 1 :]), seen


@pytest.mark.parametrize("victim", ["worker", "scheduler"])
def test_a_thought_goes_on_where_a_process_died_in_its_middle(
    thinker: Stack, client: openai.OpenAI, victim: str
) -> None:
    """The budget counts on from the journal, and the grammar begins where it would have begun."""
    asked = {"response_format": FORMAT, "thinking_token_budget": 250, "max_tokens": 350, "seed": 8,
             "logit_bias": {str(THOUGHT): -100}}  # fmt: skip
    undisturbed = ask(client, **asked).choices[0].model_extra["token_ids"]
    assert undisturbed[250] == THOUGHT
    ids: list[int] = []
    killed = 0
    for chunk in ask(client, **asked, stream=True):
        ids += (chunk.choices[0].model_extra or {}).get("token_ids") or ()
        if len(ids) >= 20 and not killed:
            killed = thinker.kill(victim)
            assert THOUGHT not in ids
    assert ids == undisturbed
