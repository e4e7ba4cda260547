"""How the tools print: tables for people, JSON lines for programs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from rich.table import Table


def duration(seconds: float) -> str:
    """Two digits or so: 850ms, 12s, 3m20s, 5h02m."""
    if seconds < 1:
        return f"{seconds * 1000:.0f}ms"
    if seconds < 60:
        return f"{seconds:.0f}s"
    if seconds < 3600:
        return f"{seconds // 60:.0f}m{seconds % 60:02.0f}s"
    return f"{seconds // 3600:.0f}h{seconds % 3600 // 60:02.0f}m"


def as_json(records: Sequence[Any]) -> None:
    for one in records:
        print(json.dumps(dataclasses.asdict(one)))


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], empty: str) -> None:
    """A table without lines, as wide as it is: ids are there to be copied. A name that ends in a colon is that of a
    column of numbers, which stand to the right."""
    if not rows:
        print(empty)
        return
    shown = [[name.rstrip(":") for name in columns], *rows]
    widths = [max(len(row[at]) for row in shown) for at in range(len(columns))]
    for row in shown:
        cells = zip(columns, row, widths, strict=True)
        print("  ".join(text.rjust(w) if name.endswith(":") else text.ljust(w) for name, text, w in cells).rstrip())


def grid(columns: Sequence[str]) -> Table:
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        right = name.endswith(":")
        shown.add_column(name.rstrip(":"), justify="right" if right else "left", no_wrap=True)
    return shown
