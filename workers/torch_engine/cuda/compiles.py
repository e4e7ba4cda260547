"""What Triton compiles: kept in a folder between starts, counted at the start, and told once steps are served.

Triton finds a kernel again by all that it depends on (its source and what it calls, its constants, the kind of GPU,
Triton's own version), so one folder serves many models, releases and machines. All that a step may need is compiled at
start; what comes later makes everybody wait for about a second, and is a kind of launch that the start forgot.
"""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from protocol.errors import StartError

log = logging.getLogger(__name__)

VARIABLE = "TRITON_CACHE_DIR"

found: list[str] = []  # names of kernels that the start has read
made: list[tuple[str, float]] = []  # of those that it has compiled, with seconds
late: list[str] = []  # of those that were compiled since ``watch``


def keep_in(wanted: str | None) -> None:
    """Have kernels kept in the folder ``wanted``, by default $TRITON_CACHE_DIR or our own, and counted from here on.
    StartError where the folder that was asked for cannot be written."""
    asked = wanted or os.environ.get(VARIABLE)
    folder = Path(asked).expanduser() if asked else _default()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        if wanted:
            raise StartError(
                f"--kernel-cache {wanted}: {error.strerror}; choose a folder that can be written"
            ) from error
        log.warning(
            "%s: %s, so kernels are compiled at every start; --kernel-cache chooses a folder", folder, error.strerror
        )
        folder = Path(tempfile.mkdtemp(prefix="headrace-kernels-"))
    os.environ[VARIABLE] = str(folder)
    found.clear()
    made.clear()
    _listen(_count)


def watch() -> None:
    """The start is over: say what it has compiled. From here on a kernel that is compiled is told, and in ``late``."""
    late.clear()
    if found or made:
        seconds = sum(took for _, took in made)
        folder = os.environ.get(VARIABLE, "")
        log.info("kernels: %d from %s, %d compiled in %.1f s", len(found), folder, len(made), seconds)
    _listen(_tell)


def _default() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(f"{base}/headrace/kernels").expanduser()


def _listen(listener: Any) -> None:
    try:
        from triton import knobs
    except ImportError:  # an older Triton does not tell
        return
    knobs.compilation.listener = listener


def _count(**told: Any) -> None:
    if told.get("cache_hit"):
        found.append(_name(told))
    else:
        made.append((_name(told), _seconds(told)))


def _tell(**told: Any) -> None:
    if told.get("cache_hit"):
        return
    late.append(_name(told))
    log.warning("%s was compiled while serving: %.2f s", late[-1], _seconds(told))


def _name(told: dict[str, Any]) -> str:
    src = told.get("src")
    return str(getattr(src, "name", None) or getattr(getattr(src, "fn", None), "__name__", "a kernel"))


def _seconds(told: dict[str, Any]) -> float:
    return float(getattr(told.get("times"), "total", 0)) / 1e6
