"""What the programs share: their arguments, the function that is called as a tool, and how they report.

A program runs in its client's own environment, which has nothing of this project, so it is not imported but started:
``python programs/NAME.py BASE_URL MODEL``. It writes one JSON line a check: ``{"check": name, "error": text or null}``.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from typing import Any

BASE, MODEL = sys.argv[1:3]  # http://host:port/v1 and the served name
FRANCE = "What is the capital of France?"
SUM = "What is 2 + 3? Use the tool."
CITY = "Tell me about Paris as JSON with the keys city and population."
REPEAT = 'Repeat this: {"city": "Paris", "population": 2}'  # where a small model is only told to answer in JSON
TOKENS = 200

calls: list[tuple[int, int]] = []  # what the model has called the function with


def add(a: int, b: int) -> int:
    """The sum of two integers."""
    assert isinstance(a, int)
    assert isinstance(b, int)
    calls.append((a, b))
    return a + b


PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "minimum": 0, "maximum": 99},
        "b": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["a", "b"],
    "additionalProperties": False,
}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "add", "description": "The sum of two integers.", "parameters": PARAMETERS},
}
NAMED = {"type": "function", "function": {"name": "add"}}
CITY_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Paris", "Rome", "Berlin"]},
        "population": {"type": "integer", "minimum": 1, "maximum": 99_999_999},
    },
    "required": ["city", "population"],
    "additionalProperties": False,
}


def is_city(value: Any) -> None:
    """``value``, a map or an object of the client's, is as CITY_SCHEMA wants it."""
    found = value if isinstance(value, dict) else vars(value)
    assert found["city"] in ("Paris", "Rome", "Berlin"), found
    assert 1 <= found["population"] <= 99_999_999, found
    assert isinstance(found["population"], int), found


def run(*checks: Callable[[], None]) -> None:
    """Each check, whatever became of those before it."""
    for check in checks:
        error = None
        try:
            check()
        except BaseException:
            error = traceback.format_exc(limit=-4, chain=False)
        print(json.dumps({"check": check.__name__, "error": error}), flush=True)
