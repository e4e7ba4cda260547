"""What the gateway counts, under the names that dashboards of LLM servers read.

Histograms that are fed once per step are kept as plain lists: an observation costs a bisection.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Info,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import Exemplar, HistogramMetricFamily
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector as MetricSource

from protocol.levels import release

disable_created_metrics()  # type: ignore[no-untyped-call]  # nobody asks since when a counter counts
REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)
PlatformCollector(registry=REGISTRY)

CONTENT_TYPE = "text/plain; version=0.0.4"

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 300.0)
STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 10.0)


class Histogram(MetricSource):
    """A histogram by model whose ``observe`` is cheap enough for every row of every step."""

    def __init__(self, name: str, text: str, bounds: tuple[float, ...]) -> None:
        self.name = name
        self.text = text
        self.bounds = bounds
        self._series: dict[str, list[float]] = {}  # model -> counts per bucket, then the sum
        self._exemplars: dict[tuple[str, int], Exemplar] = {}  # model and bucket -> the last traced one there
        REGISTRY.register(self)

    def of(self, model: str) -> list[float]:
        return self._series.setdefault(model, [0.0] * (len(self.bounds) + 2))

    def observe(self, model: str, value: float) -> None:
        series = self._series.get(model) or self.of(model)
        series[bisect_left(self.bounds, value)] += 1
        series[-1] += value

    def observe_traced(self, model: str, value: float, trace_id: str | None) -> None:
        """The same, with the trace that shows why it took so long."""
        self.observe(model, value)
        if trace_id is not None:
            at = model, bisect_left(self.bounds, value)
            self._exemplars[at] = Exemplar({"trace_id": trace_id}, value, time.time())

    def all(self) -> Iterable[list[float]]:
        """Of each model: counts per bucket, then the sum."""
        return self._series.values()

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(self.name, self.text, labels=["model"])
        for model, series in self._series.items():
            total = 0.0
            buckets: list[Any] = []
            for place, (bound, count) in enumerate(zip((*map(str, self.bounds), "+Inf"), series, strict=False)):
                total += count
                exemplar = self._exemplars.get((model, place))
                buckets.append((bound, total) if exemplar is None else (bound, total, exemplar))
            family.add_metric([model], buckets, sum_value=series[-1])
        yield family


REQUESTS = Counter("llm_requests", "Requests answered, by HTTP status.", ["model", "status"], registry=REGISTRY)
ACTIVE = Gauge("llm_active_requests", "Requests being answered now.", ["model"], registry=REGISTRY)
DURATION = Histogram("llm_request_duration_seconds", "From the request to the end of its answer.", SECONDS)
TTFT = Histogram("headrace_time_to_first_token_seconds", "From the request to its first token.", SECONDS)
INTER_TOKEN = Histogram("headrace_inter_token_latency_seconds", "Between the tokens of a choice.", STEP_SECONDS)
E2E = Histogram("headrace_e2e_request_latency_seconds", "From the request to its last token.", SECONDS)
PROMPT_TOKENS = Counter("headrace_gateway_prompt_tokens", "Prompt tokens answered.", ["model"], registry=REGISTRY)
OUTPUT_TOKENS = Counter("headrace_gateway_generation_tokens", "Tokens sent.", ["model"], registry=REGISTRY)
RESYNCS = Counter("headrace_stream_resyncs", "Journals read since a publication was missed.", registry=REGISTRY)
ERRORS = Counter(
    "headrace_gateway_errors", "Error answers of any route, by HTTP status and error code.", ["status", "code"],
    registry=REGISTRY,
)  # fmt: skip
ROUTED = Counter(
    "headrace_routed_requests", "Answers, by what was asked for and the rule that chose.",
    ["model", "tenant", "asked", "rule"], registry=REGISTRY,
)  # fmt: skip
ROUTED_TOKENS = Counter(
    "headrace_routed_tokens", "Tokens of answers.", ["model", "tenant", "rule", "kind"], registry=REGISTRY
)
COST = Counter("headrace_cost", "Money of answers, where prices are set.", ["model", "tenant", "rule"],
               registry=REGISTRY)  # fmt: skip
SCORED = Counter("headrace_scored_requests", "Questions that a scorer was asked about, by what it said.",
                 ["model", "verdict"], registry=REGISTRY)  # fmt: skip
MOVED = Counter("headrace_moved_requests", "Requests that said nothing in time and went to another model.",
                ["model", "to"], registry=REGISTRY)  # fmt: skip
READY_WORKERS = Gauge("headrace_ready_workers", "Workers that serve now, as seen here.", ["model"], registry=REGISTRY)
Info("headrace_build", "The release that runs.", registry=REGISTRY).info({"version": release(), "role": "gateway"})
DROPPED = Counter("headrace_readers_dropped", "Readers that stalled for too long.", registry=REGISTRY)


def seen(model: str, workers: int) -> None:
    """A served model and its workers. Its series of active requests begins at 0 here, not at the first request: what
    scales by it needs a value before there is load."""
    ACTIVE.labels(model)
    READY_WORKERS.labels(model).set(workers)


def gone(model: str) -> None:
    """A model that is no longer served, or sleeps, has no number of workers that an alarm could read as 0."""
    READY_WORKERS.remove(model)


def exposition(accept: str = "") -> tuple[bytes, str]:
    """All metrics and their content type: in OpenMetrics, with exemplars, where that is asked for."""
    if "application/openmetrics-text" in accept:
        return openmetrics.generate_latest(REGISTRY), openmetrics.CONTENT_TYPE_LATEST  # type: ignore[no-untyped-call]
    return generate_latest(REGISTRY), CONTENT_TYPE
