"""Kernels that Triton compiles once steps are served: each makes everybody wait for about a second, so each is told.

All that a step may need is compiled at start; what comes here is a kind of launch that the start forgot.
"""

from __future__ import annotations

import logging
from typing import Any

log = logging.getLogger(__name__)

late: list[str] = []  # names of the kernels, since ``watch``


def watch() -> None:
    """From here on a kernel that is compiled is told in the log, and in ``late``."""
    late.clear()
    try:
        from triton import knobs
    except ImportError:  # an older Triton does not tell
        return
    knobs.compilation.listener = _note


def _note(**told: Any) -> None:
    if told.get("cache_hit"):
        return
    src, times = told.get("src"), told.get("times")
    name = str(getattr(src, "name", None) or getattr(getattr(src, "fn", None), "__name__", "a kernel"))
    late.append(name)
    log.warning("%s was compiled while serving: %.2f s", name, getattr(times, "total", 0) / 1e6)
