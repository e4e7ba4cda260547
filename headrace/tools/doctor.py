"""``headrace doctor``: looks at this machine and at a running installation, and says what to do.

Each check is a function that yields findings; one that breaks is a finding itself. Nothing is changed, but for a file
of a few kilobytes that is written and deleted to time the disk. Exit code 1 if anything must be mended.
"""

from __future__ import annotations

import asyncio
import http.client
import importlib.metadata
import json
import os
import shutil
import socket
import stat
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from headrace.options import state_dir
from headrace.serve import embedded
from headrace.tools.show import duration
from headrace.tools.stored import PATIENCE_S, OperatorBus, shards_of
from protocol.bus import GatewayBus
from protocol.errors import HeadraceError, StartError, StoreFailed
from protocol.messages import WIRE
from protocol.routing.store import RoutingStore, decode

Level = Literal["ok", "warn", "fail"]
CLOCK_S = 2.0  # difference to the server's clock that is told
FSYNCS = 20
SLOW_FSYNC_S = 0.02
LEAST_FREE = 5 << 30  # bytes of disk
BEATS_S = 3.0  # a living leader's and worker's beats move within


@dataclass(frozen=True)
class Finding:
    """``todo`` says what to do; empty where nothing is."""

    level: Level
    what: str
    todo: str = ""


# ------------------------------------------------------------------ this machine


def check_versions(values: Mapping[str, Any]) -> Iterator[Finding]:
    from packaging.requirements import Requirement

    if sys.version_info < (3, 11):  # noqa: UP036 (what an old interpreter would say)
        yield Finding("fail", f"Python {sys.version.split()[0]}", "install Python 3.11 or later")
    try:
        needed = importlib.metadata.requires("headrace") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("warn", "headrace runs from a checkout that is not installed", "pip install -e .")
        return
    wrong = 0
    for text in needed:
        required = Requirement(text)
        if required.marker is not None and not required.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = importlib.metadata.version(required.name)
        except importlib.metadata.PackageNotFoundError:
            wrong += 1
            yield Finding("fail", f"{required.name} is not installed", f"pip install '{required}'")
            continue
        if not required.specifier.contains(installed, prereleases=True):
            wrong += 1
            yield Finding("fail", f"{required.name} is {installed}", f"pip install '{required}'")
    if not wrong:
        told = importlib.metadata.version("headrace")
        yield Finding("ok", f"headrace {told}, Python {sys.version.split()[0]}, and all that it needs")


def check_kernels(values: Mapping[str, Any]) -> Iterator[Finding]:
    from workers.native.library import KernelsUnavailable, load_kernels

    try:
        yield Finding("ok", f"native CPU kernels ({load_kernels().instruction_set})")
    except KernelsUnavailable as reason:
        todo = "install a C++ compiler and headrace again (from a checkout: python setup.py build_ext --inplace)"
        yield Finding("warn", f"no native CPU kernels, a CPU is several times slower: {reason}", todo)


def check_gpus(values: Mapping[str, Any]) -> Iterator[Finding]:
    program = shutil.which("nvidia-smi")
    if program is None and not Path("/proc/driver/nvidia").exists():
        yield Finding("ok", "no GPU: models run on the CPU")
        return
    listed = ""
    if program is not None:
        fields = "--query-gpu=name,memory.total,driver_version"
        listed = subprocess.run(
            [program, fields, "--format=csv,noheader"], capture_output=True, text=True, timeout=30, check=False
        ).stdout.strip()
    if not listed:
        yield Finding("fail", "there is a GPU, but its driver does not answer", "run nvidia-smi; reinstall the driver")
        return
    for line in listed.splitlines():
        yield Finding("ok", f"GPU {line}")
    asked = "import torch; print(torch.__version__, torch.cuda.is_available())"  # takes seconds, and much memory
    told = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, timeout=120, check=False)
    if not told.stdout.strip().endswith("True"):
        version = told.stdout.split(" ")[0] or "cannot be imported, and"
        yield Finding("fail", f"torch {version} cannot use it", "install torch for CUDA: pytorch.org")


def _data_dir(values: Mapping[str, Any]) -> Path:
    return Path(values["data_dir"] or state_dir() / "data").expanduser()


def check_disk(values: Mapping[str, Any]) -> Iterator[Finding]:
    folder = _data_dir(values)
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(there, os.W_OK):
        yield Finding("fail", f"{there} is not writable", "choose another --data-dir, or change its owner")
        return
    free = shutil.disk_usage(there).free
    if free < LEAST_FREE:
        yield Finding(
            "warn", f"{free >> 20} MiB are free in {there}", "the append-only file needs room to be rewritten"
        )
    if folder.exists() and stat.S_IMODE(folder.stat().st_mode) & 0o077:
        yield Finding("warn", f"others may read {folder}, where prompts are stored", f"chmod 700 {folder}")
    took = statistics.median(_fsyncs(there))
    if took > SLOW_FSYNC_S:
        todo = "each step waits for one: use a disk of its own, or one with power-loss protection"
        yield Finding("warn", f"an fsync in {there} takes {duration(took)}", todo)
    else:
        yield Finding("ok", f"{there}: {free >> 30} GiB free, an fsync takes {took * 1000:.1f} ms")


def _fsyncs(folder: Path) -> list[float]:
    took = []
    path = folder / f".doctor-{os.getpid()}"
    try:
        with path.open("wb") as file:
            for _ in range(FSYNCS):
                file.write(b"x" * 512)
                file.flush()
                began = time.monotonic()
                os.fsync(file.fileno())
                took.append(time.monotonic() - began)
    finally:
        path.unlink(missing_ok=True)
    return took


def check_ports(values: Mapping[str, Any]) -> Iterator[Finding]:
    host, port = values["host"], values["port"]
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if _is_ours(host, port):
                yield Finding("ok", f"{host}:{port}: a gateway of Headrace answers")
            else:
                yield Finding("warn", f"{host}:{port} cannot be bound: {error.strerror}", "something listens: --port")
        else:
            yield Finding("ok", f"{host}:{port} is free")


def _is_ours(host: str, port: int) -> bool:
    """Whether a gateway answers there."""
    try:
        with urllib.request.urlopen(f"http://{host}:{port}/health", timeout=2) as reply:
            return bool(reply.headers.get("Server") == "headrace")
    except (OSError, ValueError, http.client.HTTPException):
        return False


def check_model_files(values: Mapping[str, Any]) -> Iterator[Finding]:
    from headrace.model_check import check_model

    if values["model"] is None:
        return
    try:
        check_model(values["model"])
    except StartError as error:
        yield Finding("fail", str(error))
    else:
        yield Finding("ok", f"{values['model']} can be served, as far as its files tell")


# ------------------------------------------------------------------ a running installation


async def check_server(values: Mapping[str, Any]) -> AsyncIterator[Finding]:
    """The server, and every model on it."""
    data_dir = _data_dir(values)
    url = values["redis_url"] or (embedded.server_url(data_dir) if embedded.answers(data_dir) else None)
    if url is None:
        yield Finding("ok", "no server runs in the data directory, and --redis-url names none")
        return
    try:
        models = sorted(await GatewayBus.models(url, patience=PATIENCE_S))
        asleep = await _may_sleep(url)
        for weakness in await GatewayBus.durability(url, patience=PATIENCE_S):
            yield Finding("warn", f"the server could lose what it acknowledged: {weakness}", "docs/operations.md")
    except HeadraceError as error:
        yield Finding("fail", f"the server: {error}", "is it up, and are URL, user and password right?")
        return
    looks = [_looked(url, models[0] if models else "doctor", _server)]
    for shard in [one for name in models for one in await shards_of(url, name) if one.open]:
        looks.append(_looked(url, shard.tag, partial(_model, may_sleep=shard.model in asleep)))
    for found in await asyncio.gather(*looks):
        for finding in found:
            yield finding
    if not models:
        yield Finding("ok", "the server serves no model now")


async def _looked(url: str, name: str, look: Callable[[OperatorBus], AsyncIterator[Finding]]) -> list[Finding]:
    """What ``look`` finds by the bus of model ``name``."""
    bus = OperatorBus(url, name, patience=PATIENCE_S)
    try:
        await bus.connect()
        return [finding async for finding in look(bus)]
    except HeadraceError as error:
        return [Finding("fail", f"{name}: {error}")]
    finally:
        await bus.close()


async def _server(bus: OperatorBus) -> AsyncIterator[Finding]:
    began = time.monotonic()
    server_ms = await bus.server_ms()
    took, apart = time.monotonic() - began, abs(server_ms / 1000 - time.time())
    if apart > CLOCK_S:
        yield Finding("warn", f"the server's clock is {apart:.0f} s away from this one's", "let both run NTP")
    text = (await bus._link.command("INFO", "everything")).decode()
    told = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    used, most = int(told.get("used_memory", 0)), int(told.get("maxmemory", 0))
    if most and used > 0.8 * most:
        yield Finding("warn", f"the server uses {used >> 20} of {most >> 20} MiB", "raise maxmemory, or add a server")
    if told.get("aof_last_write_status", "ok") != "ok" or told.get("aof_last_bgrewrite_status", "ok") != "ok":
        yield Finding("fail", "the server's last write to its file failed", "free disk space; see its log")
    kind = "Valkey" if "valkey_version" in told else "Redis"
    version = told.get("valkey_version") or told.get("redis_version", "?")
    yield Finding("ok", f"{kind} {version} answers in {took * 1000:.1f} ms and uses {used >> 20} MiB")


async def _may_sleep(url: str) -> set[str]:
    """Models that have no worker while nobody asks for them."""
    store = RoutingStore(url, PATIENCE_S)
    try:
        return {name for name, terms in decode(await store.read()).models.items() if terms.sleeps}
    except StoreFailed:  # a user that may not read the table
        return set()
    finally:
        await store.close()


async def _model(bus: OperatorBus, *, may_sleep: bool) -> AsyncIterator[Finding]:
    name = bus.keys.model
    leader, workers = await bus.read_leader(), {one.wid: one for one in await bus.list_workers()}
    await asyncio.sleep(BEATS_S)
    later, after = await bus.read_leader(), {one.wid: one for one in await bus.list_workers()}
    lives = bool(later.owner) and (leader.epoch, leader.beat) != (later.epoch, later.beat)
    if not lives:
        yield Finding("fail", f"{name}: no scheduler leads: requests are stored and wait", "start a scheduler")
    if later.wire not in (0, WIRE):
        yield Finding("fail", f"{name}: its scheduler is of another wire version", "update all services of the model")
    serving = 0
    for wid, worker in after.items():
        moved = wid not in workers or (workers[wid].gen, workers[wid].beat) != (worker.gen, worker.beat)
        serving += moved and worker.state == "serving"
        if not moved:
            yield Finding("warn", f"{name}: worker {wid} is silent", "look at its log; its requests move elsewhere")
    sleeps = may_sleep and not after
    if not serving and not sleeps:
        yield Finding("fail", f"{name}: no worker serves", "start a worker; look at its log")
    dead = int(await bus._link.command("XLEN", bus.keys.dead))
    if dead:
        yield Finding("warn", f"{name}: {dead} dead letters", "headrace dead ls")
    if lives and sleeps:
        yield Finding("ok", f"{name}: led in epoch {later.epoch}, asleep until it is asked")
    if lives and serving:
        yield Finding("ok", f"{name}: led in epoch {later.epoch}, {serving} of {len(after)} workers serve")


CHECKS: tuple[Callable[[Mapping[str, Any]], Iterator[Finding]], ...] = (
    check_versions, check_kernels, check_gpus, check_disk, check_ports, check_model_files,
)  # fmt: skip


async def findings(values: Mapping[str, Any]) -> list[Finding]:
    found: list[Finding] = []
    for check in CHECKS:
        name = check.__name__.removeprefix("check_")
        try:
            found += check(values)
        except Exception as error:
            found.append(Finding("fail", f"the check of {name} broke: {type(error).__name__}: {error}"))
    found += [finding async for finding in check_server(values)]
    return found


def run(values: Mapping[str, Any]) -> int:
    """The command. Returns 1 if anything must be mended."""
    found = asyncio.run(findings(values))
    for one in found:
        if values["json"]:
            print(json.dumps(asdict(one)))
        else:
            print(f"{one.level:<5} {one.what}" + (f"\n      -> {one.todo}" if one.todo else ""))
    return int(any(one.level == "fail" for one in found))
