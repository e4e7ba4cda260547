"""Names of release 0.1, for one release: use `from headrace import AsyncClient, Client, HttpClient`."""

from __future__ import annotations

import warnings
from typing import Any

import headrace

NEW = {"Client": "AsyncClient", "SyncClient": "Client"}


def __getattr__(name: str) -> Any:
    if name not in NEW:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{__name__}.{name} is now headrace.{NEW[name]}", DeprecationWarning, stacklevel=2)
    return getattr(headrace, NEW[name])
