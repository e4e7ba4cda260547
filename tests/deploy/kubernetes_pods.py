"""Manifests as Kubernetes would read them: pods with their labels, environment, arguments and ports."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Object = dict[str, Any]
INDEX = "metadata.labels['apps.kubernetes.io/pod-index']"


def selects(selector: Object, labels: dict[str, str]) -> bool:
    """Whether a label selector, matchLabels and matchExpressions, matches."""
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for rule in selector.get("matchExpressions", []):
        assert rule["operator"] == "In", "no other operator is used"
        if labels.get(rule["key"]) not in rule["values"]:
            return False
    return True


@dataclass(frozen=True)
class Pod:
    """The first pod of a Deployment or StatefulSet."""

    owner: Object

    @property
    def kind(self) -> str:
        return str(self.owner["kind"])

    @property
    def name(self) -> str:
        return self.owner["metadata"]["name"] + ("-0" if self.kind == "StatefulSet" else "-5d4f8c7b9d-x2x7k")

    @property
    def labels(self) -> dict[str, str]:
        return self.owner["spec"]["template"]["metadata"]["labels"]  # type: ignore[no-any-return]

    @property
    def role(self) -> str:
        return self.labels["app.kubernetes.io/component"]

    @property
    def spec(self) -> Object:
        return self.owner["spec"]["template"]["spec"]  # type: ignore[no-any-return]

    @property
    def container(self) -> Object:
        [only] = self.spec["containers"]
        return only  # type: ignore[no-any-return]

    @property
    def ports(self) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for port in self.container.get("ports", [])}

    @property
    def index(self) -> str:
        return self.name.rpartition("-")[2]

    def volumes(self) -> set[str]:
        claims = self.owner["spec"].get("volumeClaimTemplates", [])
        return {v["name"] for v in self.spec.get("volumes", [])} | {c["metadata"]["name"] for c in claims}


@dataclass(frozen=True)
class Cluster:
    """All objects of an overlay, and the Secrets that are made beside it."""

    objects: list[Object]
    secrets: list[Object]

    def of(self, *kinds: str) -> Iterator[Object]:
        return (o for o in self.objects if o["kind"] in kinds)

    def named(self, kind: str, name: str) -> Object | None:
        return next((o for o in self.of(kind) if o["metadata"]["name"] == name), None)

    def pods(self) -> list[Pod]:
        return [Pod(o) for o in self.of("Deployment", "StatefulSet", "DaemonSet", "Job")]

    def ours(self) -> list[Pod]:
        """Gateways, schedulers and workers; a rank is a part of its worker, and has neither server nor probes."""
        return [pod for pod in self.pods() if pod.role not in ("valkey", "rank")]

    def selected(self, selector: Object) -> list[Pod]:
        return [pod for pod in self.pods() if selects(selector, pod.labels)]

    def secret(self, name: str) -> dict[str, str]:
        """Files of a Secret; KeyError if nobody makes it."""
        return {s["metadata"]["name"]: s["stringData"] for s in self.secrets}[name]

    def environment(self, pod: Pod) -> dict[str, str]:
        """What the container finds in its environment. KeyError for a Secret, ConfigMap or key that is not there."""
        found: dict[str, str] = {}
        for source in pod.container.get("envFrom", []):
            config = self.named("ConfigMap", source["configMapRef"]["name"])
            if config is None:
                raise KeyError(source["configMapRef"]["name"])
            found |= config["data"]
        for variable in pod.container.get("env", []):
            found[variable["name"]] = self._value(pod, variable)
        return found

    def arguments(self, pod: Pod) -> list[str]:
        """The arguments, $(NAME) replaced by what it stands for; left as it is where nothing has that name."""
        known = self.environment(pod)
        return [re.sub(r"\$\((\w+)\)", lambda m: known.get(m[1], m[0]), arg) for arg in pod.container["args"]]

    def _value(self, pod: Pod, variable: Object) -> str:
        if "value" in variable:
            return str(variable["value"])
        source = variable["valueFrom"]
        if "secretKeyRef" in source:
            return self.secret(source["secretKeyRef"]["name"])[source["secretKeyRef"]["key"]]
        if "fieldRef" in source:
            told = {"metadata.name": pod.name, "status.podIP": "10.1.2.3", INDEX: pod.index}
            return told[source["fieldRef"]["fieldPath"]]
        kind, _, resource = source["resourceFieldRef"]["resource"].partition(".")
        return str(math.ceil(cpus(pod.container["resources"][kind][resource])))


def cpus(quantity: str | int) -> float:
    """``500m`` or ``4``."""
    text = str(quantity)
    return float(text[:-1]) / 1000 if text.endswith("m") else float(text)


def memory(quantity: str) -> int:
    """``4Gi`` or ``256Mi``, in bytes."""
    return int(quantity[:-2]) * {"Mi": 2**20, "Gi": 2**30}[quantity[-2:]]
