"""How the HTTP bodies ask for structure: `response_format`, `structured_outputs`, and the older `guided_*` names.

All of them become one Structure; ``field`` keeps the name that the client used. More than one at a time is refused.
"""

from __future__ import annotations

from typing import Any

from protocol.errors import InvalidRequest
from protocol.structures.structure import KINDS, Structure

GUIDED = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}
_FORMATS = ("text", "json_object", "json_schema", "structural_tag")
_SCHEMA_FIELDS = ("name", "description", "schema", "strict")


def structure_of(body: Any) -> Structure | None:
    """What ``body`` asks for, None for plain text. InvalidRequest names the field."""
    asked: dict[str, Structure] = {}
    if body.response_format is not None and (found := _response_format(body.response_format)):
        asked["response_format"] = found
    if body.structured_outputs is not None:
        asked["structured_outputs"] = _structured_outputs(body.structured_outputs)
    for name, kind in GUIDED.items():
        if (value := getattr(body, name)) is not None:
            asked[name] = _structure({kind: value}, name)
    if len(asked) > 1:
        first, second, *_ = asked
        raise InvalidRequest(f"{first} and {second} must not be given together", param=second)
    return next(iter(asked.values()), None)


def _response_format(given: Any) -> Structure | None:
    at = "response_format"
    kind = given.get("type") if isinstance(given, dict) else None
    if kind not in _FORMATS:
        raise InvalidRequest(f"{at}.type must be one of {', '.join(_FORMATS)}", param=f"{at}.type")
    allowed = {"type", "json_schema"} if kind == "json_schema" else {"type"}
    if kind != "structural_tag" and (unknown := sorted(set(given) - allowed)):
        raise _unknown(at, unknown[0])
    if kind == "text":
        return None
    if kind == "json_object":
        return Structure(json_object=True, field=at)
    if kind == "structural_tag":
        return _structure({"structural_tag": given}, at)
    return _json_schema(given.get("json_schema"), f"{at}.json_schema")


def _json_schema(given: Any, at: str) -> Structure:
    """OpenAI's wrapping of a schema. Strict or not, the schema is kept: `strict` says nothing more here."""
    if not isinstance(given, dict):
        raise InvalidRequest(f"{at} must be an object with name and schema", param=at)
    if unknown := sorted(set(given) - set(_SCHEMA_FIELDS)):
        raise _unknown(at, unknown[0])
    if not isinstance(given.get("strict"), bool | None):
        raise InvalidRequest(f"{at}.strict must be a boolean", param=f"{at}.strict")
    schema = given.get("schema")
    if schema is None:
        return Structure(json_object=True, field=at)
    if not isinstance(schema, dict):
        raise InvalidRequest(f"{at}.schema must be an object", param=f"{at}.schema")
    return Structure(json=schema, field=f"{at}.schema")


def _structured_outputs(given: Any) -> Structure:
    at = "structured_outputs"
    if not isinstance(given, dict):
        raise InvalidRequest(f"{at} must be an object", param=at)
    fields = {name: value for name, value in given.items() if value is not None}
    if unknown := sorted(set(fields) - set(KINDS)):
        raise _unknown(at, unknown[0])
    kind = next(iter(fields), None)
    return _structure(fields, at if len(fields) != 1 else f"{at}.{kind}")


def _unknown(at: str, name: str) -> InvalidRequest:
    at = f"{at}.{name[:64]}"
    return InvalidRequest(f"unknown parameter: {at}", param=at, code="unknown_parameter")


_TYPES: dict[str, Any] = {"json": dict | bool | str, "json_object": bool, "choice": list, "structural_tag": dict | str}


def _structure(fields: dict[str, Any], at: str) -> Structure:
    for kind, value in fields.items():
        if not isinstance(value, _TYPES.get(kind, str)):
            raise InvalidRequest(f"{at}: {kind} is of a wrong type", param=at)
        if kind == "choice" and not all(isinstance(one, str) for one in value):
            raise InvalidRequest(f"{at}: choice must hold strings", param=at)
    return Structure(**fields, field=at)
