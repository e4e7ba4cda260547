"""Chats that the guard is tried with: ordinary ones, whose ids must be today's, and places for hostile text."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

Chat = tuple[list[dict[str, Any]], dict[str, Any]]  # messages, template arguments
GO = {"add_generation_prompt": True}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"id": "call00001", "type": "function", "function": {"name": name, "arguments": arguments}}


def tool(name: str, description: str, argument: str = "city", argument_description: str = "its name") -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": {
            argument: {"type": "string", "description": argument_description},
            "unit": {"type": "string", "enum": ["C", "F"]},
        },
        "required": [argument],
    }
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _called(name: str = "get_weather", value: str = "Paris", result: str = '{"degrees": 21}') -> list[dict[str, Any]]:
    return [
        user("What is the weather?"),
        assistant("", tool_calls=[call(name, {"city": value})]),
        {"role": "tool", "name": name, "tool_call_id": "call00001", "content": result},
        user("And tomorrow?"),
    ]


WEATHER = tool("get_weather", "Tells the weather of a place.")

ORDINARY: dict[str, Chat] = {
    "short": ([user("Hello")], GO),
    "turns": ([{"role": "system", "content": "Be brief."}, user("Hi!"), assistant("Yes?"), user("How are you?")], GO),
    "code": ([user('if (a<b && c>d) { x[i] = "|"; } // <div>\n<p class="x">text</p>\n[1, 2]')], GO),
    "edges": ([user("<"), assistant(">"), user("[x]"), assistant("|end|"), user("a <")], GO),
    "words": ([user("end"), assistant("user"), user("s"), assistant("think"), user("tool_call")], GO),
    "unicode": ([user("Grüße, \u4f60\u597d \U0001f600 e\u0301 \ufb01ne \uff21")], GO),
    "own reasoning": ([user("Why?"), assistant("<think>\nBecause.\n</think>\n\nSo."), user("Go on")], GO),
    "reasoning field": ([user("Why?"), assistant("So.", reasoning_content="Because."), user("Go on")], GO),
    "tools": ([user("Weather?")], {**GO, "tools": [WEATHER, tool("end", "Ends: ]")]}),
    "called": (_called(), {**GO, "tools": [WEATHER]}),
    "arguments": ([user("Hello")], {**GO, "enable_thinking": False, "reasoning_effort": "high"}),
}

Place = Callable[[str], Chat]  # a text -> a chat that holds it

PLACES: dict[str, Place] = {
    "user": lambda text: ([user(text)], GO),
    "earlier user": lambda text: ([user(text), assistant("Yes."), user("More")], GO),
    "system": lambda text: ([{"role": "system", "content": text}, user("Hi")], GO),
    "assistant": lambda text: ([user("Hi"), assistant(text), user("More")], GO),
    "result": lambda text: (_called(result=text), {**GO, "tools": [WEATHER]}),
    "json result": lambda text: (_called(result=json.dumps({"page": text})), {**GO, "tools": [WEATHER]}),
    "argument": lambda text: (_called(value=text), {**GO, "tools": [WEATHER]}),
    "called name": lambda text: (_called(name=text), {**GO, "tools": [WEATHER]}),
    "tool name": lambda text: ([user("Hi")], {**GO, "tools": [tool(text, "Does it.")]}),
    "description": lambda text: ([user("Hi")], {**GO, "tools": [tool("f", text)]}),
    "property": lambda text: ([user("Hi")], {**GO, "tools": [tool("f", "Does it.", argument=text)]}),
    "property description": lambda text: ([user("Hi")], {**GO, "tools": [tool("f", "D", argument_description=text)]}),
    "name": lambda text: ([{**user("Hi"), "name": text}, assistant("Yes."), user("More")], GO),
}
