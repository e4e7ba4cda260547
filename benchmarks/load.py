"""One workload against one server over HTTP, with the load generator of `headrace bench`, and what remains of it."""

from __future__ import annotations

import asyncio
import math
import random
from typing import Any

from benchmarks.stack import Unavailable
from headrace.bench import WARMUP_SEED, Result, Target, drive, quantile, summarize
from headrace.workload import Request, Vocabulary, Workload

TIMEOUT_S = 900.0


def run(target: Target, workload: Workload, vocabulary: Vocabulary) -> dict[str, Any]:
    """The figures of `headrace.bench.summarize`. Never raises for what the server does: see ``errors``."""
    return asyncio.run(_run(target, workload, vocabulary))


def warm_up(target: Target, vocabulary: Vocabulary, requests: int = 2) -> dict[str, Any]:
    """A few short requests with prompts of their own, so that a first call's cost is nobody's figure."""
    return run(target, Workload(requests, (64, 64), (8, 8), seed=WARMUP_SEED), vocabulary)


def beside_prefill(
    target: Target, vocabulary: Vocabulary, streams: int = 8, output: int = 192, prompt: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """What running streams feel of one long prompt: gaps between their tokens from its arrival to its first token,
    against those of such streams by themselves. Unavailable if one fails."""
    lone = Workload(streams, (64, 64), (output, output), seed=seed).build(vocabulary)
    alone, began = asyncio.run(_drive(target, lone))
    _all_good(alone)
    steady = max(result.chunks[0] for result in alone)
    gaps = [b - a for r in alone for a, b in zip(r.chunks, r.chunks[1:], strict=False) if a >= steady]
    arrival = steady - began + 0.2 * (max(result.chunks[-1] for result in alone) - steady)
    others = Workload(streams, (64, 64), (output, output), seed=seed + 1).build(vocabulary)
    long_ids = vocabulary.prompt(vocabulary.draw(random.Random(seed), prompt))
    crowd, _ = asyncio.run(_drive(target, [*others, Request(streams, arrival, long_ids, prompt, 4)]))
    _all_good(crowd)
    *running, long_one = crowd
    window = (long_one.start, long_one.chunks[0])
    felt = [
        b - a for r in running for a, b in zip(r.chunks, r.chunks[1:], strict=False) if b > window[0] and a < window[1]
    ]
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
