"""Text that comes in pieces, and what a parser asks of it.

A parser is written as if the whole text were there: a generator that yields wherever it needs more. What it finds is
then the same however the text was cut, and a parser is rebuilt by reading the same text again.

Single-token markers are characters of their own here: lone surrogates, which no decoded text can hold. So markers
are found like any text, and never in what was merely typed like them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable
from typing import NamedTuple, TypeVar

T = TypeVar("T")
Reading = Generator[None, None, T]  # yields: more text is needed

FIRST_CONTROL = 0xD800
CONTROL = re.compile("[\ud800-\udfff]")
_JOINTS = re.compile("\\s+|(?<=[>\\]])(?=[<\\[])|(?<=[\ud800-\udfff])|(?=[\ud800-\udfff])")
SPACE = re.compile(r"[ \t\r\n]*")


class Cut(Exception):
    """The text ended where more was needed."""


class Malformed(Exception):
    """This is no call."""


class Alphabet:
    """Control tokens as characters: ``encode`` puts them into a marker, ``decode`` takes them out of raw text."""

    def __init__(self, controls: dict[str, int]) -> None:
        texts = sorted(controls, key=lambda text: (-len(text), text))  # a marker within another must not win
        self._texts = {chr(FIRST_CONTROL + i): text for i, text in enumerate(texts)}
        self._chars = {text: char for char, text in self._texts.items()}
        self.tokens = {controls[text]: (self._chars[text], text) for text in texts}
        self._any = re.compile("|".join(map(re.escape, texts))) if texts else None

    def encode(self, marker: str) -> str:
        return self._any.sub(lambda m: self._chars[m[0]], marker) if self._any is not None else marker

    def pieces(self, marker: str) -> tuple[str, ...]:
        """A marker cut at its whitespace, which may be there or not, between its tags and round its control tokens."""
        return tuple(piece for piece in _JOINTS.split(self.encode(marker)) if piece)

    def decode(self, text: str) -> str:
        if text.isascii():
            return text
        return CONTROL.sub(lambda m: self._texts.get(m[0], ""), text)


def overlap(text: str, marker: str) -> int:
    """Length of the longest end of ``text`` that ``marker`` begins with, short of all of it."""
    at = text.find(marker[0], max(0, len(text) - len(marker) + 1))
    while at >= 0 and not marker.startswith(text[at:]):
        at = text.find(marker[0], at + 1)
    return len(text) - at if at >= 0 else 0


class Resting(NamedTuple):
    heads: re.Pattern[str]  # what may begin a marker
    emit: Callable[[str], None]


def heads_of(markers: Iterable[str]) -> re.Pattern[str]:
    """Matches the first characters of ``markers``, and nothing where there are none."""
    heads = sorted({marker[0] for marker in markers})
    return re.compile("[" + re.escape("".join(heads)) + "]") if heads else re.compile(r"(?!)")


class Source:
    """``text`` so far, read up to ``at``; ``ended`` once no more will come. ``mark``: where the call that is being read
    began, -1 outside of calls. ``resting``: what may be done with more text without asking the parser, as long as it
    holds nothing that could begin a marker."""

    __slots__ = ("at", "ended", "mark", "resting", "text")

    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        self.mark = -1
        self.ended = False
        self.resting: Resting | None = None

    def drop(self) -> None:
        """Forget what was read."""
        self.text = self.text[self.at :]
        self.at = 0

    def pass_until(self, ends: tuple[str, ...], emit: Callable[[str], None]) -> Reading[str]:
        """Hand the text before the first of ``ends`` to ``emit``, forgetting it, and say which it was. Cut if none
        comes."""
        heads = heads_of(ends)
        while True:
            found = [(at, -len(end), end) for end in ends if (at := self.text.find(end, self.at)) >= 0]
            safe = min(found)[0] if found else len(self.text)
            if not found and not self.ended:
                safe = max(self.at, safe - max(overlap(self.text, end) for end in ends))
            if safe > self.at:
                emit(self.text[self.at : safe])
            self.at = safe
            if found:
                end = min(found)[2]
                self.at += len(end)
                return end
            if self.ended:
                raise Cut
            self.drop()
            if not self.text:
                self.resting = Resting(heads, emit)
            yield

    def peek(self) -> Reading[str]:
        """The next character, "" at the end."""
        while self.at >= len(self.text) and not self.ended:
            yield
        return self.text[self.at : self.at + 1]

    def skip_space(self) -> Reading[None]:
        while True:
            found = SPACE.match(self.text, self.at)
            assert found is not None
            self.at = found.end()
            if self.at < len(self.text) or self.ended:
                return
            yield

    def take(self, pattern: re.Pattern[str]) -> Reading[str]:
        """As much as ``pattern`` matches from here: one that can only grow with the text (a run of a class)."""
        start = self.at
        while True:
            found = pattern.match(self.text, self.at)
            self.at = found.end() if found is not None else self.at
            if self.at < len(self.text) or self.ended:
                return self.text[start : self.at]
            yield

    def accept(self, pieces: tuple[str, ...]) -> Reading[bool]:
        """Step over ``pieces`` and the whitespace before each, if they come next; else stay."""
        start = self.at
        for piece in pieces:
            yield from self.skip_space()
            while (have := self.text[self.at : self.at + len(piece)]) != piece:
                if self.ended or not piece.startswith(have):
                    self.at = start
                    return False
                yield
            self.at += len(piece)
        return True

    def expect(self, pieces: tuple[str, ...]) -> Reading[None]:
        if not (yield from self.accept(pieces)):
            raise Malformed

    def until(self, ends: tuple[str, ...], emit: Callable[[str], None] | None = None) -> Reading[tuple[str, str]]:
        """The text before the first of ``ends``, and which it was. ``emit`` gets the text as soon as it is sure.
        Cut if none comes."""
        start = shown = look = self.at
        while True:
            found = [(at, -len(end), end) for end in ends if (at := self.text.find(end, look)) >= 0]
            if found:
                at, _, end = min(found)
                if emit is not None and at > shown:
                    emit(self.text[shown:at])
                self.at = at + len(end)
                return self.text[start:at], end
            safe = len(self.text)
            if not self.ended:
                safe -= max(overlap(self.text[look:], end) for end in ends)
            if emit is not None and safe > shown:
                emit(self.text[shown:safe])
            shown = look = self.at = safe
            if self.ended:
                raise Cut
            yield
