"""Answers that are parsed: frames to deltas and to a whole message, by the format that is pinned in the job.

A function of the job, the choice and its journal alone: deltas of one frame come in a fixed order, so that a stream
can be taken up after any of them.
"""

from __future__ import annotations

from typing import Any

from gateway.edge import encode_json
from gateway.openai.view import View
from protocol.formats.events import Event
from protocol.formats.message import call_id, functions_of, message_of
from protocol.formats.parser import Parser
from protocol.messages import Frame, Job


class ParsedAnswer:
    """The parsers of all choices of one request. ``thinking``: its prompt has opened a thought."""

    def __init__(self, rid: str, job: Job, view: View, choices: int, thinking: bool) -> None:
        assert job.format is not None
        self.rid = rid
        self.shows_thoughts = view.thoughts
        functions = functions_of(job.tools) if view.calls else {}
        self.parsers = [
            Parser(job.format, functions, thinking=thinking, eager=view.calls == "eager", single=view.single)
            for _ in range(choices)
        ]

    @property
    def reasoning_tokens(self) -> int:
        return sum(parser.reasoning_tokens for parser in self.parsers)

    def events(self, choice: int, frame: Frame) -> list[Event]:
        parser = self.parsers[choice]
        events = parser.feed(frame.token, frame.text)
        if frame.finish is not None:
            events += parser.end()
        return events

    def finish(self, choice: int, finish: str | None) -> str | None:
        """The finish reason as it is shown: a turn that ends with calls has ended for them."""
        return "tool_calls" if finish == "stop" and self.parsers[choice].calls else finish

    def deltas(self, choice: int, frame: Frame) -> list[bytes]:
        """The deltas that one more frame of ``choice`` makes, as JSON."""
        found = []
        for event in self.events(choice, frame):
            if (delta := self._delta(choice, event)) is not None:
                found.append(encode_json(delta))
        return found

    def _delta(self, choice: int, event: Event) -> dict[str, Any] | None:
        if event.kind == "content":
            return {"content": event.text}
        if event.kind == "reasoning":
            return {"reasoning_content": event.text, "reasoning": event.text} if self.shows_thoughts else None
        if event.kind == "call":
            function = {"name": event.text, "arguments": ""}
            call = {"index": event.number, "id": call_id(self.rid, choice, event.number), "type": "function"}
            return {"tool_calls": [{**call, "function": function}]}
        if event.kind == "arguments":
            return {"tool_calls": [{"index": event.number, "function": {"arguments": event.text}}]}
        return None

    def message(self, choice: int, frames: list[Frame]) -> dict[str, Any]:
        """The whole message of ``choice``."""
        events = [event for frame in frames for event in self.events(choice, frame)]
        found = message_of(self.rid, choice, events)
        text, calls = found.content, found.calls
        message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
        if found.reasoning and self.shows_thoughts:
            message["reasoning_content"] = message["reasoning"] = found.reasoning
        if calls:
            message["tool_calls"] = calls
        return message


def parsed_answer(rid: str, job: Job | None, view: View, choices: int, thinking: bool) -> ParsedAnswer | None:
    """None for an answer that is shown as it is."""
    if view.kind != "chat" or job is None or job.format is None:
        return None
    return ParsedAnswer(rid, job, view, choices, thinking)
