"""The parts of benchmarks.gpu that put load on a whole stack: bursts, Poisson arrivals, long contexts, shared prefixes,
starts."""

from __future__ import annotations

import gc
import os
import re
import shutil
import signal
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks import load
from benchmarks.gpu_part import Part, draw_model
from benchmarks.models import tokenizer
from benchmarks.stack import Stack, Unavailable
from headrace.clients.bench import Target
from headrace.clients.workload import Vocabulary, Workload

BODY = {"temperature": 0.0, "ignore_eos": True}
POISSON = 1500  # requests
LONG = 32768  # tokens of the long prompt
FILES = 40 << 30  # bytes of memory that must be free for the files to lie there
TIMES = {
    "admission": "headrace_admission_time_seconds", "queue": "headrace_request_queue_time_seconds",
    "prefill": "headrace_request_prefill_time_seconds", "plan": "headrace_planning_time_seconds",
    "step": "headrace_step_seconds",
}  # fmt: skip


class Served:
    """A stack that serves one shape, and the client's side of it."""

    def __init__(self, part: Part, stack: Stack, shape: str, vocab_size: int) -> None:
        self.part, self.stack = part, stack
        self.target = Target(stack.url, shape, body=BODY)
        self.vocabulary = Vocabulary(size=vocab_size)

    def run(self, workload: Workload) -> dict[str, Any]:
        """Figures of one run, and where its first tokens' time went; Unavailable if a request failed."""
        before = self.times()
        found = load.figures(load.run(self.target, workload, self.vocabulary))
        if found["failed"]:
            raise Unavailable(f"{found['failed']} requests failed: {found['errors'][:1]}")
        time.sleep(0.5)  # the last steps' hints
        after = {name: (value - before[name][0], n - before[name][1]) for name, (value, n) in self.times().items()}
        means = {f"{name}_ms": round(1e3 * value / max(1, n), 2) for name, (value, n) in after.items()}
        return {**found, **means, "device_s": round(after["step"][0], 2)}

    def times(self) -> dict[str, tuple[float, float]]:
        """(seconds, how many) so far: steps on the device, rounds of plans, and the parts of a first token's time."""
        text = ""
        for role in ("scheduler", "worker"):
            for port in self.stack.metrics_ports(role):
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
                    text += reply.read().decode()
        return {name: (_sum(text, metric, "sum"), _sum(text, metric, "count")) for name, metric in TIMES.items()}


def _sum(text: str, metric: str, what: str) -> float:
    found = re.findall(rf"^{metric}_{what}(?:\{{.*\}})? (.*)$", text, re.MULTILINE)
    if not found:
        raise Unavailable(f"nobody tells {metric}")
    return sum(map(float, found))


def make_files(part: Part, shape: str, path: Path) -> None:
    """A checkpoint of random weights, and a tokenizer whose every id is text."""
    fields = part.fields(shape)
    began = time.perf_counter()
    model = draw_model(fields, part.device, torch.bfloat16 if part.cuda else torch.float32, "eager")
    model.save_pretrained(path)
    tokenizer(fields["vocab_size"]).save_pretrained(path)
    del model
    gc.collect()
    if part.cuda:
        torch.cuda.empty_cache()
    os.sync()
    part.note(made_s=round(time.perf_counter() - began, 1))


@contextmanager
def started(part: Part, shape: str, path: Path, **policy: Any) -> Iterator[Served]:
    """A stack over the files at ``path``, asked what an engine of the same ``policy`` is asked."""
    asked = part.policy(**policy)
    if part.cuda:
        asked.pop("threads")
    args = ["--model", str(path), "--served-model-name", shape, "--device", part.device.type]
    args += [text for name, value in asked.items() for text in ("--" + name.replace("_", "-"), str(value))]
    if not part.cuda:
        args += ["--engine-options", '{"process": true}']
    began = time.perf_counter()
    stack = Stack(*args)
    signal.signal(signal.SIGTERM, lambda number, frame: _kill(stack))
    with stack:
        part.note(ready_s=round(time.perf_counter() - began, 1))
        served = Served(part, stack, shape, part.fields(shape)["vocab_size"])
        load.warm_up(served.target, served.vocabulary)
        yield served
        log = stack._process.log.read_text(errors="replace")
        part.note(warnings=[line[-200:] for line in log.splitlines() if "WARN" in line or "compiled" in line][:10])
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _kill(stack: Stack) -> None:
    """Time is up: the supervisor's end is everyone's, so nothing stays on the device."""
    if stack._process.process is not None:
        stack._process.signal_group(signal.SIGKILL)
    os._exit(1)


@contextmanager
def serving(part: Part, shape: str, **policy: Any) -> Iterator[Served]:
    """The same with files of its own. Tiny shapes are alike: one stack serves all parts of the process."""
    if part.tiny:
        if part.served is None:
            folder = Path(part.open.enter_context(tempfile.TemporaryDirectory(prefix="headrace-")))
            make_files(part, shape, folder)
            part.served = part.open.enter_context(started(part, shape, folder))
        yield part.served
        return
    with in_memory() as folder:
        path = folder / shape
        make_files(part, shape, path)
        with started(part, shape, path, **policy) as served:
            yield served


@contextmanager
def in_memory() -> Iterator[Path]:
    """A folder for a model's files: in memory where there is room. 16 GB on their way to a disk hold up every fsync of
    the queue's server for seconds (seen: a burst of 3.9 s took 7.9)."""
    memory = Path("/dev/shm")
    room = memory.is_dir() and shutil.disk_usage(memory).free > FILES
    with tempfile.TemporaryDirectory(prefix="headrace-", dir=memory if room else None) as folder:
        yield Path(folder)


# ------------------------------------------------------------------ rows that must hold


def one_stream(part: Part, streams: int = 1) -> Workload:
    """What one stream, or a few, are asked for: of the stack and of the bare loop alike."""
    return part.workload(requests=streams, prompt_len=(64, 64), output_len=(256, 256), seed=11)


def stack(part: Part, shape: str) -> None:
    with serving(part, shape) as served:
        with part.row("burst") as found:
            burst(served, found)
        with part.row("poisson") as poisson:
            poisson |= open_loop(served, found, 0.8, POISSON)
        with part.row("share") as share:
            device_share(served, share)
        with part.row("one") as one:
            one |= served.run(one_stream(part))


def burst(served: Served, found: dict[str, Any], rounds: int = 3) -> None:
    """The middle of three; what there is stays in ``found`` if time ends earlier."""
    runs: list[dict[str, Any]] = []
    for seed in range(1, (1 if served.part.tiny else rounds) + 1):
        runs.append(served.run(served.part.workload(seed=seed)))
        for name in (
            "tokens_per_s",
            "admission_ms",
            "queue_ms",
            "prefill_ms",
            "plan_ms",
            "ttft_p50_ms",
            "ttft_p99_ms",
            "itl_p50_ms",
            "itl_p99_ms",
        ):
            found[name] = statistics.median(run[name] for run in runs)
        found["rounds"] = [run["tokens_per_s"] for run in runs]
        found["device_s"] = [run["device_s"] for run in runs]
        found["requests_per_s"] = found["tokens_per_s"] / (runs[0]["output_tokens"] / served.part.workload().requests)


def open_loop(served: Served, burst: dict[str, Any], share: float, requests: int) -> dict[str, Any]:
    """Poisson arrivals at ``share`` of the requests a second that the burst of the same run saw through."""
    if "requests_per_s" not in burst:
        raise Unavailable("the burst, whose rate it is a share of, was not measured")
    rate = share * burst["requests_per_s"]
    part = served.part
    asked = part.workload(requests=requests, rate=min(rate, 20.0) if part.tiny else rate, seed=7)
    return {"rate": round(rate, 2), **served.run(asked)}


def device_share(served: Served, found: dict[str, Any]) -> None:
    """Device time of the steps over the time from the requests' sending to the last token: a little less than from the
    first plan on."""
    asked = served.part.workload(requests=256, prompt_len=(64, 64), output_len=(384, 384), seed=3)
    found |= served.run(asked)
    found["device_share"] = round(found["device_s"] * found["tokens_per_s"] / found["output_tokens"], 3)


# ------------------------------------------------------------------ more


def open_loops(part: Part, shape: str) -> None:
    """Arrivals at half, four fifths and nearly all of the capacity, which the burst tells."""
    with serving(part, shape) as served:
        with part.row("burst") as found:
            burst(served, found, rounds=2)
        for share in (0.5, 0.8, 0.95):
            with part.row(f"at_{share:.0%}") as row:
                row |= open_loop(served, found, share, 600)
        with part.row("shared_prefix") as row:
            row |= served.run(part.workload(requests=128, prompt_len=(16, 64), shared_prefix=1024, seed=9))
        with part.row("without_prefix") as row:  # the same lengths, nothing shared
            row |= served.run(part.workload(requests=128, prompt_len=(1040, 1088), seed=10))


def long_context(part: Part, shape: str) -> None:
    """What 32 streams feel of a prompt of 32k tokens."""
    with serving(part, shape, max_model_len=LONG + 1024) as served, part.row("beside") as row:
        sizes = (
            {"streams": 7, "output": 60, "prompt": 100} if part.tiny else {"streams": 32, "output": 900, "prompt": LONG}
        )
        row |= load.beside_prefill(served.target, served.vocabulary, **sizes)


def starts(part: Part, shape: str) -> None:
    """From exec to /ready, twice over the same files: the second finds the page cache warm and kernels compiled."""
    if part.tiny:
        with serving(part, shape):
            part.note(first={"ready_s": "that of the one stack"})
        return
    with in_memory() as folder:
        make_files(part, shape, folder)
        for name in ("first", "second"):
            with part.row(name) as row, started(part, shape, folder) as served:
                row["ready_s"] = part.found["ready_s"]
                row["log"] = [line for line in served.stack._process.log.read_text().splitlines() if " s" in line][-12:]
