"""What the scheduler reports: Prometheus metrics, /health, and one JSON line per ended request.

Metric stems are vLLM's, under ``headrace_``, so that dashboards need one change only. Everything here is counted per
step or per request, nothing per token.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator

from aiohttp import web
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    Metric,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from protocol.errors import SpecialTokensRefused, StartError
from protocol.levels import release
from protocol.messages import Plan
from protocol.records import ServerState
from scheduler.core.events import RequestDone
from scheduler.core.lifecycle import Counters
from scheduler.core.scheduler import Stats

request_log = logging.getLogger("headrace.requests")

SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
STEP_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


MOST_TENANTS = 50  # that wait and have series of their own: those with most requests
LAST_ANSWERS = 1000  # requests over which the hit rate of the cache of answers is taken

# are served under both names until release 0.3
OLD_NAMES = {"admission_time_seconds": "ingest_time_seconds", "iteration_tokens": "iteration_tokens_total"}


class OldName(Collector):
    """A metric once more, under the name that dashboards know it by."""

    def __init__(self, metric: Histogram, name: str) -> None:
        self._metric, self._name = metric, name

    def collect(self) -> Iterator[Metric]:
        for family in self._metric.collect():
            text = f"{family.documentation} (old name of {family.name})"
            old = Metric(self._name, text, family.type)
            old.samples = [s._replace(name=self._name + s.name.removeprefix(family.name)) for s in family.samples]
            yield old


class Metrics:
    """All instruments of one scheduler, labelled with its model, in a registry of their own."""

    def __init__(self, model: str, *, process: bool = True) -> None:
        """``process``: with what is told of the process itself."""
        self.registry = CollectorRegistry()
        self.model = model
        self._counted = Counters()  # the core's totals when last read
        self._model = model
        if process:
            ProcessCollector(registry=self.registry)
            PlatformCollector(registry=self.registry)
            build = Info("headrace_build", "The release that runs", registry=self.registry)
            build.info({"version": release(), "role": "scheduler"})
        self._workers: set[str] = set()  # that have series of their own
        gauge, counter, histogram = self._gauge, self._counter, self._histogram
        self.is_leader = gauge("is_leader", "1 while this scheduler leads")
        self.epoch = gauge("epoch", "Number of the term that this scheduler knows")
        self.takeovers = counter("takeovers", "Times this scheduler took the lead from one that was silent")
        self.running = gauge("num_requests_running", "Sequences that run on a worker")
        self.waiting = gauge("num_requests_waiting", "Requests that wait for a worker, wholly or in part")
        self.oldest = gauge("oldest_waiting_seconds", "How long the oldest request waits for a worker; 0: none does")
        self.inbox = gauge("inbox_length", "Jobs not admitted yet: nothing but an alarm on this bounds direct pushes")
        self.rate = gauge("generation_tokens_per_second", "Output tokens per second, smoothed")
        self.preemptions = counter("num_preemptions", "Sequences whose blocks were taken away")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of ended requests")
        self.generation_tokens = counter("generation_tokens", "Tokens journaled")
        self.cache_queries = counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache")
        self.cache_hits = counter("prefix_cache_hits", "Prompt tokens found there")
        self.host_hits = counter("prefix_cache_host_hits", "Prompt tokens copied from host memory, not computed")
        self.blocks_saved = counter("kv_offload_blocks_out", "KV blocks copied to host memory")
        self.blocks_loaded = counter("kv_offload_blocks_in", "KV blocks copied from there")
        self.refused = counter("requests_refused", "Jobs ended before admission")
        self._answers = Counter(
            "headrace_answer_cache", "Requests for which the cache of answers was asked, by what it said",
            ["model", "result"], registry=self.registry,
        )  # fmt: skip
        self.answer_bytes = gauge("answer_cache_bytes", "Bytes of cached answers")
        self.answer_hit_rate = gauge("answer_cache_hit_rate", "Of the last requests that asked it, 0 to 1")
        self._last_answers: deque[bool] = deque(maxlen=LAST_ANSWERS)
        self.special_tokens_refused = counter(
            "special_tokens_refused", "Chats refused since special tokens in them could not be told from the template's"
        )
        self.server_memory = gauge("server_memory_bytes", "Memory that the server with the model's keys uses")
        self.server_most_memory = gauge("server_max_memory_bytes", "Memory that it may use; 0: no limit")
        self.server_log = counter("server_log_seconds", "Time of its main thread in writing and syncing its log")
        self._server_log_s: float | None = None  # that it told last
        self.worker_deaths = counter("worker_deaths", "Workers retired because they died or hung")
        self.queue_time = histogram("request_queue_time_seconds", "Arrival to first plan", SECONDS)
        self.prefill_time = histogram("request_prefill_time_seconds", "First plan to first token", SECONDS)
        self.decode_time = histogram("request_decode_time_seconds", "First token to end", SECONDS)
        self.admission_time = histogram(
            "admission_time_seconds", "Template, tokenizer and the admission itself", SECONDS
        )
        self.planning_time = histogram("planning_time_seconds", "The core's time for one round of plans", STEP_SECONDS)
        self._success = Counter(
            "headrace_request_success", "Ended choices", ["model", "finish_reason"], registry=self.registry
        )
        self._by_class = Gauge(
            "headrace_waiting_by_class", "Requests that wait for a worker", ["model", "class"], registry=self.registry
        )
        self._by_tenant = Gauge(
            "headrace_waiting_by_tenant", "Requests that wait for a worker", ["model", "tenant"],
            registry=self.registry,
        )  # fmt: skip
        self._kv_usage = Gauge(
            "headrace_kv_cache_usage_perc",
            "KV blocks in use, 0 to 1",
            ["model", "worker"],
            registry=self.registry,
        )
        self._host_usage = Gauge(
            "headrace_kv_offload_usage_perc",
            "Host memory for KV blocks in use, 0 to 1",
            ["model", "worker"],
            registry=self.registry,
        )
        self._step_time = Histogram(
            "headrace_step_time_seconds", "Device time of a step", ["model", "worker"],
            buckets=STEP_SECONDS, registry=self.registry,
        )  # fmt: skip
        self._step_tokens = Histogram(
            "headrace_iteration_tokens", "Tokens scheduled in a step", ["model", "worker"],
            buckets=STEP_TOKENS, registry=self.registry,
        )  # fmt: skip

        self._serve_old_name(self._step_tokens, "iteration_tokens")

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"headrace_{name}", text, ["model"], registry=self.registry).labels(model=self._model)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"headrace_{name}", text, ["model"], registry=self.registry).labels(model=self._model)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        whole = Histogram(f"headrace_{name}", text, ["model"], buckets=buckets, registry=self.registry)
        if name in OLD_NAMES:
            self._serve_old_name(whole, name)
        return whole.labels(model=self._model)

    def _serve_old_name(self, whole: Histogram, name: str) -> None:
        self.registry.register(OldName(whole, f"headrace_{OLD_NAMES[name]}"))

    def observe(self, stats: Stats, rate: float, inbox: int, oldest_s: float) -> None:
        """Once a second: what the core counts, as gauges and as what was added to its running totals."""
        self.running.set(stats.running)
        self.waiting.set(stats.waiting)
        self.inbox.set(inbox)
        self.oldest.set(oldest_s)
        self.rate.set(rate)
        for name, count in stats.classes.items():
            self._by_class.labels(self._model, name).set(count)
        self._by_tenant.clear()
        most = sorted(((requests, tenant) for tenant, (requests, _) in stats.tenants.items()), reverse=True)
        for requests, tenant in most[:MOST_TENANTS]:
            self._by_tenant.labels(self._model, tenant).set(requests)
        if others := sum(requests for requests, _ in most[MOST_TENANTS:]):
            self._by_tenant.labels(self._model, "other").inc(others)
        self._kv_usage.clear()
        self._host_usage.clear()
        for wid in self._workers - stats.workers.keys():  # they have gone: series of their names would grow for ever
            self._step_time.remove(self._model, wid)
            self._step_tokens.remove(self._model, wid)
            self._workers.discard(wid)
        for wid, worker in stats.workers.items():
            self._kv_usage.labels(self._model, wid).set(worker.blocks_used / worker.blocks_total)
            if worker.host_total:
                self._host_usage.labels(self._model, wid).set(worker.host_used / worker.host_total)
        now, before = stats.counters, self._counted
        self.preemptions.inc(now.preemptions - before.preemptions)
        self.cache_queries.inc(now.prefix_queries - before.prefix_queries)
        self.cache_hits.inc(now.prefix_hits - before.prefix_hits)
        self.host_hits.inc(now.host_hits - before.host_hits)
        self.blocks_saved.inc(now.blocks_saved - before.blocks_saved)
        self.blocks_loaded.inc(now.blocks_loaded - before.blocks_loaded)
        self.generation_tokens.inc(now.output_tokens - before.output_tokens)
        self._counted = dataclasses.replace(now)

    def server(self, told: ServerState) -> None:
        """Every few seconds. The time in its log is counted from this scheduler's first look on; a server that was
        restarted begins at 0."""
        self.server_memory.set(told.memory)
        self.server_most_memory.set(told.most_memory)
        before = self._server_log_s if self._server_log_s is not None else told.log_s
        self.server_log.inc(told.log_s - before if told.log_s >= before else told.log_s)
        self._server_log_s = told.log_s

    def step(self, wid: str, exec_us: int) -> None:
        self._workers.add(wid)
        self._step_time.labels(self._model, wid).observe(exec_us / 1e6)

    def planned(self, wid: str, plan: Plan) -> None:
        self._workers.add(wid)
        self._step_tokens.labels(self._model, wid).observe(plan.tokens)

    def leads(self, epoch: int, taken_over: bool) -> None:
        self.takeovers.inc(taken_over)
        self.is_leader.set(1)
        self.epoch.set(epoch)

    def request_done(self, done: RequestDone) -> None:
        """Count an ended request and write its log line. Figures only: never a prompt, never a token."""
        self.prompt_tokens.inc(done.prompt_tokens)
        self.queue_time.observe(done.queued_s)
        self.prefill_time.observe(done.prefill_s)
        self.decode_time.observe(done.decode_s)
        for reason in done.finish_reasons:
            self._success.labels(self._model, reason).inc()
        line = {
            "id": done.rid, "model": self._model, "tenant": done.tenant, "prompt_tokens": done.prompt_tokens,
            "output_tokens": done.output_tokens, "cached_tokens": done.cached_tokens,
            "queue_s": round(done.queued_s, 4), "load_s": round(done.load_s, 4), "prefill_s": round(done.prefill_s, 4),
            "decode_s": round(done.decode_s, 4), "preemptions": done.preemptions, "finish_reasons": done.finish_reasons,
        }  # fmt: skip
        request_log.info("%s", json.dumps(line))

    def answered(self, result: str) -> None:
        """What the cache of answers said: hit, joined or miss."""
        self._answers.labels(self._model, result).inc()
        self._last_answers.append(result != "miss")
        self.answer_hit_rate.set(sum(self._last_answers) / len(self._last_answers))

    def request_refused(
        self, rid: str | None, tenant: str | None, reason: str, code: str | None, choices: int = 1
    ) -> None:
        """A job that ended before admission: a line without figures; ``code`` where ``reason`` is error."""
        self.refused.inc()
        self._success.labels(self._model, reason).inc(choices)
        if code == SpecialTokensRefused.code:
            self.special_tokens_refused.inc()
        line = {"id": rid, "model": self._model, "tenant": tenant, "finish_reasons": [reason], "error": code}
        request_log.info("%s", json.dumps(line))


class Health:
    """What /health reports: when the lead was last read or renewed, and when the planner last ran."""

    def __init__(self, limit_s: float = 10.0) -> None:
        self._limit = limit_s
        self._seen: dict[str, float] = {}
        self.state = "starting"

    def alive(self, part: str) -> Callable[[], None]:
        """A function for ``part`` to call whenever it makes progress; from now on a long pause is a fault."""

        def note() -> None:
            self._seen[part] = time.monotonic()

        note()
        return note

    def forget(self, part: str) -> None:
        """It has ended, and need not make progress any more."""
        self._seen.pop(part, None)

    def silent(self) -> list[str]:
        """Parts that have made no progress for too long."""
        now = time.monotonic()
        return [part for part, seen in self._seen.items() if now - seen > self._limit]


class Exposed(Collector):
    """What one process exposes: its own figures and those of each shard, one family after another. Series of other
    shards than the first have a further label, `shard`."""

    def __init__(self, first: Metrics) -> None:
        self._first = first
        self._shards: dict[int, Metrics] = {0: first}

    def of(self, shard: int) -> Metrics:
        return self._shards.setdefault(shard, Metrics(self._first.model, process=False))

    def collect(self) -> Iterator[Metric]:
        families = {family.name: family for family in self._first.registry.collect()}
        for number, metrics in self._shards.items():
            for family in metrics.registry.collect() if number else ():
                labelled = [s._replace(labels={**s.labels, "shard": str(number)}) for s in family.samples]
                families[family.name].samples.extend(labelled)
        yield from families.values()


async def serve_status(exposed: Collector, health: Health, host: str, port: int) -> web.AppRunner:
    """Start the metrics port: /metrics and /health (503 naming what is stuck). Port 0 is the caller's to skip."""

    registry = CollectorRegistry()
    registry.register(exposed)

    async def show_health(_: web.Request) -> web.Response:
        silent = health.silent()
        body = {"status": "stuck" if silent else "ok", "state": health.state, "silent": silent}
        return web.json_response(body, status=503 if silent else 200)

    async def exposition(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.on_response_prepare.append(_without_version)
    app.add_routes([web.get("/health", show_health), web.get("/metrics", exposition)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as e:
        await runner.cleanup()
        raise StartError(f"cannot listen on {host}:{port}: {e.strerror}; choose another --metrics-port") from e
    return runner


async def _without_version(_: web.Request, response: web.StreamResponse) -> None:
    response.headers["Server"] = "headrace"
