"""One model on 1, 2 and 4 shards of a real three-node cluster: tokens per second, and CPU per token by role.

    python -m benchmarks.shards

Engines are simulated, so what is measured is everything but the model. Each shard has a leader, a worker and as many
streams as every other, so the batch of a step is the same in all runs: what a token costs must not grow with the number
of shards. Streams are read over HTTP by one client process, whose CPU is not counted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections import Counter
from pathlib import Path

import aiohttp

from benchmarks.stack import cpu_seconds
from tests.models import save_tiny_model
from tests.protocol.test_cluster import Cluster
from tests.stack import Stack

MODEL = "org/tiny"
STEP_US = 40_000
SETTLE_S = 4.0  # until all streams run


async def measure(stack: Stack, cluster: Cluster, streams: int, seconds: float) -> dict[str, object]:
    """So many endless streams for a while."""
    seen = Counter[str]()

    async def stream(number: int) -> None:
        body = {
            "model": MODEL, "prompt": [number + 5] * 16, "max_tokens": 4000, "ignore_eos": True, "stream": True,
        }  # fmt: skip
        async with session.post(f"{stack.url}/v1/completions", json=body) as reply:
            async for line in reply.content:
                seen["tokens"] += line.startswith(b"data: {")

    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        readers = [asyncio.create_task(stream(number)) for number in range(streams)]
        await asyncio.sleep(SETTLE_S)
        cpu, tokens, began = used(stack, cluster), seen["tokens"], time.monotonic()
        await asyncio.sleep(seconds)
        after, tokens, wall = used(stack, cluster), seen["tokens"] - tokens, time.monotonic() - began
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
    spent = {role: after[role] - cpu[role] for role in after}
    return {
        "tokens_per_s": round(tokens / wall),
        "cpu_cores": {role: round(s / wall, 3) for role, s in sorted(spent.items())},
        "cpu_us_per_token": {role: round(1e6 * s / max(1, tokens), 1) for role, s in sorted(spent.items())},
    }


def used(stack: Stack, cluster: Cluster) -> Counter[str]:
    """CPU seconds by role."""
    found = Counter[str]()
    for role in ("gateway", "scheduler", "worker"):
        for pid in stack.pids(role).values():
            found[role] += cpu_seconds(pid)
    found["redis"] += sum(cpu_seconds(process.pid) for process in cluster.processes)
    return found


def run(shards: int, per_shard: int, seconds: float) -> dict[str, object]:
    with tempfile.TemporaryDirectory(prefix="headrace-shards-") as folder:
        cluster = Cluster(Path(folder))
        model = Path(folder) / "model"
        model.mkdir()
        save_tiny_model("llama", model)
        try:
            cluster.start()
            with Stack(
                Path(folder) / "stack", "--redis-url", cluster.url, "--model", str(model), "--served-model-name", MODEL,
                "--engine", "simulated", "--engine-options", json.dumps({"step_us": STEP_US}),
                "--shards", str(shards), "--workers", str(shards), "--schedulers", str(shards),
            ) as stack:  # fmt: skip
                time.sleep(SETTLE_S)  # each leader has its shard
                return asyncio.run(measure(stack, cluster, shards * per_shard, seconds))
        finally:
            cluster.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--streams", type=int, default=16, help="of each shard")
    parser.add_argument("--seconds", type=float, default=15)
    options = parser.parse_args()
    for shards in options.shards:
        print(json.dumps({"shards": shards, **run(shards, options.streams, options.seconds)}), flush=True)


if __name__ == "__main__":
    main()
