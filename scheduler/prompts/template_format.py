"""What a chat template tells of the way its model writes tool calls: sentinel calls are rendered and looked for.

One idea: a template that renders an assistant's calls shows, around values that we chose, every marker there is. What
is derived so is taken only if it reads back what the template writes: texts, types and several calls at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import msgspec

from protocol.formats.families import REASONING
from protocol.formats.parser import Parser
from protocol.formats.spec import FormatSpec, Tools

Render = Callable[..., str]  # (messages, tools=..., add_generation_prompt=...) -> text; raises what the template raises

NAME, OTHER = "zq_function", "zq_function_b"
KEY, KEY_B = "zqkeya", "zqkeyb"
VALUE, VALUE_B = "zqvala", "zqvalb"
TEXT = "zqcontent"
IDS = ("zqid00001", "zqid00002")
_INSIDE_TAG = re.compile(r"[<\[][^<>\[\]\s]{0,40}$")
_DECODER = json.JSONDecoder()


class NotDerived(Exception):
    """Nothing sound can be told from this template."""


def schema(*keys: str, types: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"type": "object", "properties": {k: {"type": (types or {}).get(k, "string")} for k in keys}}


def tool(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": parameters}}


def call(arguments: dict[str, Any], number: int = 0, name: str = NAME) -> dict[str, Any]:
    return {"id": IDS[number], "type": "function", "function": {"name": name, "arguments": arguments}}


TOOLS = [tool(NAME, schema(KEY, KEY_B)), tool(OTHER, schema(KEY, KEY_B))]


class Turns:
    """What an assistant's turn looks like: the text after the prompt that would have made the model write it."""

    def __init__(self, render: Render) -> None:
        self._render = render
        self.text_arguments = False  # the template wants arguments as JSON text

    def turn(self, content: str = "", calls: list[dict[str, Any]] | None = None) -> str:
        """Raises NotDerived where the template raises."""
        user = {"role": "user", "content": "hello"}
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if calls:
            message["tool_calls"] = [self._arguments(one) for one in calls]
        try:
            whole = self._render([user, message], tools=TOOLS, add_generation_prompt=False)
            prompt = self._render([user], tools=TOOLS, add_generation_prompt=True)
        except Exception as error:  # a template's code fails in whatever way it likes
            raise NotDerived(type(error).__name__) from None
        shared = len(_common_start(prompt, whole))
        if shared < len(prompt):
            shared = _tag_start(whole[:shared])
        return whole[shared:]

    def _arguments(self, one: dict[str, Any]) -> dict[str, Any]:
        if not self.text_arguments:
            return one
        function = one["function"]
        text = json.dumps(function["arguments"], ensure_ascii=False)
        return {**one, "function": {**function, "arguments": text}}


def derive_tools(render: Render) -> tuple[Tools, str]:
    """The tool format that a template writes, and an example of a turn. NotDerived if none can be told for sure."""
    turns = Turns(render)
    plain = turns.turn(TEXT)
    if TEXT not in plain:
        raise NotDerived("an assistant's content is not where its turn begins")
    one = _first(turns)
    end = plain.split(TEXT, 1)[1]
    made = _json_call(turns, one, end) or _json_arguments(turns, one, end) or _tagged(turns, one, end)
    trigger = (made.section_open or made.call_open).split()
    if not trigger or len(trigger[0]) < 3 or not set("<[|") & set(trigger[0]):
        raise NotDerived("calls have no marker of their own")
    if not reads_back(made, turns):
        raise NotDerived("what it writes is not read back")
    try:
        turns.turn(calls=[{**call({KEY: VALUE}), "id": "call_of_another_length"}])
    except NotDerived:
        made = msgspec.structs.replace(made, ids="nine")
    return made, one


def _first(turns: Turns) -> str:
    """A turn with one call. Sets ``text_arguments`` where only that works."""
    for text_arguments in (False, True):
        turns.text_arguments = text_arguments
        try:
            one = turns.turn(calls=[call({KEY: VALUE})])
        except NotDerived:
            continue
        if NAME in one and VALUE in one:
            return one
    raise NotDerived("it renders no calls")


# ------------------------------------------------------------------ kinds of bodies


def _json_call(turns: Turns, one: str, end: str) -> Tools | None:
    """The whole call is JSON: an object, or a list of objects."""
    first = min(one.index(NAME), one.index(VALUE))
    last = max(one.index(NAME), one.index(VALUE))
    for start in (i for i in range(first) if one[i] in "{["):
        value, stop = _decoded(one, start)
        if stop <= last or not isinstance(value, dict | list):
            continue
        listed = isinstance(value, list)
        at = _paths(value[0] if listed else value)
        if at is None:
            return None
        opened, closed = _own(one[:start]).lstrip(), _without(one[stop:], end).rstrip()
        if listed:
            return Tools(kind="json", listed=True, call_open=opened, call_close=closed, **at)
        return _sections(turns, Tools(kind="json", **at), one, start, stop, end)
    return None


def _paths(value: Any) -> dict[str, Any] | None:
    """Where name and arguments lie in the object of a call."""
    if isinstance(value, dict) and list(value) == [NAME] and value[NAME] == {KEY: VALUE}:
        return {"keyed": True}
    found: dict[str, Any] = {}

    def walk(inner: Any, path: tuple[str, ...]) -> None:
        if inner == NAME:
            found["name_at"] = path
        elif inner == {KEY: VALUE} or (isinstance(inner, str) and VALUE in inner):
            found["args_at"] = path
        elif isinstance(inner, dict):
            for key, below in inner.items():
                walk(below, (*path, key))

    walk(value, ())
    return found if len(found) == 2 else None


def _json_arguments(turns: Turns, one: str, end: str) -> Tools | None:
    """The name, then the arguments as JSON."""
    name = one.index(NAME)
    for start in (i for i in range(one.index(VALUE)) if one[i] == "{"):
        value, stop = _decoded(one, start)
        if value != {KEY: VALUE}:
            continue
        if start < name:
            return None
        before, between = one[:name], one[name + len(NAME) : start]
        if IDS[0] in before:  # the id comes first
            before, _, id_close = before.partition(IDS[0])
            return _sections(
                turns, Tools(kind="args", id_close=id_close, name_close=between), one, len(before), stop, end
            )
        if IDS[0] in between:
            between, _, args_open = between.partition(IDS[0])
            return _sections(turns, Tools(kind="args", args_open=args_open), one, name, stop, end)
        if indexed := re.fullmatch(r":0(\D.*)", between, re.DOTALL):
            prefix = name - len("functions.") if before.endswith("functions.") else name
            return _sections(turns, Tools(kind="args", name_close=indexed[1], ids="indexed"), one, prefix, stop, end)
        return _sections(turns, Tools(kind="args", name_close=between), one, name, stop, end)
    return None


def _tagged(turns: Turns, one: str, end: str) -> Tools:
    """The name, then each argument between tags. Two arguments show what stands between them."""
    two = turns.turn(calls=[call({KEY: VALUE, KEY_B: VALUE_B})])
    if any(part not in two for part in (VALUE, VALUE_B, KEY_B)) or KEY not in one:
        raise NotDerived("arguments are not where they were looked for")
    name, key, value = one.index(NAME), one.index(KEY), one.index(VALUE)
    if not name < key < value:
        raise NotDerived("the order of a call's parts is not known here")
    to_value = one[key + len(KEY) : value]
    if two[two.index(KEY_B) + len(KEY_B) : two.index(VALUE_B)] != to_value:
        raise NotDerived("arguments are not written alike")
    head, tail = one[name + len(NAME) : key], one[value + len(VALUE) :]
    joint = two[two.index(VALUE) + len(VALUE) : two.index(KEY_B)]  # close of a value, open of a key
    value_close = _common_start(joint, tail)
    value_close = value_close[: _tag_start(value_close)]
    key_open = _common_end(head, joint[len(value_close) :])
    if len(value_close) + len(key_open) != len(joint):
        raise NotDerived("something stands between arguments")
    if not key_open.strip() or not value_close.strip() or not tail.startswith(value_close):
        raise NotDerived("arguments have no tags of their own")
    lines = to_value.endswith("\n") and value_close.startswith("\n")
    key_close, value_open = to_value, ""
    if attribute := re.fullmatch(r'(.*string=")true(".*)', to_value, re.DOTALL):
        key_close, value_open = attribute.groups()
    made = Tools(
        kind="tagged", name_close=head[: len(head) - len(key_open)], key_open=key_open, key_close=key_close,
        value_open=value_open, value_close=value_close, lines=lines,
    )  # fmt: skip
    return _sections(turns, made, one, name, value + len(VALUE) + len(value_close), end)


# ------------------------------------------------------------------ what stands around calls


def _sections(turns: Turns, made: Tools, one: str, start: int, stop: int, end: str) -> Tools:
    """``made`` with what opens, parts and closes calls: one call is ``one[start:stop]``; two tell the rest."""
    head, tail = _own(one[:start]), _without(one[stop:], end)
    alone = msgspec.structs.replace(made, call_open=head.lstrip(), call_close=tail.rstrip())
    try:
        both = turns.turn(calls=[call({KEY: VALUE}), call({KEY: VALUE_B}, 1, OTHER)])
    except NotDerived:
        return alone  # the template takes one call only
    if VALUE_B not in both:
        return alone
    body = one[start:stop]
    at = both.find(body)
    second = body.replace(NAME, OTHER).replace(VALUE, VALUE_B).replace(IDS[0], IDS[1]).replace(":0", ":1")
    at_second = both.find(second)
    if at < 0 or at_second < at:
        return alone
    middle = both[at + len(body) : at_second]
    call_close = _common_start(tail, middle)
    call_close = call_close[: _tag_start(call_close)]
    call_open = _common_end(head, middle[len(call_close) :])
    section_open = head[: len(head) - len(call_open)]
    if not section_open.strip():  # each call stands alone: nothing but whitespace is between them
        return msgspec.structs.replace(alone, between=middle[len(tail) : len(middle) - len(call_open)])
    return msgspec.structs.replace(
        made,
        section_open=section_open.lstrip(),
        section_close=tail[len(call_close) :].rstrip(),
        call_open=call_open,
        call_close=call_close,
        between=middle[len(call_close) : len(middle) - len(call_open)],
    )


def _own(head: str) -> str:
    """A call's opening without a thought that was closed before it."""
    for marks in REASONING.values():
        head = head.rsplit(marks.close, 1)[-1]
    return head


def _without(tail: str, end: str) -> str:
    """A call's close without the end of the turn, which is also that of a turn of text."""
    shared = _common_end(tail, end)
    while shared and shared[0] not in "<[\n":
        shared = shared[1:]
    return tail[: len(tail) - len(shared)]


def _decoded(text: str, start: int) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, start)
    except ValueError:
        return None, -1


def _tag_start(text: str) -> int:
    found = _INSIDE_TAG.search(text)
    return found.start() if found is not None else len(text)


def _common_start(a: str, b: str) -> str:
    length = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:length]


def _common_end(a: str, b: str) -> str:
    return _common_start(a[::-1], b[::-1])[::-1]


# ------------------------------------------------------------------ the proof

PROOFS: tuple[list[tuple[str, dict[str, Any]]], ...] = (
    [(NAME, {KEY: 'Zoë says "hi"', KEY_B: "b"})],
    [(NAME, {KEY: "several\nlines {x} [1]", KEY_B: "it's </b>"})],
    [(NAME, {KEY: "p"}), (OTHER, {KEY: "q", KEY_B: "r"})],
    [(NAME, {})],
    [(NAME, {KEY: 5, KEY_B: True})],
    [(NAME, {KEY: [1, "a"], KEY_B: {"k": "v"}})],
)
_TYPES = {str: "string", int: "integer", bool: "boolean", list: "array", dict: "object"}


def reads_back(tools: Tools, turns: Turns) -> bool:
    """Whether everything that the template writes is read back as it was given, content before calls included."""
    spec = FormatSpec(name="derived", tools=tools)
    for calls in PROOFS:
        try:
            text = turns.turn(calls=[call(arguments, i, name) for i, (name, arguments) in enumerate(calls)])
        except NotDerived:
            if len(calls) > 1:
                continue  # one call a turn
            return False
        functions = {
            name: schema(KEY, KEY_B, types={k: _TYPES[type(v)] for k, v in arguments.items()})
            for name, arguments in calls
        }
        if read_calls(spec, text, functions) != calls and not (len(calls) > 1 and calls[1][0] not in text):
            return False
    return True


def read_calls(spec: FormatSpec, text: str, functions: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The calls in a text, all of it at once."""
    parser = Parser(spec, functions)
    found: list[tuple[str, str]] = []
    for event in parser.feed(None, text) + parser.end():
        if event.kind == "call":
            found.append((event.text, ""))
        elif event.kind == "arguments":
            found[-1] = (found[-1][0], found[-1][1] + event.text)
    return [(name, json.loads(arguments)) for name, arguments in found]
