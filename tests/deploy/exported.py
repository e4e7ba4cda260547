"""What the three roles export, from their own registries with a value in every series."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

import gateway.metrics
import scheduler.metrics
import workers.metrics
from gateway.edge import error_answer
from protocol.errors import NotFound
from protocol.messages import Plan
from protocol.records import ServerState
from scheduler.core.events import RequestDone
from scheduler.core.lifecycle import Counters
from scheduler.core.scheduler import Stats, WorkerStats

MODEL, WORKER = "org/model", "w0"


def gateway_registry() -> CollectorRegistry:
    door = gateway.metrics
    door.seen(MODEL, 1)
    door.REQUESTS.labels(MODEL, "200").inc()
    for histogram in (door.DURATION, door.TTFT, door.INTER_TOKEN, door.E2E):
        histogram.observe(MODEL, 0.1)
    for counter in (door.PROMPT_TOKENS, door.OUTPUT_TOKENS):
        counter.labels(MODEL).inc()
    door.ROUTED.labels(MODEL, "default", "auto", "rule-1").inc()
    door.ROUTED_TOKENS.labels(MODEL, "default", "rule-1", "prompt").inc()
    door.MOVED.labels(MODEL, "org/other").inc()
    door.SCORED.labels(MODEL, "simple").inc()
    door.COST.labels(MODEL, "default", "rule-1").inc()
    error_answer(NotFound("this model is not served here", code="model_not_found"))
    return door.REGISTRY


def scheduler_metrics() -> scheduler.metrics.Metrics:
    metrics = scheduler.metrics.Metrics(MODEL)
    metrics.step(WORKER, 1000)
    metrics.answered("hit")
    metrics.planned(WORKER, Plan(epoch=1, gen=1, step=1))
    worker = WorkerStats(1, 2, 4, 0, 0.0, False, 3, 8)
    tenants = {"default": (1, 1)}
    metrics.observe(Stats(1, 1, 1, 1, tenants, {WORKER: worker}, Counters(), {"standard": 1}), 1.0, 0, 0.0)
    metrics.server(ServerState(1 << 20, 1 << 30, 0.1))
    metrics.request_done(
        RequestDone("r", "default", 1, 1, 0, ["stop"], 0.1, 0.1, 0.1),
    )
    return metrics


def worker_registry() -> CollectorRegistry:
    metrics = workers.metrics.Metrics(MODEL, WORKER)
    metrics.takes("torch")
    metrics.ranks_did([1, 1])
    return metrics.registry


def registries() -> dict[str, CollectorRegistry]:
    return {
        "gateway": gateway_registry(),
        "scheduler": scheduler_metrics().registry,
        "worker": worker_registry(),
    }


def expositions() -> dict[str, bytes]:
    return {role: generate_latest(registry) for role, registry in registries().items()}


def sample_names() -> set[str]:
    """Every name that a query may ask for: a histogram's has _bucket, _sum and _count."""
    return {
        sample.name
        for registry in registries().values()
        for family in registry.collect()
        for sample in family.samples
        if not sample.name.endswith("_created")
    }
