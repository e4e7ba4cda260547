"""Bodies that say nothing wrong in an unusual way: integers written 4.0, and unknown fields that are null.

Looked at only after the strict decoder has refused a body: a usual one pays nothing. No other value is changed, so
whatever else is wrong is still refused by name.
"""

from __future__ import annotations

import types
import typing
from typing import Any

import msgspec

_from_json = msgspec.json.Decoder()


def mended(raw: bytes, kind: type) -> Any:
    """The body ``raw`` as maps and lists, as ``kind``, a struct, wants it; None if there is nothing to mend."""
    try:
        given = _from_json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    body = _struct(given, kind)
    return None if body is given else body


def _struct(given: Any, kind: type) -> Any:
    if not isinstance(given, dict):
        return given
    hints = typing.get_type_hints(kind)
    fields = {
        name: _value(value, hints[name]) if name in hints else value
        for name, value in given.items()
        if name in hints or value is not None
    }
    unchanged = len(fields) == len(given) and all(fields[name] is given[name] for name in fields)
    return given if unchanged else fields


def _value(given: Any, hint: Any) -> Any:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if isinstance(given, float):
        whole = int in kinds and float not in kinds and given.is_integer() and abs(given) < 2**53
        return int(given) if whole else given
    if isinstance(given, list):
        for kind in kinds:
            if typing.get_origin(kind) is list:
                items = [_value(item, typing.get_args(kind)[0]) for item in given]
                return items if any(a is not b for a, b in zip(items, given, strict=True)) else given
    if isinstance(given, dict):
        for kind in kinds:
            strict = isinstance(kind, type) and issubclass(kind, msgspec.Struct)
            if strict and kind.__struct_config__.forbid_unknown_fields:
                return _struct(given, kind)
    return given
