"""Some three hundred JSON schemas, valid ones all: the ideas of the public JSON-Schema-Test-Suite, and tricky ones.

    for name, schema in schemas(): ...

Strings are bounded where nothing speaks against it, so that a model that draws at random comes to an end.
``refused()`` are those that no grammar can keep, each with the keyword and the path that the refusal must name.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

Schema = Any
Named = tuple[str, Schema]
WORD = {"type": "string", "maxLength": 8}
INT = {"type": "integer", "minimum": 0, "maximum": 999}
BOOL = {"type": "boolean"}
SCALARS: dict[str, Schema] = {
    "string": WORD, "integer": INT, "number": {"type": "number", "minimum": -5, "maximum": 5}, "boolean": BOOL,
    "null": {"type": "null"},
}  # fmt: skip


def closed(properties: dict[str, Schema], required: list[str] | None = None, **more: Any) -> Schema:
    needed = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": needed, "additionalProperties": False, **more}


def schemas() -> list[Named]:
    """All that are to be served."""
    parts = (scalars, numbers, strings, enums, arrays, objects, references, combinations, everyday)
    return [named for part in parts for named in part()]


def scalars() -> Iterator[Named]:
    yield from SCALARS.items()
    for first, second in itertools.combinations(SCALARS, 2):
        yield f"{first} or {second}", {"type": [first, second], "maxLength": 6, "minimum": 0, "maximum": 99}
    yield "annotations", {
        "$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "https://example.org/a", "$comment": "c",
        "title": "t", "description": "d", "default": 1, "examples": [1, 2], "deprecated": True, "readOnly": True,
        **INT,
    }  # fmt: skip
    yield "unknown words", {"x-order": 3, "nullable": True, **WORD}
    yield "an annotating format", {"type": "string", "format": "password", "maxLength": 5}
    yield "says nothing", {"uniqueItems": False, "unevaluatedProperties": True, **BOOL}


def numbers() -> Iterator[Named]:
    bounds = [(0, 9), (-12, 130), (-7, -3), (1, 1), (-1, 1), (99, 101), (0, 65535), (-(2**31), 2**31 - 1), (950, 1049)]
    for low, high in bounds:
        yield f"integer {low} to {high}", {"type": "integer", "minimum": low, "maximum": high}
        yield f"number {low} to {high}", {"type": "number", "minimum": low, "maximum": high}
        if high - low > 1:
            yield f"integer inside {low} to {high}", {
                "type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": high,
            }  # fmt: skip
    for low, high in [(-1.5, 2.25), (0.001, 0.01), (0.5, 10), (-0.25, 0)]:
        yield f"number {low} to {high}", {"type": "number", "minimum": low, "maximum": high}
        yield f"number inside {low} to {high}", {"type": "number", "exclusiveMinimum": low, "exclusiveMaximum": high}
    for factor in (2, 3, 7, 10, 25):
        yield f"a multiple of {factor}", {"type": "integer", "multipleOf": factor, "minimum": 0, "maximum": 200}
    yield "no lower bound", {"type": "integer", "maximum": 7}
    yield "no upper bound", {"type": "integer", "minimum": 7}
    yield "no bound", {"type": "integer"}


def strings() -> Iterator[Named]:
    for low, high in [(0, 0), (1, 1), (0, 3), (2, 4), (5, 5), (1, 12)]:
        yield f"length {low} to {high}", {"type": "string", "minLength": low, "maxLength": high}
    patterns = [
        "^[a-z]{1,6}$", "^(?:[A-Z]{2}\\d{2,4}|n/a)$", "^a?b{2,3}c{1,2}$", "^\\d{3}-\\d{4}$", "^[^\"\\\\]{0,4}$",
        "^(foo|bar|baz)(-(foo|bar)){0,2}$", "^[\\w.]{1,5}@[a-z]{1,4}\\.com$", "^$", "^(|x)$", "^[αβγ]{1,3}$",
        "^[A-Fa-f0-9]{2}(:[A-Fa-f0-9]{2}){2}$", "^v\\d{1,2}(\\.\\d{1,2}){0,2}$", "^[ -~]{1,5}$", "^\\s?x\\s?$",
        "^(a(b(c)?)?)?$", "^[+-]?\\d{1,3}$", "^\\$\\d{1,3}\\.\\d{2}$", "^日本[0-9]$", "^.{3}$", "^(yes|no)$|^$",
    ]  # fmt: skip
    for pattern in patterns:
        yield f"pattern {pattern}", {"type": "string", "pattern": pattern}
    for form in ("date", "time", "date-time", "uuid", "ipv4", "duration"):
        yield f"format {form}", {"type": "string", "format": form}
    yield "pattern and length", {"type": "string", "pattern": "^[ab]+$", "maxLength": 5}
    yield "two patterns", {"type": "string", "allOf": [{"pattern": "^a[a-z]{0,4}z$"}, {"pattern": "^.b"}]}


def enums() -> Iterator[Named]:
    values: list[list[Any]] = [
        ["a"], ["a", "b", "c"], [1, 2, 3], [None], [True, False], ["", " "], ["grün", "保留", "🙂"],
        ['a"b', "c\\d", "e\nf"],
        [{"a": 1}, [1, "x"], None], [1.5, "1.5"], ["prefix", "prefixed", "pre"], [[], {}], [-1, 0, 10**12],
        ["true", True], [{"b": {"a": [1, {"c": None}]}}],
    ]  # fmt: skip
    for number, choices in enumerate(values):
        yield f"enum {number}", {"enum": choices}
        yield f"const {number}", {"const": choices[0]}
    yield "enum of a type", {"type": "string", "enum": ["a", 1, "b"]}
    yield "many", {"enum": [f"value-{number}" for number in range(200)]}


def arrays() -> Iterator[Named]:
    for (name, item), (low, high) in itertools.product(SCALARS.items(), [(0, 2), (2, 2), (1, 4)]):
        yield f"{low} to {high} of {name}", {"type": "array", "items": item, "minItems": low, "maxItems": high}
    yield "tuple", {"type": "array", "prefixItems": [INT, WORD], "items": False, "minItems": 2}
    yield "tuple with a tail", {"type": "array", "prefixItems": [BOOL], "items": INT, "minItems": 1, "maxItems": 4}
    yield "optional tuple", {"type": "array", "prefixItems": [INT, WORD, BOOL], "items": False}
    for (one, first), (other, second) in itertools.product(SCALARS.items(), repeat=2):
        pair = {"type": "array", "prefixItems": [first, second], "items": False, "minItems": 2}
        yield f"a pair of {one} and {other}", pair
    yield "nothing in it", {"type": "array", "maxItems": 0}
    yield "matrix", {"type": "array", "minItems": 2, "maxItems": 2, "items": {
        "type": "array", "items": INT, "minItems": 2, "maxItems": 2}}  # fmt: skip
    yield "of objects", {"type": "array", "items": closed({"a": INT}), "maxItems": 3}
    yield "of mixed", {"type": "array", "items": {"anyOf": [INT, WORD, {"type": "null"}]}, "maxItems": 4}
    yield "of enums", {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 9}


def objects() -> Iterator[Named]:
    names = ["a", "b", "c"]
    for count in range(4):
        for required in itertools.combinations(names, count):
            yield f"required {''.join(required)}", closed({"a": INT, "b": WORD, "c": BOOL}, list(required))
    odd = ("with space", 'quo"te', "back\\slash", "ключ", "🙂", "", "$ref", "not", "a/b", "~tilde", "type", "enum")
    for name in odd:
        yield f"named {name}", closed({name: INT})
    for one, other in itertools.permutations(SCALARS, 2):
        yield f"perhaps {one}, then {other}", closed({"perhaps": SCALARS[one], "then": SCALARS[other]}, ["then"])
    yield "empty", closed({})
    yield "others are integers", {
        "type": "object", "properties": {"a": WORD}, "required": ["a"], "additionalProperties": INT, "maxProperties": 1,
    }  # fmt: skip
    yield "a map", {"type": "object", "additionalProperties": INT, "minProperties": 1, "maxProperties": 2}
    yield "pattern of names", {
        "type": "object", "patternProperties": {"^x_[a-z]{1,3}$": INT}, "additionalProperties": False,
        "maxProperties": 3,
    }  # fmt: skip
    yield "pattern and names", {
        "type": "object", "properties": {"id": INT}, "patternProperties": {"^n[0-9]$": BOOL}, "required": ["id"],
        "additionalProperties": False,
    }  # fmt: skip
    yield "two patterns of names", {
        "type": "object", "patternProperties": {"^a[0-9]$": INT, "^b[0-9]$": WORD}, "additionalProperties": False,
    }  # fmt: skip
    yield "a property that may not be", closed({"a": False, "b": INT}, ["b"])
    yield "required without a schema", {
        "type": "object", "required": ["a"], "additionalProperties": INT, "maxProperties": 1,
    }  # fmt: skip
    for depth in (2, 4, 8):
        schema: Schema = INT
        for _ in range(depth):
            schema = closed({"in": schema})
        yield f"nested {depth}", schema
    yield "thirty properties", closed({f"p{number}": BOOL for number in range(30)})
    yield "thirty optional ones", closed({f"p{number}": BOOL for number in range(30)}, [])


def references() -> Iterator[Named]:
    yield "a definition", {"$defs": {"n": INT}, "$ref": "#/$defs/n"}
    yield "an old definition", {"definitions": {"n": INT}, "type": "array", "items": {"$ref": "#/definitions/n"},
                                "maxItems": 3}  # fmt: skip
    yield "a chain", {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/c"}, "c": WORD}, "$ref": "#/$defs/a"}
    yield "an anchor", {"$defs": {"p": {"$anchor": "pos", **INT}}, "$ref": "#pos"}
    yield "a list by itself", closed({"next": {"anyOf": [{"type": "null"}, {"$ref": "#"}]}})
    tree = closed({"v": INT, "kids": {"type": "array", "items": {"$ref": "#/$defs/n"}, "maxItems": 2}})
    yield "a tree", {"$defs": {"n": tree}, "$ref": "#/$defs/n"}
    even = closed({"odd": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/odd"}]}})
    odd = closed({"even": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/even"}]}})
    yield "two that name each other", {"$defs": {"even": even, "odd": odd}, "$ref": "#/$defs/even"}
    yield "a property's", {"type": "object", "properties": {"a": INT, "b": {"$ref": "#/properties/a"}},
                           "required": ["a", "b"], "additionalProperties": False}  # fmt: skip
    yield "an escaped pointer", {"$defs": {"a/b~c": INT}, "$ref": "#/$defs/a~1b~0c"}
    yield "beside another keyword", {"$defs": {"n": {"type": "integer", "minimum": 0}}, "$ref": "#/$defs/n",
                                     "maximum": 40}  # fmt: skip


def combinations() -> Iterator[Named]:
    for first, second in itertools.combinations(SCALARS, 2):
        yield f"any of {first}, {second}", {"anyOf": [SCALARS[first], SCALARS[second]]}
    for first, second in [("string", "integer"), ("boolean", "null"), ("string", "null"), ("integer", "boolean")]:
        yield f"one of {first}, {second}", {"oneOf": [SCALARS[first], SCALARS[second]]}
    yield "any of objects", {"anyOf": [closed({"a": INT}), closed({"b": WORD})]}
    yield "any of with what is common", {
        "type": "object", "properties": {"a": INT}, "required": ["a"],
        "anyOf": [{"properties": {"b": WORD}, "required": ["b"]}, {"properties": {"c": BOOL}, "required": ["c"]}],
        "maxProperties": 2,
    }  # fmt: skip
    shapes = [closed({"kind": {"const": kind}, "size": INT}) for kind in ("circle", "square", "line")]
    yield "told apart by a constant", {"oneOf": shapes}
    yield "told apart, any", {"anyOf": shapes, "discriminator": {"propertyName": "kind"}}
    yield "all of properties", {"allOf": [
        {"type": "object", "properties": {"a": INT}, "required": ["a"]},
        {"type": "object", "properties": {"b": BOOL}, "required": ["b"]},
    ], "maxProperties": 2}  # fmt: skip
    yield "all of bounds", {"allOf": [{"type": "integer"}, {"minimum": 3}, {"maximum": 9}]}
    yield "all of a definition", {"$defs": {"base": {"type": "object", "properties": {"a": INT}, "required": ["a"]}},
        "allOf": [{"$ref": "#/$defs/base"}], "properties": {"b": WORD}, "required": ["b"],
        "maxProperties": 2}  # fmt: skip
    yield "one of all", {"oneOf": [{"type": "integer", "minimum": 0, "maximum": 9}]}
    yield "any of nested", {"anyOf": [{"anyOf": [INT, BOOL]}, {"anyOf": [{"const": "x"}, {"type": "null"}]}]}
    yield "optional, as programs write it", closed({"x": {"anyOf": [INT, {"type": "null"}], "default": None}})


def everyday() -> Iterator[Named]:
    zip_code = {"type": "string", "pattern": "^\\d{5}$"}
    address = closed({"street": WORD, "zip": zip_code, "country": {"enum": ["DE", "FR"]}})
    yield "a person", closed({"name": WORD, "age": INT, "mail": {"type": ["string", "null"], "maxLength": 9},
                              "home": address}, ["name", "age"])  # fmt: skip
    line = closed({"sku": {"type": "string", "pattern": "^[A-Z]{3}-\\d{3}$"}, "count": INT, "price": {
        "type": "number", "minimum": 0, "maximum": 1000}})  # fmt: skip
    yield "an invoice", {"$defs": {"line": line}, **closed({
        "number": {"type": "string", "format": "uuid"}, "day": {"type": "string", "format": "date"},
        "lines": {"type": "array", "items": {"$ref": "#/$defs/line"}, "minItems": 1, "maxItems": 3}})}  # fmt: skip
    yield "a verdict", closed({"label": {"enum": ["good", "bad"]}, "score": {"type": "number", "minimum": 0,
                               "maximum": 1}, "why": {"type": "string", "maxLength": 20}})  # fmt: skip
    yield "a step by step answer", closed({"steps": {"type": "array", "items": closed({"text": WORD}), "maxItems": 3},
                                           "answer": INT})  # fmt: skip
    expression = {"anyOf": [INT, closed({"op": {"enum": ["+", "*"]}, "left": {"$ref": "#/$defs/e"}, "right": INT})]}
    yield "an expression", {"$defs": {"e": expression}, "$ref": "#/$defs/e"}
    yield "a call", closed({"name": {"const": "get_weather"}, "arguments": closed({"city": WORD, "unit": {
        "enum": ["c", "f"]}}, ["city"])})  # fmt: skip
    yield "one of several calls", {"anyOf": [
        closed({"name": {"const": name}, "arguments": closed({argument: INT})})
        for name, argument in (("add", "a"), ("sub", "b"), ("mul", "c"))
    ]}  # fmt: skip
    yield "a menu", {"$defs": {"m": closed({"label": WORD, "items": {"type": "array", "items": {"$ref": "#/$defs/m"},
                     "maxItems": 1}}, ["label"])}, "$ref": "#/$defs/m"}  # fmt: skip
    yield "a colour", {"type": "string", "pattern": "^#[0-9a-f]{6}$"}
    yield "a table", closed({"columns": {"type": "array", "items": {"enum": ["id", "name"]}, "minItems": 1,
        "maxItems": 2}, "rows": {"type": "array", "items": {"type": "array", "items": {"type": ["integer", "null"],
        "minimum": 0, "maximum": 9}, "maxItems": 2}, "maxItems": 2}})  # fmt: skip


def refused() -> Iterator[tuple[str, Schema, str, str]]:
    """(name, schema, keyword, path) of valid schemas that cannot be served."""
    keywords: dict[str, Any] = {
        "not": {"type": "string"}, "uniqueItems": True, "contains": {"const": 5}, "minContains": 2, "maxContains": 2,
        "propertyNames": {"pattern": "^[a-z]+$"}, "dependentRequired": {"a": ["b"]}, "if": {"const": 1},
        "dependentSchemas": {"a": {"required": ["b"]}}, "unevaluatedProperties": False, "unevaluatedItems": False,
        "then": False, "else": False, "dependencies": {"a": ["b"]},
    }  # fmt: skip
    for keyword, value in keywords.items():
        yield f"{keyword} at the root", {keyword: value}, keyword, "/"
        yield f"{keyword} below", closed({"a": {"items": {keyword: value}}}), keyword, "/properties/a/items"
        yield f"{keyword} in a definition", {"$defs": {"d": {keyword: value}}, "$ref": "#/$defs/d"}, keyword, "/$defs/d"
    for form in ("regex", "json-pointer", "idn-email", "uri-template", "iban"):
        yield f"format {form}", closed({"a": {"type": "string", "format": form}}), "format", "/properties/a"
    overlapping = [{"type": "number", "multipleOf": 3}, {"type": "number", "multipleOf": 5}]
    yield "overlapping oneOf", {"items": {"oneOf": overlapping}}, "oneOf", "/items"
    yield "one of two open objects", {"oneOf": [{"type": "object"}, {"type": "object"}]}, "oneOf", "/"
    for pattern in ("(?=.*a)[ab]+", "(?!x)y", "(a)\\1", "a\\b"):
        yield f"pattern {pattern}", {"type": "string", "pattern": pattern}, "pattern", "/"
    yield "a remote reference", closed({"a": {"$ref": "https://example.org/x.json"}}), "$ref", "/properties/a"
    few = {"type": "object", "properties": {"a": INT, "b": INT}, "minProperties": 1}
    yield "few of many properties", few, "minProperties", "/"
    yield "contradicting bounds", {"type": "integer", "minimum": 5, "maximum": 3}, "minimum", "/"
