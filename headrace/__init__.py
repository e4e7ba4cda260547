"""Headrace: LLM inference with a durable queue. The names of ``__all__`` are the public API in Python.

They are loaded when they are first asked for: this package is also the command line's, and a gateway must not load the
clients' libraries to start.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headrace.clients.http import HttpClient
    from headrace.clients.llm import LLM
    from headrace.clients.queue import AsyncClient
    from headrace.clients.sync import Client
    from protocol.sampling import SamplingParams

__all__ = ["LLM", "AsyncClient", "Client", "HttpClient", "SamplingParams"]

_MODULES = {
    "LLM": "headrace.clients.llm",
    "AsyncClient": "headrace.clients.queue",
    "Client": "headrace.clients.sync",
    "HttpClient": "headrace.clients.http",
    "SamplingParams": "protocol.sampling",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = found  # so that the next use does not come here
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
