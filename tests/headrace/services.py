"""Services of either version as processes of their own on one server, for the tests of updates."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.stack import START_S, answers

ROOT = Path(__file__).parents[2]
MODEL = "tiny"


class Services:
    """Processes of either version on one server."""

    def __init__(self, folder: Path, url: str, model_dir: Path) -> None:
        self.folder, self.url, self.model_dir = folder, url, model_dir
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, role: str, code: Path, version: str, port: int = 0, *more: str) -> None:
        own = {
            "gateway": ["--port", str(port)],
            "scheduler": ["--model", str(self.model_dir), "--served-model-name", MODEL],
            "worker": ["--model", str(self.model_dir), "--served-model-name", MODEL, "--engine", "simulated",
                       "--engine-options", '{"step_us": 10000}', "--drain-timeout", "20"],
        }[role]  # fmt: skip
        name = f"{role}-{version}"
        command = [sys.executable, "-m", "headrace", role, "--redis-url", self.url, "--name", name, *own, *more]
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                command, cwd=code, env={**os.environ, "PYTHONPATH": str(code)}, stdout=log, stderr=log
            )

    def stop(self, name: str) -> None:
        process = self.processes.pop(name)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, (self.folder / f"{name}.log").read_text()

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()

    def logs(self) -> str:
        return "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in sorted(self.folder.glob("*.log")))


def ready(port: int) -> bool:
    return answers(f"http://127.0.0.1:{port}/ready")


async def until_ready(services: Services, port: int) -> None:
    deadline = time.monotonic() + START_S
    while not await asyncio.to_thread(ready, port):
        assert time.monotonic() < deadline, services.logs()
        await asyncio.sleep(0.2)


async def until(services: Services, what: str, condition) -> None:
    deadline = time.monotonic() + START_S
    while not await condition():
        assert time.monotonic() < deadline, f"{what}\n{services.logs()}"
        await asyncio.sleep(0.2)
