"""What ``serve`` shows: bars on a terminal, one line per stage elsewhere, then one block that says how to use it."""

from __future__ import annotations

import io
import json
import os
import time
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

PLAIN_STEP = 0.25  # without a terminal, a line is printed at the start, the end and each quarter of a stage


class Lenient(io.TextIOBase):
    """A stream whose reader may go away (``| tee`` that ended, a terminal that was closed): then it writes nowhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream: TextIO | None = stream
        self._tty = stream.isatty()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding if self._stream is not None else "utf-8"

    def write(self, text: str) -> int:
        if self._stream is not None:
            try:
                self._stream.write(text)
                self._stream.flush()
            except OSError:
                # what is buffered would be tried again at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
                self._stream = None
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return self._tty

    def fileno(self) -> int:
        if self._stream is None:
            raise io.UnsupportedOperation("fileno")
        return self._stream.fileno()


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
                # without a total the bar moves to and fro: something is done, and nobody knows how much is left
                self._tasks[key] = self._bars.add_task(f"{name} {stage}", total=None)
            self._bars.update(self._tasks[key], completed=fraction, total=1.0 if fraction else None)
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
    first = json.dumps({"model": model, "prompt": "The capital of France is"}).removesuffix("}")
    rows = {
        "API": f"{url}/v1  (chat/completions, completions, models)",
        "model": model,
        "state": f"{url}/health  {url}/ready  {url}/metrics",
        **lines,
    }
    body = "\n".join(f"  {name:<9} {value}" for name, value in rows.items())
    curl = (
        f"  curl -N {url}/v1/completions \\\n    -H 'Content-Type: application/json' \\\n"
        f'    -d \'{first},\n         "max_tokens": 48, "stream": true}}\''
    )  # lines of less than 80 columns, each broken where a shell goes on
    closing = "  Ctrl-C lets running requests end and stops; twice stops at once."
    text = f"\nHeadrace is ready.\n\n{body}\n\n{curl}\n\n{closing}\n"
    console.print(text, markup=False, highlight=False, soft_wrap=True)
