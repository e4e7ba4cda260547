"""The bodies of calls: JSON objects, a name before JSON arguments, and arguments between tags."""

from __future__ import annotations

import ast
import re
from typing import Any

from protocol.formats.events import MAX_NAME, SPACE, Sink, as_json, json_value
from protocol.formats.json_text import read_key, read_tree, read_value
from protocol.formats.source import Alphabet, Malformed, Reading, Source
from protocol.formats.spec import Tools

NAME = re.compile(r"[\w.:/-]*")
INDEXED = re.compile(r"^(?:functions\.)?(.+?)(?::\d+)?$")
ARGUMENTS = ("arguments", "parameters")  # models take one for the other
JSON_TYPES: dict[type, str] = {
    dict: "object", list: "array", bool: "boolean", int: "integer", float: "number", type(None): "null", str: "string",
}  # fmt: skip


class Bodies:
    """Reads one call (or one list of calls) after its marker, into the sink. Raises Malformed or Cut."""

    def __init__(self, tools: Tools, alphabet: Alphabet, source: Source, sink: Sink) -> None:
        self.tools = tools
        self.source = source
        self.sink = sink
        pieces = alphabet.pieces
        self.id_close = alphabet.encode(tools.id_close.strip())
        self.name_prefix, self.name_close = pieces(tools.name_prefix), pieces(tools.name_close)
        self.args_open = alphabet.encode(tools.args_open.strip())
        self.key_open, self.key_close = pieces(tools.key_open), pieces(tools.key_close)
        self.value_open = alphabet.encode(tools.value_open.strip())
        value_close = alphabet.encode(tools.value_close.strip())
        self.value_ends = (f"\n{value_close}", value_close) if tools.lines else (value_close,)
        self.args_path = tools.args_at
        self.paths = (tools.name_at, tools.args_at)

    def read(self) -> Reading[None]:
        kind = self.tools.kind
        if kind == "json":
            yield from self._list() if self.tools.listed else self._object()
        elif kind == "args":
            yield from self._named()
        else:
            yield from self._tagged()

    # -------------------------------------------------------------- json

    def _list(self) -> Reading[None]:
        """One list of objects; a lone object is taken for a list of one."""
        source = self.source
        if not (yield from source.accept(("[",))):
            yield from self._object()
            return
        while True:
            yield from self._object()
            if (yield from source.accept(("]",))):
                return
            yield from source.expect((",",))

    def _object(self) -> Reading[None]:
        """``{"name": ..., "arguments": {...}}``, in any order, or ``{"name": {...}}`` where it is keyed."""
        yield from self.source.expect(("{",))
        if self.tools.keyed:
            name = yield from read_key(self.source)
            yield from self.source.expect((":",))
            yield from self._json_arguments(self._plain(name))
            yield from self.source.expect(("}",))
            self._end()
            return
        found: dict[str, Any] = {}
        yield from self._members((), found)
        if "name" not in found:
            raise Malformed
        if not found.get("shown"):
            self.sink.begin(found["name"])
            self.sink.arguments(found.get("arguments", "{}"))
        self._end()

    def _end(self) -> None:
        """The call is whole: what comes next is no part of it."""
        self.sink.end()
        self.source.mark = self.source.at

    def _members(self, path: tuple[str, ...], found: dict[str, Any]) -> Reading[None]:
        """The members of an object after its brace, up to and with the closing one."""
        source = self.source
        if (yield from source.accept(("}",))):
            return
        while True:
            key = yield from read_key(source)
            yield from source.expect((":",))
            here = (*path, key)
            if here == self.tools.name_at:
                found["name"] = self._plain((yield from read_key(source)))
            elif here[:-1] == self.args_path[:-1] and key in (*ARGUMENTS, self.args_path[-1]):
                if "name" in found and not found.get("shown"):
                    yield from self._json_arguments(found["name"])
                    found["shown"] = True
                else:
                    found["arguments"] = _object_text((yield from read_value(source)))
            elif any(path[: len(here)] == here for path in self.paths) and (yield from source.accept(("{",))):
                yield from self._members(here, found)
            else:
                yield from read_value(source)
            if (yield from source.accept(("}",))):
                return
            yield from source.expect((",",))

    def _json_arguments(self, name: str) -> Reading[None]:
        """Begin a call and read its arguments: an object, or a text that holds one."""
        self.sink.begin(name)
        yield from self.source.skip_space()
        if (yield from self.source.peek()) == "{":
            yield from read_tree(self.source, self.sink.arguments)
        else:
            self.sink.arguments(_object_text((yield from read_value(self.source))))

    def _plain(self, name: Any) -> str:
        if not isinstance(name, str):
            raise Malformed
        if self.tools.ids == "indexed" and (found := INDEXED.match(name)):
            return found[1]
        return name

    # -------------------------------------------------------------- a name, then JSON or tags

    def _name(self) -> Reading[str]:
        source = self.source
        if self.id_close:
            yield from source.skip_space()
            yield from source.take(NAME)
            yield from source.expect((self.id_close,))
        if self.name_prefix:
            yield from source.expect(self.name_prefix)
        yield from source.skip_space()
        name = yield from source.take(NAME)
        if not 0 < len(name) <= MAX_NAME:
            raise Malformed
        yield from source.expect(self.name_close)
        return self._plain(name)

    def _named(self) -> Reading[None]:
        source = self.source
        name = yield from self._name()
        if self.args_open and not (yield from source.accept((self.args_open,))):
            between, _ = yield from source.until((self.args_open,))  # such as an id
            if len(between) > MAX_NAME:
                raise Malformed
        yield from source.skip_space()
        if (yield from source.peek()) != "{":
            raise Malformed
        yield from self._json_arguments(name)
        self._end()

    def _tagged(self) -> Reading[None]:
        """``<name><key>K</key><value>V</value>...``: what the schema does not call a text is read as JSON."""
        source, sink = self.source, self.sink
        name = yield from self._name()
        sink.begin(name)
        sink.arguments("{")
        seen: set[str] = set()
        while (yield from source.accept(self.key_open)):
            key, _ = yield from source.until(self.key_close[:1])
            yield from source.expect(self.key_close[1:])
            key = sink.alphabet.decode(key).strip(SPACE)
            attribute = ""
            if self.value_open and not (yield from source.accept((self.value_open,))):
                attribute, _ = yield from source.until((self.value_open,))
            if not key or len(key) > MAX_NAME or len(attribute) > MAX_NAME or key in seen:
                raise Malformed
            sink.arguments(f"{', ' if seen else ''}{as_json(key)}: ")
            seen.add(key)
            yield from self._tagged_value(_types(sink.functions[name], key, attribute.strip(SPACE + '"')))
        sink.arguments("}")
        yield from self._closed()
        self._end()

    def _closed(self) -> Reading[None]:
        """Where the arguments end is told by the end of the call alone."""
        for close in (self.tools.call_close, self.tools.section_close):
            pieces = self.sink.alphabet.pieces(close)
            if pieces:
                start = self.source.at
                yield from self.source.expect(pieces[:1])
                self.source.at = start
                return

    def _tagged_value(self, types: frozenset[str]) -> Reading[None]:
        source, sink = self.source, self.sink
        if self.tools.lines:
            char = yield from source.peek()
            if char == "\r":
                source.at += 1
                char = yield from source.peek()
            if char == "\n":
                source.at += 1
        if types == {"string"}:
            sink.arguments('"')
            yield from source.until(
                self.value_ends, lambda text: sink.arguments(as_json(sink.alphabet.decode(text))[1:-1])
            )
            sink.arguments('"')
        else:
            raw, _ = yield from source.until(self.value_ends)
            sink.arguments(typed_text(sink.alphabet.decode(raw), types))


def _object_text(raw: str) -> str:
    """Arguments as the text of an object: as they are, within a JSON string, or absent."""
    try:
        value = json_value(raw)
        if isinstance(value, str):
            raw, value = value, json_value(value or "{}")
    except ValueError:
        raise Malformed from None
    if value is None:
        return "{}"
    if not isinstance(value, dict):
        raise Malformed
    return raw or "{}"


def typed_text(raw: str, types: frozenset[str]) -> str:
    """The JSON text of a raw value: what it says, if the schema (``types``; empty: anything) allows that, else a text.
    Python's notation is read too, as templates write values with it."""
    text = raw.strip(SPACE)
    try:
        value = json_value(text)
    except ValueError:
        try:
            value = ast.literal_eval(text) if len(text) < 65536 else raw
            text = as_json(value)
            value = json_value(text)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return as_json(raw)
    kind = JSON_TYPES[type(value)]
    allowed = not types or kind in types or (kind == "integer" and "number" in types)
    if kind == "string" or ("string" in types and not allowed):
        return as_json(raw)
    return text


def _types(schema: Any, key: str, attribute: str) -> frozenset[str]:
    """The JSON types that the schema of the arguments allows for ``key``; empty: not said."""
    if attribute in ("true", "false"):  # said by the model: a text or not
        return frozenset({"string"}) if attribute == "true" else frozenset(JSON_TYPES.values()) - {"string"}
    properties = schema.get("properties") if isinstance(schema, dict) else None
    inner = properties.get(key) if isinstance(properties, dict) else None
    return frozenset(_types_of(inner, schema, 4))


def _types_of(schema: Any, root: Any, depth: int) -> set[str]:
    if not isinstance(schema, dict) or not depth:
        return set()
    if isinstance(reference := schema.get("$ref"), str) and reference.startswith("#/"):
        target: Any = root
        for part in reference[2:].split("/"):
            target = target.get(part) if isinstance(target, dict) else None
        return _types_of(target, root, depth - 1)
    given = schema.get("type")
    if isinstance(given, str):
        return {given}
    if isinstance(given, list):
        return {one for one in given if isinstance(one, str)}
    if isinstance(values := schema.get("enum"), list):
        return {JSON_TYPES[type(value)] for value in values}
    if "const" in schema:
        return {JSON_TYPES[type(schema["const"])]}
    found: set[str] = set()
    for word in ("anyOf", "oneOf", "allOf"):
        for part in schema.get(word) or () if isinstance(schema.get(word), list) else ():
            found |= _types_of(part, root, depth - 1)
    return found
