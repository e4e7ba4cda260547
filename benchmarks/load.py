"""One workload against one server over HTTP, with the load generator of `headrace bench`, and what remains of it."""

from __future__ import annotations

import asyncio
import math
from typing import Any

from headrace.bench import WARMUP_SEED, Target, drive, summarize
from headrace.workload import Vocabulary, Workload

TIMEOUT_S = 900.0


def run(target: Target, workload: Workload, vocabulary: Vocabulary) -> dict[str, Any]:
    """The figures of `headrace.bench.summarize`. Never raises for what the server does: see ``errors``."""
    return asyncio.run(_run(target, workload, vocabulary))


def warm_up(target: Target, vocabulary: Vocabulary, requests: int = 2) -> dict[str, Any]:
    """A few short requests with prompts of their own, so that a first call's cost is nobody's figure."""
    return run(target, Workload(requests, (64, 64), (8, 8), seed=WARMUP_SEED), vocabulary)


async def _run(target: Target, workload: Workload, vocabulary: Vocabulary) -> dict[str, Any]:
    import aiohttp

    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
        read_bufsize=1 << 20,
    )
    async with session:
        return summarize(*await drive(session, target, workload.build(vocabulary), None))


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
