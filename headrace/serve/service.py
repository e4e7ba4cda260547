"""``headrace serve``: everything on one machine, as separate processes that a supervisor keeps alive.

Resolve the options (errors before anything is started), start server, scheduler, gateway and workers, show their
progress, print how to use them, then wait: for Ctrl-C, which drains gateway, worker, scheduler and server in this
order, or for a process that cannot be kept alive, which ends all with a non-zero code.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import re
import signal
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

from rich.console import Console

from headrace import options
from headrace.console import Lenient, StartView, print_block
from headrace.model import choose as choose_model
from headrace.model_check import check_model
from headrace.option_table import OPTIONS, options_of
from headrace.serve import embedded, progress
from headrace.serve.durability import check_durability
from headrace.serve.supervisor import Child, GaveUp, Program, Supervisor
from protocol.bus import GatewayBus, LeaderBus
from protocol.connection import check_url
from protocol.errors import EX_CONFIG, StartError
from protocol.keys import MODEL_NAME

# a log line as either --log-format has it
IMPORTANT = re.compile(r'\S+ \S+ (WARNING|ERROR|CRITICAL) |\{"time": "[^"]*", "level": "(warning|error|critical)"')
OWN_SCHEDULER = re.compile(r"scheduler-\d+\.[0-9a-f]{8}")  # the owner of a lead, if serve started it
POLL_S = 0.2
MAKE_POLL_S = 0.5
SERVER_POLL_S = 0.02
SERVER_STOP_S = 30.0
STOP_MARGIN_S = 15.0  # beyond --drain-timeout, before a process that does not exit is killed


def serve(values: Mapping[str, Any]) -> int:
    """Run until stopped; returns the exit code."""
    layout = resolve(values)
    view = StartView(Console(file=cast("TextIO", Lenient(sys.stdout))))
    with exclusive(layout.run_dir), contextlib.closing(view):
        model = choose_model(values, lambda stage, fraction: view.stage("model", stage, fraction), view.say)
        view.say(f"model: {model}")
        layout.values.update(model.options)
        return asyncio.run(Stack(layout, view).run())


# ------------------------------------------------------------------ what was asked for


@dataclass(frozen=True)
class Layout:
    """Options with every default and free port decided, so that a restarted process gets the same. Only the model, if
    none was named, is decided later."""

    values: dict[str, Any]
    run_dir: Path
    data_dir: Path | None  # None: the server is not ours
    ports: list[int]  # one per gateway
    metrics_ports: dict[str, int]  # scheduler-0, ..., worker-0, ...

    @property
    def url(self) -> str:
        host = self.values["host"]
        if host in ("", "0.0.0.0"):
            host = "127.0.0.1"
        elif ":" in host:
            host = "[::1]" if host == "::" else f"[{host}]"
        return f"http://{host}:{self.ports[0]}"


def resolve(values: Mapping[str, Any]) -> Layout:
    """Decide all defaults. StartError for what is known to fail before anything is started."""
    if values["redis_url"]:
        check_url(values["redis_url"])
    if values["api_keys_file"] and not os.access(values["api_keys_file"], os.R_OK):
        raise StartError(f"--api-keys-file {values['api_keys_file']}: there is no such file that may be read")
    model, name = values["model"], values["served_model_name"]
    if model is not None:
        check_model(str(model), weights=values["engine"] == "torch")
        name = name or options.served_name(str(model))
    if name and not MODEL_NAME.fullmatch(name):
        raise StartError(f"--served-model-name {name!r} must match [A-Za-z0-9._:/-]{{1,128}}")
    ports = choose_ports(values["host"], values["port"], values["gateways"], "--port")
    # a gateway's metrics are on its main port, but for one that asks for keys
    apart = ("gateway", "scheduler", "worker") if values["api_keys_file"] else ("scheduler", "worker")
    others = [f"{role}-{k}" for role in apart for k in range(values[f"{role}s"])]
    metrics = choose_ports(values["metrics_host"], values["metrics_port"] or 0, len(others), "--metrics-port")
    state = options.state_dir()
    data_dir = Path(values["data_dir"] or state / "data").expanduser().resolve()
    run_dir = Path(values["run_dir"] or state / f"run-{ports[0]}").expanduser().resolve()
    threads = values["threads"] or worker_threads(values["workers"])
    return Layout(
        values={**values, "served_model_name": name, "threads": threads},
        run_dir=run_dir,
        data_dir=None if values["redis_url"] else data_dir,
        ports=ports,
        metrics_ports=dict(zip(others, metrics, strict=True)),
    )


def choose_ports(host: str, first: int, count: int, flag: str) -> list[int]:
    """``count`` ports, first, first + 1, ..., or free ones if ``first`` is 0. StartError if one is in use."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.ExitStack() as held:
        ports = []
        for index in range(count):
            probe = held.enter_context(socket.socket(family, socket.SOCK_STREAM))
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            wanted = first and first + index
            try:
                probe.bind((host, wanted))
            except OSError as error:
                raise StartError(
                    f"cannot listen on {host}:{wanted} ({error.strerror}); choose another with {flag}"
                ) from None
            except OverflowError:
                raise StartError(f"{flag} {wanted} is no port number") from None
            ports.append(probe.getsockname()[1])
        return ports


def worker_threads(workers: int) -> int:
    """CPU threads for each worker: its share of the cores, less some for the other processes where there are many."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdecimal() and int(wanted) > 0:
        return int(wanted)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, (cores - min(2, cores // 4)) // workers)


def gpus_of(
    worker: int, workers: int, ranks: int, device: str | None, proc: Path = Path("/proc/driver/nvidia/gpus")
) -> str | None:
    """CUDA_VISIBLE_DEVICES for one of several workers of so many ranks, which share out the GPUs; None: leave it as it
    is."""
    if workers == 1 or device not in (None, "auto", "cuda"):
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        gpus = [gpu.strip() for gpu in visible.split(",") if gpu.strip()]
    else:
        gpus = [str(k) for k in range(len(list(proc.iterdir())))] if proc.is_dir() else []
    worker %= max(1, len(gpus) // ranks)
    return ",".join(gpus[worker * ranks : (worker + 1) * ranks]) or None


def make_above(pid: int) -> int | None:
    """The nearest make among the ancestors of ``pid`` (Linux; None elsewhere)."""
    while pid > 1:
        found = status_of(pid)
        if found is None:
            return None
        pid = found[1]
        parent = status_of(pid)
        if parent is not None and parent[0] in ("make", "gmake"):
            return pid
    return None


def status_of(pid: int, proc: Path = Path("/proc")) -> tuple[str, int] | None:
    """(name, parent's pid) of a process that runs; None if it does not."""
    try:
        text = (proc / str(pid) / "stat").read_text()
    except OSError:
        return None
    state, parent = text.rpartition(")")[2].split()[:2]
    return None if state in "ZX" else (text[text.index("(") + 1 : text.rindex(")")], int(parent))


@contextlib.contextmanager
def exclusive(run_dir: Path) -> Iterator[None]:
    """Hold the run directory for this process alone. StartError if that cannot be."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / "lock").open("w")
    except OSError as error:
        raise StartError(f"cannot write to {run_dir} ({error.strerror}); choose another with --run-dir") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartError(f"{run_dir} is in use by another headrace serve; choose another --run-dir") from None
        yield


# ------------------------------------------------------------------ running


class Stack:
    """One run of ``serve``: start, wait, drain."""

    def __init__(self, layout: Layout, view: StartView) -> None:
        self.layout = layout
        self.view = view
        self.interrupts = 0
        self.interrupted = asyncio.Event()
        self.supervisor: Supervisor

    async def run(self) -> int:
        self.supervisor = Supervisor(self.layout.run_dir, self._on_line, self.view.note)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # ignored: nohup
                loop.add_signal_handler(number, self._interrupt)
        watching = asyncio.create_task(self._end_with_make())
        starting: asyncio.Future[Any] = asyncio.create_task(self._start())
        stop: asyncio.Future[Any] = asyncio.create_task(self.interrupted.wait())
        try:
            await asyncio.wait({starting, stop, self.supervisor.failed}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
                await asyncio.wait({stop, self.supervisor.failed}, return_when=asyncio.FIRST_COMPLETED)
            if self.supervisor.failed.done():
                self.supervisor.failed.result()
            starting.cancel()
            return await self._drain()
        except StartError as error:
            return await self._fail(str(error), EX_CONFIG)
        except GaveUp as error:
            return await self._fail(str(error), 1)
        finally:
            self.view.close()
            starting.cancel()
            stop.cancel()
            watching.cancel()
            self.supervisor.kill()
            await self.supervisor.ended()

    def _interrupt(self) -> None:
        self.interrupts += 1
        self.interrupted.set()
        if self.interrupts > 1:
            self.view.note("stopping at once")
            self.supervisor.kill()

    async def _end_with_make(self) -> None:
        """Under make, its end is ours: nobody else would end what it started. Any other parent may die."""
        make = make_above(os.getpid()) if "MAKELEVEL" in os.environ else None
        while make is not None:
            await asyncio.sleep(MAKE_POLL_S)
            if status_of(make) is None and not self.interrupted.is_set():
                self._interrupt()

    def _on_line(self, child: Child, line: str) -> None:
        if child.program.role != "redis":
            self.view.stage(child.name, "start", 1.0)  # its first line: it is up
        if (told := progress.parse(line)) is not None:
            self.view.stage(child.name, *told)
        elif IMPORTANT.match(line):
            self.view.note(f"{child.name} | {line}")

    # -------------------------------------------------------------- start

    async def _start(self) -> None:
        values, layout = self.layout.values, self.layout
        redis_url = values["redis_url"] or await self._start_server()
        env = options.child_environment(OPTIONS, redis_url, os.environ) | {
            progress.SUPERVISED: "1",
            "PYTHONUNBUFFERED": "1",
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),  # spinning would slow the others
        }
        await self._check_server(redis_url)
        if layout.data_dir is not None:
            await self._withdraw_other_models(redis_url)
            await self._release_dead_lead(redis_url)
        for role in ("scheduler", "gateway", "worker"):
            for index in range(values[f"{role}s"]):
                name = f"{role}-{index}"
                own = {"name": name, "metrics_port": layout.metrics_ports.get(name)}
                if role == "gateway":
                    own["port"] = layout.ports[index]
                argv = [sys.executable, "-m", "headrace", role, *options.argv_of(options_of(role), {**values, **own})]
                workers, ranks = values["workers"], values["tensor_parallel_size"] * values["pipeline_parallel_size"]
                gpus = gpus_of(index, workers, ranks, values["device"]) if role == "worker" else None
                own_env = env if gpus is None else env | {"CUDA_VISIBLE_DEVICES": gpus}
                self.supervisor.start(Program(role, name, argv, own_env))
                self.view.stage(name, "start", 0.0)
        await self._until_ready()
        self.supervisor.served |= {"scheduler", "gateway", "worker"}
        self.view.close()
        self._print_block()

    async def _start_server(self) -> str:
        """Start the embedded server; returns its URL."""
        assert self.layout.data_dir is not None
        self.view.stage("server", "start", 0.0)
        data_dir = self.layout.data_dir
        try:
            embedded.claim(data_dir)
            argv = embedded.server_command(data_dir)
            self._data_lock = embedded.lock_data_dir(data_dir)  # held until this process ends
        except OSError as error:
            raise StartError(f"cannot write to {data_dir} ({error.strerror}); choose another --data-dir") from None
        child = self.supervisor.start(Program("redis", "redis", argv, dict(os.environ), lasting=True, umask=0o077))
        while not await asyncio.to_thread(embedded.answers, data_dir):  # noqa: ASYNC110 (another process)
            await asyncio.sleep(SERVER_POLL_S)
        child.was_up = True
        self.view.stage("server", "start", 1.0)
        return embedded.server_url(data_dir)

    async def _check_server(self, url: str) -> None:
        """StartError if the server cannot be reached or is too old; weaker settings of a foreign one are reported."""
        bus = GatewayBus(url, self.layout.values["served_model_name"], patience=5.0)
        try:
            await bus.connect()
        finally:
            await bus.close()
        if self.layout.data_dir is None:
            await check_durability(url, self.layout.values["strict_durability"], self.view.note)

    async def _withdraw_other_models(self, url: str) -> None:
        """What an earlier start in this data directory served, and nobody leads now, is no longer listed: clients that
        name no model mean the one of today."""
        for name in await GatewayBus.models(url):
            if name == self.layout.values["served_model_name"]:
                continue
            bus = LeaderBus(url, name, patience=5.0)
            await bus.connect()
            try:
                if not (await bus.read_leader()).owner:
                    await bus.withdraw_card()
            finally:
                await bus.close()

    async def _release_dead_lead(self, url: str) -> None:
        """Let the new scheduler lead at once where one of an earlier serve, which was killed, still holds the lead.

        Such a scheduler died with its serve, since this one has the data's lock and no process outlives its supervisor.
        Compare-and-set and fencing make it safe all the same."""
        bus = LeaderBus(url, self.layout.values["served_model_name"], patience=5.0)
        await bus.connect()
        try:
            seen = await bus.read_leader()
            if OWN_SCHEDULER.fullmatch(seen.owner):
                await bus.release(seen.epoch, seen.owner)
        finally:
            await bus.close()

    async def _until_ready(self) -> None:
        import aiohttp

        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
            while True:
                with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                    async with session.get(self.layout.url + "/ready") as reply:
                        if reply.status == 200:
                            return
                await asyncio.sleep(POLL_S)

    def _print_block(self) -> None:
        metrics = "  ".join(f"{name} 127.0.0.1:{port}" for name, port in self.layout.metrics_ports.items())
        lines = {"metrics": metrics, "logs": str(self.layout.run_dir / "logs")}
        if len(self.layout.ports) > 1:
            lines = {"gateways": "ports " + ", ".join(map(str, self.layout.ports)), **lines}
        if self.layout.data_dir is not None:
            lines["queue"] = f"{embedded.server_url(self.layout.data_dir)}  (kept in {self.layout.data_dir})"
        print_block(self.view.console, self.layout.url, self.layout.values["served_model_name"], lines)

    # -------------------------------------------------------------- end

    async def _drain(self) -> int:
        self.view.note("stopping: running requests may end (Ctrl-C again to stop at once)")
        patience = self.layout.values["drain_timeout"] + STOP_MARGIN_S
        for role, timeout in (
            ("gateway", patience),
            ("worker", patience),
            ("scheduler", STOP_MARGIN_S),
            ("redis", SERVER_STOP_S),
        ):
            await self.supervisor.stop(*self.supervisor.role(role), timeout=timeout)
        if self.interrupts > 1:
            return 130
        self.view.note("stopped")
        return 0

    async def _fail(self, message: str, code: int) -> int:
        self.view.close()
        with contextlib.suppress(OSError):  # nobody may read it any more
            print(f"headrace serve: {message}", file=sys.stderr)
        return code
