"""What an actor does: keep one process of Headrace alive, say how it is, and let it drain.

The process dies with its actor (serve/leash.py), and the other way round an actor whose process cannot be kept alive
ends itself, so that Ray starts both again, elsewhere if it has to. An invalid configuration (exit code 78) is not
tried again: the actor stays and says why. A worker that comes back under its old name fences the one before it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from headrace import options
from headrace.option_table import OPTIONS, options_of
from headrace.ray.plan import Program
from headrace.serve.machine import choose_ports
from headrace.serve.supervisor import GaveUp, Supervisor
from protocol.errors import StartError

T = TypeVar("T")
STOP_MARGIN_S = 15.0  # beyond --drain-timeout, before a process that does not exit is killed
METRICS_S = 2.0
DEMAND = ("headrace_num_requests_waiting", "headrace_num_requests_running", "headrace_inbox_length")


@dataclasses.dataclass(frozen=True)
class State:
    """An actor's answer."""

    node: str  # Ray's id of it
    address: str
    pid: int | None
    leaving: bool
    failed: str  # why it is not started again; "": it runs
    port: int | None  # of a gateway
    metrics_port: int | None
    rendezvous: str  # where ranks of other actors come in, or what this one goes to; "": the worker has no others
    demand: int | None  # of a scheduler that leads: waiting + running + inbox


class Process:
    """``place``: (node, address) of this actor; None asks Ray."""

    def __init__(self, program: Program, redis_url: str, place: tuple[str, str] | None = None) -> None:
        self._program = program
        self._node, self._address = place or _place()
        self._values = self._decided(program)
        self._failed = ""
        self._leaving = False
        self._folder = tempfile.TemporaryDirectory(prefix=f"headrace-{program.role}-")
        self._loop = asyncio.new_event_loop()  # in a thread that lasts: the process is tied to it
        threading.Thread(target=self._run_loop, name="supervisor", daemon=True).start()
        self._do(self._start(redis_url))

    def _decided(self, program: Program) -> dict[str, Any]:
        """Its options, with free ports of this machine."""
        values = dict(program.values)
        if "metrics_host" in values:
            values["metrics_port"] = choose_ports(values["metrics_host"], 0, 1, "--metrics-port")[0]
        if program.role == "gateway" and not values["port"]:
            values["port"] = choose_ports(values["host"], 0, 1, "--port")[0]
        if program.ranks > 1 and not program.rank:
            (port,) = choose_ports(self._address, 0, 1, "--rendezvous")
            values |= {"rendezvous": f"{self._address}:{port}", "local_ranks": 1}
        return values

    def _run_loop(self) -> None:
        with contextlib.suppress(PermissionError):  # Ray's own processes are nice, those that serve must not be
            os.setpriority(os.PRIO_PROCESS, 0, min(0, os.getpriority(os.PRIO_PROCESS, 0)))
        if os.getpriority(os.PRIO_PROCESS, 0) > 0:
            print("this process is slower than others: start Ray with RAY_worker_niceness=0", file=sys.stderr)
        self._loop.run_forever()

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _start(self, redis_url: str) -> None:
        from headrace.serve.supervisor import Program as Child

        program = self._program
        self._supervisor = Supervisor(Path(self._folder.name), lambda _, line: _say(line), _say)
        self._supervisor.failed.add_done_callback(self._on_failed)
        argv = [sys.executable, "-m", "headrace", program.role]
        argv += options.argv_of(options_of(program.role), self._values)
        env = options.child_environment(OPTIONS, redis_url, os.environ) | {"PYTHONUNBUFFERED": "1"}
        self._child = self._supervisor.start(Child(program.role, program.role, argv, env))

    def _on_failed(self, failed: asyncio.Future[None]) -> None:
        error = failed.exception()
        self._failed = str(error)
        _say(self._failed)
        if isinstance(error, GaveUp):
            os._exit(1)
        assert isinstance(error, StartError), error

    def state(self) -> State:
        process = self._child.process
        pid = process.pid if process is not None and process.returncode is None else None
        return State(
            self._node, self._address, pid, self._leaving, self._failed,
            self._values.get("port"), self._values.get("metrics_port"), self._values.get("rendezvous") or "",
            self._demand() if self._program.role == "scheduler" else None,
        )  # fmt: skip

    def _demand(self) -> int | None:
        url = f"http://{self._values['metrics_host']}:{self._values['metrics_port']}/metrics"
        try:
            with urllib.request.urlopen(url, timeout=METRICS_S) as reply:
                return demand_in(reply.read().decode())
        except (urllib.error.URLError, OSError):
            return None

    def drain(self, patience_s: float) -> None:
        """SIGTERM: what runs here goes on elsewhere, or ends here if there is nobody else. Returns when it has ended;
        after ``patience_s`` and a margin it is killed."""
        self._leaving = True
        self._do(self._supervisor.stop(self._child, timeout=patience_s + STOP_MARGIN_S))


def demand_in(text: str) -> int | None:
    """waiting + running + inbox, from a scheduler's /metrics; None if it does not lead."""
    values: dict[str, float] = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            values[name.partition("{")[0]] = float(value)
    return int(sum(values[name] for name in DEMAND)) if values.get("headrace_is_leader") else None


def _say(line: str) -> None:
    """Into the actor's log."""
    print(line, file=sys.stderr, flush=True)


def _place() -> tuple[str, str]:
    import ray

    return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()
