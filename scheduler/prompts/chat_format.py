"""How the chats of one model are told to its template: tools, calls and results in the form that it takes.

What the template can do with them is tried once, at load. What it would drop in silence is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from protocol.errors import InvalidRequest, StartError
from protocol.formats import families
from protocol.formats.prompted import Message, write_tools
from protocol.formats.spec import FormatSpec, marker_texts, with_controls
from scheduler.prompts.template_format import (
    KEY,
    NAME,
    TOOLS,
    VALUE,
    NotDerived,
    Render,
    Turns,
    call,
    derive_tools,
)

AUTO = "auto"
RESULT = "zqresult"
THINKING: tuple[dict[str, Any], ...] = ({}, {"enable_thinking": True}, {"thinking": True})
NOT_THINKING: tuple[dict[str, Any], ...] = ({}, {"enable_thinking": False}, {"thinking": False})
MAX_OPENED = 16  # tokens of what a prompt writes when it opens a thought
# Templates without tools whose models are served with tools all the same: the model of this tree, and SmolLM2.
PROMPTED = (
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    "{{- '<|' + message['role'] + '|>\\n' }}",
)


@dataclass(frozen=True)
class Tokens:
    """What of a tokenizer is needed here."""

    added: dict[str, int]  # text of each added token -> id
    special: frozenset[int]
    end_ids: frozenset[int]
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    ruled: bool = True  # whether grammars over it can be had


@dataclass(frozen=True)
class ChatFormat:
    """``spec`` is what readers of answers need. The rest says what the template takes."""

    spec: FormatSpec
    tells_tools: bool = False
    shows_calls: bool = False
    shows_results: bool = False
    text_arguments: bool = False  # arguments of calls in history as JSON text

    def prepare(
        self, messages: list[Message], tools: list[dict[str, Any]] | None
    ) -> tuple[list[Message], list[dict[str, Any]] | None]:
        """Messages (in their normal form) and tools as the template is to have them. InvalidRequest for what it would
        drop."""
        if tools and self.spec.tools is None:
            raise InvalidRequest(NO_TOOLS, param="tools")
        if not tools and not any(m.get("tool_calls") or m.get("role") == "tool" for m in messages):
            return messages, None
        messages = _named_results(self._numbered(messages))
        prompted = self.spec.prompted
        prepared = []
        for number, message in enumerate(messages):
            at = f"messages[{number}]"
            if message.get("role") == "tool" and not (self.shows_results or prompted):
                raise InvalidRequest(f"{at}: {DROPPED.format('tool results')}", param=f"{at}.role")
            if message.get("tool_calls"):
                if not (self.shows_calls or prompted):
                    raise InvalidRequest(f"{at}: {DROPPED.format('tool calls')}", param=f"{at}.tool_calls")
                message = self._with_calls(message)
            prepared.append(message)
        if prompted:
            return write_tools(prepared, tools), None
        return prepared, tools or None

    def _with_calls(self, message: Message) -> Message:
        """Arguments in the template's form. gpt-oss's takes a thought or a content beside calls, not both."""
        calls = message["tool_calls"]
        if self.text_arguments and not self.spec.prompted:
            calls = [{**one, "function": {**one["function"], "arguments": _text(one)}} for one in calls]
        kept = {**message, "tool_calls": calls}
        if self.spec.tools is not None and self.spec.tools.kind == "harmony" and message["content"]:
            kept.pop("reasoning_content", None)
        return kept

    def _numbered(self, messages: list[Message]) -> list[Message]:
        """Ids of calls in the form that the template asks for. Any client's ids are taken."""
        style = self.spec.tools.ids if self.spec.tools is not None else "any"
        if style == "any":
            return messages
        ids: dict[str, str] = {}
        out = []
        for message in messages:
            if message.get("tool_calls"):
                calls = []
                for one in message["tool_calls"]:
                    given, name = str(one.get("id") or len(ids)), one["function"]["name"]
                    ids[given] = f"functions.{name}:{len(ids)}" if style == "indexed" else _nine(given)
                    calls.append({**one, "id": ids[given]})
                message = {**message, "tool_calls": calls}
            elif message.get("tool_call_id"):
                given = message["tool_call_id"]
                message = {**message, "tool_call_id": ids.get(given) or _nine(given)}
            out.append(message)
        return out


NO_TOOLS = (
    "this model's chat template knows no tools; the server's --tool-format hermes writes them into the system turn"
)
DROPPED = "this model's chat template would drop {}; the server's --tool-format hermes writes them as text"


def _nine(given: str) -> str:
    """Nine letters and digits: given ones stay as they are."""
    if len(given) == 9 and given.isascii() and given.isalnum():
        return given
    return hashlib.blake2b(given.encode(), digest_size=5).hexdigest()[:9]


def _text(one: Message) -> str:
    return json.dumps(one["function"]["arguments"], ensure_ascii=False)


def _named_results(messages: list[Message]) -> list[Message]:
    """Results with the name of their function, which some templates write."""
    names: dict[str, str] = {}
    out = []
    for message in messages:
        for one in message.get("tool_calls") or ():
            names[one.get("id") or ""] = one["function"]["name"]
        if message.get("role") == "tool" and not message.get("name"):
            name = names.get(message.get("tool_call_id") or "")
            message = {**message, "name": name} if name else message
        out.append(message)
    return out


# ------------------------------------------------------------------ at load


def find_format(
    render: Render, template: str, tokens: Tokens, tool_format: str = AUTO, reasoning_format: str = AUTO
) -> tuple[ChatFormat, str]:
    """The format of a model by its template, or as it was told; and what the log is to say. StartError names an option
    that cannot be."""
    tools, reasoning = (None if name == AUTO else name for name in (tool_format, reasoning_format))
    try:
        spec = families.named(tools, reasoning or families.reasoning_family(template))
    except ValueError as error:
        raise StartError(str(error)) from None
    told = f"as --tool-format {tools} says" if tools else ""
    if tools is None:
        spec, told = _chosen(spec, render, template)
    made = _tried(ChatFormat(spec), render)
    if spec.tools is not None and not made.tells_tools:
        made = _without_tools(made, template, tools)
        told = f"{told}; its template tells no tools" + ("" if made.spec.tools is None else ": written as text")
    spec = with_controls(made.spec, tokens.added)
    if (marks := spec.reasoning) is not None:
        spec = msgspec.structs.replace(
            spec, opening=_opening(marks.open, spec.controls, tokens),
            opened=_prompts_end(marks.open, THINKING, render, tokens),
            closed=_prompts_end(marks.close, NOT_THINKING, render, tokens),
        )  # fmt: skip
    spec = msgspec.structs.replace(spec, ends=_ends(spec, render, tokens), ruled=tokens.ruled)
    return _with_spec(made, spec), _told(spec, told)


def _with_spec(made: ChatFormat, spec: FormatSpec) -> ChatFormat:
    return ChatFormat(spec, made.tells_tools, made.shows_calls, made.shows_results, made.text_arguments)


def _chosen(spec: FormatSpec, render: Render, template: str) -> tuple[FormatSpec, str]:
    """The tool format that nobody named: by family where a template tells too little, else derived, else by family."""
    family = families.tool_family(template, derivable=True)
    if family is not None:
        return families.with_tools(spec, family, families.TOOLS[family]), f"known as {family}"
    try:
        tools, _ = derive_tools(render)
        return families.with_tools(spec, "template", tools), "derived from the chat template, read back"
    except NotDerived as reason:
        family = families.tool_family(template, derivable=False)
        if family is not None:
            return families.with_tools(spec, family, families.TOOLS[family]), f"known as {family}"
        if any(sign in template for sign in PROMPTED):
            return families.with_tools(spec, "hermes", families.TOOLS["hermes"]), "hermes"
        return spec, f"none ({reason})"


def _tried(made: ChatFormat, render: Render) -> ChatFormat:
    """What the template does with tools, calls and results."""
    user: Message = {"role": "user", "content": "hello"}

    def shows(word: str, messages: list[Message]) -> bool:
        try:
            return word in render(messages, tools=TOOLS, add_generation_prompt=True)
        except Exception:  # a template's code fails in whatever way it likes
            return False

    one = call({KEY: VALUE})
    result: Message = {"role": "tool", "content": RESULT, "tool_call_id": one["id"], "name": NAME}
    for text_arguments in (False, True):
        given = one
        if text_arguments:
            given = {**one, "function": {"name": NAME, "arguments": json.dumps({KEY: VALUE})}}
        asked: list[Message] = [user, {"role": "assistant", "content": "", "tool_calls": [given]}, result]
        if shows(VALUE, asked):
            break
    return ChatFormat(
        made.spec,
        tells_tools=shows(NAME, [user]),
        shows_calls=shows(VALUE, asked),
        shows_results=shows(RESULT, asked),
        text_arguments=text_arguments and shows(VALUE, asked),
    )


def _without_tools(made: ChatFormat, template: str, asked: str | None) -> ChatFormat:
    """The template tells no tools: hermes is written as text where it was asked for, or is known to be of use."""
    wanted = asked == "hermes" or (asked is None and any(sign in template for sign in PROMPTED))
    if asked not in (None, "hermes"):
        raise StartError(f"--tool-format {asked} needs a chat template that tells tools; --tool-format hermes does not")
    if wanted:
        return _with_spec(made, msgspec.structs.replace(made.spec, prompted=True, name="hermes"))
    return _with_spec(made, families.with_tools(made.spec, families.NONE, None))


def _opening(marker: str, controls: dict[str, int], tokens: Tokens) -> list[int]:
    """The ids of ``marker``, if they begin with one that is no letters."""
    ids = tokens.encode(marker)
    return ids if ids and ids[0] in controls.values() else []


def _prompts_end(marker: str, ways: tuple[dict[str, Any], ...], render: Render, tokens: Tokens) -> list[list[int]]:
    """How those prompts end, made with the template arguments of each of ``ways``, whose last word is ``marker``."""
    found: list[list[int]] = []
    for arguments in ways:
        try:
            text = render([{"role": "user", "content": "hello"}], add_generation_prompt=True, **arguments)
        except Exception:
            continue
        if not text.rstrip().endswith(marker):
            continue
        ids = tokens.encode(text)[-MAX_OPENED:]
        sizes = (n for n in range(1, len(ids) + 1) if marker in tokens.decode(ids[-n:]))
        if (size := next(sizes, None)) is not None and ids[-size:] not in found:
            found.append(ids[-size:])
    return found


def _ends(spec: FormatSpec, render: Render, tokens: Tokens) -> list[int]:
    """The special token that the template writes where a turn with calls ends, if it is no end id of the model."""
    if spec.tools is None or spec.prompted:
        return []
    if spec.tools.kind == "harmony":
        named = [tokens.added.get(text) for text in ("<|call|>", "<|return|>")]
        return [id for id in named if id is not None and id not in tokens.end_ids]
    turns = Turns(render)
    for turns.text_arguments in (False, True):
        try:
            turn = turns.turn(calls=[call({KEY: VALUE})])
        except NotDerived:
            continue
        tail = turn[turn.rfind(VALUE) :] if VALUE in turn else ""
        markers = "\0".join(marker_texts(spec))
        after = sorted(
            (at, id)
            for text, id in tokens.added.items()
            if id in tokens.special and text not in markers and (at := tail.find(text)) >= 0
        )
        return [after[0][1]] if after and after[0][1] not in tokens.end_ids else []
    return []


def _told(spec: FormatSpec, told: str) -> str:
    kind = spec.tools.kind if spec.tools is not None else "none"
    thoughts = f"{spec.reasoning.open} ... {spec.reasoning.close}" if spec.reasoning is not None else "none"
    return f"tool calls: {kind}, {told}; reasoning: {thoughts}"
