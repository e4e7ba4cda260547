"""The parts of benchmarks.gpu, one a process: `python -m benchmarks.gpu_parts NAME FILE` writes what it finds to FILE.

Engines are made without files where no other process has to read the model: weights are drawn on the device.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import signal
import statistics
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch

from benchmarks.bare import BareLoop
from benchmarks.gpu_parity import parity
from benchmarks.gpu_part import Part, draw_model, load_engine, timed
from benchmarks.models import PAD, tokenizer
from benchmarks.stack import Stack
from headrace.clients.workload import Vocabulary, Workload
from protocol.messages import Capacity, NewSequence, Plan, pack_ids
from protocol.sampling import SamplingParams

CONTEXT = 512  # tokens of every sequence in the decode steps
STEPS = 48  # that are timed
BATCHES = (1, 32, 128, 256)
BODY = {"temperature": 0.0, "ignore_eos": True}


# ------------------------------------------------------------------ the machine


def ceilings(part: Part) -> tuple[float, float]:
    """Bytes moved a second by a copy on the device, reads and writes counted; operations a second of a bf16 product."""
    size = (1 << 22) if part.tiny else (1 << 30)
    edge = 256 if part.tiny else 8192
    source = torch.ones(size, dtype=torch.uint8, device=part.device)
    target = torch.empty_like(source)
    dtype = torch.bfloat16 if part.cuda else torch.float32
    left, right = (torch.randn(edge, edge, device=part.device).to(dtype) for _ in range(2))
    copy = timed(part, lambda: target.copy_(source), 10)
    product = timed(part, lambda: left @ right, 10)
    return 2 * size / copy, 2 * edge**3 / product


def machine(part: Part) -> None:
    moved, computed = ceilings(part)
    name = torch.cuda.get_device_name() if part.cuda else "CPU"
    part.note(device=name, torch=torch.__version__, copy_tb_s=moved / 1e12, product_tflop_s=computed / 1e12)


# ------------------------------------------------------------------ the engine alone


def decode(part: Part, engine: Any, rows: int, context: int, params: SamplingParams) -> dict[str, Any]:
    """Steps in which ``rows`` sequences of ``context`` tokens gain one each, two queued at a time. What they attend to
    is not computed but claimed to be there: it does not matter what is in the pool."""
    size, warm = engine.config.block_size, 4
    steps = 6 if part.tiny else STEPS
    width = -(-(context + steps + warm + 2) // size)
    width = min(width, engine.backend.pool.blocks // rows)
    context = min(context, width * size - steps - warm - 2)
    new = [
        NewSequence(
            seat, "", seat, 1, pack_ids(range(context)), context, params, 0, 0,
            pack_ids(range(seat * width, (seat + 1) * width)), context - 1,
        )
        for seat in range(rows)
    ]  # fmt: skip
    seats = b"".join(seat.to_bytes(2, "little") for seat in range(rows))
    running: deque[Any] = deque()
    ends, began = [], 0.0
    stepper = getattr(engine.backend, "steps", None) if part.cuda else None
    for step in range(steps + warm):
        if step == warm:
            part.wait()
            if stepper is not None:
                stepper.trace = []
            began = time.perf_counter()
        output = engine.execute(Plan(0, 0, step + 1, seats, b"", b"", new if step == 0 else []))
        running.append(output)
        if step >= warm and part.cuda:
            ends.append(output._clock._marks[1])
        if len(running) > 1:
            running.popleft().wait()
    while running:
        running.popleft().wait()
    part.wait()
    found: dict[str, Any] = {"batch": rows, "context": context}
    found["step_ms"] = round((time.perf_counter() - began) / steps * 1e3, 3)
    if stepper is not None and stepper.trace:
        begins, stepper.trace = stepper.trace, None
        busy = sum(a.elapsed_time(b) for a, b in zip(begins, ends, strict=True))
        span = begins[0].elapsed_time(ends[-1])
        found["gpu_ms"] = round(busy / steps, 3)
        found["idle_share"] = round(max(0.0, 1 - busy / span), 3)
    engine.reset()
    return found


def floor_ms(fields: dict[str, Any], rows: int, context: int, moved: float, computed: float) -> float:
    """No step can be faster: weights and contexts are read once, every token costs two operations a weight."""
    size = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
    layers, hidden, heads = fields["num_hidden_layers"], fields["hidden_size"], fields["num_attention_heads"]
    kv = fields["num_key_value_heads"] * size
    weights = layers * (2 * hidden * heads * size + 2 * hidden * kv + 3 * hidden * fields["intermediate_size"])
    weights += hidden * fields["vocab_size"]
    read = 2 * weights + 2 * rows * context * 2 * kv * layers
    operations = 2 * weights * rows + 4 * rows * context * heads * size * layers
    return 1e3 * max(read / moved, operations / computed)


def engine_alone(part: Part, shape: str) -> None:
    moved, computed = ceilings(part)
    part.note(copy_tb_s=round(moved / 1e12, 3), product_tflop_s=round(computed / 1e12, 1))
    engine, capacity = load_engine(part, shape)
    greedy = SamplingParams(temperature=0.0, max_tokens=1 << 20, ignore_eos=True)
    nucleus = SamplingParams(temperature=0.8, top_p=0.9, max_tokens=1 << 20, ignore_eos=True)
    batches = (1, 4) if part.tiny else BATCHES
    context = 32 if part.tiny else CONTEXT
    steps: list[dict[str, Any]] = []
    for rows in batches:
        tries = [decode(part, engine, rows, context, greedy) for _ in range(3)]
        best = sorted(tries, key=lambda found: found["step_ms"])[1]
        best["floor_ms"] = round(floor_ms(part.fields(shape), rows, best["context"], moved, computed), 3)
        best["over_floor"] = round(best["step_ms"] / best["floor_ms"], 3)
        best["top_p_ms"] = decode(part, engine, rows, context, nucleus)["step_ms"]
        steps.append(best)
        part.note(steps=steps)
    loop(part, engine, capacity)
    stepper = getattr(engine.backend, "steps", None)
    if stepper is not None:
        stepper.forget()
        for found in steps:
            if found["batch"] in (1, 32):
                found["without_graphs_ms"] = decode(part, engine, found["batch"], context, greedy)["step_ms"]
        part.note(steps=steps)


def loop(part: Part, engine: Any, capacity: Capacity) -> None:
    """The bare loop over the workload that the whole stack is given."""
    bare = BareLoop(engine, capacity)
    vocabulary = Vocabulary(size=capacity.vocab_size)
    rates = []
    for seed in (1, 2, 3):
        requests = Workload(**{**vars(part.workload()), "seed": seed}).build(vocabulary)
        rates.append(bare.run(requests)["tokens_per_s"])
        part.note(loop_tokens_per_s=statistics.median(rates), loop_rounds=rates)
    few = part.workload().build(vocabulary)
    part.note(loop_few_tokens_per_s=bare.run(few[: len(few) // 8 or 1])["tokens_per_s"])


# ------------------------------------------------------------------ the whole stack


def stack(part: Part, shape: str) -> None:
    from benchmarks import load
    from headrace.clients.bench import Target

    fields = part.fields(shape)
    with tempfile.TemporaryDirectory(prefix="headrace-") as folder:
        path = Path(folder) / shape
        began = time.perf_counter()
        dtype = torch.bfloat16 if part.cuda else torch.float32
        model = draw_model(fields, part.device, dtype, "eager")
        model.save_pretrained(path)
        tokenizer(fields["vocab_size"]).save_pretrained(path)
        del model
        gc.collect()
        if part.cuda:
            torch.cuda.empty_cache()
        part.note(made_s=round(time.perf_counter() - began, 1))
        args = ["--model", str(path), "--served-model-name", shape, "--max-model-len", "2048"]
        args += ["--max-num-seqs", "8" if part.tiny else "256"]
        if part.cuda:
            args += ["--device", "cuda"]
        else:
            args += ["--kv-cache-memory", "64MiB", "--engine-options", '{"process": true}', "--threads", "1"]
        began = time.perf_counter()
        signal.signal(signal.SIGTERM, lambda number, frame: _kill(running))
        running = Stack(*args)
        with running:
            part.note(ready_s=round(time.perf_counter() - began, 1))
            target = Target(running.url, shape, body=BODY)
            vocabulary = Vocabulary(size=fields["vocab_size"])
            load.warm_up(target, vocabulary)
            rounds = []
            for seed in (1, 2, 3):
                before = running.use()
                given = Workload(**{**vars(part.workload()), "seed": seed})
                figures = load.figures(load.run(target, given, vocabulary))
                rounds.append(figures)
                rates = [found["tokens_per_s"] for found in rounds]
                part.note(
                    tokens_per_s=statistics.median(rates),
                    rounds=rates,
                    last=figures,
                    use=running.use().since(before, figures["output_tokens"]),
                )


def _kill(running: Stack) -> None:
    """Time is up: the supervisor's end is everyone's, so nothing stays on the device."""
    if running._process.process is not None:
        running._process.signal_group(signal.SIGKILL)
    os._exit(1)


# ------------------------------------------------------------------ transformers' own


def peer(part: Part, shape: str) -> None:
    """transformers' continuous batching over the same prompts, the same number of tokens each. With sdpa: it is what
    there is without further packages."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    fields = part.fields(shape)
    dtype = torch.bfloat16 if part.cuda else torch.float32
    model = draw_model(fields, part.device, dtype, "paged|sdpa")
    asked = part.workload().build(Vocabulary(size=fields["vocab_size"]))
    output = asked[0].max_tokens
    config = GenerationConfig(max_new_tokens=output, do_sample=False, eos_token_id=-1, pad_token_id=PAD)
    batching = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64) if part.tiny else ContinuousBatchingConfig()
    for warm, requests in ((True, asked[: len(asked) // 8 or 1]), (False, asked)):
        prompts = [list(request.prompt) for request in requests]
        part.wait()
        began = time.perf_counter()
        results = model.generate_batch(prompts, generation_config=config, continuous_batching_config=batching)
        took = time.perf_counter() - began
        made = sum(len(result.generated_tokens) for result in results.values())
        rate = round(made / took, 1)
        part.note(**({"few_tokens_per_s": rate} if warm else {"tokens_per_s": rate, "output_tokens": made}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part")
    parser.add_argument("file", type=Path)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(levelname)s %(name)s: %(message)s")
    part = Part(args.file, args.tiny)
    kind, _, shape = args.part.partition("-")
    if kind == "machine":
        machine(part)
    elif kind == "parity":
        parity(part)
    else:
        {"engine": engine_alone, "stack": stack, "transformers": peer}[kind](part, shape)


if __name__ == "__main__":
    main()
