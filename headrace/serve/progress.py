"""Progress of a worker's start: a bar on a terminal, lines for the supervisor, else log lines.

Under ``serve`` (HEADRACE_SUPERVISED is set) each step of progress is one line on stderr,
``progress <stage> <fraction>``, which ``serve`` turns into a bar.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

SUPERVISED = "HEADRACE_SUPERVISED"
Progress = Callable[[str, float], None]  # (stage, fraction 0..1)


def reporter() -> Progress:
    """The reporter that fits this process's stderr."""
    if os.environ.get(SUPERVISED):
        return _lines("progress {} {:.3f}")
    if sys.stderr.isatty():
        return _bar()
    return _lines("{}: {:.0%}", only_ends=True)


def parse(line: str) -> tuple[str, float] | None:
    """(stage, fraction) of a progress line; None for any other line."""
    if not line.startswith("progress "):
        return None
    stage, _, fraction = line.removeprefix("progress ").rpartition(" ")
    try:
        return stage, min(1.0, max(0.0, float(fraction)))
    except ValueError:
        return None


def _lines(template: str, only_ends: bool = False) -> Progress:
    last = ("", -1.0, 0.0)  # stage, fraction, time

    def report(stage: str, fraction: float) -> None:
        nonlocal last
        now = time.monotonic()
        edge = stage != last[0] or (fraction >= 1.0 and last[1] < 1.0)
        if edge or (not only_ends and now - last[2] >= 0.1):
            last = (stage, fraction, now)
            print(template.format(stage, fraction), file=sys.stderr, flush=True)

    return report


def _bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    shown: RichProgress | None = None
    tasks: dict[str, TaskID] = {}

    def report(stage: str, fraction: float) -> None:
        nonlocal shown
        if shown is None:
            shown = RichProgress(
                TextColumn("{task.description:>10}"), BarColumn(), TimeElapsedColumn(), console=Console(stderr=True)
            )
            shown.start()
        if stage not in tasks:
            tasks[stage] = shown.add_task(stage, total=1.0)
        shown.update(tasks[stage], completed=fraction)
        if all(task.finished for task in shown.tasks):
            shown.stop()
            shown = None
            tasks.clear()

    return report
