"""What a parser found, as one message: the same for HTTP, results of the queue and the Python clients."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from protocol.formats.events import Event
from protocol.formats.parser import Parser
from protocol.formats.spec import FormatSpec


def call_id(rid: str, choice: int, number: int) -> str:
    """The id of a call: the same from whoever shows it."""
    return "call_" + hashlib.blake2b(f"{rid} {choice} {number}".encode(), digest_size=12).hexdigest()


@dataclass
class ParsedMessage:
    """``content`` is empty where there is none; ``calls`` are OpenAI's tool_calls, their arguments JSON text."""

    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)

    @property
    def fields(self) -> dict[str, Any]:
        """For a result: what is there of the three."""
        told = {"content": self.content, "reasoning_content": self.reasoning, "tool_calls": self.calls}
        return {name: value for name, value in told.items() if value}

    def finish(self, reason: str | None) -> str | None:
        """The finish reason as it is shown: a turn that ends with calls has ended for them."""
        return "tool_calls" if reason == "stop" and self.calls else reason


def parsed_message(
    rid: str, choice: int, spec: FormatSpec, functions: dict[str, Any], thinking: bool,
    frames: Iterable[tuple[int | None, str]], *, eager: bool,
) -> ParsedMessage:  # fmt: skip
    """The message of a whole journal, its ``frames`` as (token, text). ``functions``: name -> schema of the arguments;
    ``thinking``: the prompt has opened a thought; ``eager``: a grammar rules its calls, so that one that was cut off is
    one as far as it came, as streams show it."""
    parser = Parser(spec, functions, thinking=thinking, eager=eager)
    events = [event for token, text in frames for event in parser.feed(token, text)]
    return message_of(rid, choice, [*events, *parser.end()])


def message_of(rid: str, choice: int, events: Iterable[Event]) -> ParsedMessage:
    content: list[str] = []
    reasoning: list[str] = []
    calls: list[dict[str, Any]] = []
    for event in events:
        if event.kind == "content":
            content.append(event.text)
        elif event.kind == "reasoning":
            reasoning.append(event.text)
        elif event.kind == "call":
            function = {"name": event.text, "arguments": ""}
            calls.append({"id": call_id(rid, choice, event.number), "type": "function", "function": function})
        elif event.kind == "arguments":
            calls[event.number]["function"]["arguments"] += event.text
    return ParsedMessage("".join(content), "".join(reasoning), calls)


def functions_of(tools: list[dict[str, Any]] | None) -> dict[str, Any]:
    """Name -> schema of the arguments, of a job's tools."""
    return {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools or ()}
