"""What ``serve`` shows: bars on a terminal, one line per stage elsewhere, then one block that says how to use it."""

from __future__ import annotations

import json
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

PLAIN_STEP = 0.25  # without a terminal, a line is printed at the start, the end and each quarter of a stage


class StartView:
    """Progress by (process, stage), and notices between. Use ``close`` before printing the block."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._began = time.monotonic()
        self._bars: Progress | None = None
        self._tasks: dict[tuple[str, str], TaskID] = {}
        self._told: dict[tuple[str, str], float] = {}
        if console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.description:<24}"), BarColumn(), TimeElapsedColumn(), console=console, transient=True
            )
            self._bars.start()

    def stage(self, name: str, stage: str, fraction: float) -> None:
        """``fraction`` of ``stage`` of the process ``name`` is done."""
        key = (name, stage)
        if self._told.get(key, -1.0) >= fraction:
            return
        if self._bars is not None:
            if key not in self._tasks:
                self._tasks[key] = self._bars.add_task(f"{name} {stage}", total=1.0)
            self._bars.update(self._tasks[key], completed=fraction)
        elif fraction in (0.0, 1.0) or fraction - self._told.get(key, 0.0) >= PLAIN_STEP:
            self.note(f"{name} {stage} {fraction:.0%}")
        else:
            return
        self._told[key] = fraction

    def note(self, text: str) -> None:
        since = time.monotonic() - self._began
        self.console.print(f"{since:7.1f}s  {text}", markup=False, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """A line that stands by itself, without the time."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None


def print_block(console: Console, url: str, model: str, lines: dict[str, str]) -> None:
    """The closing block: where it listens, what it serves, and a line to paste."""
    ask = json.dumps({"model": model, "prompt": "The capital of France is", "max_tokens": 48, "stream": True})
    rows = {
        "API": f"{url}/v1  (chat/completions, completions, models)",
        "model": model,
        "state": f"{url}/health  {url}/ready  {url}/metrics",
        **lines,
    }
    body = "\n".join(f"  {name:<9} {value}" for name, value in rows.items())
    curl = f"  curl -N {url}/v1/completions -H 'Content-Type: application/json' -d '{ask}'"
    closing = "  Ctrl-C lets running requests end and stops; twice stops at once."
    text = f"\nHeadrace is ready.\n\n{body}\n\n{curl}\n\n{closing}\n"
    console.print(text, markup=False, highlight=False, soft_wrap=True)
