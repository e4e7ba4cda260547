"""What the dashboard shows, as one JSON object: this gateway's counts, and each model as its leader describes it.

The page reads it once a second and takes rates and percentiles from differences. Without the ``admin`` right a caller
sees what waits of its own tenant only.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from gateway import metrics
from gateway.models import Model, Models
from protocol.errors import HeadraceError

HISTOGRAMS = {"ttft": metrics.TTFT, "inter_token": metrics.INTER_TOKEN, "e2e": metrics.E2E}


async def feed(models: Models, tenant: str, admin: bool) -> dict[str, Any]:
    """{"at", "admin", "tenant", "gateway": {...}, "models": [{...}]}; times in seconds."""
    shown: dict[str, Any] = {"at": time.time(), "admin": admin, "tenant": tenant}
    if admin:
        shown["gateway"] = _gateway()
    cards = [card for card in await models.listed() if admin or models.routing.allows(card.model, tenant)]
    shown["models"] = await asyncio.gather(*(_model(models, card.model, tenant, admin) for card in cards))
    return shown


def _gateway() -> dict[str, Any]:
    requests: dict[str, float] = {}
    for labels, value in _samples(metrics.REQUESTS, "_total"):
        status = labels["status"][0] + "xx"
        requests[status] = requests.get(status, 0) + value
    return {
        "active": sum(value for _, value in _samples(metrics.ACTIVE)),
        "requests": requests,
        "latency": {name: _buckets(histogram) for name, histogram in HISTOGRAMS.items()},
    }


def _samples(metric: Any, suffix: str = "") -> list[tuple[dict[str, str], float]]:
    return [
        (sample.labels, sample.value)
        for family in metric.collect()
        for sample in family.samples
        if sample.name == family.name + suffix
    ]


def _buckets(histogram: metrics.Histogram) -> dict[str, Any]:
    """Counts per bucket over all models, the last one without a bound."""
    counts = [0.0] * (len(histogram.bounds) + 1)
    for series in histogram.all():
        counts = [a + b for a, b in zip(counts, series, strict=False)]
    return {"bounds": histogram.bounds, "counts": counts}


async def _model(models: Models, name: str, tenant: str, admin: bool) -> dict[str, Any]:
    try:
        model = await models.get(name)
        depth = await _depth(model)
        terms = models.routing.models.get(name)
        shown = {
            "name": name,
            "ready": models.up(model),
            "sleeps": models.sleeps(model),
            "waits": terms.waits if terms is not None else "",
            "reachable": True,
            "own": _waiting(depth, tenant),
        }
        return {**shown, **await _inside(model, depth)} if admin else shown
    except HeadraceError as error:
        return {"name": name, "ready": False, "reachable": False, "why": str(error)}


async def _depth(model: Model) -> dict[str, float]:
    """Of all shards together; times are the latest."""
    depth: dict[str, float] = {}
    for slot in list(model.slots.values()):
        for field, value in (await slot.bus.read_depth_fields()).items():
            together = max if field in ("led_at", "worker_lost_at") else float.__add__
            depth[field] = together(value, depth[field]) if field in depth else value
    return depth


def _waiting(depth: dict[str, float], tenant: str) -> dict[str, float]:
    return {what: depth.get(f"{what}:{tenant}", 0.0) for what in ("requests", "tokens")}


async def _inside(model: Model, depth: dict[str, float]) -> dict[str, Any]:
    leader = await model.bus.read_leader()
    workers = [worker for slot in list(model.slots.values()) for worker in await slot.bus.list_workers()]
    tenants = [field.partition(":")[2] for field in depth if field.startswith("requests:")]
    return {
        "waiting": depth.get("requests", 0.0),
        "waiting_tokens": depth.get("tokens", 0.0),
        "running": depth.get("running", 0.0),
        "rate": depth.get("rate", 0.0) if depth.get("running") else 0.0,  # an idle leader keeps the last one
        "tenants": {tenant: _waiting(depth, tenant) for tenant in tenants},
        "leader": {
            "name": leader.owner,
            "term": leader.epoch,
            "since": depth.get("led_at"),
            "alive": model.led,
            "taken_over": depth.get("taken_over", 0.0) > 0,  # from one that had gone silent
        },
        "lost": {"workers": depth.get("workers_lost", 0.0), "last": depth.get("worker_lost_at")},  # in this term
        "workers": [
            {
                "name": worker.wid,
                "state": worker.state,
                "generation": worker.gen,
                "kv_used": depth.get(f"kv_used:{worker.wid}"),
                "kv_blocks": depth.get(f"kv_blocks:{worker.wid}"),
            }
            for worker in workers
        ],
    }
