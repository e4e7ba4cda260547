"""The engine alone, no Redis and no scheduler: what the stack around it is measured against.

    python -m benchmarks.engine --model PATH            a checkpoint
    python -m benchmarks.engine --shape 135m            a Llama shape with random bf16 weights, made on the spot

Told are: milliseconds of a decode step by batch size, and output tokens per second of the workloads w1 (one stream,
prompt 128, output 128) and w2 (64 requests at once, prompts 32-256, outputs 16-256), all greedy and seeded.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from array import array
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks.models import SHAPES, checkpoint
from benchmarks.stack import settle
from protocol.messages import NewSequence, Plan, pack_ids
from protocol.sampling import SamplingParams
from workers.torch_engine.config import EngineConfig
from workers.torch_engine.engine import TorchEngine
from workers.torch_engine.make import make_engine


class Batch:
    """Sequences on an engine, each with blocks for all it will ever hold; decodes first, then prefills, in order."""

    def __init__(self, engine: TorchEngine, params: SamplingParams) -> None:
        self.engine, self.params = engine, params
        self.step = 0
        self.decodes: list[float] = []  # seconds of each step of the last run in which all sequences decoded

    def run(self, lengths: list[tuple[int, int]], seed: int = 0) -> tuple[float, float]:
        """(seconds until all are done, seconds until the first token of the last one started)."""
        rng = random.Random(seed)
        size, budget = self.engine.config.block_size, self.engine.config.max_num_batched_tokens
        vocab = self.engine.backend.model.config.get_text_config().vocab_size
        todo, left, new, block = [], [], [], 0
        self.decodes = []
        for seat, (prompt, output) in enumerate(lengths):
            width = -(-(prompt + output) // size)
            ids = [rng.randrange(vocab) for _ in range(prompt)]
            blocks = pack_ids(range(block, block + width))
            new.append(NewSequence(seat, "", seat, 1, pack_ids(ids), prompt, self.params, 0, 0, blocks, 0))
            block += width
            todo.append(prompt)
            left.append(output)
        began = time.perf_counter()
        first = 0.0
        while any(left):
            rows = [(seat, 1, 1) for seat in range(len(todo)) if not todo[seat] and left[seat]]
            room = budget - len(rows)
            for seat in range(len(todo)):
                if todo[seat] and room > 0:
                    count = min(todo[seat], room)
                    todo[seat] -= count
                    room -= count
                    rows.append((seat, count, not todo[seat]))
            seats, counts, samples = zip(*rows, strict=True)
            self.step += 1
            step_began = time.perf_counter()
            self.engine.execute(
                Plan(0, 0, self.step, array("H", seats).tobytes(), pack_ids(counts), bytes(samples), new)
            ).wait()
            if len(rows) == len(todo) == sum(counts):
                self.decodes.append(time.perf_counter() - step_began)
            new = []
            for seat, _, sampled in rows:
                left[seat] -= sampled
            if not first and not any(todo):
                first = time.perf_counter() - began
        took = time.perf_counter() - began
        self.engine.reset()
        return took, first


def decode_ms(batch: Batch, rows: int, context: int, steps: int) -> float:
    """Median milliseconds of a step in which ``rows`` sequences of about ``context`` tokens each gain a token."""
    prefills = -(-rows * context // (batch.engine.config.max_num_batched_tokens - rows))  # steps until all decode
    batch.run([(context, 1 + prefills + steps)] * rows)
    return statistics.median(batch.decodes) * 1e3


def sampler_ms(engine: TorchEngine, rows: int) -> float:
    """Median milliseconds in which ``rows`` draws are made, each with a temperature and top-p, from random logits."""
    params = SamplingParams(temperature=1.0, top_p=0.9, max_tokens=16)
    for seat in range(rows):
        engine.sampler.add(NewSequence(seat, "", 0, 1, pack_ids([0]), 1, params, seat, 0, pack_ids([seat]), 0))
    logits = 3 * torch.randn(rows, engine.sampler.vocab_size, device=engine.device)
    seats, took = np.arange(rows), []
    for position in range(20):
        began = time.perf_counter()
        engine.sampler.sample(logits, seats, np.full(rows, position)).tokens.cpu()
        took.append(time.perf_counter() - began)
    engine.sampler.clear()
    return statistics.median(took) * 1e3


def ceilings() -> tuple[float, float]:
    """What this machine can do with these threads: bytes read a second, float32 operations a second of a product."""
    words = torch.ones(1 << 26)  # 256 MiB: no cache holds it
    left, right = torch.ones(2048, 2048), torch.ones(2048, 2048)
    reads, products = [], []
    for _ in range(5):
        began = time.perf_counter()
        words.sum()
        middle = time.perf_counter()
        left @ right
        reads.append(words.nbytes / (middle - began))
        products.append(2 * 2048**3 / (time.perf_counter() - middle))
    return max(reads), max(products)


def matrix_weights(config: Any) -> int:
    """Weights that take part in every token's products; packed ones are not the model's parameters any more."""
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config)
    return sum(m.weight.numel() for m in shapes.modules() if isinstance(m, torch.nn.Linear))


def floor_ms(weights: int, rows: int, read: float, product: float) -> float:
    """No step of ``rows`` tokens can be faster: the weights are read once, in the checkpoint's bf16, and every token
    costs a multiplication and an addition per weight. Attention is not counted."""
    return 1e3 * max(2 * weights / read, 2 * weights * rows / product)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a local checkpoint; default: --shape")
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--batches", default="1,8,32,64", help="batch sizes of the decode steps")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--steps-only", action="store_true", help="no workloads")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    engine = make_engine(
        EngineConfig(
            model=args.model or str(checkpoint(args.shape)),
            dtype=args.dtype,
            device=args.device,
            max_model_len=2048,
            max_num_seqs=256,
            max_num_batched_tokens=512,
            threads=args.threads,
        )
    )
    capacity = engine.load(lambda stage, fraction: None)
    batch = Batch(engine, SamplingParams(temperature=args.temperature, top_p=args.top_p, max_tokens=1 << 20))
    rng = random.Random(1)
    w2 = [(rng.randint(32, 256), rng.randint(16, 256)) for _ in range(64)]
    settle([os.getpid()])
    batch.run([(16, 4)])  # warm
    found: dict[str, Any] = {"device": capacity.device, "dtype": capacity.dtype, "threads": torch.get_num_threads()}
    if capacity.device == "cpu":
        read, product = ceilings()
        found["read_gb_s"], found["product_gflop_s"] = round(read / 1e9, 1), round(product / 1e9, 1)
        weights = matrix_weights(engine.backend.model.config.get_text_config())
    for rows in map(int, args.batches.split(",")):
        values = [decode_ms(batch, rows, args.context, 24) for _ in range(args.rounds)]
        found[f"decode_ms_{rows}"] = round(statistics.median(values), 2)
        found[f"decode_spread_{rows}"] = round((max(values) - min(values)) / statistics.median(values), 3)
        if capacity.device == "cpu":
            found[f"floor_ms_{rows}"] = round(floor_ms(weights, rows, read, product), 2)
        found[f"sampler_ms_{rows}"] = round(sampler_ms(engine, rows), 2)
    if not args.steps_only:
        w1_s, w1_first = batch.run([(128, 128)])
        w2_s, _ = batch.run(w2)
        found["w1_tokens_s"], found["w1_first_ms"] = round(128 / w1_s, 1), round(w1_first * 1e3)
        found["w2_tokens_s"] = round(sum(output for _, output in w2) / w2_s, 1)
    print(json.dumps(found) if args.json else "\n".join(f"{name:14} {value}" for name, value in found.items()))


if __name__ == "__main__":
    main()
