"""What ``serve`` decides before it starts anything: every default, every free port, the names of all processes."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headrace import options
from headrace.model_check import check_model
from headrace.serve.machine import choose_ports, worker_threads
from protocol.connection import check_url
from protocol.errors import StartError
from protocol.keys import MODEL_NAME

ROLES = ("scheduler", "worker")  # what each model has of its own


@dataclass
class Deployment:
    """One model: its options, and the processes that serve it. ``prefix`` tells them from those of other models."""

    asked: dict[str, Any]  # its options as they were given
    values: dict[str, Any]  # the same with all that serve decides
    prefix: str = ""
    state: str = "starting"  # serving, asleep (it has no worker while nobody asks for it), draining, failed
    reason: str = ""  # why it failed
    waits: str = ""  # why it is not loaded though it has work
    loaded_at: float = 0.0  # monotonic seconds: when its workers were started last
    busy_at: float = 0.0  # when it last had unfinished requests
    waits_since: float | None = None
    shards: list[int] = field(default_factory=lambda: [0])  # those that need workers
    by_hand: bool = False  # added by `headrace models add`: no file names it

    @property
    def name(self) -> str:
        return str(self.values["served_model_name"])

    def shard(self, process: str) -> int | None:
        """Which shard a worker computes for, or a scheduler leads first. None: there is one shard."""
        if len(self.shards) == 1:
            return None
        return self.shards[int(process.rpartition("-")[2]) % len(self.shards)]

    def processes(self, role: str) -> list[str]:
        """Names of its processes, as in the process list and the logs."""
        return [f"{role}-{self.prefix}{k}" for k in range(self.values[f"{role}s"])]


@dataclass(frozen=True)
class Layout:
    """Options with every default and free port decided, so that a restarted process gets the same. Only the model, if
    none was named, is decided later."""

    values: dict[str, Any]  # what all processes share
    models: list[Deployment]
    run_dir: Path
    data_dir: Path | None  # None: the server is not ours
    ports: list[int]  # one per gateway
    metrics_ports: dict[str, int] = field(default_factory=dict)  # by name of process

    @property
    def url(self) -> str:
        host = self.values["host"]
        if host in ("", "0.0.0.0"):
            host = "127.0.0.1"
        elif ":" in host:
            host = "[::1]" if host == "::" else f"[{host}]"
        return f"http://{host}:{self.ports[0]}"


def check_values(values: Mapping[str, Any]) -> None:
    """StartError for what is known to fail before anything is started."""
    if values["redis_url"]:
        check_url(values["redis_url"])
    if values["api_keys_file"] and not os.access(values["api_keys_file"], os.R_OK):
        raise StartError(f"--api-keys-file {values['api_keys_file']}: there is no such file that may be read")
    if values["model"] is not None:
        check_model(str(values["model"]), weights=values["engine"] == "torch")
    name = name_of(values)
    if name and not MODEL_NAME.fullmatch(name):
        raise StartError(f"--served-model-name {name!r} must match [A-Za-z0-9._:/-]{{1,128}}")


def name_of(values: Mapping[str, Any]) -> str | None:
    """The served name, as far as the options tell it."""
    named, model = values["served_model_name"], values["model"]
    return named or (options.served_name(str(model)) if model is not None else None)


def resolve(values: Mapping[str, Any], models: Mapping[str, Mapping[str, Any]] | None = None) -> Layout:
    """Decide all defaults. StartError for what is known to fail. Without ``models``, ``values`` are those of the one
    model."""
    check_values(values)
    given = list(models.values()) if models else [values]
    for own in given if models else []:
        check_values(own)
    workers = sum(own["workers"] for own in given)
    prefixes = unique_prefixes([str(own["served_model_name"]) for own in given]) if models else [""]
    deployments = [deployment(own, prefix, workers) for own, prefix in zip(given, prefixes, strict=True)]
    ports = choose_ports(values["host"], values["port"], values["gateways"], "--port")
    # a gateway's metrics are on its main port, but for one that asks for keys
    others = [f"gateway-{k}" for k in range(values["gateways"])] if values["api_keys_file"] else []
    others += [name for role in ROLES for model in deployments for name in model.processes(role)]
    metrics = choose_ports(values["metrics_host"], values["metrics_port"] or 0, len(others), "--metrics-port")
    run_dir = run_dir_of(values, ports[0])
    return Layout(
        values={**values, "served_model_name": deployments[0].values["served_model_name"]},
        models=deployments,
        run_dir=run_dir,
        data_dir=None if values["redis_url"] else data_dir_of(values),
        ports=ports,
        metrics_ports=dict(zip(others, metrics, strict=True)),
    )


def deployment(own: Mapping[str, Any], prefix: str, workers: int) -> Deployment:
    """A model of which its options are known; ``workers``: how many share this machine."""
    threads = own["threads"] or worker_threads(workers)
    return Deployment(dict(own), {**own, "served_model_name": name_of(own), "threads": threads}, prefix)


def unique_prefixes(names: list[str]) -> list[str]:
    """A part of process names for each of these models: what a file name may hold, different for all."""
    prefixes: list[str] = []
    for name in names:
        plain = re.sub(r"[^A-Za-z0-9_.]+", "-", name).strip("-.")[-40:] or "model"
        tries = [f"{plain}-", *(f"{plain}-{k}-" for k in range(2, len(names) + 2))]
        prefixes.append(next(found for found in tries if found not in prefixes))
    return prefixes


def data_dir_of(values: Mapping[str, Any]) -> Path:
    return Path(values["data_dir"] or options.state_dir() / "data").expanduser().resolve()


def run_dir_of(values: Mapping[str, Any], port: int) -> Path:
    return Path(values["run_dir"] or options.state_dir() / f"run-{port}").expanduser().resolve()
