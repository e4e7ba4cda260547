"""From the frames of one choice to content, reasoning and tool calls.

A parser is a function of the frames alone: whoever feeds it the same journal gets the same events from the same
frames, so a stream can be taken up after any event. It never raises for what a model writes: what is no call is
content.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from typing import Any

from protocol.formats.bodies import Bodies
from protocol.formats.events import Event, Sink
from protocol.formats.harmony import Harmony
from protocol.formats.notations import Gemma, read_pythonic
from protocol.formats.source import Alphabet, Cut, Malformed, Reading, Resting, Source, heads_of, overlap
from protocol.formats.spec import BARE_TOKEN, FormatSpec, Tools

_BARE = {"json": "{", "pythonic": "["}


class Parser:
    """Parses one choice. ``functions``: name -> schema of its arguments; empty: calls are not looked for."""

    def __init__(
        self,
        spec: FormatSpec,
        functions: dict[str, Any] | None = None,
        *,
        thinking: bool = False,
        eager: bool = False,
        single: bool = False,
    ) -> None:
        """``thinking``: the prompt has opened a thought. ``eager``: arguments are shown as they come, for outputs that
        a grammar keeps well-formed. ``single``: calls after the first are left out."""
        self.thinking = thinking
        self.reasoning_tokens = 0
        self._alphabet = Alphabet(spec.controls)
        self._source = Source()
        self._sink = Sink(self._alphabet, functions or {}, eager=eager, single=single)
        self._tools = spec.tools if functions else None
        encode = self._alphabet.encode
        self._thought = (encode(spec.reasoning.open), encode(spec.reasoning.close)) if spec.reasoning else None
        self._opens = _trigger(self._tools, self._alphabet)
        self._harmony: Harmony | None = None
        self._read_body = self._body(self._tools)
        triggers = [t for t in (self._thought and self._thought[0], self._opens) if t]
        self._triggers = re.compile("|".join(map(re.escape, triggers))) if triggers else None
        self._starts = triggers
        self._heads = heads_of(triggers)
        if spec.tools is not None and spec.tools.kind == "harmony":
            self._harmony = Harmony(self._alphabet, self._source, self._sink)
            self._reading: Generator[None, None, None] = self._harmony.run()
        else:
            self._reading = self._run()
        self._over = False

    # -------------------------------------------------------------- frames

    @property
    def calls(self) -> int:
        """Calls that were found so far."""
        return self._sink.calls

    @property
    def in_content(self) -> bool:
        """Whether the text at this point is plain content: neither thought nor (perhaps) a call."""
        if self._harmony is not None:
            return self._harmony.plain
        return not self.thinking and not self._in_call

    @property
    def unsure(self) -> int:
        """Within content: how many characters at the end may begin a thought or a call."""
        return len(self._source.text) - self._source.at if self._harmony is None else 0

    @property
    def _thinks(self) -> bool:
        return self._harmony.thinking if self._harmony is not None else self.thinking

    @property
    def _in_call(self) -> bool:
        return self._sink.open or self._source.mark >= 0

    def feed(self, token: int | None, text: str) -> list[Event]:
        """The events of one more frame."""
        control = self._alphabet.tokens.get(token) if token is not None else None
        resting = self._source.resting
        if resting is not None and control is None and resting.heads.search(text) is None:
            resting.emit(text)
            if token is not None and self._thinks:
                self.reasoning_tokens += 1
            return self._taken()
        before = self._thinks
        if control is not None:
            char, own = control
            text = text.removesuffix(own) + char
        events = self._more(text) if text else []
        if token is not None and (before or self._thinks):
            self.reasoning_tokens += 1
        return events

    def end(self) -> list[Event]:
        """The events of the end: what was held, and what turns out to be no call."""
        self._source.ended = True
        events = self._more("")
        self._sink.end_text()
        events += self._sink.events
        self._sink.events = []
        return events

    def _more(self, text: str) -> list[Event]:
        self._source.text += text
        self._source.resting = None
        if not self._over:
            try:
                next(self._reading)
            except StopIteration:
                self._over = True
        return self._taken()

    def _taken(self) -> list[Event]:
        events, self._sink.events = self._sink.events, []
        return events

    # -------------------------------------------------------------- the answer

    def _run(self) -> Reading[None]:
        if self.thinking:
            yield from self._think()
        while True:
            found = yield from self._content()
            if not found:
                return
            if self._thought is not None and found == self._thought[0]:
                yield from self._think()
            else:
                yield from self._section()

    def _content(self) -> Reading[str]:
        """Show content up to a marker, and return that; "" at the end. A bare call's marker is its bracket."""
        source, sink = self._source, self._sink
        source.mark = -1
        source.drop()
        fresh = not sink.said and not sink.calls
        if self._tools is not None and self._tools.bare and fresh and (yield from self._bare()):
            return _BARE[self._tools.kind]
        while True:
            found = self._triggers.search(source.text, source.at) if self._triggers is not None else None
            if found is not None:
                sink.content(source.text[source.at : found.start()])
                source.at = found.start()
                if self._allowed(found[0]):
                    return found[0]
                sink.content(found[0])
                source.at = found.end()
                continue
            held = 0 if source.ended else max((overlap(source.text, start) for start in self._starts), default=0)
            safe = max(source.at, len(source.text) - held)
            sink.content(source.text[source.at : safe])
            source.at = safe
            if source.ended:
                return ""
            source.drop()
            if not source.text:
                source.resting = Resting(self._heads, sink.content)
            yield

    def _bare(self) -> Reading[bool]:
        """Whether the answer begins as a call does. Whitespace before is content if not."""
        source, sink = self._source, self._sink
        assert self._tools is not None
        start = source.at
        yield from source.skip_space()
        token = self._alphabet.pieces(BARE_TOKEN)
        yield from source.accept(token)
        if (yield from source.peek()) == _BARE[self._tools.kind]:
            source.at = start
            return True
        sink.content(source.text[start : source.at])
        return False

    def _allowed(self, found: str) -> bool:
        """Letters alone open a thought only where an answer begins: later they may be about the marker."""
        if self._thought is None or found != self._thought[0] or found == self._opens:
            return True
        return (len(found) == 1 and ord(found) >= 0xD800) or not (self._sink.said or self._sink.calls)

    def _think(self) -> Reading[None]:
        """A thought up to its end. One that the prompt opened has no marker of its own."""
        assert self._thought is not None
        source = self._source
        opens, closes = self._thought
        yield from source.accept((opens,))
        self.thinking = True
        source.mark = -1
        self._sink.turn()
        try:
            yield from source.pass_until((closes,), self._sink.reasoning)
        except Cut:
            source.at = len(source.text)
        self._sink.turn()
        self.thinking = False

    # -------------------------------------------------------------- calls

    def _section(self) -> Reading[None]:
        """One call, or several in a section, after its marker was seen. What is no call becomes content, up to where
        that was seen."""
        source, tools = self._source, self._tools
        assert tools is not None
        pieces = self._alphabet.pieces
        source.mark = source.at
        least = source.at + max(1, len(self._opens))  # the marker itself is behind us, whatever follows
        try:
            if tools.bare:
                yield from source.accept(pieces(BARE_TOKEN))
            yield from source.expect(pieces(tools.section_open))
            yield from source.expect(pieces(tools.call_open))
            while True:
                yield from self._read_body()
                yield from self._close(pieces(tools.call_close))
                source.mark = source.at
                if not (yield from self._another(tools)):
                    return
        except Malformed:
            source.at = max(source.at, least)
            self._sink.reject(source.text[source.mark : source.at])
        except Cut:
            self._sink.reject(source.text[source.mark :], cut=True)
            source.at = len(source.text)

    def _close(self, pieces: tuple[str, ...]) -> Reading[None]:
        """Step over as much of a call's end as is there."""
        for piece in pieces:
            if not (yield from self._source.accept((piece,))):
                return

    def _another(self, tools: Tools) -> Reading[bool]:
        """Whether one more call of this section comes."""
        source, pieces = self._source, self._alphabet.pieces
        closes = pieces(tools.section_close)
        if closes and (yield from source.accept(closes[:1])):
            yield from self._close(closes[1:])
            return False
        between = pieces(tools.between)
        if not tools.section_open and not between:
            return False  # each call has a marker of its own
        parted = bool(between) and (yield from source.accept(between))
        if tools.call_open:
            return (yield from source.accept(pieces(tools.call_open)))
        yield from source.skip_space()
        if not parted and between:
            return False
        return (yield from source.peek()) == "{"

    def _body(self, tools: Tools | None) -> Any:
        if tools is None:
            return None
        if tools.kind == "pythonic":
            return lambda: read_pythonic(self._source, self._sink)
        if tools.kind == "gemma":
            return Gemma(self._alphabet, self._source, self._sink).read
        return Bodies(tools, self._alphabet, self._source, self._sink).read


def _trigger(tools: Tools | None, alphabet: Alphabet) -> str:
    """The first piece of what opens a call or a section of them."""
    if tools is None or tools.bare:
        return ""
    return next(iter(alphabet.pieces(tools.section_open) + alphabet.pieces(tools.call_open)), "")
