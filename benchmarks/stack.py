"""A whole Headrace as users start it (`headrace serve`, free ports, a durable server of its own), and what it uses.

with Stack("--model", path) as stack:
    before = stack.use()
    ...
    print(stack.use().since(before, tokens))
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import redis

from headrace.serve.embedded import server_url
from tests.stack import answers

START_S = 600.0
STOP_S = 120.0
TICKS = os.sysconf("SC_CLK_TCK")


class Unavailable(Exception):
    """What was to be measured cannot run here. The message says why, for the report."""


def end_on_sigterm() -> None:
    """SIGTERM unwinds this process as an exception, so that it stops what it started."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def settle(pids: Iterable[int], patience_s: float = 120.0) -> None:
    """Return when the processes rest: until then they take the memory of their KV pools, beside what they serve."""
    known, deadline = list(pids), time.monotonic() + patience_s
    while time.monotonic() < deadline:
        before = sum(map(cpu_seconds, known))
        time.sleep(2.0)
        if sum(map(cpu_seconds, known)) - before < 0.3:
            return


def resident_bytes(pid: int) -> int:
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) * 1024 if found else 0


def disk_flushes(path: Path) -> int | None:
    """How often the disk under ``path`` was told to make its writes last: one a fsync. Counts every process of the
    machine. None where the kernel does not say."""
    device = path.stat().st_dev
    wanted = [str(os.major(device)), str(os.minor(device))]
    for line in Path("/proc/diskstats").read_text().splitlines():
        fields = line.split()
        if fields[:2] == wanted and len(fields) >= 20:  # Documentation/admin-guide/iostats.rst: the 16th figure
            return int(fields[18])
    return None


class Process:
    """A program under measurement, in a session of its own: a log file, awaited over HTTP, stopped with SIGINT."""

    def __init__(
        self, command: list[str], log: Path, env: dict[str, str] | None = None, folder: Path | None = None
    ) -> None:
        self.command, self.log, self.folder = command, log, folder
        self.env = {**os.environ, **(env or {})}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.env, start_new_session=True,
                cwd=self.folder,
            )  # fmt: skip

    def wait_ready(self, url: str, patience: float = START_S) -> None:
        """Until ``url`` answers 200. Unavailable with the end of its log if it does not come so far."""
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            assert self.process is not None
            if self.process.poll() is not None:
                raise Unavailable(f"ended with {self.process.returncode}: {self.tail()}")
            if answers(url):
                return
            time.sleep(0.2)
        raise Unavailable(f"not ready after {patience:.0f} s: {self.tail()}")

    def stop(self) -> None:
        if self.process is None:
            return
        if self.process.poll() is None:
            self.signal_group(signal.SIGCONT)
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(timeout=STOP_S)
            except subprocess.TimeoutExpired:
                pass
        try:
            os.killpg(self.process.pid, signal.SIGKILL)  # the process itself, or what it left in its session
        except ProcessLookupError:
            pass
        self.process.wait()

    def signal_group(self, number: signal.Signals) -> None:
        """To it and to all that it started."""
        assert self.process is not None
        os.killpg(self.process.pid, number)

    def tail(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines() if self.log.exists() else []
        return " | ".join(line.strip() for line in lines[-4:])[-600:]


@dataclass(frozen=True)
class Use:
    """What a stack had used at one moment."""

    at: float  # monotonic seconds
    cpu: dict[str, float]  # CPU seconds by role
    server: dict[str, float]  # the server's own counters
    flushes: int | None

    def since(self, before: Use, tokens: int) -> dict[str, Any]:
        """Per token and per second, between two moments in which ``tokens`` were generated."""
        wall, tokens = self.at - before.at, max(1, tokens)
        moved = {name: value - before.server[name] for name, value in self.server.items()}
        cpu = {role: self.cpu[role] - before.cpu.get(role, 0.0) for role in self.cpu}
        flushes = None if self.flushes is None or before.flushes is None else self.flushes - before.flushes
        return {
            "redis_bytes_per_token": round((moved["in"] + moved["out"]) / tokens, 1),
            "redis_log_bytes_per_token": round(moved["log"] / tokens, 1),
            "redis_commands_per_token": round(moved["commands"] / tokens, 3),
            "fsyncs_per_s": None if flushes is None else round(flushes / wall, 1),
            "log_share": round(moved["log_us"] / 1e6 / wall, 3),
            "cpu_cores": {role: round(seconds / wall, 3) for role, seconds in sorted(cpu.items())},
            "cpu_us_per_token": {role: round(1e6 * seconds / tokens, 1) for role, seconds in sorted(cpu.items())},
        }


class Stack:
    """``args`` are further options of `headrace serve`; ``tree`` is another checkout whose code serves, to compare
    with. Unavailable if it does not become ready."""

    def __init__(self, *args: str, env: dict[str, str] | None = None, tree: Path | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="hr-", ignore_cleanup_errors=True)
        self.run_dir = Path(self._folder.name) / "run"
        self.data_dir = Path(self._folder.name) / "data"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [
            sys.executable, "-m", "headrace", "serve", "--port", str(self.port),
            "--run-dir", str(self.run_dir), "--data-dir", str(self.data_dir), *args,
        ]  # fmt: skip
        if tree is not None:  # its own folder is what `python -m` looks into first
            env = {**(env or {}), "PYTHONPATH": str(tree)}
        self._process = Process(command, self.run_dir / "serve.log", env, tree)

    def __enter__(self) -> Self:
        self._process.start()
        try:
            self._process.wait_ready(self.url + "/ready")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        self.redis_url = server_url(self.data_dir)
        self._redis = redis.Redis.from_url(self.redis_url)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.stop()
        self._folder.cleanup()

    def pids(self) -> list[tuple[str, int]]:
        """(role, pid) of every process."""
        return [(p["role"], p["pid"]) for p in json.loads((self.run_dir / "processes.json").read_text())]

    def metrics_ports(self, role: str) -> list[int]:
        """Ports of /metrics of the processes of ``role``, as serve prints them once it finds that all is ready."""
        deadline = time.monotonic() + 30
        while not (
            told := re.search(r"^  metrics +(.*)$", self._process.log.read_text(errors="replace"), re.MULTILINE)
        ):
            if time.monotonic() > deadline:
                raise Unavailable("serve did not say where its metrics are")
            time.sleep(0.1)
        return [int(port) for port in re.findall(rf"\b{role}-\d+ 127\.0\.0\.1:(\d+)", told[1])]

    def use(self) -> Use:
        cpu: Counter[str] = Counter()
        for role, pid in self.pids():
            cpu[role] += cpu_seconds(pid)
        told: dict[str, Any] = {**self._redis.info("everything"), **self._redis.info("debug")}  # type: ignore[dict-item]
        server = {
            "in": told["total_net_input_bytes"],
            "out": told["total_net_output_bytes"],
            "commands": told["total_commands_processed"],
            "log": told.get("aof_current_size", 0),  # falls when the log is rewritten: then a run says less
            "log_us": told.get("eventloop_duration_aof_sum", 0),
        }
        return Use(time.monotonic(), dict(cpu), server, disk_flushes(self.data_dir))

    def resident(self) -> dict[str, int]:
        """Bytes in memory by role."""
        found: Counter[str] = Counter()
        for role, pid in self.pids():
            found[role] += resident_bytes(pid)
        return dict(found)
