"""What a parser finds: events, and the sink that a parser writes them to."""

from __future__ import annotations

import json
from typing import Any, Literal, NamedTuple

from protocol.formats.source import CONTROL, Alphabet, Malformed

SPACE = " \t\r\n"
MAX_CALLS = 128  # in one choice
MAX_NAME = 256  # characters

Kind = Literal["content", "reasoning", "call", "arguments", "end"]


class Event(NamedTuple):
    """One finding. ``text``: what is added to content, reasoning or arguments; the function's name of a "call".
    ``number`` of the call, 0, 1, ...; "end": the call is whole, its arguments joined are a JSON object."""

    kind: Kind
    text: str = ""
    number: int = -1


class Sink:
    """Gathers events. A call is shown when it is whole, or (``eager``) as it comes.

    Whitespace between content and calls belongs to neither: it is held until it is known what follows.
    """

    def __init__(self, alphabet: Alphabet, functions: dict[str, Any], *, eager: bool, single: bool) -> None:
        self.alphabet = alphabet
        self.functions = functions
        self.eager = eager
        self.single = single  # calls after the first are left out
        self.events: list[Event] = []
        self.calls = 0
        self.said = False  # whether there is content
        self.trim = False  # whitespace at the start of the next content is dropped
        self._space = ""
        self._draft: list[Event] | None = None  # the call that is being read
        self._arguments: list[str] = []

    # -------------------------------------------------------------- text

    def content(self, text: str) -> None:
        """Content, its whitespace at the end held."""
        if self.trim:
            text = text.lstrip(SPACE)
            if not text:
                return
            self.trim = False
        if self._space:
            text = self._space + text
        shown = text.rstrip(SPACE) if self.functions else text
        self._space = text[len(shown) :]
        if shown:
            self.said = True
            self._add(Event("content", self.alphabet.decode(shown)))

    def reasoning(self, text: str) -> None:
        if self.trim:
            text = text.lstrip(SPACE)
        if text:
            self.trim = False
            text = self._space + text
            shown = text.rstrip(SPACE)
            self._space = text[len(shown) :]
            if shown:
                self._add(Event("reasoning", self.alphabet.decode(shown)))

    def turn(self) -> None:
        """A thought begins or ends here: whitespace on either side is dropped."""
        self._space = ""
        self.trim = True

    def end_text(self) -> None:
        """No more text: what was held is shown, unless nothing but calls came before."""
        if self._space and not (self.calls and not self.said) and not self.trim:
            self._add(Event("content", self._space))
        self._space = ""

    # -------------------------------------------------------------- calls

    @property
    def open(self) -> bool:
        """Whether a call has begun and not ended."""
        return self._draft is not None

    def begin(self, name: str) -> None:
        """A call of ``name``. Malformed if there is no such function."""
        if name not in self.functions or self.calls >= MAX_CALLS:
            raise Malformed
        self._draft = []
        self._arguments = []
        self._show(Event("call", name, self.calls))

    def arguments(self, text: str) -> None:
        """More of the JSON text of a call's arguments. A control token in one of its strings is its letters."""
        if text:
            text = CONTROL.sub(lambda m: as_json(self.alphabet.decode(m[0]))[1:-1], text)
            self._arguments.append(text)
            self._show(Event("arguments", text, self.calls))

    def end(self) -> None:
        """The call is whole. Malformed if its arguments are no JSON object."""
        if not is_object("".join(self._arguments)):
            raise Malformed
        draft, self._draft = self._draft, None
        dropped = self.single and self.calls > 0
        if not dropped:
            for event in draft or ():
                self._add(event)
            self._add(Event("end", "", self.calls))
            self.calls += 1
        self._space = ""
        self.trim = True

    def reject(self, raw: str, *, cut: bool = False) -> None:
        """What was read was no call: ``raw`` is content. ``cut``: the text ended; a call that was shown stays."""
        shown = self._draft is not None and self.eager
        self._draft = None
        if shown:
            self.calls += 1
        if not (shown and cut):
            self.trim = False
            self.content(raw)

    def _show(self, event: Event) -> None:
        if self.eager and not (self.single and self.calls):
            self._space = ""
            self._add(event)
        elif self._draft is not None:
            self._draft.append(event)

    def _add(self, event: Event) -> None:
        """Append, joined with the last one where both are text of the same."""
        if self.events and event.kind in ("content", "reasoning", "arguments"):
            last = self.events[-1]
            if last.kind == event.kind and last.number == event.number:
                self.events[-1] = last._replace(text=last.text + event.text)
                return
        self.events.append(event)


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


def json_value(text: str) -> Any:
    """The value of a JSON text. ValueError for what is none (also NaN and what is nested too deep)."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("nested too deep") from None


def is_object(text: str) -> bool:
    try:
        return isinstance(json_value(text), dict)
    except ValueError:
        return False


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
