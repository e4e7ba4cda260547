"""A worker's figures and its own small HTTP port: /metrics for Prometheus, /health for supervisors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from aiohttp import web
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

from protocol.levels import release

log = logging.getLogger("headrace.worker")

STEP_BUCKETS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.0, 2.0, 4.0, 8.0)
MASK_BUCKETS = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.5)
TOKEN_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


class Metrics:
    """Labels: model (served name), worker (wid). A registry of its own, so that tests can run several workers."""

    def __init__(self, model: str, worker: str) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        build = Info("headrace_build", "The release that runs", registry=self.registry)
        build.info({"version": release(), "role": "worker"})
        labels = {"model": model, "worker": worker}

        def made(kind: type, name: str, text: str, **options: object):  # type: ignore[no-untyped-def]
            metric = kind(name, text, list(labels), registry=self.registry, **options)
            return metric.labels(**labels)

        self.step = made(Histogram, "headrace_step_seconds", "Device time of a step", buckets=STEP_BUCKETS)
        self.scheduled = made(Histogram, "headrace_step_tokens", "Tokens computed in a step", buckets=TOKEN_BUCKETS)
        self.tokens = made(Counter, "headrace_worker_tokens", "Output tokens made")
        self.idle = made(Counter, "headrace_device_idle_seconds", "Time that the device waited for a plan")
        self.commit = made(
            Histogram, "headrace_commit_seconds", "Time of a commit, queueing not counted", buckets=STEP_BUCKETS
        )
        self.refused = made(Counter, "headrace_refused_rows", "Rows of commits that did not land")
        self.dropped = made(Counter, "headrace_dropped_sequences", "Sequences that could not be computed here")
        self.engine_restarts = made(Counter, "headrace_engine_restarts", "Engine processes that were replaced")
        self.fenced = made(Counter, "headrace_worker_fenced", "Times that this worker found itself replaced")
        self.mask = made(
            Histogram, "headrace_mask_seconds", "Longest mask of a step's constrained rows", buckets=MASK_BUCKETS
        )
        self.mask_wait = made(Counter, "headrace_mask_wait_seconds", "Time that draws waited for masks")
        self._path = Gauge(
            "headrace_worker_path_info", "1 for the path that passes take (docs/operations.md)", [*labels, "path"],
            registry=self.registry,
        )  # fmt: skip
        self._rank_steps = Gauge(
            "headrace_rank_steps", "Steps that each rank of this worker has done", [*labels, "rank"],
            registry=self.registry,
        )  # fmt: skip
        self._labels = labels
        self.sequences = made(Gauge, "headrace_worker_sequences", "Sequences on this worker that have not ended")

    def takes(self, path: str) -> None:
        """Passes through the model go by ``path``, and by no other any more."""
        self._path.clear()
        self._path.labels(**self._labels, path=path).set(1)

    def ranks_did(self, steps: Sequence[int]) -> None:
        """Each rank has done so many ``steps``."""
        for rank, done in enumerate(steps):
            self._rank_steps.labels(**self._labels, rank=rank).set(done)


async def serve_metrics(
    metrics: Metrics, host: str, port: int, health: Callable[[], dict[str, object]]
) -> web.AppRunner:
    """Serve until ``cleanup`` of what is returned. ``health``: its ``ok`` decides between 200 and 503."""

    async def show_metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def show_health(_: web.Request) -> web.Response:
        state = health()
        return web.json_response(state, status=200 if state["ok"] else 503)

    app = web.Application()
    app.on_response_prepare.append(_without_version)
    app.add_routes([web.get("/metrics", show_metrics), web.get("/health", show_health)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    log.info("metrics on http://%s:%d/metrics", *runner.addresses[0][:2])
    return runner


async def _without_version(_: web.Request, response: web.StreamResponse) -> None:
    response.headers["Server"] = "headrace"
