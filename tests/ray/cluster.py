"""A real Ray cluster on this machine: a head and other nodes, each a `ray start` of its own, in an environment of its
own (tests/clients/environments.py)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.clients.environments import python_of

ROOT = Path(__file__).parents[2]
TRIES = 3


def free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    for one in held:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def descendants(pid: int) -> list[int]:
    """Processes below ``pid``, by /proc."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                children.setdefault(parent_of(int(entry.name)), []).append(int(entry.name))
            except OSError:
                continue
    found, todo = [], [pid]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


class RayCluster:
    """A context manager; ``nodes`` by name, "head" the first."""

    def __init__(self, folder: Path) -> None:
        self.python = python_of("ray", shares=True)
        self.folder = folder
        self.temp = Path(tempfile.mkdtemp(prefix="hr-ray-", dir="/tmp"))  # paths of its sockets must be short
        (port,) = free_ports(1)
        self.address = f"127.0.0.1:{port}"
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        self.env = {
            **os.environ, "PYTHONPATH": str(ROOT), "RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": str(self.temp), "NO_PROXY": "127.0.0.1,localhost", "RAY_DISABLE_IMPORT_WARNING": "1",
            "PATH": f"{self.python.parent}{os.pathsep}{os.environ['PATH']}",
        }  # fmt: skip

    def __enter__(self) -> RayCluster:
        self.add("head", cpus=8)
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self.nodes):
            self.kill(name)
        shutil.rmtree(self.temp, ignore_errors=True)

    def add(self, name: str, cpus: float) -> None:
        agent, export, grpc = free_ports(3)
        command = [
            "start", "--block", "--node-ip-address", "127.0.0.1", "--num-cpus", str(cpus), "--num-gpus", "0",
            "--object-store-memory", str(100 << 20), "--dashboard-agent-listen-port", str(agent),
            "--metrics-export-port", str(export), "--dashboard-agent-grpc-port", str(grpc),
            "--resources", json.dumps({name: 1}),
        ]  # fmt: skip
        if name == "head":
            command += ["--head", "--port", self.address.rpartition(":")[2], "--include-dashboard", "false"]
            command += ["--ray-client-server-port", str(free_ports(1)[0]), "--temp-dir", str(self.temp)]
        else:
            command += ["--address", self.address]
        for _ in range(TRIES):
            if self._started(name, command):
                return
        raise AssertionError(self._log(name))

    def _started(self, name: str, command: list[str]) -> bool:
        """Ray itself gives a node 30 s to start, which a loaded machine may not keep."""
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [self.python.parent / "ray", *command], stdout=log, stderr=log, env=self.env, start_new_session=True
            )
        self.nodes[name] = process
        while "Ray runtime started" not in self._log(name):
            if process.poll() is not None:
                return False
            time.sleep(0.3)
        return True

    def _log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()[-3000:]

    def pids(self, name: str) -> list[int]:
        """Everything that runs on a node."""
        return [self.nodes[name].pid, *descendants(self.nodes[name].pid)]

    def kill(self, name: str) -> None:
        """As if its machine had lost power."""
        for pid in self.pids(name):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.nodes.pop(name).wait()

    def run(self, *command: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        """A command of the cluster's environment."""
        return subprocess.run(command, env=self.env, cwd=self.folder, capture_output=True, text=True, timeout=timeout)

    def headrace(self, *words: str, expect: int = 0) -> str:
        command = [str(self.python), "-m", "headrace", "ray", *words, "--address", self.address]
        ended = self.run(*command)
        assert ended.returncode == expect, f"{ended.stdout}\n{ended.stderr[-4000:]}"
        return ended.stdout if not expect else ended.stderr

    def ask(self, program: str) -> Any:
        """The JSON that a program prints which is connected to the cluster."""
        begin = f"import json, ray; ray.init({self.address!r}, namespace='headrace', log_to_driver=False); "
        ended = self.run(str(self.python), "-c", begin + program)
        assert ended.returncode == 0, ended.stderr[-4000:]
        return json.loads(ended.stdout.splitlines()[-1])

    def give_notice(self, name: str) -> None:
        """The node is told that it will be taken away in five minutes, as clouds tell of spot machines."""
        node = self.ask(
            f"print(json.dumps(next(n['NodeID'] for n in ray.nodes() if n['Alive'] and {name!r} in n['Resources'])))"
        )
        ended = self.run(
            str(self.python.parent / "ray"), "drain-node", "--address", self.address, "--node-id", node, "--reason",
            "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--deadline-remaining-seconds", "300",
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr[-2000:]

    def logs(self) -> str:
        """The tail of what actors wrote, for a failure."""
        texts = sorted(self.temp.glob("session_*/logs/worker-*.err"))
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in texts)[-30_000:]
