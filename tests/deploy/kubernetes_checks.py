"""What no schema sees in manifests. Each check yields a sentence for each fault that it finds."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from headrace.cli import build_parser
from headrace.option_table import OPTIONS
from headrace.options import Unusable
from protocol.connection import check_url
from protocol.errors import HeadraceError
from protocol.keys import check_name
from tests.deploy.kubernetes_pods import Cluster, Object, Pod, memory

ROOT = Path(__file__).parents[2]
SELF_LABELLED = "headrace/producer"  # pods of others give themselves this label
LEAST_AFTER_DRAIN_S = 15.0  # docs/operations.md
DRAINING = ("gateway", "worker")
SERVER_PORT = 6379


def name_of(thing: Object) -> str:
    return f"{thing['kind']} {thing['metadata']['name']}"


def selectors(cluster: Cluster) -> Iterator[str]:
    for pod in cluster.pods():
        inner = [spread["labelSelector"] for spread in pod.spec.get("topologySpreadConstraints", [])]
        for selector in (pod.owner["spec"]["selector"], *inner):
            if [p.owner for p in cluster.selected(selector)] != [pod.owner]:
                yield f"{name_of(pod.owner)}: a selector does not match its own pods alone"
    for thing in cluster.of("Service", "PodDisruptionBudget", "NetworkPolicy", "PodMonitor"):
        for selector in _selectors_of(thing):
            if SELF_LABELLED not in selector.get("matchLabels", {}) and not cluster.selected(selector):
                yield f"{name_of(thing)}: a selector matches nothing: {selector}"


def _selectors_of(thing: Object) -> Iterator[Object]:
    spec = thing["spec"]
    if thing["kind"] == "Service":
        yield {"matchLabels": spec["selector"]}
    elif thing["kind"] == "NetworkPolicy":
        yield spec["podSelector"]
        for rule in (*spec.get("ingress", []), *spec.get("egress", [])):
            yield from (p["podSelector"] for p in (*rule.get("from", []), *rule.get("to", [])) if "podSelector" in p)
    else:
        yield spec["selector"]


def ports(cluster: Cluster) -> Iterator[str]:
    for pod in cluster.pods():
        for kind in ("startupProbe", "readinessProbe", "livenessProbe") if pod.role != "rank" else ():
            probe = pod.container.get(kind)
            if probe is None:
                yield f"{name_of(pod.owner)}: no {kind}"
            elif "httpGet" in probe and probe["httpGet"]["port"] not in pod.ports:
                yield f"{name_of(pod.owner)}: {kind} asks an unknown port"
    for thing in cluster.of("Service", "PodMonitor", "NetworkPolicy"):
        [selector, *_] = _selectors_of(thing)
        for pod in cluster.selected(selector):
            for port in _ports_of(thing):
                if port not in (*pod.ports, *pod.ports.values()):
                    yield f"{name_of(thing)}: {pod.name} has no port {port}"


def _ports_of(thing: Object) -> Iterator[str | int]:
    spec = thing["spec"]
    if thing["kind"] == "Service":
        yield from (port["targetPort"] for port in spec.get("ports", []))
    elif thing["kind"] == "PodMonitor":
        yield from (end["port"] for end in spec["podMetricsEndpoints"])
    else:
        ports = (port for rule in spec.get("ingress", []) for port in rule["ports"])
        yield from (port["port"] for port in ports if "endPort" not in port)


def probes(cluster: Cluster) -> Iterator[str]:
    """/ready is false without workers: as a probe of gateways it would keep demand out, and workers at zero."""
    for pod in cluster.ours():
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            path = pod.container.get(kind, {}).get("httpGet", {}).get("path")
            if path != ("/accepting" if (pod.role, kind) == ("gateway", "readinessProbe") else "/health"):
                yield f"{name_of(pod.owner)}: {kind} asks {path}, which shuts a service without workers off"


def autoscalers(cluster: Cluster) -> Iterator[str]:
    targets = []
    for thing in cluster.of("HorizontalPodAutoscaler", "ScaledObject"):
        spec, target = thing["spec"], thing["spec"]["scaleTargetRef"]
        low, high = (spec.get(f"{edge}Replica{'Count' if 'triggers' in spec else 's'}") for edge in ("min", "max"))
        if low is None or high is None or low > high:
            yield f"{name_of(thing)}: at least {low}, at most {high}"
        scaled = cluster.named(target["kind"], target["name"])
        targets.append(target["name"])
        if scaled is None:
            yield f"{name_of(thing)}: there is no {target['kind']} {target['name']}"
        elif "replicas" in scaled["spec"]:
            yield f"{name_of(thing)}: {name_of(scaled)} sets replicas too, so each apply would undo the scaling"
        elif any("resource" in metric for metric in spec.get("metrics", [])) and not requests_cpu(Pod(scaled)):
            yield f"{name_of(thing)}: a share of no request of CPU"
    if len(targets) != len(set(targets)):
        yield "two autoscalers of one target"


def requests_cpu(pod: Pod) -> bool:
    return "cpu" in pod.container["resources"].get("requests", {})


def to_zero(cluster: Cluster) -> Iterator[str]:
    for thing in cluster.of("ScaledObject"):
        spec = thing["spec"]
        [worker] = [pod for pod in cluster.ours() if pod.owner["metadata"]["name"] == spec["scaleTargetRef"]["name"]]
        if spec["cooldownPeriod"] <= worker.spec["terminationGracePeriodSeconds"]:
            yield f"{name_of(thing)}: the cooldown is shorter than a drain"
        if spec.get("fallback", {}).get("replicas", 0) < 1:
            yield f"{name_of(thing)}: no fallback for when Prometheus is down"
        for trigger in spec["triggers"]:
            if trigger["metadata"].get("ignoreNullValues") != "false":
                yield f"{name_of(thing)}: a missing leader would count as no work"
            for part in ("num_requests_waiting", "num_requests_running", "inbox_length"):
                if part not in trigger["metadata"]["query"]:
                    yield f"{name_of(thing)}: {part} is not counted"
            if f'namespace="{thing["metadata"]["namespace"]}"' not in trigger["metadata"]["query"]:
                yield f"{name_of(thing)}: the query names another namespace"


def command_lines(cluster: Cluster) -> Iterator[str]:
    for pod in cluster.ours():
        env, args = cluster.environment(pod), cluster.arguments(pod)
        told = io.StringIO()
        try:
            with contextlib.redirect_stderr(told):
                values = vars(build_parser(env).parse_args(args))
        except SystemExit:
            yield f"{name_of(pod.owner)}: {told.getvalue()}"
            continue
        yield from (f"{name_of(pod.owner)}: {v.reason}" for v in values.values() if isinstance(v, Unusable))
        if unknown := {k for k in env if k.startswith("HEADRACE_")} - {o.env for o in OPTIONS}:
            yield f"{name_of(pod.owner)}: no option has the variables {unknown}"
        try:
            check_name(values["name"], "name")
            check_url(values["redis_url"])
        except HeadraceError as error:
            yield f"{name_of(pod.owner)}: {error}"
        listens = {"metrics": values["metrics_port"]} | ({"http": values["port"]} if "port" in values else {})
        if listens != pod.ports:
            yield f"{name_of(pod.owner)}: declares the ports {pod.ports}, listens on {listens}"
        if {values["metrics_host"], values.get("host", "0.0.0.0")} != {"0.0.0.0"}:
            yield f"{name_of(pod.owner)}: listens on loopback"
        if pod.role in DRAINING:
            before = pod.container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
            if pod.spec["terminationGracePeriodSeconds"] < before + values["drain_timeout"] + LEAST_AFTER_DRAIN_S:
                yield f"{name_of(pod.owner)}: would be killed while it drains"


def names(cluster: Cluster) -> Iterator[str]:
    for pod in cluster.ours():
        given = [arg for arg in cluster.arguments(pod) if arg.startswith("--name=")]
        if given != [f"--name={pod.name}"]:
            yield f"{name_of(pod.owner)}: pods share a name: {given}"
        if pod.role == "worker" and pod.kind != "StatefulSet":
            yield f"{name_of(pod.owner)}: names are not stable, so a new pod does not fence the old one"
    for thing in cluster.of("StatefulSet"):
        service = cluster.named("Service", thing["spec"]["serviceName"])
        if service is None or service["spec"].get("clusterIP") != "None":
            yield f"{name_of(thing)}: no headless service {thing['spec']['serviceName']}"
    for pod in cluster.pods():
        if pod.spec.get("enableServiceLinks") is not False:
            yield f"{name_of(pod.owner)}: variables of services would be taken for options"


def volumes(cluster: Cluster) -> Iterator[str]:
    for pod in cluster.pods():
        mounts = {mount["name"]: PurePosixPath(mount["mountPath"]) for mount in pod.container["volumeMounts"]}
        if set(mounts) != pod.volumes():
            yield f"{name_of(pod.owner)}: mounts {sorted(mounts)}, has {sorted(pod.volumes())}"
        files = []
        for volume in pod.spec.get("volumes", []):
            if "secret" in volume and volume["name"] in mounts:
                files += [str(mounts[volume["name"]] / file) for file in cluster.secret(volume["secret"]["secretName"])]
        for path in re.findall(r"/etc/[\w./-]+", " ".join(pod.container["args"])):
            if path not in files:
                yield f"{name_of(pod.owner)}: {path} is in no volume"


def rights(cluster: Cluster) -> Iterator[str]:
    [image_user] = re.findall(r"^USER (\d+)$", (ROOT / "deploy/Dockerfile").read_text(), re.MULTILINE)
    for pod in cluster.pods():
        of_pod, of_container = pod.spec["securityContext"], pod.container["securityContext"]
        found = {
            "may be root": not of_pod.get("runAsNonRoot") or not of_pod.get("runAsUser"),
            "another user than the image's": pod in cluster.ours() and of_pod["runAsUser"] != int(image_user),
            "no seccomp profile": of_pod.get("seccompProfile") != {"type": "RuntimeDefault"},
            "may gain privileges": of_container.get("allowPrivilegeEscalation") is not False,
            "has capabilities": of_container.get("capabilities") != {"drop": ["ALL"]},
            "can write its root": not of_container.get("readOnlyRootFilesystem"),
            "has a service account's token": pod.spec.get("automountServiceAccountToken") is not False,
            "no limit of memory": "memory" not in pod.container["resources"].get("limits", {}),
            "requests nothing": not {"cpu", "memory"} <= set(pod.container["resources"].get("requests", {})),
            "an image of no version": not re.search(r":[\w.-]*\d[\w.-]*$", pod.container["image"]),
        }
        yield from (f"{name_of(pod.owner)}: {fault}" for fault, there in found.items() if there)


def network(cluster: Cluster) -> Iterator[str]:
    """Everything of ours is denied by default, each role reaches the server, and nobody else does."""
    policies = list(cluster.of("NetworkPolicy"))
    for pod in cluster.pods():
        mine = [p["spec"] for p in policies if selects_pod(p, pod)]
        if not any(set(p["policyTypes"]) == {"Ingress", "Egress"} and not {"ingress", "egress"} & set(p) for p in mine):
            yield f"{name_of(pod.owner)}: no default of deny"
        out = [port["port"] for p in mine for rule in p.get("egress", []) for port in rule["ports"]]
        if (SERVER_PORT in out) != (pod in cluster.ours()):
            yield f"{name_of(pod.owner)}: its way to the server is wrong"
        if pod.role == "valkey":
            peers = [peer for p in mine for rule in p.get("ingress", []) for peer in rule.get("from", [{}])]
            for client in cluster.ours():
                if not any(client in cluster.selected(peer.get("podSelector", {})) for peer in peers):
                    yield f"{name_of(pod.owner)}: refuses {client.name}"
            if not all("podSelector" in peer for peer in peers):
                yield f"{name_of(pod.owner)}: open to all"


def selects_pod(policy: Object, pod: Pod) -> bool:
    return pod in Cluster([pod.owner], []).selected(policy["spec"]["podSelector"])


def ranks(cluster: Cluster) -> Iterator[str]:
    """Each rank finds the worker of its number, over ports that are theirs alone, and all read one volume of models."""
    workers = {pod.role: pod for pod in cluster.ours()}
    policies = [p["spec"] for p in cluster.of("NetworkPolicy")]
    for pod in cluster.pods():
        if pod.role != "rank":
            continue
        worker, args = workers["worker"], vars(build_parser({}).parse_args(cluster.arguments(pod)))
        door = vars(build_parser(cluster.environment(worker)).parse_args(cluster.arguments(worker)))
        host, _, port = (args["rendezvous"] or "").rpartition(":")
        if host != f"{worker.owner['metadata']['name']}-{pod.index}.{worker.owner['spec']['serviceName']}":
            yield f"{name_of(pod.owner)}: goes to {host}, which is not the worker of its number"
        if port != (door["rendezvous"] or "").rpartition(":")[2]:
            yield f"{name_of(pod.owner)}: goes to port {port}, where its worker does not listen"
        if not args["rank"] or args["rank"] >= door["tensor_parallel_size"] * door["pipeline_parallel_size"]:
            yield f"{name_of(pod.owner)}: the worker awaits no rank {args['rank']}"
        if pod.owner["spec"].get("replicas") != worker.owner["spec"].get("replicas"):
            yield f"{name_of(pod.owner)}: not as many as workers"
        for one in (pod, worker):
            shm = [v.get("emptyDir", {}) for v in one.spec["volumes"] if v["name"] == "shm"]
            if [volume.get("medium") for volume in shm] != ["Memory"]:
                yield f"{name_of(one.owner)}: /dev/shm has the 64 MiB of a container, too few for NCCL"
            held = memory(one.container["resources"]["limits"]["memory"])
            if any("sizeLimit" not in volume or memory(volume["sizeLimit"]) >= held for volume in shm):
                yield f"{name_of(one.owner)}: what lies in /dev/shm counts as its memory, and has no bound below that"
            ways = [p for p in policies if one in cluster.selected(p["podSelector"])]
            for way, peer in (("ingress", "from"), ("egress", "to")):
                rules = [r for p in ways for r in p.get(way, []) if any("endPort" in port for port in r["ports"])]
                open_to = {
                    q.role for r in rules for side in r.get(peer, [{}]) for q in cluster.selected(side["podSelector"])
                }
                if open_to != {"worker", "rank"}:
                    yield f"{name_of(one.owner)}: the ports of ranks ({way}) are open to {sorted(open_to)}"


def disruptions(cluster: Cluster) -> Iterator[str]:
    for pod in cluster.ours():
        budgets = [
            b["spec"] for b in cluster.of("PodDisruptionBudget") if pod in cluster.selected(b["spec"]["selector"])
        ]
        if [budget.get("maxUnavailable") for budget in budgets] != [1]:
            yield f"{name_of(pod.owner)}: its budget should be one pod at a time, which never blocks a node's drain"


CHECKS: tuple[Callable[[Cluster], Iterator[str]], ...] = (
    selectors, ports, probes, autoscalers, to_zero, command_lines, names, volumes, rights, network, ranks, disruptions,
)  # fmt: skip


def faults(cluster: Cluster) -> list[str]:
    return [fault for check in CHECKS for fault in check(cluster)]
