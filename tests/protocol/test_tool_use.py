"""What a chat asks of its tools becomes rules: once, for gateways, clients and pushed jobs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from protocol.errors import InvalidRequest
from protocol.formats.families import REASONING, TOOLS
from protocol.formats.spec import FormatSpec
from protocol.formats.tool_use import with_tools
from protocol.jobs import check_job, decode_job
from protocol.levels import job_level
from protocol.messages import Job

SPEC = FormatSpec(name="hermes", tools=TOOLS["hermes"], controls={"<tool_call>": 300, "</tool_call>": 301}, ends=[310])
THINKS = FormatSpec(name="think", reasoning=REASONING["think"], controls={"<think>": 302, "</think>": 303})
ASK: dict[str, Any] = {
    "messages": [{"role": "user", "content": "hi"}],
    "tools": [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in "fg"],
}


def pushed(**more: Any) -> Job:
    return decode_job(json.dumps({**ASK, **more}).encode())


def grammar_of(**more: Any) -> str:
    made = with_tools(pushed(**more), SPEC)
    assert made.sampling.structure is not None
    return made.sampling.structure.grammar or ""


def test_a_named_function_is_all_that_a_pushed_job_may_call() -> None:
    named = with_tools(pushed(tool_choice={"type": "function", "function": {"name": "g"}}), SPEC)
    assert named.sampling.structure is not None
    assert named.sampling.structure.field == "tools"
    assert '\\"g\\"' in (named.sampling.structure.grammar or "")
    assert '\\"f\\"' not in (named.sampling.structure.grammar or "")
    assert [tool["function"]["name"] for tool in named.tools or ()] == ["f", "g"]  # the model is told of both
    assert (named.format, named.sampling.stop_token_ids) == (SPEC, [310])


def test_required_calls_are_one_where_they_may_not_be_parallel() -> None:
    several, one = grammar_of(tool_choice="required"), grammar_of(tool_choice="required", parallel_tool_calls=False)
    assert several != one
    assert grammar_of() != several  # auto


def test_none_tells_the_model_of_no_tool() -> None:
    quiet = with_tools(pushed(tool_choice="none", parallel_tool_calls=True), SPEC)
    assert (quiet.tools, quiet.format, quiet.sampling.structure, quiet.sampling.stop_token_ids) == (
        None,
        None,
        None,
        [],
    )


def test_what_is_stored_says_all_by_its_sampling() -> None:
    """So a leader of a version that knows no tool_choice can take it over, and nothing is ruled twice."""
    job = pushed(tool_choice="required", parallel_tool_calls=False)
    made = with_tools(job, SPEC)
    assert (made.tool_choice, made.parallel_tool_calls) == (None, None)
    assert (job_level(job), job_level(made)) == (5, 1)
    assert with_tools(made, SPEC) is made
    check_job(made)


def test_a_model_that_thinks_is_read_without_tools_too() -> None:
    plain = decode_job(json.dumps({"messages": ASK["messages"]}).encode())
    assert with_tools(plain, THINKS).format == THINKS
    assert with_tools(plain, None) == plain
    text = decode_job(b'{"prompt": "hi"}')
    assert with_tools(text, THINKS) is text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "h"}}}, "tool_choice"),
        ({"tool_choice": "perhaps"}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": None}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"tools": 5}}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "tools": {"f": 1}}}, "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tools": ASK["tools"][:1] * 2}, "tools"),
        ({"tools": [{"type": "search", "function": {"name": "f"}}]}, "tools[0].type"),
        ({"tool_choice": "required", "sampling": {"structure": {"json_object": True}}}, "tool_choice"),
    ],
)
def test_what_cannot_be_names_its_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        with_tools(pushed(**fields), SPEC)
    assert caught.value.param == param


@pytest.mark.parametrize("field", ["tools", "tool_choice", "parallel_tool_calls"])
def test_a_prompt_has_no_tools(field: str) -> None:
    value = {"tools": ASK["tools"], "tool_choice": "none", "parallel_tool_calls": True}[field]
    with pytest.raises(InvalidRequest) as caught:
        decode_job(json.dumps({"prompt": "hi", field: value}).encode())
    assert caught.value.param == field


def test_a_template_without_tools_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequest) as caught:
        with_tools(pushed(), THINKS)
    assert caught.value.param == "tools"
    kept = with_tools(Job(messages=ASK["messages"], sampling=pushed().sampling, tool_choice="auto"), THINKS)
    assert kept.sampling.structure is None
