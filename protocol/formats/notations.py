"""Bodies of calls in notations of their own: Python's, and Gemma 4's."""

from __future__ import annotations

import ast
import re
from typing import Any

from protocol.formats.bodies import NAME
from protocol.formats.events import MAX_NAME, SPACE, Sink, as_json, json_value
from protocol.formats.source import CONTROL, Alphabet, Cut, Malformed, Reading, Source
from protocol.formats.spec import GEMMA_QUOTE

MAX_LIST = 1 << 16  # characters of a list of calls in Python's notation
MAX_DEPTH = 32
_PLAIN = re.compile("[^\"'()\\[\\]{}\ud800-\udfff]*")
_QUOTED = {quote: re.compile(f"[^{quote}\\\\\ud800-\udfff]*") for quote in "\"'"}
_CONSTANTS = {"true": True, "false": False, "null": None, "none": None}
_GEMMA_SCALAR = re.compile("[^,}\\]:{\\[\ud800-\udfff]*")


def read_pythonic(source: Source, sink: Sink) -> Reading[None]:
    """``[f(a=1), g(b="x")]``: read once its bracket closes."""
    yield from source.skip_space()
    text = yield from _balanced(source)
    try:
        tree = ast.parse(text, mode="eval").body
        calls = [_call(node) for node in tree.elts] if isinstance(tree, ast.List) else []
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        raise Malformed from None
    if not calls or any(name not in sink.functions for name, _ in calls):
        raise Malformed
    for name, arguments in calls:
        sink.begin(name)
        sink.arguments(as_json(arguments))
        sink.end()


def _call(node: ast.expr) -> tuple[str, dict[str, Any]]:
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError
    return ast.unparse(node.func), {word.arg or "": _value(word.value) for word in node.keywords}


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Name) and node.id.lower() in _CONSTANTS:
        return _CONSTANTS[node.id.lower()]
    if isinstance(node, ast.List):
        return [_value(one) for one in node.elts]
    if isinstance(node, ast.Dict):
        return {str(ast.literal_eval(k)): _value(v) for k, v in zip(node.keys, node.values, strict=True) if k}
    value = ast.literal_eval(node)
    json_value(as_json(value))  # what JSON can say, and no more
    return value


def _balanced(source: Source) -> Reading[str]:
    """The text from the next bracket to the one that closes it, whatever stands in quotes. Line breaks in quotes, which
    some models write as they are, are escaped."""
    start, depth = source.at, 0
    out: list[str] = []
    if (yield from source.peek()) != "[":
        raise Malformed
    while True:
        run = _PLAIN.match(source.text, source.at)
        assert run is not None
        source.at = run.end()
        out.append(run[0])
        if source.at - start > MAX_LIST:
            raise Malformed
        char = yield from source.peek()
        if not char:
            raise Cut
        if char in _QUOTED:
            quoted_from = source.at
            yield from _quoted(source, char)
            out.append(source.text[quoted_from : source.at].replace("\n", "\\n"))
            continue
        if CONTROL.match(char):
            raise Malformed
        if char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        else:
            continue  # more of the run has come
        source.at += 1
        out.append(char)
        if not depth:
            return "".join(out)


def _quoted(source: Source, quote: str) -> Reading[None]:
    source.at += 1
    while True:
        run = _QUOTED[quote].match(source.text, source.at)
        assert run is not None
        source.at = run.end()
        char = yield from source.peek()
        if not char:
            raise Cut
        if CONTROL.match(char):
            raise Malformed
        if char == quote:
            source.at += 1
            return
        if char == "\\":
            source.at += 1
            if not (yield from source.peek()):
                raise Cut
            source.at += 1


class Gemma:
    """``call:name{key:<|"|>text<|"|>,other:[1,2]}``."""

    def __init__(self, alphabet: Alphabet, source: Source, sink: Sink) -> None:
        self.source = source
        self.sink = sink
        self.quote = alphabet.encode(GEMMA_QUOTE)

    def read(self) -> Reading[None]:
        yield from self.source.expect(("call:",))
        name = yield from self.source.take(NAME)
        if not 0 < len(name) <= MAX_NAME:
            raise Malformed
        arguments = yield from self._object(0)
        self.sink.begin(name)
        self.sink.arguments(as_json(arguments))
        self.sink.end()

    def _object(self, depth: int) -> Reading[dict[str, Any]]:
        source = self.source
        yield from source.expect(("{",))
        found: dict[str, Any] = {}
        if (yield from source.accept(("}",))):
            return found
        while True:
            key = (yield from self._text()) or (yield from source.take(_GEMMA_SCALAR)).strip(SPACE)
            yield from source.expect((":",))
            found[key] = yield from self._value(depth + 1)
            if (yield from source.accept(("}",))):
                return found
            yield from source.expect((",",))

    def _value(self, depth: int) -> Reading[Any]:
        source = self.source
        if depth > MAX_DEPTH:
            raise Malformed
        text = yield from self._text()
        if text is not None:
            return text
        yield from source.skip_space()
        char = yield from source.peek()
        if char == "{":
            return (yield from self._object(depth))
        if char == "[":
            return (yield from self._list(depth))
        raw = (yield from source.take(_GEMMA_SCALAR)).strip(SPACE)
        try:
            return json_value(raw)
        except ValueError:
            if raw.lower() in _CONSTANTS:
                return _CONSTANTS[raw.lower()]
            if not raw:
                raise Malformed from None
            return raw

    def _list(self, depth: int) -> Reading[list[Any]]:
        source = self.source
        source.at += 1
        found: list[Any] = []
        if (yield from source.accept(("]",))):
            return found
        while True:
            found.append((yield from self._value(depth + 1)))
            if (yield from source.accept(("]",))):
                return found
            yield from source.expect((",",))

    def _text(self) -> Reading[str | None]:
        if not (yield from self.source.accept((self.quote,))):
            return None
        text, _ = yield from self.source.until((self.quote,))
        return self.sink.alphabet.decode(text)
