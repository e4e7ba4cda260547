"""Free-form values of a request: what JSON can hold, and no more. No message repeats what a value says."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from protocol.errors import InvalidRequest
from protocol.sampling import INT64_MAX

MAX_NESTING = 32
INT64_MIN = -INT64_MAX - 1


def check_tree(tree: Any, field: str, deepest: int = MAX_NESTING) -> None:
    """Finite numbers, whole Unicode, text keys, at most ``deepest`` deep (counted from the body)."""
    level: list[Any] = [tree]
    for _ in range(deepest):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                if not all(isinstance(key, str) for key in value):
                    raise InvalidRequest(f"{field}: the keys of an object must be strings", param=field)
                _check_leaves(value.keys(), field)
                below.extend(value.values())
            elif isinstance(value, list):
                below.extend(value)
        _check_leaves(below, field)
        level = [value for value in below if isinstance(value, dict | list)]
        if not level:
            return
    raise InvalidRequest(f"{field} is nested more than {deepest} deep", param=field)


def _check_leaves(values: Iterable[Any], field: str) -> None:
    for value in values:
        if isinstance(value, str):
            check_text(value, field)
        elif isinstance(value, float) and not math.isfinite(value):
            raise InvalidRequest(f"{field} must hold finite numbers", param=field)
        elif isinstance(value, int) and not INT64_MIN <= value <= INT64_MAX:
            raise InvalidRequest(f"{field} must hold numbers of at most 64 bits", param=field)
        elif not isinstance(value, int | float | dict | list | None):
            raise InvalidRequest(f"{field} may hold what JSON can hold, and no more", param=field)


def check_text(text: str, field: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(f"{field} holds half a surrogate pair, which is no text", param=field) from None
