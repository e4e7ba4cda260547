"""JSON schemas as far as they can be kept by a grammar: a fixed list of keywords that cannot, named with their path.

A schema is compiled to a grammar that admits what it allows (grammar.py). What would need the whole value
before it can be judged (`not`, `uniqueItems`, `if`, ...) is refused here, without the library, so that the answer is
the same at every door. Such a keyword with a value that says nothing (``uniqueItems: false``) is left out instead.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from typing import Any

from protocol.errors import InvalidRequest, StructureNotSupported

# Keyword -> values that constrain nothing.
REFUSED: dict[str, tuple[Any, ...]] = {
    "not": (False,),
    "if": (),
    "then": (),
    "else": (),
    "uniqueItems": (False,),
    "contains": (),
    "minContains": (),
    "maxContains": (),
    "propertyNames": (True, {}, {"type": "string"}),
    "dependencies": ({},),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
    "unevaluatedItems": (True, {}),
    "unevaluatedProperties": (True, {}),
    "$dynamicRef": (),
    "$dynamicAnchor": (),
    "$recursiveRef": (),
    "$recursiveAnchor": (False,),
}
FORMATS = frozenset(
    ["date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown"]
)
# Notes for programs and forms (OpenAPI's, and those of well-known model libraries), no promise about the text.
ANNOTATION_FORMATS = frozenset(
    ["password", "binary", "byte", "int32", "int64", "float", "double", "path", "file-path", "directory-path"]
)
MAX_DEPTH = 64
# RFC 3339 as every validator reads it: the library's own also take `z`, `t` and the second 60.
_TWO = "(0[48]|[2468][048]|[13579][26])"  # the last two digits of most leap years
_DATE = (
    r"([0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)-"  # no year 0
    r"((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8]))"
    rf"|([0-9]{{2}}{_TWO}|{_TWO}00)-02-29"
)
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
FORMAT_PATTERNS = {"date": f"^({_DATE})$", "time": f"^({_TIME})$", "date-time": f"^({_DATE})T{_TIME}$"}
BELOW_ZERO = -1e-6  # the library takes -0 for less than 0
_ONE = ("additionalProperties", "additionalItems", "items", "contains", "not", "if", "then", "else", "propertyNames")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")

# White space in JSON: enough for every usual layout, but bounded, since a model could otherwise go on for ever.
WHITESPACE = r"\n?[ \t]{0,32}"
# One without an end goes to the end of the pattern: looked for again from each bracket within it, 64 kB took a minute.
_NEGATED_CLASS = re.compile(r"\[\^\]?(?:\\.|[^\]\\])*+(?:\]|\\?\Z)", re.DOTALL)
MAX_CLASSES = 32  # different negated classes of a schema that are looked at one by one
ESCAPES = 'bfnrt"\\'  # of JSON strings

Path = tuple[str, ...]


def subschemas(schema: Any) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every subschema that is an object, with the path to it, parents first. What is no schema (the value of `enum`,
    `const`, `default`, the names under `properties`) is not looked into."""
    waiting: list[tuple[Path, Any]] = [((), schema)]
    while waiting:
        path, one = waiting.pop()
        if not isinstance(one, dict):
            continue
        yield path, one
        below = [((*path, key), one[key]) for key in _ONE if key in one]
        for key in _LISTS:
            if isinstance(one.get(key), list):
                below.extend(((*path, key, str(at)), part) for at, part in enumerate(one[key]))
        for key in _MAPS:
            if isinstance(one.get(key), dict):
                below.extend(((*path, key, name), part) for name, part in one[key].items())
        waiting.extend(reversed(below))


def pointer(path: Path) -> str:
    """The JSON pointer (RFC 6901) of ``path``; "/" for the root, so that a message shows something."""
    return "/" + "/".join(step.replace("~", "~0").replace("/", "~1") for step in path)


def check_schema(schema: Any, at: str) -> None:
    """Raise InvalidRequest, ``at`` its param, for the first keyword that cannot be served."""
    if not isinstance(schema, dict | bool):
        raise InvalidRequest(f"{at} must be an object or a boolean", param=at)
    for path, one in subschemas(schema):
        if len(path) > MAX_DEPTH:
            raise InvalidRequest(f"{at} is nested more than {MAX_DEPTH} deep", param=at)
        for keyword in REFUSED:
            if keyword in one and one[keyword] not in REFUSED[keyword]:
                raise cannot_serve(keyword, path, at)
        form = one.get("format")
        if form is not None and not _one_of(form, FORMATS) and not _one_of(form, ANNOTATION_FORMATS):
            raise cannot_serve("format", path, at, f": the known ones are {', '.join(sorted(FORMATS))}")


def cannot_serve(keyword: str, path: Path, at: str, why: str = "") -> StructureNotSupported:
    """The one way in which a schema is refused: keyword, path, reason."""
    return StructureNotSupported(
        f"{at}: the keyword {keyword} at {pointer(path)[:200]} cannot be served{why}", param=at
    )


def served_schema(schema: Any) -> Any:
    """A copy of a checked schema without what constrains nothing and without options of the library's own."""
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        return schema
    kept: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "x-guidance" or key in REFUSED or (key == "format" and _one_of(value, ANNOTATION_FORMATS)):
            continue
        if key in _MAPS and isinstance(value, dict):
            kept[key] = {name: served_schema(part) for name, part in value.items()}
        elif key in _LISTS and isinstance(value, list):
            kept[key] = [*(served_schema(part) for part in value), *(kept.get(key) or ())]
        elif key in _ONE:
            kept[key] = served_schema(value)
        elif key == "exclusiveMaximum" and value == 0 and value is not False and _is_number(schema.get("maximum", 0)):
            kept["maximum"] = min(BELOW_ZERO, schema.get("maximum", 0))
        elif key == "format" and _one_of(value, FORMAT_PATTERNS):
            pattern = {"pattern": FORMAT_PATTERNS[value]}
            kept["allOf"] = [*kept.get("allOf", []), pattern]
        elif key != "maximum" or "maximum" not in kept:
            kept[key] = value
    return kept


def _one_of(value: Any, known: Container[str]) -> bool:
    return isinstance(value, str) and value in known


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def library_options(schema: Any, whitespace: str = WHITESPACE) -> dict[str, Any]:
    """How the library is to read a schema (its `x-guidance`).

    It takes an escaped quote or backslash for a character of a negated class that excludes them: where a pattern has
    such a class, no string of the schema may hold that escape. Stricter than the schema, never laxer.
    """
    options: dict[str, Any] = {"whitespace_pattern": whitespace, "lenient": False, "coerce_one_of": False}
    excluded = set(_excluded({found for one in _patterns(schema) for found in _NEGATED_CLASS.findall(one)}))
    if excluded:
        options["json_allowed_escapes"] = "".join(char for char in ESCAPES if char not in excluded)
    return options


def _patterns(schema: Any) -> Iterator[str]:
    for _, one in subschemas(schema):
        if isinstance(one.get("pattern"), str):
            yield one["pattern"]
        if isinstance(one.get("patternProperties"), dict):
            yield from one["patternProperties"]


def _excluded(classes: set[str]) -> Iterator[str]:
    """Which of quote and backslash some negated class excludes; of too many classes it is taken that they do both."""
    for char in '"\\':
        if len(classes) > MAX_CLASSES or any(_excludes(negated, char) for negated in classes):
            yield char


def _excludes(negated: str, char: str) -> bool:
    try:
        return re.fullmatch(negated, char) is None
    except re.error:  # of another dialect, or without an end: take no risk
        return True
