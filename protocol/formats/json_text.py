"""JSON in text that comes in pieces: where a value ends. Whether it is well-formed is asked once it is whole."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from protocol.formats.events import as_json, json_value
from protocol.formats.source import Cut, Malformed, Reading, Source

MAX_DEPTH = 128
_IN_STRING = re.compile('[^"\\\\\x00-\x1f]*')  # control tokens are text there
_BETWEEN = re.compile('[^"{}\\[\\]\ud800-\udfff]*')
_SCALAR = re.compile("[-+.0-9A-Za-z]*")
_CLOSES = {"{": "}", "[": "]"}

Emit = Callable[[str], object]


def read_string(source: Source, emit: Emit) -> Reading[None]:
    """Step over a string, the next character being its quote. Raw control characters, which some models write, are
    escaped on the way."""
    source.at += 1
    emit('"')
    while True:
        run = _IN_STRING.match(source.text, source.at)
        assert run is not None
        source.at = run.end()
        emit(run[0])
        char = yield from source.peek()
        if char == '"':
            source.at += 1
            emit('"')
            return
        if char == "\\":
            while len(source.text) < source.at + 2:
                if source.ended:
                    raise Cut
                yield
            escape = source.text[source.at + 1]
            if escape not in '"\\/bfnrtu':
                raise Malformed
            source.at += 2
            emit("\\" + escape)
        elif not char:
            raise Cut
        elif char < " ":
            source.at += 1
            emit(as_json(char)[1:-1])


def read_tree(source: Source, emit: Emit) -> Reading[None]:
    """Step over an object or an array, the next character being its bracket."""
    stack: list[str] = []
    while True:
        run = _BETWEEN.match(source.text, source.at)
        assert run is not None
        source.at = run.end()
        emit(run[0])
        char = yield from source.peek()
        if char == '"':
            yield from read_string(source, emit)
        elif char in _CLOSES:
            if len(stack) >= MAX_DEPTH:
                raise Malformed
            stack.append(_CLOSES[char])
            source.at += 1
            emit(char)
        elif char and char in "]}":
            if stack.pop() != char:
                raise Malformed
            source.at += 1
            emit(char)
            if not stack:
                return
        elif not char:
            raise Cut
        elif _BETWEEN.match(char).end() == 0:  # type: ignore[union-attr]  # a control token
            raise Malformed


def read_value(source: Source) -> Reading[str]:
    """The text of the next value, whichever it is."""
    out: list[str] = []
    yield from source.skip_space()
    char = yield from source.peek()
    if char == '"':
        yield from read_string(source, out.append)
    elif char in _CLOSES:
        yield from read_tree(source, out.append)
    elif not char:
        raise Cut
    else:
        out.append((yield from source.take(_SCALAR)))
    return "".join(out)


def read_key(source: Source) -> Reading[Any]:
    """The next string, decoded."""
    yield from source.skip_space()
    char = yield from source.peek()
    if not char:
        raise Cut
    if char != '"':
        raise Malformed
    try:
        return json_value((yield from read_value(source)))
    except ValueError:
        raise Malformed from None
