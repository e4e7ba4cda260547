"""Prometheus' own checker: HEADRACE_PROMTOOL, or the one on PATH (Debian has it in the package prometheus)."""

from __future__ import annotations

import os
import shutil

import pytest


def promtool() -> str:
    path = os.environ.get("HEADRACE_PROMTOOL") or shutil.which("promtool")
    if path is None:
        pytest.skip("promtool is not installed")
    return path
