"""One workload against one server over HTTP, with the load generator of `headrace bench`, and what remains of it."""

from __future__ import annotations

import asyncio
import math
import random
from typing import Any

from benchmarks.stack import Unavailable
from headrace.clients.bench import WARMUP_SEED, Result, Target, drive, quantile, summarize
from headrace.clients.workload import Request, Vocabulary, Workload

TIMEOUT_S = 900.0


def run(target: Target, workload: Workload, vocabulary: Vocabulary) -> dict[str, Any]:
    """The figures of `headrace.clients.bench.summarize`. Never raises for what the server does: see ``errors``."""
    return asyncio.run(_run(target, workload, vocabulary))


def warm_up(target: Target, vocabulary: Vocabulary, requests: int = 2) -> dict[str, Any]:
    """A few short requests with prompts of their own, so that a first call's cost is nobody's figure."""
    return run(target, Workload(requests, (64, 64), (8, 8), seed=WARMUP_SEED), vocabulary)


def beside_prefill(
    target: Target, vocabulary: Vocabulary, streams: int = 8, output: int = 320, prompt: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """What running streams feel of one long prompt: gaps between their tokens from its arrival to its first token,
    against those before and after, in the same run. Unavailable if one fails."""
    short = Workload(streams, (64, 64), (16, 16), seed=seed).build(vocabulary)  # how long the start and a step take
    alone, began = asyncio.run(_drive(target, short))
    _all_good(alone)
    steady = max(result.chunks[0] for result in alone)
    step_s = (max(result.chunks[-1] for result in alone) - steady) / 15
    arrival = steady - began + 0.2 * output * step_s
    others = Workload(streams, (64, 64), (output, output), seed=seed + 1).build(vocabulary)
    long_ids = vocabulary.prompt(vocabulary.draw(random.Random(seed), prompt))
    crowd, _ = asyncio.run(_drive(target, [*others, Request(streams, arrival, long_ids, prompt, 4)]))
    _all_good(crowd)
    *running, long_one = crowd
    window = (long_one.start, long_one.chunks[0])
    steady = max(result.chunks[0] for result in running)
    last = min(result.chunks[-1] for result in running)  # from then on fewer than all are running
    steps = [(a, b) for r in running for a, b in zip(r.chunks, r.chunks[1:], strict=False) if steady <= a and b <= last]
    felt = [b - a for a, b in steps if b > window[0] and a < window[1]]
    gaps = [b - a for a, b in steps if b <= window[0] or a >= window[1]]
    if min(len(gaps), len(felt)) < 20:
        raise Unavailable(f"{len(felt)} gaps beside the prompt and {len(gaps)} without it are too few to compare")
    found = {
        "streams": streams,
        "prompt": prompt,
        "alone_p50_ms": round(1e3 * quantile(gaps, 50), 2),
        "alone_p99_ms": round(1e3 * quantile(gaps, 99), 2),
        "beside_p50_ms": round(1e3 * quantile(felt, 50), 2),
        "beside_p99_ms": round(1e3 * quantile(felt, 99), 2),
        "prompt_ttft_ms": round(1e3 * (window[1] - window[0]), 1),
    }
    return found | {"p99_ratio": round(found["beside_p99_ms"] / found["alone_p99_ms"], 2)}


def _all_good(results: list[Result]) -> None:
    if bad := [result.error for result in results if not result.ok]:
        raise Unavailable(f"{len(bad)} requests failed: {bad[0]}")


async def _run(target: Target, workload: Workload, vocabulary: Vocabulary) -> dict[str, Any]:
    return summarize(*await _drive(target, workload.build(vocabulary)))


async def _drive(target: Target, requests: list[Request]) -> tuple[list[Result], float]:
    """Results in request order and the time of the start."""
    import aiohttp

    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
        read_bufsize=1 << 20,
    )
    async with session:
        return await drive(session, target, requests, None)


def figures(summary: dict[str, Any]) -> dict[str, Any]:
    """What the tables show of one run. NaN where nothing came."""

    def of(name: str, percentile: str) -> float:
        return (summary[name] or {}).get(percentile, math.nan)

    return {
        "tokens_per_s": summary["output_tokens_per_s"],
        "ttft_p50_ms": of("ttft_ms", "p50"),
        "ttft_p99_ms": of("ttft_ms", "p99"),
        "itl_p50_ms": of("itl_ms", "p50"),
        "itl_p99_ms": of("itl_ms", "p99"),
        "output_tokens": summary["output_tokens"],
        "failed": summary["failed"],
        "short": summary["shorter_than_asked"],
        "errors": list(summary["errors"]),
    }
