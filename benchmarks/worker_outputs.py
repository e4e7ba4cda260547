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

import numpy as np

from protocol.bus import Bus, commit_arguments
from protocol.messages import Hint, Job, NewSequence, Plan, encode, new_rid, pack_ids
from protocol.sampling import SamplingParams
from workers.engine import Sampled
from workers.outputs import Batch, Outputs
from workers.simulated import byte_vocabulary

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
def bench_server() -> Iterator[str]:
    from headrace.embedded import FAST, EmbeddedServer

    with tempfile.TemporaryDirectory(prefix="hr-") as data_dir, EmbeddedServer(Path(data_dir), settings=FAST) as server:
        yield server.url


async def measure_commits(url: str, rows: int, steps: int) -> None:
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
            await bus.ingest(epoch, entry.entry_id, rid=rid, prompts=[pack_ids([1, 2, 3])], seed=0)
    placed = [NewSequence(s, rid, 0, 1, b"", 0, job.sampling, 0, 0, b"", 0) for s, rid in enumerate(rids)]
    await bus.plan(epoch, "w0", gen, Plan(epoch, gen, 1, new=placed))
    steady = Steady(rids, job.sampling)
    walls, cpus = [], []
    for _ in range(steps):
        sampled = steady.sampled()
        wall, cpu = time.perf_counter(), time.process_time()
        batch = steady.execute(sampled)
        verdicts = await bus.commit("w0", epoch, gen, batch.commit_rows(), hint_of(batch), executed="1-0")
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
        assert verdicts == "l" * rows, verdicts
    await bus.close()
    wall, cpu = (statistics.median(times) * 1e6 for times in (walls, cpus))
    print(f"{rows:5d} rows  outputs + commit to a server: {wall:8.0f} us wall, {cpu:8.0f} us CPU of this process")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--server", action="store_true", help="also commit to an embedded server")
    args = parser.parse_args()
    for name in SAMPLINGS:
        measure(name, args.rows, args.steps)
    if args.server:
        with bench_server() as url:
            asyncio.run(measure_commits(url, args.rows, args.steps))


if __name__ == "__main__":
    main()
