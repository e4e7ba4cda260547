"""Machines without machines: network namespaces on one bridge, with links that can be cut.

A cut is silent, as in a network: a neighbour's address is bound to a MAC that nobody has, so packets go out and are
lost, and neither side is told. Other links of the same machine stay whole. The bridge is in a namespace of its own; the
tests are one more machine of it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

NET = "198.18.77"  # of the range for benchmarks of networks (RFC 2544): nobody's
LOST = "02:00:00:00:de:ad"
ROOT = Path(__file__).parents[2]


def missing() -> str:
    """Why there can be no namespaces here; "": there can."""
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
        return "network namespaces need Linux, root and iproute2"
    tried = subprocess.run(["ip", "netns", "add", f"hr{os.getpid()}try"], capture_output=True, text=True)
    if tried.returncode:
        return f"network namespaces need more rights: {tried.stderr.strip()}"
    _ip("netns", "del", f"hr{os.getpid()}try")
    return ""


def _ip(*words: str) -> None:
    ended = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert ended.returncode == 0, f"ip {' '.join(words)}: {ended.stderr}"


class Machine:
    def __init__(self, name: str, namespace: str, number: int, folder: Path) -> None:
        self.name, self.namespace, self.folder = name, namespace, folder
        self.address = f"{NET}.{number}"
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, *command: str, **env: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{self.name}.log").open("ab") as log:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *command], stdout=log, stderr=log, cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env},
            )  # fmt: skip
        self.processes.append(process)  # `ip netns exec` becomes the command, so this is its pid
        return process

    def headrace(self, role: str, redis_url: str, options: Sequence[str]) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "headrace", role, "--name", self.name]
        metrics = ["--metrics-host", "0.0.0.0", "--metrics-port", "9100"]
        return self.start(*command, *metrics, *options, HEADRACE_REDIS_URL=redis_url)

    def leave(self) -> list[int]:
        """SIGTERM to all that runs here, to its end; the exit codes."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        codes = [process.wait(60) for process in self.processes]
        self.processes.clear()
        return codes

    def lost(self, other: Machine, yes: bool) -> None:
        """Whether what this machine sends to ``other`` is lost."""
        if yes:
            words = ("replace", other.address, "lladdr", LOST, "dev", "eth0", "nud", "permanent")
        else:
            words = ("del", other.address, "dev", "eth0")
        _ip("-n", self.namespace, "neigh", *words)


class Network:
    """A context manager that leaves nothing behind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.machines: dict[str, Machine] = {}
        self._id = f"hr{os.getpid()}"
        self._hub = f"{self._id}hub"

    def __enter__(self) -> Network:
        _ip("netns", "add", self._hub)
        _ip("-n", self._hub, "link", "add", "br0", "type", "bridge")
        _ip("-n", self._hub, "link", "set", "br0", "up")
        outside = f"{self._id}o"
        _ip("link", "add", outside, "type", "veth", "peer", "name", "p1", "netns", self._hub)
        _ip("addr", "add", f"{NET}.1/24", "dev", outside)
        _ip("link", "set", outside, "up")
        self._join("p1")
        return self

    def _join(self, port: str) -> None:
        _ip("-n", self._hub, "link", "set", port, "master", "br0")
        _ip("-n", self._hub, "link", "set", port, "up")

    def add(self, name: str) -> Machine:
        number = len(self.machines) + 2
        machine = Machine(name, f"{self._id}{name}", number, self.folder)
        _ip("netns", "add", machine.namespace)
        self.machines[name] = machine
        port = f"p{number}"
        _ip("-n", self._hub, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", machine.namespace)
        self._join(port)
        _ip("-n", machine.namespace, "addr", "add", f"{machine.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", machine.namespace, "link", "set", device, "up")
        return machine

    def cut(self, one: str, other: str, yes: bool = True) -> None:
        """The way between two machines, in both directions; ``yes`` False: it is whole again."""
        self.machines[one].lost(self.machines[other], yes)
        self.machines[other].lost(self.machines[one], yes)

    def __exit__(self, *_: object) -> None:
        for machine in self.machines.values():
            for process in machine.processes:
                process.kill()
                process.wait()
        for namespace in [*(machine.namespace for machine in self.machines.values()), self._hub]:
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True)
        subprocess.run(["ip", "link", "del", f"{self._id}o"], capture_output=True)

    def logs(self) -> str:
        texts = sorted(self.folder.glob("*.log"))
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-2000:]}" for path in texts)
