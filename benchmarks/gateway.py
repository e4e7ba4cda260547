"""How many tokens one gateway process can stream: N open streams, fed by publications made up on the spot.

A real server, a real gateway process and real HTTP clients; only the scheduler and the workers are missing: this
program takes in the requests and publishes one row per stream and step, at a given rate. As many workers as would be
needed for that many streams take turns, each with the rows of its sequences. Told are the tokens that arrived, the
gateway's CPU time per token (from it: what one core could stream), and how long a token took from its publication to
the client, for streams of all workers. Here all streams end in the same step, as they never would; ages of those last
tokens, behind which a thousand requests are closed, stand by themselves.

    python -m benchmarks.gateway --streams 1000 --rate 10000 --seconds 10
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import sys
import tempfile
import time
from multiprocessing import Process, Queue
from pathlib import Path
from typing import Any

import redis.asyncio
import uvloop

from benchmarks.stack import cpu_seconds, resident_bytes
from headrace.serve.embedded import FAST, EmbeddedServer
from protocol.messages import Capacity, Frame, ModelCard, PoolCapacity, encode, pack_ids, row_edges
from tests.bus import Bus

MODEL = "bench/gateway"
MEASURED = 32  # streams whose tokens are timed one by one, spread evenly over all
SEQUENCES = 256  # of a worker at most, which is also what one commit carries
GATEWAY = """
import asyncio, logging, sys, uvloop
logging.basicConfig(level="INFO", stream=sys.stdout, format="%(message)s")
from gateway.app import GatewayConfig, run_gateway
raise SystemExit(uvloop.run(run_gateway(GatewayConfig(redis_url=sys.argv[1], port=0, drain_timeout=0.0))))
"""


# ------------------------------------------------------------------ the clients: a process of their own


class Reader(asyncio.Protocol):
    """One stream: counts its events; a measured one also notes how old each token is on arrival."""

    def __init__(self, body: bytes, measured: bool, totals: dict[str, Any], done: asyncio.Future[None]) -> None:
        self.body, self.measured, self.totals, self.done = body, measured, totals, done

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        head = (
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        )
        transport.write(head % len(self.body) + self.body)  # type: ignore[attr-defined]

    def data_received(self, received: bytes) -> None:
        self.totals["events"] += received.count(b"data: {")
        self.totals["bytes"] += len(received)
        if self.measured:
            now = time.monotonic()
            for last, at in re.findall(rb'"text":"@(!?)([0-9.]+)', received):
                self.totals["last_ages" if last else "ages"].append(now - float(at))
        if b"data: [DONE]" in received:
            self.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(None)


async def read_streams(port: int, streams: int, queue: Queue[Any], model: str) -> None:
    loop = asyncio.get_running_loop()
    totals: dict[str, Any] = {"events": 0, "bytes": 0, "ages": [], "last_ages": []}
    body = json.dumps({"model": model, "prompt": [1, 2, 3], "max_tokens": 100000, "stream": True}).encode()
    waiting = []
    for i in range(streams):
        done = loop.create_future()
        waiting.append(done)
        timed = i % max(1, streams // MEASURED) == 0
        await loop.create_connection(lambda t=timed, d=done: Reader(body, t, totals, d), "127.0.0.1", port)  # type: ignore[misc]
    await asyncio.gather(*waiting)
    queue.put(totals)


def run_clients(port: int, streams: int, queue: Queue[Any], model: str) -> None:
    uvloop.run(read_streams(port, streams, queue, model))


# ------------------------------------------------------------------ the backend


class Source:
    """Admits what arrives, then publishes a token to each stream of a worker at each of its steps."""

    def __init__(self, url: str) -> None:
        self.bus = Bus(url, MODEL)
        self.raw = redis.asyncio.Redis.from_url(url)
        self.cursors: dict[str, int] = {}
        self.channel = ""

    async def start(self) -> None:
        await self.bus.connect()
        card = ModelCard(model=MODEL, created=1, max_model_len=1 << 20, vocab_size=1000)
        await self.bus.publish_card(card, None)
        epoch = await self.bus.lead("bench", await self.bus.read_leader())
        assert epoch is not None
        self.epoch = epoch
        await self.bus.register("w0", Capacity(MODEL, 1 << 20, 1, 1, [PoolCapacity("full", 1, 1)], 1000), "serving")

    async def admit(self, streams: int) -> None:
        while len(self.cursors) < streams:
            for entry in await self.bus.read_jobs("term", 256, 1000):
                assert entry.rid is not None
                await self.bus.admit(self.epoch, entry.entry_id, rid=entry.rid, prompts=[pack_ids([1, 2, 3])], seed=1)
                self.cursors[entry.rid] = 0
        names = {n for channels in (await self.bus.scan_live()).values() for n in channels}
        (self.channel,) = names

    async def step(self, rids: list[str], last: bool = False) -> None:
        frame = encode(Frame(7, f"@{'!' if last else ''}{time.monotonic():.6f} tok", "stop" if last else None))
        parts: list[bytes] = []
        for rid in rids:
            head, tail = row_edges(rid, 0, self.cursors[rid], len(frame), None)
            parts += (head, frame, tail)
            self.cursors[rid] += len(frame)
        await self.raw.publish(self.bus.keys.out(self.channel), b"".join(parts))


async def measure(
    url: str,
    streams: int,
    rate: float,
    seconds: float,
    *,
    model: str = MODEL,
    env: dict[str, str] | None = None,
    tree: Path | None = None,
) -> dict[str, Any]:
    """``model``: the name that clients ask for; ``env``: of the gateway besides; ``tree``: another checkout of it."""
    source = Source(url)
    await source.start()
    gateway = await asyncio.create_subprocess_exec(
        sys.executable, "-c", GATEWAY, url, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
        env={**os.environ, **(env or {}), **({"PYTHONPATH": str(tree)} if tree else {})}, cwd=tree,
    )  # fmt: skip
    assert gateway.stdout is not None
    line = (await gateway.stdout.readline()).decode()
    port = int(line.rsplit(":", 1)[1])
    queue: Queue[Any] = Queue()
    clients = Process(target=run_clients, args=(port, streams, queue, model))
    clients.start()
    await source.admit(streams)
    await asyncio.sleep(1.0)
    interval = streams / rate
    steps = max(2, int(seconds / interval))
    cpu, started = cpu_seconds(gateway.pid), time.monotonic()
    rids = list(source.cursors)
    workers = [rids[at : at + SEQUENCES] for at in range(0, streams, SEQUENCES)]
    for step in range(steps):
        for turn, sequences in enumerate(workers, 1):
            await source.step(sequences, last=step == steps - 1)
            await asyncio.sleep(max(0.0, started + (step + turn / len(workers)) * interval - time.monotonic()))
    totals = await asyncio.to_thread(queue.get)
    wall, cpu = time.monotonic() - started, cpu_seconds(gateway.pid) - cpu
    clients.join()
    memory = resident_bytes(gateway.pid) / 2**20
    gateway.terminate()
    await gateway.wait()
    ages, last_ages = sorted(totals["ages"]), sorted(totals["last_ages"])
    tokens = streams * steps
    return {
        "streams": streams,
        "tokens": tokens,
        "arrived": totals["events"],
        "tokens_per_s": round(tokens / wall),
        "cpu_us_per_token": round(1e6 * cpu / tokens, 1),
        "tokens_per_cpu_s": round(tokens / cpu),
        "cpu_share": round(cpu / wall, 2),
        "age_p50_ms": round(1e3 * ages[len(ages) // 2], 1),
        "age_p99_ms": round(1e3 * ages[int(len(ages) * 0.99)], 1),
        "last_age_p99_ms": round(1e3 * last_ages[int(len(last_ages) * 0.99)], 1),
        "bytes_per_token": round(totals["bytes"] / tokens),
        "rss_mib": round(memory),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=10000.0, help="tokens per second, over all streams")
    parser.add_argument("--seconds", type=float, default=10.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, EmbeddedServer(Path(folder), settings=FAST) as server:
        print(json.dumps(uvloop.run(measure(server.url, args.streams, args.rate, args.seconds)), indent=1))


if __name__ == "__main__":
    main()
