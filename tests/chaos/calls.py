"""Tool calls under fire: what a client joins of the deltas is what the journal holds, and keeps the schema."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from jsonschema import Draft202012Validator, ValidationError

from protocol.formats.message import ParsedMessage, functions_of, parsed_message
from protocol.messages import Frame
from protocol.records import RequestRecord

SCHEMA = {  # some two hundred tokens of what draws at random: most are moved in the middle of it
    "type": "array", "minItems": 8, "maxItems": 14,
    "items": {
        "type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "s": {
            "type": "string", "maxLength": 6}}, "required": ["n", "s"], "additionalProperties": False,
    },
}  # fmt: skip
STRUCTURED_TOKENS = 440
PARAMETERS = {
    "type": "object", "properties": {"notes": SCHEMA}, "required": ["notes"], "additionalProperties": False,
}  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": name, "parameters": PARAMETERS}} for name in ("keep", "drop")]


def asked(choice: float) -> dict[str, Any]:
    """The fields of a chat that must call: either function, or a named one, as ``choice`` in [0, 1) draws. It is not
    thought about."""
    named = {"type": "function", "function": {"name": "drop"}}
    return {
        "messages": [{"role": "user", "content": "Note it."}], "tools": TOOLS, "parallel_tool_calls": False,
        "tool_choice": named if choice < 0.5 else "required", "chat_template_kwargs": {"enable_thinking": False},
    }  # fmt: skip


def thought(choice: float) -> dict[str, Any]:
    """Fields that let a chat be thought about first: in a thought that the prompt opens, or that the model may open."""
    return {
        "chat_template_kwargs": {"opens": choice < 0.5}, "thinking_token_budget": int(choice * 160),
        "max_tokens": STRUCTURED_TOKENS + int(choice * 160),
    }  # fmt: skip


@dataclass
class CallsSeen:
    """The deltas of a chat's only choice, joined."""

    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)  # return_token_ids

    def take(self, choice: dict[str, Any]) -> None:
        delta = choice["delta"]
        self.content += delta.get("content") or ""
        self.reasoning += delta.get("reasoning_content") or ""
        self.ids += choice.get("token_ids") or ()
        for one in delta.get("tool_calls") or ():
            function = one["function"]
            if one["index"] == len(self.calls):
                head = {"name": function["name"], "arguments": ""}
                self.calls.append({"id": one["id"], "type": "function", "function": head})
            self.calls[one["index"]]["function"]["arguments"] += function.get("arguments") or ""

    def faults(self, truth: ParsedMessage, whole: bool) -> list[str]:
        """What of it differs from the journal's message, of which it may be the beginning unless it is ``whole``."""
        if whole:
            seen, told = ((one.content, one.reasoning, one.calls) for one in (self, truth))
            return [] if seen == told else ["differs from the journal"]
        begun = truth.content.startswith(self.content) and len(self.calls) <= len(truth.calls)
        begun = begun and truth.reasoning.startswith(self.reasoning)
        for seen, told in zip(self.calls, truth.calls, strict=False):
            mine, full = seen["function"], told["function"]
            begun = begun and (seen["id"], mine["name"]) == (told["id"], full["name"])
            begun = begun and full["arguments"].startswith(mine["arguments"])
        return [] if begun else ["is no beginning of the journal's message"]


def message_in(record: RequestRecord, choice: int, frames: list[Frame]) -> ParsedMessage:
    """What the journal of a chat with tools says."""
    job, shown = record.job, [(frame.token, frame.text) for frame in frames]
    assert job.format is not None
    functions, ruled = functions_of(job.tools), job.sampling.ruled
    return parsed_message(record.rid, choice, job.format, functions, record.thinking, shown, eager=ruled)


def call_faults(message: ParsedMessage, ended: Counter[str]) -> list[str]:
    """What is wrong with a message that had to be calls and ended by itself."""
    found = ["no call where one was required"] if not message.calls else []
    ended["thoughts"] += bool(message.reasoning)
    for call in message.calls:
        ended["calls"] += 1
        try:
            Draft202012Validator(PARAMETERS).validate(json.loads(call["function"]["arguments"]))
        except (ValueError, ValidationError) as error:
            found.append(f"arguments are not what their schema asks for: {str(error)[:100]}")
    return found
