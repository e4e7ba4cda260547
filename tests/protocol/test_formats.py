"""Parsers of tool calls and thoughts: the same findings for every split, and no exception for anything."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.formats.families import REASONING, TOOLS
from protocol.formats.parser import Parser
from protocol.formats.spec import FormatSpec, marker_texts, with_controls

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "x": {}}}
FUNCTIONS: dict[str, Any] = {"weather": PARAMETERS, "sum.of": {"type": "object"}}

# The same two calls, as each family writes them: weather(city="Zoë's <b>", days=3) and sum.of()
TWO_CALLS: dict[str, str] = {
    "hermes": '<tool_call>\n{"name": "weather", "arguments": {"city": "Zoë\'s <b>", "days": 3}}\n</tool_call>\n'
    '<tool_call>\n{"name": "sum.of", "arguments": {}}\n</tool_call>',
    "qwen3-coder": "<tool_call>\n<function=weather>\n<parameter=city>\nZoë's <b>\n</parameter>\n"
    "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=sum.of>\n</function>\n"
    "</tool_call>",
    "llama3": '{"name": "weather", "parameters": {"city": "Zoë\'s <b>", "days": 3}}; '
    '{"name": "sum.of", "parameters": {}}',
    "pythonic": '[weather(city="Zoë\'s <b>", days=3), sum.of()]',
    "lfm2": '<|tool_call_start|>[weather(city="Zoë\'s <b>", days=3), sum.of()]<|tool_call_end|>',
    "mistral": '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Zoë\'s <b>", "days": 3}, "id": "123456789"}, '
    '{"name": "sum.of", "arguments": {}, "id": "123456780"}]',
    "mistral-args": '[TOOL_CALLS]weather[CALL_ID]123456789[ARGS]{"city": "Zoë\'s <b>", "days": 3}'
    "[TOOL_CALLS]sum.of[ARGS]{}",
    "deepseek-r1": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
    '{"city": "Zoë\'s <b>", "days": 3}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>sum.of\n'
    "```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek-v3.1": '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Zoë\'s <b>", "days": 3}'
    "<｜tool▁call▁end｜><｜tool▁call▁begin｜>sum.of<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek-v3.2": '<｜DSML｜function_calls>\n<｜DSML｜invoke name="weather">\n'
    '<｜DSML｜parameter name="city" string="true">Zoë\'s <b></｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
    '<｜DSML｜invoke name="sum.of">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>',
    "gpt-oss": "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
    '{"city": "Zoë\'s <b>", "days": 3}<|call|><|start|>assistant to=functions.sum.of<|channel|>commentary json'
    "<|message|>{}<|call|>",
    "glm": "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Zoë's <b></arg_value>\n<arg_key>days</arg_key>\n"
    "<arg_value>3</arg_value>\n</tool_call>\n<tool_call>sum.of\n</tool_call>",
    "kimi-k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
    '{"city": "Zoë\'s <b>", "days": 3}<|tool_call_end|><|tool_call_begin|>functions.sum.of:1'
    "<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
    "granite3": '<|tool_call|>[{"name": "weather", "arguments": {"city": "Zoë\'s <b>", "days": 3}}, '
    '{"name": "sum.of", "arguments": {}}]',
    "phi4": 'functools[{"name": "weather", "arguments": {"city": "Zoë\'s <b>", "days": 3}}, '
    '{"name": "sum.of", "arguments": {}}]',
    "gemma4": '<|tool_call>call:weather{city:<|"|>Zoë\'s <b><|"|>,days:3}<tool_call|>'
    "<|tool_call>call:sum.of{}<tool_call|>",
    "minimax-m2": '<minimax:tool_call>\n<invoke name="weather">\n<parameter name="city">Zoë\'s <b></parameter>\n'
    '<parameter name="days">3</parameter>\n</invoke>\n<invoke name="sum.of">\n</invoke>\n</minimax:tool_call>',
}
EXPECTED = [("weather", {"city": "Zoë's <b>", "days": 3}), ("sum.of", {})]


def spec_of(family: str, *, controls: bool, reasoning: str | None = None) -> FormatSpec:
    """The family's format; with ``controls`` every tag of its markers is a token of its own."""
    spec = FormatSpec(name=family, tools=TOOLS[family], reasoning=REASONING[reasoning] if reasoning else None)
    return with_controls(spec, token_ids(spec)) if controls else spec


def token_ids(spec: FormatSpec) -> dict[str, int]:
    from re import findall

    tags = {tag for text in marker_texts(spec) for tag in findall(r"<[^<>\s=]+>|\[[A-Z_]+\]", text)}
    return {tag: 1000 + i for i, tag in enumerate(sorted(tags))}


def frames(spec: FormatSpec, text: str, cuts: list[int], hidden: bool) -> list[tuple[int, str]]:
    """``text`` as (token, text) of frames: cut at ``cuts``, a token of its own for every control. ``hidden``: their
    text is not in the frames, as that of special tokens."""
    whole: list[tuple[int, str]] = []
    at = 0
    ends = sorted({min(cut, len(text)) for cut in cuts} | {len(text)})
    while at < len(text):
        control = next((c for c in sorted(spec.controls, key=len, reverse=True) if text.startswith(c, at)), None)
        if control is not None:
            whole.append((spec.controls[control], "" if hidden else control))
            at += len(control)
            continue
        nearest = [text.find(c, at) for c in spec.controls if text.find(c, at) >= 0]
        end = min([next(e for e in ends if e > at), *nearest])
        whole.append((5, text[at:end]))
        at = end
    return whole


class Reading:
    """What a parser found in all."""

    def __init__(self, spec: FormatSpec, pieces: list[tuple[int, str]], **settings_: Any) -> None:
        parser = Parser(spec, settings_.pop("functions", FUNCTIONS), **settings_)
        self.content = self.reasoning = ""
        self.calls: list[list[str]] = []
        self.whole: list[int] = []
        for token, text in pieces:
            self._take(parser.feed(token, text))
        self._take(parser.end())
        self.reasoning_tokens = parser.reasoning_tokens

    def _take(self, events: Any) -> None:
        for event in events:
            if event.kind == "content":
                self.content += event.text
            elif event.kind == "reasoning":
                self.reasoning += event.text
            elif event.kind == "call":
                assert event.number == len(self.calls)
                self.calls.append([event.text, ""])
            elif event.kind == "arguments":
                assert event.number == len(self.calls) - 1
                self.calls[-1][1] += event.text
            else:
                self.whole.append(event.number)

    @property
    def parsed(self) -> list[tuple[str, Any]]:
        return [(name, json.loads(arguments)) for name, arguments in self.calls]

    def same(self) -> tuple[Any, ...]:
        return self.content, self.reasoning, self.calls, self.whole


cuts = st.lists(st.integers(1, 400), max_size=40)


@pytest.mark.parametrize("family", sorted(TOOLS))
@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("controls", [False, True])
@given(cuts=cuts, hidden=st.booleans(), before=st.sampled_from(["", "Let me look.\n"]))
@settings(max_examples=6, deadline=None)
def test_two_calls_however_the_text_is_cut(
    family: str, eager: bool, controls: bool, cuts: list[int], hidden: bool, before: str
) -> None:
    spec = spec_of(family, controls=controls)
    if spec.tools is not None and spec.tools.bare:
        before = ""
    if family == "gpt-oss" and before:
        text = f"<|channel|>commentary<|message|>{before}<|end|><|start|>assistant{TWO_CALLS[family]}"
    else:
        text = before + TWO_CALLS[family]
    found = Reading(spec, frames(spec, text, cuts, hidden), eager=eager)
    assert found.parsed == EXPECTED
    assert found.whole == [0, 1]
    assert found.content.rstrip() == before.rstrip()


FRAGMENTS = ["weather", "sum.of", "city", "days", " ", "\n", "{", "}", "[", "]", '"', ":", ",", "\\", "3", "é", "<",
             ">", '{"name": "weather", "arguments": {', '"city": "a"', "}}", "<think>", "</think>", "name", "arguments",
             "(city='a')", "x=[1", "text", "'"]  # fmt: skip


@pytest.mark.parametrize("family", sorted(TOOLS))
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_whatever_a_model_writes(family: str, data: st.DataObject) -> None:
    """Any soup of markers is read without an exception, alike for every split, and no letter of content is lost where
    there is no call and no thought."""
    controls = data.draw(st.booleans())
    spec = spec_of(family, controls=controls, reasoning="think")
    own = sorted({piece for text in marker_texts(spec) for piece in [text, *text.split()]})
    text = "".join(data.draw(st.lists(st.sampled_from([*own, *FRAGMENTS]), max_size=25)))
    thinking = data.draw(st.booleans())
    eager = data.draw(st.booleans())
    cut = [data.draw(cuts), [], list(range(1, len(text) + 1))]
    readings = [Reading(spec, frames(spec, text, c, False), thinking=thinking, eager=eager).same() for c in cut]
    assert readings[0] == readings[1] == readings[2]
    content, reasoning, calls, whole = readings[0]
    if not calls and not reasoning and not thinking and "think>" not in text and family != "gpt-oss":
        assert content == text
    for number in whole:
        assert isinstance(json.loads(calls[number][1]), dict)
