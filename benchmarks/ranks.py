"""Ranks on a CPU beside one process with as many threads: output tokens per second of w1 and w2 (benchmarks/engine.py).

    python -m benchmarks.ranks [--shape 135m] [--ranks 2] [--rounds 3]

Each rank has one thread, native kernels included, and they add up by gloo. In turn, each round anew; told are medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict

from transformers import AutoConfig

from benchmarks.engine import W1, W2, Batch
from benchmarks.models import SHAPES, checkpoint
from protocol.sampling import SamplingParams
from workers.engines.process import ProcessEngine
from workers.engines.ranks import RankedEngine
from workers.torch_engine.config import EngineConfig


def measure(model: str, ranks: int, threads: int, dtype: str) -> dict[str, float]:
    config = EngineConfig(
        model=model, device="cpu", dtype=dtype, max_model_len=2048, max_num_seqs=256, max_num_batched_tokens=512,
        threads=threads,
    )  # fmt: skip
    engine = RankedEngine("torch", config, ranks) if ranks > 1 else ProcessEngine("torch", config)
    try:
        engine.load(lambda stage, fraction: None)
        vocab = AutoConfig.from_pretrained(model).get_text_config().vocab_size
        batch = Batch(engine, SamplingParams(temperature=0.0, max_tokens=1 << 20), config, vocab)
        batch.run([(16, 4)])  # warm
        return {
            "w1": sum(output for _, output in W1) / batch.run(W1)[0],
            "w2": sum(output for _, output in W2) / batch.run(W2)[0],
        }
    finally:
        engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a local checkpoint; default: --shape")
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    model = options.model or str(checkpoint(options.shape))
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(options.rounds):
        for name, ranks, threads in (("one", 1, options.ranks), ("ranks", options.ranks, 1)):
            for load, rate in measure(model, ranks, threads, options.dtype).items():
                found[f"{load}_{name}"].append(rate)
    told = {name: round(statistics.median(rates), 1) for name, rates in sorted(found.items())}
    share = {f"{load}_share": round(told[f"{load}_ranks"] / told[f"{load}_one"], 3) for load in ("w1", "w2")}
    print(json.dumps({"ranks": options.ranks, **told, **share}))


if __name__ == "__main__":
    main()
