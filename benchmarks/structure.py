"""What constrained rows cost those beside them: 64 decodes of which 8 keep a grammar, against the same 64 without.

    python -m benchmarks.structure                      the 135M shape and the demo model
    python -m benchmarks.structure --model PATH

Blocks of steps of either kind take turns on one engine, so that whatever else the machine does falls on both. All rows
of a step end together: the ratio of the step times is that of the other rows' tokens per second, and, since a
constrained row gets a token in every step, of its own pace. Bounds: 0.97 and 0.7. Masks are timed where they are made.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from array import array
from pathlib import Path
from typing import Any

from benchmarks.models import checkpoint
from benchmarks.stack import settle
from protocol.messages import NewSequence, Plan, pack_ids
from protocol.sampling import SamplingParams
from protocol.structures.structure import Structure
from workers.engines.base import Sampled
from workers.torch_engine.config import EngineConfig
from workers.torch_engine.engine import TorchEngine
from workers.torch_engine.make import make_engine

ROWS, CONSTRAINED, PROMPT = 64, 8, 32
BLOCK = 8  # steps of one kind before the other's turn
OTHERS_BOUND, OWN_BOUND = 0.97, 0.7
ITEM = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "count": {"type": "integer"}, "tags": {"type": "array", "items": {
        "enum": ["red", "green", "blue"]}}},
    "required": ["name", "count", "tags"],
    "additionalProperties": False,
}  # fmt: skip
ENDLESS = Structure(json={"type": "array", "items": ITEM, "minItems": 1000})  # it must not end before the benchmark


class Rows:
    """ROWS sequences on seats of their own; each call of ``step`` gives each of them a token."""

    def __init__(self, engine: TorchEngine, first_seat: int, constrained: int, steps: int, sampling: dict[str, Any]):
        self.engine = engine
        size, rng = engine.config.block_size, random.Random(1)
        vocab = engine.backend.vocab_size
        width = -(-(PROMPT + steps) // size)
        new = []
        for row in range(ROWS):
            seat = first_seat + row
            params = SamplingParams(
                max_tokens=steps, ignore_eos=True, structure=ENDLESS if row < constrained else None, **sampling
            )
            ids = pack_ids([rng.randrange(vocab) for _ in range(PROMPT)])
            blocks = pack_ids(range(seat * width, (seat + 1) * width))
            new.append(NewSequence(seat, "", row, 1, ids, PROMPT, params, 0, 0, blocks, 0))
        self.seats = array("H", range(first_seat, first_seat + ROWS)).tobytes()
        per_step = engine.config.max_num_batched_tokens // PROMPT
        for at in range(0, ROWS, per_step):
            some = new[at : at + per_step]
            seats = array("H", [one.seat for one in some]).tobytes()
            engine.execute(Plan(0, 0, 1, seats, pack_ids([PROMPT] * len(some)), b"\1" * len(some), some)).wait()

    def step(self) -> Sampled:
        return self.engine.execute(Plan(0, 0, 1, self.seats)).wait()

    def block(self) -> tuple[float, list[Sampled]]:
        """(seconds, results) of BLOCK steps, after one that is not counted: the other kind's work may run into it."""
        self.step()
        began = time.perf_counter()
        results = [self.step() for _ in range(BLOCK)]
        return time.perf_counter() - began, results


def measure(model: str, blocks: int, sampling: dict[str, Any], threads: int | None) -> dict[str, Any]:
    steps = (blocks + 1) * (BLOCK + 1) + 1
    engine = make_engine(
        EngineConfig(
            model=model, max_model_len=PROMPT + steps, max_num_seqs=2 * ROWS, max_num_batched_tokens=512,
            threads=threads,
        )
    )  # fmt: skip
    capacity = engine.load(lambda stage, fraction: None)
    settle([os.getpid()])
    plain = Rows(engine, 0, 0, steps, sampling)
    mixed = Rows(engine, ROWS, CONSTRAINED, steps, sampling)
    plain.block(), mixed.block()  # warm
    ratios, masks, waits, times = [], [], [], []
    for number in range(blocks):
        first, second = (plain, mixed) if number % 2 else (mixed, plain)
        (one, ones), (other, others) = first.block(), second.block()
        without, held, results = (one, other, others) if first is plain else (other, one, ones)
        assert not any(result.failed for result in results)
        ratios.append(without / held)
        times.append(without / BLOCK)
        masks += [result.mask_us for result in results]
        waits += [result.mask_wait_us for result in results]
    masks.sort()
    ratio = statistics.median(ratios)
    return {
        "device": capacity.device,
        "step_ms": round(1e3 * statistics.median(times), 2),
        "others_tokens_s": round(ratio, 3),
        "own_pace": round(ratio, 3),
        "spread": [round(value, 3) for value in (min(ratios), max(ratios))],
        "mask_us_p50": masks[len(masks) // 2],
        "mask_us_p99": masks[int(0.99 * len(masks))],
        "wait_us_mean": round(statistics.mean(waits), 1),
        "held": ratio >= OTHERS_BOUND,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", help="a local checkpoint; default: the 135M shape, the demo model")
    parser.add_argument("--blocks", type=int, default=24, help=f"of {BLOCK} steps, of each kind")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--temperature", type=float, default=0.8)
    args = parser.parse_args()
    models = args.model or [str(checkpoint("135m")), str(Path(__file__).parents[1] / "examples" / "demo-model")]
    for model in models:
        found = measure(model, args.blocks, {"temperature": args.temperature, "seed": 1}, args.threads)
        print(json.dumps({"model": Path(model).name, "bounds": [OTHERS_BOUND, OWN_BOUND], **found}))


if __name__ == "__main__":
    main()
