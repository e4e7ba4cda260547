"""Grammars of calls: what a model may write where it must call, or once it has begun to.

One Lark grammar for each request, in the form of the model's own format. Control tokens are named by their ids. Its
first line is ``start: answer``, so that a thought can be put before (rules.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from protocol.errors import InvalidRequest, StructureNotSupported
from protocol.formats.source import CONTROL, FIRST_CONTROL, Alphabet
from protocol.formats.spec import GEMMA_QUOTE, FormatSpec, Tools
from protocol.structures.json_schema import check_schema, library_options, served_schema
from protocol.structures.structure import MAX_GRAMMAR_BYTES

ANY_ARGUMENTS: dict[str, Any] = {"type": "object"}
JSON_SPACE = "[ ]?"
UNRULED = ("pattern", "minLength", "maxLength", "format")  # of texts that are not written as JSON
MAX_DEPTH = 16


def call_grammar(spec: FormatSpec, functions: list[dict[str, Any]], *, required: bool, single: bool) -> str | None:
    """The grammar of an answer with calls of ``functions`` (name, parameters, strict). ``required``: nothing but calls,
    and all arguments as their schema says; else calls where the model begins one, their arguments by schema for those
    that are strict. None where nothing can be ruled. StructureNotSupported names a schema that cannot be served."""
    tools = spec.tools
    assert tools is not None
    writer = _Writer(spec, tools, required)
    try:
        calls = [writer.call(function) for function in functions]
    except StructureNotSupported:
        if required or any(function.get("strict") for function in functions):
            raise
        return None
    if tools.kind == "harmony":
        return writer.harmony(calls, required)
    body = _either(calls)
    if tools.kind == "pythonic" or tools.listed:
        more = "" if single else f' (", " {body})*'
        body = f'"[" {body}{more} "]"'
    one = _join(writer.marker(tools.call_open), body, writer.marker(tools.call_close))
    if tools.section_open:
        more = "" if single else f" ({_join(writer.marker(tools.between), one)})*"
        one = _join(writer.marker(tools.section_open), f"{one}{more}", writer.marker(tools.section_close))
    elif required and not (single or tools.listed or tools.kind == "pythonic"):
        one = f"{one} ({_join(writer.marker(tools.between), one)})*"
    if required:
        return writer.text(one)
    if tools.bare:
        return None  # a call begins like any text
    return writer.text(writer.after_text(one, once=single))


class _Writer:
    """Gathers rules; every method gives an expression."""

    def __init__(self, spec: FormatSpec, tools: Tools, by_schema: bool) -> None:
        self.tools = tools
        self.by_schema = by_schema
        self.alphabet = Alphabet(spec.controls)
        self.rules: list[str] = []
        self.written = 0  # characters of the rules

    def text(self, answer: str) -> str:
        return "\n".join(["start: answer", f"answer: {answer}", r"TEXT: /(.|\n)*/", *self.rules]) + "\n"

    def rule(self, expression: str, lazy: bool = False) -> str:
        name = f"r{len(self.rules)}"
        self.written = _bounded(self.written + len(expression))
        self.rules.append(f"{name}{'[lazy]' if lazy else ''}: {expression}")
        return name

    def marker(self, text: str) -> str:
        return marker(self.alphabet, text)

    def until(self, marker: str) -> str:
        """Any text, and then ``marker``."""
        encoded = self.alphabet.encode(marker)
        at = CONTROL.search(encoded)
        if at is None:
            return self.rule(f"TEXT {quoted(marker)}", lazy=True)
        if ord(encoded[0]) >= FIRST_CONTROL and CONTROL.match(encoded):
            return f"TEXT {self.marker(marker)}"
        return (
            self.rule(f"TEXT {quoted(encoded[: at.start()])}", lazy=True)
            + " "
            + self.marker(self.alphabet.decode(encoded[at.start() :]))
        )

    def after_text(self, section: str, once: bool) -> str:
        """Text, in which a section begins with its marker: with the first piece of it, as the parser looks for it."""
        given = self.tools.section_open or self.tools.call_open
        head = self.alphabet.pieces(given)[0]
        tail = self.alphabet.decode(self.alphabet.encode(given).lstrip()[len(head) :])
        whole = section.removeprefix(self.marker(given)).strip()
        opened = f"TEXT {self.marker(self.alphabet.decode(head))}"
        if not CONTROL.match(head):
            opened = self.rule(opened, lazy=True)
        return f"({_join(opened, self.marker(tail), whole)}){'?' if once else '*'} TEXT"

    # -------------------------------------------------------------- one call

    def call(self, function: dict[str, Any]) -> str:
        """A call of ``function`` between its markers."""
        tools, name = self.tools, function["name"]
        given = function.get("parameters") or {**ANY_ARGUMENTS, "properties": {}}
        ruled = self.by_schema or bool(function.get("strict"))
        if ruled:
            _bounded(len(json.dumps(given, ensure_ascii=False)))  # before it is looked through
            check_schema(given, f"tools: {name}")
        schema = given if ruled else ANY_ARGUMENTS
        if tools.kind == "json":
            return self._json_call(name, self.json(schema))
        if tools.kind in ("args", "harmony"):
            return self._named(name, self.json(schema))
        if not ruled and tools.kind != "pythonic":
            schema = _loose(given)
        if tools.kind == "tagged":
            return self._tagged(name, schema, ruled)
        if tools.kind == "gemma":
            return f'"call:{name}" {self._gemma_object(schema, schema, MAX_DEPTH)}'
        parts = self._members(schema, lambda key, one: f"{quoted(key + '=')} {self.json(one, schema)}", '", "')
        return f"{quoted(name + '(')} {parts} {quoted(')')}"

    def json(self, schema: Any, root: Any = None) -> str:
        """A value of ``schema``; references in it are into ``root``."""
        served = served_schema(schema)
        if not isinstance(served, dict):
            served = {} if served else {"not": {}}
        shared = {key: served_schema(root[key]) for key in ("$defs", "definitions") if root and key in root}
        whole = {**shared, **served}
        _bounded(self.written + len(json.dumps(whole, ensure_ascii=False)))
        options = {"x-guidance": library_options(whole, JSON_SPACE)}
        return self.rule("%json " + json.dumps({**options, **whole}, ensure_ascii=False))

    def _json_call(self, name: str, arguments: str) -> str:
        tools = self.tools
        if tools.keyed:
            return f"{quoted('{' + json.dumps(name) + ': ')} {arguments} {quoted('}')}"
        marks: dict[str, Any] = {}
        for path, value in ((tools.name_at, name), (tools.args_at, "\0")):
            inner = marks
            for key in path[:-1]:
                inner = inner.setdefault(key, {})
            inner[path[-1]] = value
        before, after = json.dumps(marks, ensure_ascii=False).split(json.dumps("\0"))
        return f"{quoted(before)} {arguments} {quoted(after)}"

    def _named(self, name: str, arguments: str) -> str:
        tools = self.tools
        if tools.kind == "harmony":
            head = f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>"
            return f"{self.marker(head)} {arguments}"
        number = "/[A-Za-z0-9]{9}/ " + self.marker(tools.id_close) if tools.id_close else ""
        if tools.ids == "indexed":
            return _join(quoted(f"functions.{name}:"), "/[0-9]{1,2}/", self.marker(tools.name_close), arguments)
        close = self.marker(tools.name_close + tools.args_open)
        return _join(number, self.marker(tools.name_prefix), quoted(name), close, arguments)

    def _tagged(self, name: str, schema: Any, ruled: bool) -> str:
        tools = self.tools

        def member(key: str, one: Any) -> str:
            texts = self._texts(one, ruled, key)
            attribute = ("true" if texts else "false") if tools.value_open else ""
            head = self.marker(f"{tools.key_open}{key}{tools.key_close}{attribute}{tools.value_open}")
            if texts == "TEXT":
                return f"{head} {self.until(tools.value_close)}"
            return f"{head} {texts or self.json(one, schema)} {self.marker(tools.value_close)}"

        return _join(quoted(name), self.marker(tools.name_close), self._members(schema, member, ""))

    def _texts(self, schema: Any, ruled: bool, key: str) -> str:
        """How a raw text of ``schema`` is written: TEXT, or its choices; "" for what is no text."""
        if not isinstance(schema, dict) or not schema:
            return "TEXT"
        choices = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if isinstance(choices, list) and choices and all(isinstance(one, str) for one in choices):
            return _either([quoted(one) for one in choices])
        if schema.get("type") != "string":
            return ""
        unruled = next((word for word in UNRULED if word in schema), None)
        if ruled and unruled is not None:
            raise StructureNotSupported(
                f"tools: {unruled} of {key} cannot be kept in this model's tool format, which writes texts raw",
                param="tools",
            )
        return "TEXT"

    def _members(self, schema: Any, member: Callable[[str, Any], str], separator: str) -> str:
        """The properties of an object in their order, those that are not required optional."""
        properties, required = _named_members(schema)
        parts: list[tuple[str, bool]] = []
        size = 0
        for key, one in properties.items():
            parts.append((member(key, one), key in required))
            size = _bounded(size + len(parts[-1][0]))
        if not separator:
            return " ".join(part if needed else f"({part})?" for part, needed in parts)
        first: list[str] = []  # what may come first, with all that may follow
        for at, (part, needed) in enumerate(parts):
            rest = " ".join(f"{separator} {p}" if n else f"({separator} {p})?" for p, n in parts[at + 1 :])
            first.append(_join(part, rest))
            size = _bounded(size + len(rest))
            if needed:
                return self.rule(_either(first))
        return self.rule(f"({_either(first)})?") if first else ""

    def _gemma_object(self, schema: Any, root: Any, depth: int) -> str:
        member = lambda key, one: f"{quoted(key + ':')} {self._gemma_value(one, root, depth - 1)}"  # noqa: E731
        return _join('"{"', self._members(schema, member, '","'), '"}"')

    def _gemma_value(self, schema: Any, root: Any, depth: int) -> str:
        texts = self._texts(schema, self.by_schema, "a text")
        if texts and isinstance(schema, dict) and schema:
            quote = self.marker(GEMMA_QUOTE)
            return f"{quote} {self.until(GEMMA_QUOTE)}" if texts == "TEXT" else f"{quote} {texts} {quote}"
        kind = schema.get("type") if isinstance(schema, dict) else None
        if kind not in ("object", "array", "integer", "number", "boolean", "null") or not depth:
            raise StructureNotSupported(
                "tools: every value needs one type in this model's tool format (no anyOf, no $ref)", param="tools"
            )
        if kind == "object":
            return self._gemma_object(schema, root, depth)
        if kind == "array":
            item = self._gemma_value(schema.get("items") or {"type": "string"}, root, depth - 1)
            return f'"[" ({item} ("," {item})*)? "]"'
        return self.json(schema, root)

    # -------------------------------------------------------------- gpt-oss

    def harmony(self, calls: list[str], required: bool) -> str:
        """Messages on channels, the last of them a call, or, where none is required, the final answer."""
        kinds = '"analysis"' if required else '("analysis" | "commentary")'
        between = f"{self.marker('<|channel|>')} {kinds} {self.marker('<|message|>')} {self.until('<|end|>')}"
        between += f" {self.marker('<|start|>assistant')}"
        last = _either(calls)
        if not required:
            last = f"({last} | {self.marker('<|channel|>final<|message|>')} TEXT)"
        return self.text(f"({between})* {last}")


def _bounded(size: int) -> int:
    """Told while a grammar is written: what a body may hold can be a thousand times as long by then."""
    if size > MAX_GRAMMAR_BYTES:
        raise StructureNotSupported(
            f"tools: their grammar would have more than {MAX_GRAMMAR_BYTES} bytes", param="tools"
        )
    return size


def _named_members(schema: Any) -> tuple[dict[str, Any], set[str]]:
    """The properties of an object and which are required. InvalidRequest where they are of another type."""
    given = schema if isinstance(schema, dict) else {}
    properties, required = given.get("properties") or {}, given.get("required") or []
    if not isinstance(properties, dict):
        raise InvalidRequest("tools: properties must be an object", param="tools")
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise InvalidRequest("tools: required must be a list of names", param="tools")
    return properties, set(required)


def marker(alphabet: Alphabet, text: str) -> str:
    """A marker: control tokens by their ids, letters as they are."""
    ids = {char: id for id, (char, _) in alphabet.tokens.items()}
    out, letters = [], ""
    for char in alphabet.encode(text):
        if char in ids:
            out += [quoted(letters)] if letters else []
            out.append(f"<[{ids[char]}]>")
            letters = ""
        else:
            letters += char
    return " ".join([*out, quoted(letters)] if letters else out)


def quoted(text: str) -> str:
    """A Lark string."""
    return json.dumps(text, ensure_ascii=False)


def _join(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def _either(options: list[str]) -> str:
    return f"({' | '.join(options)})"


def _loose(schema: Any) -> dict[str, Any]:
    """Properties by their names alone, each optional: what is ruled of a function that is not strict."""
    return {"type": "object", "properties": _named_members(schema)[0]}
