"""CPU of a whole scheduler process per step: Redis, asyncio, core and metrics together.

A scheduler and a worker with the simulated engine run as processes of their own against an embedded server that
syncs its log at every write. Sequences of equal length decode together; the scheduler's CPU time, from the first
accept to the last end, is divided by the number of steps. Run: python -m benchmarks.scheduler_service
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from headrace.options import demo_model
from headrace.serve.embedded import DURABLE, FAST, EmbeddedServer
from protocol.messages import Job, new_rid
from protocol.sampling import SamplingParams
from tests.bus import Bus

MODEL = "bench"


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def start(role: str, url: str, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "headrace", role, "--model", str(demo_model()), "--served-model-name", MODEL]
    return subprocess.Popen(
        [*command, "--log-level", "warning", *options],
        env={**os.environ, "HEADRACE_REDIS_URL": url},
        stdout=subprocess.DEVNULL,
    )


async def measure(url: str, sequences: int, tokens: int, step_us: int) -> None:
    engine = json.dumps({"num_blocks": sequences * (tokens // 16 + 4), "step_us": step_us, "row_us": 1})
    scheduler = start("scheduler", url)
    worker = start(
        "worker", url, "--engine", "simulated", "--max-num-seqs", str(sequences), "--engine-options", engine
    )  # fmt: skip
    bus = Bus(url, MODEL)
    try:
        await bus.connect()
        while not any(w.state == "serving" for w in await bus.list_workers()):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        began, before = time.perf_counter(), [cpu_seconds(p.pid) for p in (scheduler, worker)]
        for seed in range(sequences):
            job = Job(prompt=[5] * 32, sampling=SamplingParams(max_tokens=tokens, seed=seed, ignore_eos=True))
            await bus.accept(job, rid=new_rid())
        while await bus.scan_live():  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        took = time.perf_counter() - began
        spent = [cpu_seconds(p.pid) - b for p, b in zip((scheduler, worker), before, strict=True)]
        print(
            f"{sequences:4d} sequences, {tokens} steps of {step_us} us: {sequences * tokens / took:8.0f} tokens/s,",
            end=" ",
        )
        print(f"a step every {took / tokens * 1e3:.2f} ms,", end=" ")
        print(f"CPU a step: scheduler {spent[0] / tokens * 1e3:.2f} ms, worker {spent[1] / tokens * 1e3:.2f} ms")
    finally:
        for process in (scheduler, worker):
            process.terminate()
        for process in (scheduler, worker):
            process.wait()
        await bus.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--tokens", type=int, default=1500, help="output tokens of each sequence: the steps")
    parser.add_argument("--step-us", type=int, default=2000, help="time of a step on the imagined device")
    parser.add_argument("--no-sync", action="store_true", help="a server that keeps no log")
    args = parser.parse_args()
    for sequences in args.sequences:
        settings = FAST if args.no_sync else DURABLE
        with tempfile.TemporaryDirectory() as data, EmbeddedServer(Path(data), settings=settings) as server:
            asyncio.run(measure(server.url, sequences, args.tokens, args.step_us))


if __name__ == "__main__":
    main()
