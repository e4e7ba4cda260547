"""A whole Headrace as users start it: `headrace serve` in processes of its own, on free ports."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

START_S = 180  # a loaded machine may take that long to import torch three times


# Below the ports that the system gives to outgoing connections (32768 and up on Linux, 49152 elsewhere): one of those
# could be taken between the look and the use, or while a process that listens there restarts.
PORTS = range(20_000, 32_000)
TOGETHER = 16  # a service's gateways listen on ports that follow each other, its metrics on the later half


def free_port() -> int:
    """A port that is free, as are the next TOGETHER - 1. Tests that run beside this one look elsewhere, at random."""
    dice = random.SystemRandom()  # whatever the tests seeded
    while True:
        first = dice.randrange(PORTS.start, PORTS.stop, TOGETHER)
        with contextlib.ExitStack() as held, contextlib.suppress(OSError):
            for port in range(first, first + TOGETHER):
                held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first


def answers(url: str) -> bool:
    """Whether a GET gives 200 within some seconds."""
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


class Stack:
    """Use as a context manager. ``args`` are further options of `headrace serve`."""

    def __init__(self, run_dir: Path, *args: str, env: dict[str, str] | None = None) -> None:
        self.run_dir = run_dir
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = run_dir / "serve.log"
        self.command = [
            sys.executable, "-m", "headrace", "serve", "--port", str(self.port),
            "--metrics-port", str(self.port + TOGETHER // 2),
            "--run-dir", str(run_dir / "run"), "--data-dir", str(run_dir / "data"), *args,
        ]  # fmt: skip
        self.env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Stack:
        self.start()
        self.wait_ready()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=subprocess.STDOUT, env=self.env)

    def wait_ready(self, port: int | None = None) -> None:
        """Until the gateway on ``port`` (default: the first) says that a worker serves."""
        url = f"http://127.0.0.1:{port or self.port}/ready"
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            assert self.process is not None
            if self.process.poll() is not None:
                raise AssertionError(f"serve ended with {self.process.returncode}:\n{self.output()}")
            if answers(url):
                return
            time.sleep(0.2)
        raise AssertionError(f"not ready after {START_S} s:\n{self.output()}")

    def stop(self, expect: int | None = 0) -> int:
        """SIGINT, as Ctrl-C does; the exit code must be ``expect`` (None: any)."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            code = self.process.wait(timeout=120)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"serve did not end on SIGINT:\n{self.output()}") from None
        if expect is not None:
            assert code == expect, f"serve ended with {code}:\n{self.output()}"
        return code

    def output(self) -> str:
        """The tail of what serve and its processes printed."""
        parts = [self.log.read_text(errors="replace")[-4000:]]
        for log in sorted((self.run_dir / "run").glob("logs/*.log")):
            parts.append(f"--- {log.name}\n{log.read_text(errors='replace')[-2000:]}")
        return "\n".join(parts)

    def models(self) -> list[str]:
        """The names that GET /v1/models lists."""
        with urllib.request.urlopen(self.url + "/v1/models", timeout=30) as reply:
            return [model["id"] for model in json.loads(reply.read())["data"]]

    def processes(self) -> list[dict[str, object]]:
        return list(json.loads((self.run_dir / "run" / "processes.json").read_text()))

    def pids(self, role: str) -> dict[str, int]:
        """name -> pid of the running instances of one role."""
        return {str(p["name"]): int(str(p["pid"])) for p in self.processes() if p["role"] == role}

    def kill(self, role: str, name: str | None = None, sig: int = signal.SIGKILL) -> int:
        """Send ``sig`` to one instance; returns its pid."""
        pids = self.pids(role)
        pid = pids[name] if name else next(iter(pids.values()))
        os.kill(pid, sig)
        return pid
