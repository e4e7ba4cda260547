"""The one form of messages: what each way of writing them becomes, what is left out, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.chat import check_template_arguments, normal_messages
from protocol.errors import InvalidRequest, http_status

SECRET = "the quick brown secret"
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def assistant(content: Any = "", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def text(words: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": words, **more}


def called(arguments: Any) -> dict[str, Any]:
    return assistant(tool_calls=[{"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}}])


SAME: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("a text", user("a"), user("a")),
    ("an empty text", user(""), user("")),
    ("parts are joined by line breaks", user([text("a"), text("b")]), user("a\nb")),
    ("names of the other API", user([{"type": "input_text", "text": "a"}]), user("a")),
    ("a part's own fields", user([text("a", cache_control={"type": "ephemeral"})]), user("a")),
    ("a message's own fields", user("a", cache_control={"type": "x"}, annotations=[], weight=1), user("a")),
    ("developer", {"role": "developer", "content": "a"}, {"role": "system", "content": "a"}),
    ("a name", user("a", name="Ann"), user("a", name="Ann")),
    ("no name", user("a", name=None), user("a")),
    ("a tool's result", {"role": "tool", "tool_call_id": "c1", "content": [text("a")]},
     {"role": "tool", "content": "a", "tool_call_id": "c1"}),
    ("a function's result", {"role": "function", "name": "f", "content": "a"},
     {"role": "tool", "content": "a", "name": "f"}),
    ("an assistant that says nothing", assistant(None), assistant("")),
    ("the same without the field", {"role": "assistant"}, assistant("")),
    ("an empty list", assistant([]), assistant("")),
    ("a refusal", assistant(None, refusal="No."), assistant("No.")),
    ("a refusal as a part", assistant([text("a"), {"type": "refusal", "refusal": "No."}]), assistant("a\nNo.")),
    ("words beside a refusal", assistant("a", refusal=None, audio=None), assistant("a")),
    ("reasoning", assistant("a", reasoning_content="b"), assistant("a", reasoning_content="b")),
    ("reasoning by its newer name", assistant("a", reasoning="b"), assistant("a", reasoning_content="b")),
    ("reasoning of another server", assistant("a", thinking="b"), assistant("a", reasoning_content="b")),
    ("no reasoning", assistant("a", reasoning_content=None, reasoning=None), assistant("a")),
    ("reasoning of nobody else", user("a", reasoning="b"), user("a")),
    ("arguments as a map", called({"a": 1}), assistant(tool_calls=[CALL])),
    ("arguments as text", called('{"a": 1}'), assistant(tool_calls=[CALL])),
    ("calls and null", {**called('{"a": 1}'), "content": None}, assistant(tool_calls=[CALL])),
    ("no arguments", called(None), called({})),
    ("empty arguments", called(" "), called({})),
    ("calls with fields of their own", assistant(tool_calls=[{**CALL, "index": 0}]), assistant(tool_calls=[CALL])),
    ("a call without type and id", assistant(tool_calls=[{"function": {"name": "f"}}]),
     assistant(tool_calls=[{"type": "function", "function": {"name": "f", "arguments": {}}}])),
    ("no calls", assistant("a", tool_calls=[], function_call=None), assistant("a")),
    ("no calls of a user", user("a", tool_calls=None), user("a")),
    ("the older call", assistant(function_call={"name": "f", "arguments": '{"a": 1}'}),
     assistant(tool_calls=[{"type": "function", "function": CALL["function"]}])),
]  # fmt: skip


@pytest.mark.parametrize(("given", "normal"), [case[1:] for case in SAME], ids=[case[0] for case in SAME])
def test_one_form(given: dict[str, Any], normal: dict[str, Any]) -> None:
    assert normal_messages([given]) == [normal]
    assert normal_messages([normal]) == [normal]


REFUSED: list[tuple[Any, str]] = [
    (None, "messages"),
    ([], "messages"),
    (SECRET, "messages"),
    ([user("a")] * 1025, "messages"),
    ([SECRET], "messages[0]"),
    ([user("a"), {"content": SECRET}], "messages[1].role"),
    ([{"role": SECRET, "content": "a"}], "messages[0].role"),
    ([{"role": ["user"], "content": "a"}], "messages[0].role"),
    ([user(None)], "messages[0].content"),
    ([{"role": "system"}], "messages[0].content"),
    ([{"role": "tool", "content": None}], "messages[0].content"),
    ([user([])], "messages[0].content"),
    ([user(5)], "messages[0].content"),
    ([user({"text": SECRET})], "messages[0].content"),
    ([assistant(5)], "messages[0].content"),
    ([user([SECRET])], "messages[0].content[0].type"),
    ([user([text("a"), {"type": SECRET}])], "messages[0].content[1].type"),
    ([user([{"type": "image_url", "image_url": {"url": SECRET}}])], "messages[0].content[0].type"),
    ([user([{"type": "refusal", "refusal": SECRET}])], "messages[0].content[0].type"),
    ([user([{"type": "text"}])], "messages[0].content[0].text"),
    ([user([text(["a"])])], "messages[0].content[0].text"),  # type: ignore[arg-type]
    ([user("a", name=5)], "messages[0].name"),
    ([user("a", images=[SECRET])], "messages[0].images"),
    ([assistant(None, audio={"id": SECRET})], "messages[0].audio"),
    ([assistant("a", prefix=True)], "messages[0].prefix"),
    ([assistant("a", partial=True)], "messages[0].partial"),
    ([assistant(None, refusal=5)], "messages[0].refusal"),
    ([assistant("a", reasoning=["b"])], "messages[0].reasoning"),
    ([{"role": "tool", "content": "a", "tool_call_id": 5}], "messages[0].tool_call_id"),
    ([user("a", tool_calls=[CALL])], "messages[0].tool_calls"),
    ([user("a", function_call={"name": "f"})], "messages[0].function_call"),
    ([assistant(tool_calls={"id": SECRET})], "messages[0].tool_calls"),
    ([assistant(tool_calls=[SECRET])], "messages[0].tool_calls[0]"),
    ([assistant(tool_calls=[CALL, {"id": "c2"}])], "messages[0].tool_calls[1].function"),
    ([assistant(tool_calls=[{**CALL, "type": "custom"}])], "messages[0].tool_calls[0].type"),
    ([assistant(tool_calls=[{**CALL, "id": 5}])], "messages[0].tool_calls[0].id"),
    ([assistant(tool_calls=[{"function": {"arguments": "{}"}}])], "messages[0].tool_calls[0].function.name"),
    *(([called(value)], "messages[0].tool_calls[0].function.arguments")
      for value in (SECRET, "[1]", "5", "{", '{"a": NaN}', "[" * 100_000, 5, [1])),
    ([called('{"a": 18446744073709551615}')], "messages"),
    ([called('{"a": ' + "[" * 40 + "]" * 40 + "}")], "messages"),
    ([user("a\ud800")], "messages"),
]  # fmt: skip


@pytest.mark.parametrize(("messages", "param"), REFUSED, ids=[f"{i} {case[1]}" for i, case in enumerate(REFUSED)])
def test_refused_by_name(messages: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        normal_messages(messages)
    assert caught.value.param == param
    assert param in caught.value.message
    assert SECRET not in caught.value.message
    assert http_status(caught.value.wire_code) == 400


def test_template_arguments_that_are_not_a_requests_to_give() -> None:
    check_template_arguments({"enable_thinking": False, "documents": [{"title": "a", "text": "b"}]})
    for name in ("chat_template", "messages", "tokenize", "tokenizer_kwargs", "sanitize_control_tokens"):
        with pytest.raises(InvalidRequest) as caught:
            check_template_arguments({name: SECRET})
        assert caught.value.param == f"chat_template_kwargs.{name}"
    with pytest.raises(InvalidRequest):
        check_template_arguments({"x": float("inf")})


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.binary(max_size=3)
trees = st.recursive(scalars, lambda t: st.lists(t, max_size=3) | st.dictionaries(st.text(max_size=5), t, max_size=3))
functions = st.fixed_dictionaries({"name": st.text(max_size=3)}, optional={"arguments": trees | st.just('{"a": [1]}')})
calls = st.lists(st.fixed_dictionaries({}, optional={"id": trees, "type": trees, "function": functions | trees}))
fields = {
    "role": st.sampled_from(["user", "assistant", "tool", "developer", "system", "function"]),
    "content": trees | st.lists(st.builds(text, st.text(max_size=4)), max_size=3),
    "tool_calls": calls | trees,
    "function_call": functions | trees,
    "other": trees,
    **dict.fromkeys(("name", "refusal", "reasoning", "reasoning_content", "audio", "tool_call_id"), trees),
}


@settings(max_examples=300, deadline=None)
@given(st.lists(st.fixed_dictionaries({}, optional=fields), max_size=3))
def test_anything_becomes_the_one_form_or_is_refused(messages: Any) -> None:
    try:
        normal = normal_messages(messages)
    except InvalidRequest:
        return
    assert normal_messages(normal) == normal
    for message in normal:
        assert isinstance(message["content"], str)
        assert set(message) <= {"role", "content", "reasoning_content", "tool_calls", "name", "tool_call_id"}
        for call in message.get("tool_calls", ()):
            assert isinstance(call["function"]["arguments"], dict)
