"""How far one scheduler and one server go without a GPU for each worker: N simulated workers, always full.

    python -m benchmarks.knees --workers 1 2 4 8

Each worker runs 256 sequences in steps of 10 ms of an imagined device. The requests are put into the queue as a
gateway would, and nobody reads them: the gateway has a benchmark of its own (gateway.py). Told are tokens per second
in a window of the steady state, and the CPU time of each role, from which the knee on a machine of its own follows:
one core's worth of tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import time
import urllib.request
from typing import Any

from benchmarks.stack import Stack, Unavailable, end_on_sigterm
from headrace.options import demo_model
from protocol.messages import Job, new_rid
from protocol.sampling import SamplingParams
from tests.bus import Bus

SEQUENCES = 256  # on each worker
STEP_US = 10_000
CONTEXT = 4096  # tokens that a sequence may grow to: more than any window here needs
MODEL = "bench-knees"
SETTLE_S = 120.0


def worker_tokens(ports: list[int]) -> float:
    """Tokens made by all workers so far."""
    total = 0.0
    for port in ports:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as reply:
            found = re.search(r"^headrace_worker_tokens_total\{.*\} (\S+)$", reply.read().decode(), re.MULTILINE)
            total += float(found[1]) if found else 0.0
    return total


async def fill(url: str, requests: int) -> None:
    bus = Bus(url, MODEL)
    await bus.connect()
    sampling = SamplingParams(max_tokens=CONTEXT - 64, ignore_eos=True)

    async def some(count: int) -> None:
        for _ in range(count):
            await bus.accept(Job(prompt=[5] * 32, sampling=sampling), rid=new_rid())

    try:
        await asyncio.gather(*(some(-(-requests // 16)) for _ in range(16)))
    finally:
        await bus.close()


def measure(workers: int, seconds: float, sequences: int = SEQUENCES, step_us: int = STEP_US) -> dict[str, Any]:
    engine = {
        "step_us": step_us, "token_us": 0, "row_us": 0, "max_model_len": CONTEXT,
        "num_blocks": sequences * (CONTEXT // 16 + 1),
    }  # fmt: skip
    options = {
        "--model": str(demo_model()),
        "--served-model-name": MODEL,
        "--engine": "simulated",
        "--engine-options": json.dumps(engine),
        "--workers": str(workers),
        "--max-num-seqs": str(sequences),
        "--max-model-len": str(CONTEXT),  # the simulated engine's; the demo model, of which only the tokenizer is
        "--threads": "1",  # used, has less
        "--drain-timeout": "0s",
    }
    with Stack(*(part for pair in options.items() for part in pair)) as stack:
        ports = stack.metrics_ports("worker")
        wanted = workers * sequences
        asyncio.run(fill(stack.redis_url, wanted))
        deadline = time.monotonic() + SETTLE_S
        while worker_tokens(ports) < 16 * wanted:  # all are past their prompts, and the pace has settled
            if time.monotonic() > deadline:
                raise Unavailable("the simulated workers did not come to a steady state")
            time.sleep(0.2)
        before, made = stack.use(), worker_tokens(ports)
        time.sleep(seconds)
        after, made = stack.use(), worker_tokens(ports) - made
        used = after.since(before, int(made))
        rate = made / (after.at - before.at)
        if rate * seconds + 16 * wanted > wanted * (CONTEXT - 64):
            raise Unavailable("the sequences ended within the window: ask for fewer seconds")
    per_core = {role: round(1e6 / us) for role, us in used["cpu_us_per_token"].items() if us > 0}
    return {
        "workers": workers,
        "sequences": sequences,
        "tokens_per_s": round(rate),
        "of_ideal": round(rate / (workers * sequences * 1e6 / step_us), 3),
        "tokens_per_core_s": per_core,
        **used,
    }


def main() -> None:
    end_on_sigterm()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--sequences", type=int, default=SEQUENCES)
    parser.add_argument("--step-us", type=int, default=STEP_US)
    parser.add_argument("--seconds", type=float, default=10.0)
    args = parser.parse_args()
    for workers in args.workers:
        print(json.dumps(measure(workers, args.seconds, args.sequences, args.step_us)), flush=True)


if __name__ == "__main__":
    main()
