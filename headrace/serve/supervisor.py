"""Keeps operating-system processes alive: starts, watches, restarts with backoff, gives up with an error.

It knows nothing of Headrace's roles: ``serve`` says what to start and in which order to stop it. Every child is a
session of its own (a terminal's Ctrl-C reaches only the supervisor, which orders the drain), dies with the supervisor
(see leash.py), writes its stdout straight into RUN_DIR/logs/<name>.log and its stderr through us into the same file.

RUN_DIR/processes.json lists {role, name, pid} of what runs now; it is replaced atomically at every change.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headrace.serve import leash
from protocol.errors import EX_CONFIG, HeadraceError, StartError

DEATHS = 5  # within WINDOW_S of one process: give up
WINDOW_S = 60.0
BACKOFF_S = (0.1, 0.5, 1.0, 2.0, 5.0)
TAIL_LINES = 12
LOG_LINES = 2
READ_BYTES = 1 << 16
LAST_WORDS_S = 1.0  # how long the stderr of a dead child is still read


class GaveUp(HeadraceError):
    """A process died again and again."""


@dataclass(frozen=True)
class Program:
    """What to run. ``lasting``: restarted for ever once it was up (a server that waits for disk space)."""

    role: str
    name: str
    argv: list[str]
    env: Mapping[str, str]
    lasting: bool = False
    umask: int = -1  # of the files that it makes; -1: ours


@dataclass(eq=False)
class Child:
    program: Program
    process: asyncio.subprocess.Process | None = None
    deaths: deque[float] = field(default_factory=lambda: deque(maxlen=DEATHS))  # monotonic seconds
    was_up: bool = False
    last_end: tuple[int, str] | None = None  # exit code and last sentence of an end by itself
    stopping: bool = False
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=TAIL_LINES))  # last lines of stderr
    task: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        return self.program.name

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.returncode is None


class Supervisor:
    """``on_line(child, line)`` sees every line of a child's stderr; ``on_notice(text)`` what a user should know."""

    def __init__(
        self,
        run_dir: Path,
        on_line: Callable[[Child, str], None] = lambda child, line: None,
        on_notice: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.run_dir = run_dir
        self.logs = run_dir / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.children: dict[str, Child] = {}
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.served: set[str] = set()  # names of children that have done their work once, so their start can succeed
        self.on_failed: Callable[[Child, Exception], bool] = lambda child, error: False  # True: the others go on
        self._on_line = on_line
        self._on_notice = on_notice
        self._write_processes()

    def start(self, program: Program) -> Child:
        """Start a program and keep it running until ``stop``. Failures arrive in ``failed``."""
        log = self.logs / f"{program.name}.log"
        if log.exists():
            log.replace(log.with_suffix(".log.1"))
        child = self.children[program.name] = Child(program)
        child.task = asyncio.create_task(self._keep(child), name=f"keep {program.name}")
        return child

    def forget(self, name: str) -> None:
        """Drop a child that has ended."""
        self.children.pop(name, None)
        self.served.discard(name)
        self._write_processes()

    def role(self, role: str) -> list[Child]:
        return [c for c in self.children.values() if c.program.role == role]

    async def stop(self, *children: Child, timeout: float) -> None:
        """SIGTERM, then SIGKILL to what has not ended after ``timeout`` seconds. Returns when all have ended."""
        for child in children:
            child.stopping = True
            if child.alive:
                _signal(child, signal.SIGTERM)
            elif child.task:
                child.task.cancel()  # it waits for its next start
        tasks = [c.task for c in children if c.task]
        if not tasks:
            return
        _, late = await asyncio.wait(tasks, timeout=timeout)
        if late:
            names = ", ".join(c.name for c in children if c.task in late)
            self._on_notice(f"{names}: not done within {timeout:g} s, killed")
            for child in children:
                _signal(child, signal.SIGKILL)
            await asyncio.wait(late)

    def kill(self) -> None:
        """End everything at once."""
        for child in self.children.values():
            child.stopping = True
            if child.alive:
                _signal(child, signal.SIGKILL)
            elif child.task:
                child.task.cancel()

    async def ended(self) -> None:
        """Returns when no child is left."""
        tasks = [c.task for c in self.children.values() if c.task]
        if tasks:
            await asyncio.wait(tasks)

    # -------------------------------------------------------------- one child

    async def _keep(self, child: Child) -> None:
        try:
            while not child.stopping:
                await self._run(child)
                if child.stopping:
                    return
                delay = self._after_death(child)
                await asyncio.sleep(delay)
        except asyncio.CancelledError:
            pass
        except Exception as error:
            child.stopping = True
            if not self.on_failed(child, error) and not self.failed.done():
                self.failed.set_exception(error)

    async def _run(self, child: Child) -> None:
        """One run of the child: start, read its stderr to the end, wait."""
        program = child.program
        mask: dict[str, Any] = {} if program.umask < 0 else {"umask": program.umask}  # uvloop does not know it
        child.tail.clear()
        with (self.logs / f"{program.name}.log").open("ab", buffering=0) as log, _Pipe() as pipe:
            child.process = await asyncio.create_subprocess_exec(
                sys.executable, "-I", "-S", leash.__file__, str(os.getpid()), *program.argv,
                env=dict(program.env), stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=pipe.write_end,
                start_new_session=True, **mask,
            )  # fmt: skip
            if child.stopping:  # asked to stop while it was being started
                _signal(child, signal.SIGTERM)
            self._write_processes()
            reading = asyncio.create_task(self._read_stderr(child, await pipe.reader(), log.write))
            try:
                await child.process.wait()
                self._write_processes()
                await asyncio.wait([reading], timeout=LAST_WORDS_S)  # a grandchild may hold the pipe open
            finally:
                reading.cancel()
                _end_group(child)

    async def _read_stderr(self, child: Child, stderr: asyncio.StreamReader, write: Callable[[bytes], object]) -> None:
        rest = b""
        while piece := await stderr.read(READ_BYTES):
            write(piece)
            *lines, rest = (rest + piece).replace(b"\r", b"\n").split(b"\n")
            rest = rest[-READ_BYTES:]
            for raw in lines:
                if line := raw.decode(errors="replace").rstrip():
                    child.tail.append(line)
                    self._on_line(child, line)

    def _after_death(self, child: Child) -> float:
        """Seconds until the next try. Raises StartError or GaveUp where there is to be none."""
        assert child.process is not None
        code = child.process.returncode
        if code == EX_CONFIG:
            raise StartError(_last_words(child) or f"{child.name} cannot start; see {self.logs / child.name}.log")
        if code is not None and code > 0 and child.name not in self.served and not child.was_up:
            end = (code, _sentence(self._last_said(child)))
            if end == child.last_end:
                raise GaveUp(
                    f"{child.name} {_cause(code)} twice for the same reason: {end[1] or 'it said nothing'} "
                    f"(see {self.logs / child.name}.log)"
                )
            child.last_end = end
        now = time.monotonic()
        child.deaths.append(now)
        recent = [t for t in child.deaths if now - t <= WINDOW_S]
        if len(recent) >= DEATHS and not (child.program.lasting and child.was_up):
            shown = "\n".join(f"    {line}" for line in self._last_said(child))
            raise GaveUp(f"{child.name} died {len(recent)} times within {WINDOW_S:g} s, {_cause(code)} last:\n{shown}")
        if code is not None and code > 0:
            for line in self._last_said(child):
                self._on_notice(f"{child.name} | {line}")
        delay = BACKOFF_S[min(len(recent), len(BACKOFF_S)) - 1]
        self._on_notice(f"{child.name} {_cause(code)}; started again in {delay:g} s")
        return delay

    def _last_said(self, child: Child) -> list[str]:
        """The end of its stderr, or of its log if it wrote none: the embedded server reports errors on stdout."""
        if child.tail:
            return list(child.tail)
        with (self.logs / f"{child.name}.log").open("rb") as log:
            log.seek(-min(READ_BYTES, log.seek(0, os.SEEK_END)), os.SEEK_END)
            return log.read().decode(errors="replace").splitlines()[-LOG_LINES:]

    def _write_processes(self) -> None:
        running = [
            {"role": c.program.role, "name": c.name, "pid": c.process.pid}
            for c in self.children.values()
            if c.process is not None and c.alive
        ]
        path = self.run_dir / "processes.json"
        fresh = path.with_suffix(".json.new")
        fresh.write_text(json.dumps(running, indent=1) + "\n")
        fresh.replace(path)


class _Pipe:
    """A pipe of our own: asyncio's reports the end of a process only after its children have closed the pipe too."""

    def __enter__(self) -> _Pipe:
        self.read_end, self.write_end = os.pipe()
        self.transport: asyncio.BaseTransport | None = None
        return self

    async def reader(self) -> asyncio.StreamReader:
        """Call once the child has the write end: ours is closed here, so that the end of the child's output is seen."""
        os.close(self.write_end)
        self.write_end = -1
        reader = asyncio.StreamReader()
        read_file = os.fdopen(self.read_end, "rb", buffering=0)
        self.transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), read_file
        )
        return reader

    def __exit__(self, *_: object) -> None:
        if self.write_end >= 0:
            os.close(self.write_end)
        if self.transport is not None:
            self.transport.close()
        else:
            os.close(self.read_end)


def _signal(child: Child, number: int) -> None:
    if child.process is not None and child.process.returncode is None:
        try:
            child.process.send_signal(number)
        except ProcessLookupError:
            pass


def _end_group(child: Child) -> None:
    """Kill the child, if it still runs, and its remaining children (it leads a session of its own)."""
    assert child.process is not None
    try:
        os.killpg(child.process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass


def _cause(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def _sentence(lines: list[str]) -> str:
    """The last line, without the time of a log line."""
    return re.sub(r"^\S+ \S+ (?=(ERROR|CRITICAL|WARNING|INFO) )", "", lines[-1]) if lines else ""


def _last_words(child: Child) -> str:
    """The message of a StartError as the command line prints it: `headrace worker: ...`, to the end of stderr."""
    lines = list(child.tail)
    for index, line in enumerate(lines):
        if line.startswith(f"headrace {child.program.role}: "):
            return "\n".join([line.partition(": ")[2], *lines[index + 1 :]])
    return "\n".join(lines)
