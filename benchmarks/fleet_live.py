"""The day of benchmarks/fleet.py in small, on real services: `headrace serve` with two shards, workers that only keep
time, and the rule that asks for workers starting and stopping real processes, under requests over HTTP.

    python -m benchmarks.fleet_live [--minutes 15] [--peak 4] [--requests-per-worker 17]

A day passes in minutes, so what takes its time in real life is shortened with it as far as processes allow: a worker
serves some seconds after it was asked for, a request takes some seconds, the rule looks every second and remembers
seconds. So the load changes faster, against the start of a worker, than on any real day. A deadline is twice the time
that the request takes on a full worker, and 5 s.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from benchmarks.fleet import SEATS, Day, Load, changes_back
from headrace.ray.rule import Scaler, Scaling
from headrace.serve.embedded import server_url
from protocol.bus import GatewayBus
from protocol.routing.shards import ShardStore
from tests.models import save_tiny_model
from tests.stack import Stack

MODEL = "org/tiny"
STEP_S, ROW_S = 0.36, 0.002  # 0.4 s when full
OUTPUT = (8, 32)
LOAD_S = 3.0  # of a worker, beside the start of its process
TICK_S = 1.0
GRACE_S = 5.0
REQUEST_S = sum(OUTPUT) / 2 * (STEP_S + SEATS * ROW_S)
ENGINE = {"step_us": STEP_S * 1e6, "row_us": ROW_S * 1e6, "token_us": 0, "load_s": LOAD_S}
OPTIONS = ["--engine", "simulated", "--engine-options", json.dumps(ENGINE), "--max-num-seqs", str(SEATS)]


@dataclass
class Part:
    """One shard: its bus, the rule's memory, and the workers that the rule has asked for beside the first."""

    number: int
    bus: GatewayBus
    scaler: Scaler
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    leaving: list[subprocess.Popen[bytes]] = field(default_factory=list)
    worker_s: float = 0.0
    history: list[tuple[float, float, int, int]] = field(default_factory=list)  # time, offered, asked for, serving

    async def demand(self) -> int:
        depth = await self.bus.read_depth_fields()
        inbox = await self.bus._link.command("XLEN", self.bus.keys.jobs)
        return int(depth.get("requests", 0) + depth.get("running", 0)) + int(inbox)


class Fleet:
    def __init__(self, folder: Path, stack: Stack, rule: Scaling, load: Load) -> None:
        self.folder, self.stack, self.rule, self.load = folder, stack, rule, load
        self.url = server_url(stack.run_dir / "data")
        self.parts: list[Part] = []
        self.times: list[tuple[float, bool]] = []  # seconds over the time on a full worker, whether it was in time
        self._names = itertools.count(1)

    async def open(self) -> None:
        store = ShardStore(self.url)
        for shard in await store.read(MODEL):
            bus = GatewayBus(self.url, shard.tag, patience=10.0)
            await bus.connect()
            self.parts.append(Part(shard.number, bus, Scaler(self.rule)))
        await store.close()

    async def close(self) -> None:
        for part in self.parts:
            for process in [*part.workers, *part.leaving]:
                process.kill()
                process.wait()
            await part.bus.close()

    def start(self, part: Part) -> None:
        command = [
            sys.executable, "-m", "headrace", "worker", "--redis-url", self.url, "--model", str(self.folder / "model"),
            "--served-model-name", MODEL, "--shard", str(part.number), "--name", f"more-{next(self._names)}", *OPTIONS,
            "--drain-timeout", "30",
        ]  # fmt: skip
        with (self.folder / "workers.log").open("ab") as log:
            part.workers.append(subprocess.Popen(command, stdout=log, stderr=log, env=self.stack.env))

    async def scale(self, part: Part, now: float, offered: float) -> None:
        there = 1 + len(part.workers)
        serving = sum(worker.state == "serving" for worker in await part.bus.list_workers())
        part.history.append((now, offered, there, serving))
        part.leaving = [process for process in part.leaving if process.poll() is None]
        part.worker_s += TICK_S * (there + len(part.leaving))
        wanted = part.scaler.wanted(now, await part.demand(), there)
        for _ in range(wanted - there):
            self.start(part)
        for _ in range(there - wanted):
            process = part.workers.pop()
            process.send_signal(signal.SIGTERM)
            part.leaving.append(process)

    async def ask(self, session: aiohttp.ClientSession, dice: random.Random) -> None:
        count = dice.randint(*OUTPUT)
        body = {
            "model": MODEL,
            "prompt": [dice.randrange(200) for _ in range(16)],
            "max_tokens": count,
            "ignore_eos": True,
        }
        began, full = time.monotonic(), count * (STEP_S + SEATS * ROW_S)
        async with session.post(self.stack.url + "/v1/completions", json=body) as reply:
            answer = await reply.json()
            assert reply.status == 200, answer
            assert answer["usage"]["completion_tokens"] == count
        took = time.monotonic() - began
        self.times.append((took - full, took <= 2 * full + GRACE_S))

    async def run(self, seed: int) -> None:
        dice, began = random.Random(seed), time.monotonic()
        arrivals = self.load.arrivals(dice, SEATS / REQUEST_S * len(self.parts))
        timeout = aiohttp.ClientTimeout(total=None)
        async with (
            aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session,
            asyncio.TaskGroup() as group,
        ):
            group.create_task(self._tick(began))
            for at in arrivals:
                await asyncio.sleep(max(0.0, began + at - time.monotonic()))
                group.create_task(self.ask(session, dice))

    async def _tick(self, began: float) -> None:
        for tick in range(int(self.load.day.seconds / TICK_S)):
            await asyncio.sleep(max(0.0, began + tick * TICK_S - time.monotonic()))
            now = time.monotonic() - began
            await asyncio.gather(*(self.scale(part, now, self.load.offered(now)) for part in self.parts))

    def figures(self) -> dict[str, object]:
        ideal = len(self.parts) * self.load.ideal()
        starts = [asked - serving for part in self.parts for _, _, asked, serving in part.history]
        return {
            "requests": len(self.times),
            "met": round(sum(met for _, met in self.times) / len(self.times), 4),
            "of_ideal": round(sum(part.worker_s for part in self.parts) / ideal, 3),
            "flaps": sum(
                changes_back([(h[0], h[2]) for h in part.history], self.rule.scale_down_after) for part in self.parts
            ),
            "most_workers": sum(max(h[2] for h in part.history) for part in self.parts),
            "asked_and_not_serving": round(sum(max(0, one) for one in starts) / max(1, len(starts)), 3),
        }


async def day(folder: Path, stack: Stack, options: argparse.Namespace) -> dict[str, object]:
    rule = Scaling(
        max_workers=8, requests_per_worker=options.requests_per_worker, scale_down_after=options.scale_down_after,
        step_down_every=options.step_down_every,
    )  # fmt: skip
    seconds = options.minutes * 60
    dice = random.Random(f"live{options.seed}")
    surges = [dice.uniform(0, 0.95 * seconds) for _ in range(options.surges)]
    load = Load(options.peak, surges, Day(seconds, seconds / 100, TICK_S))
    fleet = Fleet(folder, stack, rule, load)
    await fleet.open()
    try:
        await fleet.run(options.seed)
        return fleet.figures()
    finally:
        await fleet.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--peak", type=float, default=4.0, help="full workers of each shard at the day's peak")
    parser.add_argument("--surges", type=int, default=2)
    parser.add_argument("--requests-per-worker", type=int, default=17)
    parser.add_argument("--scale-down-after", type=float, default=10.0)
    parser.add_argument("--step-down-every", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="headrace-fleet-") as name:
        folder = Path(name)
        (folder / "model").mkdir()
        save_tiny_model("llama", folder / "model")
        with Stack(
            folder / "stack", "--model", str(folder / "model"), "--served-model-name", MODEL, *OPTIONS,
            "--shards", "2", "--workers", "2", env={"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()},
        ) as stack:  # fmt: skip
            print(json.dumps(asyncio.run(day(folder, stack, options))))


if __name__ == "__main__":
    main()
