"""CPU time that a worker spends beside the device, per steady decode step: text, stop checks, frames, commit.

    python -m benchmarks.worker_outputs [--rows 256] [--steps 200] [--server]

Prints microseconds of CPU per step of the worker's event-loop thread: outputs (ids to frames), commit (frames to the
script's arguments), and with --server the whole commit against an embedded server on the same machine, in
wall time and in CPU time of this process. Stands beside the engine: none of it is device time.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import redis

from benchmarks.stack import disk_flushes
from protocol.connection import Subscription
from protocol.messages import Hint, Job, NewSequence, Plan, commit_arguments, encode, new_rid, pack_ids
from protocol.sampling import SamplingParams
from tests.bus import Bus
from workers.engines.base import Sampled
from workers.engines.simulated import byte_vocabulary
from workers.outputs import Batch, Outputs

SAMPLINGS = {
    "plain": {},
    "stop strings": {"stop": ["\n\nHuman:", "</end>"]},
    "logprobs": {"logprobs": 5},
}


class Steady:
    """``rows`` sequences that decode for ever."""

    def __init__(self, rids: list[str], sampling: SamplingParams) -> None:
        rows = len(rids)
        self.outputs = Outputs(byte_vocabulary(), frozenset([256]))
        self.seats = np.arange(rows, dtype=np.int32)
        self.step = 1
        self.top = (np.arange(5, dtype=np.int32), -np.arange(5, dtype=np.float32))
        self.wants_logprobs = sampling.logprobs is not None
        new = [
            NewSequence(seat, rid, 0, 1, pack_ids([1, 2, 3]), 3, sampling, 0, 0, b"", 0)
            for seat, rid in enumerate(rids)
        ]  # fmt: skip
        self.plan = Plan(1, 1, 1, seats=array("H", range(rows)).tobytes())
        self.outputs.step(Plan(1, 1, 1, new=new), Sampled(self.seats[:0], self.seats[:0], {}), "1-0")
        self.outputs.take()

    def sampled(self) -> Sampled:
        tokens = np.array([random.randrange(32, 127) for _ in self.seats], np.int32)
        logprobs = dict.fromkeys(self.seats.tolist(), (-1.0, *self.top)) if self.wants_logprobs else {}
        return Sampled(self.seats, tokens, logprobs, 1000)

    def execute(self, sampled: Sampled) -> Batch:
        self.outputs.step(self.plan, sampled, "1-0")
        batch = self.outputs.take()
        assert batch is not None
        return batch


def hint_of(batch: Batch) -> Hint:
    return Hint("w0", 1, batch.step, batch.hint_rows(), batch.exec_us, batch.idle_us)


def measure(name: str, rows: int, steps: int) -> None:
    steady = Steady([new_rid() for _ in range(rows)], SamplingParams(max_tokens=1 << 30, **SAMPLINGS[name]))
    outputs, commits = [], []
    for _ in range(steps):
        sampled = steady.sampled()
        started = time.thread_time()
        batch = steady.execute(sampled)
        middle = time.thread_time()
        commit_arguments(batch.commit_rows())
        encode(hint_of(batch))
        outputs.append(middle - started)
        commits.append(time.thread_time() - middle)
    parts = [statistics.median(times) * 1e6 for times in (outputs, commits)]
    print(f"{rows:5d} rows  {name:14s} outputs {parts[0]:8.0f} us   commit rows and hint {parts[1]:8.0f} us")


@contextmanager
def bench_server(durable: bool = False) -> Iterator[tuple[str, Path]]:
    """(URL, data directory) of a server. ``durable``: it syncs its log before it answers, as in service."""
    from headrace.serve.embedded import DURABLE, FAST, EmbeddedServer

    settings = DURABLE if durable else FAST
    with tempfile.TemporaryDirectory(prefix="hr-") as folder:
        data_dir = Path(folder)
        with EmbeddedServer(data_dir, settings=settings) as server:
            yield server.url, data_dir


def server_use(url: str, data_dir: Path) -> dict[str, float]:
    """The server's counters: microseconds in scripts, CPU seconds, bytes in and out, syncs of the disk."""
    with redis.Redis.from_url(url) as server:
        told: dict[str, Any] = server.info("everything")  # type: ignore[assignment]
    return {
        "script_us": told["cmdstat_evalsha"]["usec"],
        "cpu_s": told["used_cpu_user"] + told["used_cpu_sys"],
        "bytes": told["total_net_input_bytes"] + told["total_net_output_bytes"],
        "flushes": disk_flushes(data_dir) or 0,
    }


async def measure_commits(url: str, rows: int, steps: int, data_dir: Path) -> dict[str, float]:
    """Commits of ``rows`` sequences, one after the other; a channel has one subscriber, as in service."""
    bus = Bus(url, "bench")
    await bus.connect()
    epoch = await bus.lead("bench", await bus.read_leader())
    assert epoch is not None
    gen = await bus.register("w0", None, "serving")
    rids = [new_rid() for _ in range(rows)]
    job = Job(prompt=[1, 2, 3], sampling=SamplingParams(max_tokens=1 << 30))
    for rid in rids:
        await bus.accept(job, rid=rid, reply_to="gateway")
        for entry in await bus.read_jobs("bench", 1, 100):
            await bus.admit(epoch, entry.entry_id, rid=rid, prompts=[pack_ids([1, 2, 3])], seed=0)
    placed = [NewSequence(s, rid, 0, 1, b"", 0, job.sampling, 0, 0, b"", 0) for s, rid in enumerate(rids)]
    await bus.plan(epoch, "w0", gen, Plan(epoch, gen, 1, new=placed))
    steady = Steady(rids, job.sampling)
    subscription = bus.subscribe("gateway")
    await subscription.start()
    reading = asyncio.create_task(_drop(subscription))
    walls, cpus = [], []
    for step in range(-8, steps):
        if step == 0:
            before, began = await asyncio.to_thread(server_use, url, data_dir), time.perf_counter()
        sampled = steady.sampled()
        wall, cpu = time.perf_counter(), time.process_time()
        batch = steady.execute(sampled)
        verdicts = await bus.commit("w0", epoch, gen, batch.commit_rows(), hint_of(batch), executed="1-0")
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
        assert verdicts == "l" * rows, verdicts
    took, after = time.perf_counter() - began, await asyncio.to_thread(server_use, url, data_dir)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    await subscription.close()
    await bus.close()
    moved = {name: after[name] - before[name] for name in after}
    wall, cpu = (statistics.median(times[8:]) * 1e6 for times in (walls, cpus))
    return {
        "rows": rows,
        "wall_us": round(wall),
        "own_cpu_us": round(cpu),
        "script_us_per_row": round(moved["script_us"] / steps / rows, 2),
        "server_cpu_us_per_row": round(1e6 * moved["cpu_s"] / steps / rows, 2),
        "bytes_per_token": round(moved["bytes"] / steps / rows, 1),
        "commits_per_s": round(steps / took, 1),
        "fsyncs_per_s": round(moved["flushes"] / took, 1),
    }


async def _drop(subscription: Subscription) -> None:
    async for _ in subscription:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--server", action="store_true", help="also commit to an embedded server")
    parser.add_argument("--durable", action="store_true", help="that server syncs its log before it answers")
    args = parser.parse_args()
    for name in SAMPLINGS:
        measure(name, args.rows, args.steps)
    if args.server:
        with bench_server(durable=args.durable) as (url, data_dir):
            found = asyncio.run(measure_commits(url, args.rows, args.steps, data_dir))
        print("outputs + commit to a server: " + "  ".join(f"{name} {value:g}" for name, value in found.items()))


if __name__ == "__main__":
    main()
