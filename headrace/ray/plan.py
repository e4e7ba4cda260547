"""What is to run on Ray: from a configuration file to programs of gateways, schedulers and workers. Loads no Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from headrace.config.plan import Wanted
from headrace.ray.rule import Scaling
from protocol.errors import StartError

SERVICE_CPUS = 0.5  # of a gateway or a scheduler: what Ray counts, no bound
ALSO_FOR_RANKS = ("log_level", "log_format")


@dataclass(frozen=True)
class Program:
    """One process, and the actor that keeps it. ``values``: options of its role by name, but for what is decided where
    it runs (ports, addresses)."""

    name: str  # of the actor; all of them differ
    role: str
    values: dict[str, Any]
    cpus: float = SERVICE_CPUS
    gpus: float = 0.0
    group: str = ""  # the placement group that it is in, with others of the same worker
    ranks: int = 1  # bundles of that group
    rank: int = 0  # its bundle

    def as_rank(self, rank: int, address: str) -> Program:
        """Another rank of this worker, which listens at ``address``."""
        own = {name: self.values[name] for name in ALSO_FOR_RANKS if name in self.values}
        own |= {"rank": rank, "rendezvous": address}
        return Program(f"{self.name}.{rank}", self.role, own, self.cpus, self.gpus, self.group, self.ranks, rank)


@dataclass(frozen=True)
class Model:
    """Names of its actors are its own, a space and what they run; no name of a model has a space."""

    name: str
    values: dict[str, Any]
    scaling: Scaling

    @property
    def schedulers(self) -> list[Program]:
        return [Program(f"{self.name} scheduler-{k}", "scheduler", {**self.values, "name": f"scheduler-{k}"})
                for k in range(self.values["schedulers"])]  # fmt: skip

    @property
    def ranks(self) -> int:
        return int(self.values["tensor_parallel_size"] * self.values["pipeline_parallel_size"])

    def worker(self, number: int) -> Program:
        scaling, values = self.scaling, self.values
        threads = values["threads"]
        cpus = scaling.cpus if scaling.cpus is not None else float(threads or 1)
        own = {**values, "name": f"worker-{number}", "threads": threads or max(1, int(cpus)) * self.ranks}
        gpus = scaling.gpus
        if gpus is None:
            gpus = 0.0 if values["device"] == "cpu" or values["engine"] == "simulated" else 1.0
        name = f"{self.name} worker-{number}"
        return Program(name, "worker", own, cpus, gpus, name if self.ranks > 1 else "", self.ranks)

    def number_of(self, name: str) -> int | None:
        """K, if ``name`` is that of its worker K."""
        number = name.removeprefix(f"{self.name} worker-")
        return int(number) if number.isdecimal() else None


@dataclass(frozen=True)
class Fleet:
    """All of it. ``redis_url`` may hold a password: it goes into no command line."""

    redis_url: str
    drain_timeout: float
    gateways: list[Program] = field(default_factory=list)
    models: list[Model] = field(default_factory=list)


def worker_of(name: str) -> str:
    """The actor of rank 0 of the worker that the actor ``name`` belongs to; other names stay as they are."""
    model, space, process = name.partition(" ")
    return model + space + process.partition(".")[0]


def fleet_of(wanted: Wanted) -> Fleet:
    """StartError where the file does not tell enough for more than one machine."""
    values = wanted.values
    if not values["redis_url"]:
        raise StartError("redis-url is needed: a server that every node of the Ray cluster can reach")
    for name, own in wanted.models.items():
        if (own.get("shards") or 1) > 1:
            raise StartError(f"{name}: shards = {own['shards']}: on Ray a model has one shard")
    gateways = [Program(f"gateway-{k}", "gateway", _gateway(values, k)) for k in range(values["gateways"])]
    models = [Model(name, dict(own), wanted.scaling[name]) for name, own in wanted.models.items()]
    longest = max([values["drain_timeout"], *(own["drain_timeout"] for own in wanted.models.values())])
    return Fleet(values["redis_url"], longest, gateways, models)


def _gateway(values: Mapping[str, Any], number: int) -> dict[str, Any]:
    port = values["port"] and values["port"] + number
    return {**values, "name": f"gateway-{number}", "port": port}
