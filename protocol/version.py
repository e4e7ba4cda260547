"""The installed release, as /version and the metric build_info tell it."""

from __future__ import annotations

import functools
from importlib.metadata import PackageNotFoundError, version


@functools.cache
def release() -> str:
    """The version of the package; "unknown" where it runs from a checkout that was never installed."""
    try:
        return version("headrace")
    except PackageNotFoundError:
        return "unknown"
