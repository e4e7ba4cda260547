"""What serve asks the machine: a directory for itself alone, free ports, its share of cores and GPUs, who runs it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from protocol.errors import StartError


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
