"""The parts of benchmarks.gpu: `python -m benchmarks.gpu_parts FILE NAME...` writes what they find to FILE.

Engines are made without files where no other process has to read the model: weights are drawn on the device. One part
a process, so that none inherits memory or a broken device; with --tiny, all of them in one.

Over 400 lines: one function for each part, as the table at the end names them.
"""

from __future__ import annotations

import argparse
import gc
import logging
import random
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import gpu_load, gpu_offload, gpu_products, gpu_profile
from benchmarks.bare import BareLoop
from benchmarks.gpu_parity import parity
from benchmarks.gpu_part import MOE, Part, draw_model, load_engine, timed
from benchmarks.gpu_tests import memcheck, run_tests
from benchmarks.models import PAD
from benchmarks.stack import Unavailable
from headrace.clients.workload import Vocabulary
from protocol.messages import Capacity, NewSequence, Plan, pack_ids
from protocol.sampling import SamplingParams

CONTEXT = 512  # tokens of every sequence in the decode steps
STEPS = 48  # that are timed
BATCHES = (1, 32, 128, 256)
GREEDY = SamplingParams(temperature=0.0, max_tokens=1 << 20, ignore_eos=True)
KINDS = {  # of sampling, each measured beside greedy
    "top_p": {"temperature": 0.8, "top_p": 0.9},
    "top_k": {"temperature": 0.8, "top_k": 40},
    "min_p": {"temperature": 0.8, "min_p": 0.05},
    "seed": {"temperature": 0.8},
    "penalties": {"temperature": 0.8, "repetition_penalty": 1.1, "frequency_penalty": 0.2},
    "logprobs_5": {"temperature": 0.0, "logprobs": 5},
}


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


def decode(
    part: Part, engine: Any, rows: int, context: int, kinds: list[SamplingParams], steps: int = STEPS,
    profiler: Any = None,
) -> dict[str, Any]:  # fmt: skip
    """Steps in which ``rows`` sequences of ``context`` tokens gain one each, two queued at a time; ``kinds`` in turn.
    ``profiler`` is on while a step is queued.

    Each row has tokens of its own, so that a router does not send all of them to the same experts. What they attend to
    is not computed but claimed to be there: it does not matter what is in the pool.
    """
    warm, steps = 4, 6 if part.tiny else steps
    new = sequences(engine, rows, context, kinds, warm + steps)
    seats = np.arange(rows, dtype="<u2").tobytes()
    running: deque[Any] = deque()
    ends, host, began = [], [], 0.0
    stepper = getattr(engine.backend, "steps", None) if part.cuda else None
    for step in range(steps + warm):
        if step == warm:
            part.wait()
            if stepper is not None:
                stepper.trace = []
            began = time.perf_counter()
        plan = Plan(0, 0, step + 1, seats, b"", b"", new if step == 0 else [])
        queued = time.perf_counter()
        if profiler is not None and step >= warm:
            output = profiler.runcall(engine.execute, plan)
        else:
            output = engine.execute(plan)
        running.append(output)
        if step >= warm:
            host.append(time.perf_counter() - queued)
            if part.cuda:
                ends.append(output._clock._marks[1])
        if len(running) > 1:
            all_there(running.popleft().wait(), rows)
    while running:
        all_there(running.popleft().wait(), rows)
    part.wait()
    found: dict[str, Any] = {"batch": rows, "context": new[0].prompt_len, "steps": steps}
    found["step_ms"] = round((time.perf_counter() - began) / steps * 1e3, 3)
    found["execute_ms"] = round(1e3 * statistics.median(host), 3)
    if stepper is not None and stepper.trace:
        begins, stepper.trace = stepper.trace, None
        busy = sum(a.elapsed_time(b) for a, b in zip(begins, ends, strict=True))
        span = begins[0].elapsed_time(ends[-1])
        found["gpu_ms"] = round(busy / steps, 3)
        found["idle_share"] = round(max(0.0, 1 - busy / span), 3)
    engine.reset()
    return found


def sequences(engine: Any, rows: int, context: int, kinds: list[SamplingParams], more: int) -> list[NewSequence]:
    """One for each row, of about ``context`` tokens, all but the last said to be computed: these fill whole blocks.
    ``more`` tokens are to come."""
    size = engine.config.block_size
    width = min(-(-(context + more + 2) // size), engine.backend.pool.blocks // rows)
    context = min(context, width * size - more - 2) // size * size + 1
    draw, ids = random.Random(rows), range(100, engine.backend.vocab_size)
    return [
        NewSequence(
            seat, "", seat, 1, pack_ids(draw.choices(ids, k=context)), context, kinds[seat % len(kinds)], seat, 0,
            pack_ids(range(seat * width, (seat + 1) * width)), context - 1,
        )
        for seat in range(rows)
    ]  # fmt: skip


def all_there(sampled: Any, rows: int) -> None:
    """A row that the engine gives up costs no time: it must not look like speed."""
    if len(sampled.tokens) != rows:
        raise Unavailable(f"{rows - len(sampled.tokens)} of {rows} rows were not computed")


def best_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The middle one by time."""
    return sorted(runs, key=lambda found: found["step_ms"])[len(runs) // 2]


def experts_chosen(part: Part, engine: Any, rows: int, context: int) -> list[int] | None:
    """Distinct experts of each layer in one step of ``rows`` rows, asked of the router launch by launch. None: the
    backend computes experts in a way that cannot be watched."""
    chosen: list[int] = []

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        index = args[1] if len(args) > 1 else kwargs.get("top_k_index")
        if index is not None:
            chosen.append(int(index[:rows].unique().numel()))

    hooks = [
        module.register_forward_pre_hook(note, with_kwargs=True)
        for name, module in engine.backend.model.named_modules()
        if name.endswith(".experts")
    ]
    stepper = getattr(engine.backend, "steps", None)
    run = stepper.run if stepper is not None else None
    layers = len(hooks)
    try:
        if stepper is not None:
            stepper.run = lambda step: run(step, replay=False)
        decode_once(engine, rows, context)
    finally:
        for hook in hooks:
            hook.remove()
        if stepper is not None:
            del stepper.run
    return chosen[:layers] if layers and len(chosen) >= layers else None


def decode_once(engine: Any, rows: int, context: int) -> None:
    new = sequences(engine, rows, context, [GREEDY], 1)
    all_there(engine.execute(Plan(0, 0, 1, np.arange(rows, dtype="<u2").tobytes(), b"", b"", new)).wait(), rows)
    engine.reset()


def floor_ms(
    fields: dict[str, Any], rows: int, context: int, moved: float, computed: float,
    experts: list[int] | None = None, stored: float = 2.0,
) -> float:  # fmt: skip
    """No step can be faster: weights and contexts are read once, every token costs two operations a weight.

    ``experts``: distinct ones that the router chose, by layer; None: as many as could be. ``stored``: bytes of a weight
    within the layers; the head is bf16.
    """
    size = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
    layers, hidden, heads = fields["num_hidden_layers"], fields["hidden_size"], fields["num_attention_heads"]
    kv = fields["num_key_value_heads"] * size
    attention = layers * (2 * hidden * heads * size + 2 * hidden * kv)
    expert = 3 * hidden * fields["intermediate_size"]
    head = hidden * fields["vocab_size"]
    of_token = read = layers * expert
    if count := fields.get("num_experts"):
        chosen = experts or [min(count, rows * fields["num_experts_per_tok"])] * layers
        router = layers * hidden * count
        read, of_token = sum(chosen) * expert + router, layers * fields["num_experts_per_tok"] * expert + router
    bytes_read = stored * (attention + read) + 2 * head + 2 * rows * context * 2 * kv * layers
    operations = 2 * (attention + of_token + head) * rows + 4 * rows * context * heads * size * layers
    return 1e3 * max(bytes_read / moved, operations / computed)


def decode_steps(
    part: Part, engine: Any, shape: str, batches: tuple[int, ...], row: dict[str, Any], stored: float = 2.0
) -> None:
    """Steps of each of ``batches`` over their floors, into ``row`` as they come."""
    moved, computed = ceilings(part)
    row |= {"copy_tb_s": round(moved / 1e12, 3), "product_tflop_s": round(computed / 1e12, 1)}
    fields = part.fields(shape)
    context = 32 if part.tiny else CONTEXT
    for batch in batches:
        rows = min(batch, 4) if part.tiny else batch
        chosen = experts_chosen(part, engine, rows, context) if "num_experts" in fields else None
        found = best_of([decode(part, engine, rows, context, [GREEDY]) for _ in range(1 if part.tiny else 3)])
        floor = floor_ms(fields, rows, found["context"], moved, computed, chosen, stored)
        row[f"step_ms_{batch}"], row[f"floor_ms_{batch}"] = found["step_ms"], round(floor, 3)
        row[f"over_floor_{batch}"] = round(found["step_ms"] / floor, 3)
        if "idle_share" in found:
            row[f"idle_share_{batch}"] = found["idle_share"]
        if chosen is not None:
            row[f"experts_{batch}"] = round(statistics.fmean(chosen), 1)
        part.note(steps=row)


def sampling(part: Part, engine: Any, row: dict[str, Any]) -> None:
    """What each kind of sampling costs a step of 128 rows, top-p first; a batch of all last."""
    rows, context = (4, 32) if part.tiny else (128, CONTEXT)
    params = {n: SamplingParams(**{"max_tokens": 1 << 20, "ignore_eos": True, **k}) for n, k in KINDS.items()}
    cases = {"greedy": [GREEDY], **{name: [kind] for name, kind in params.items()}, "mixed": list(params.values())}
    for name, kinds in cases.items():
        again = 2 if name in ("greedy", "top_p") and not part.tiny else 1
        runs = [decode(part, engine, rows, context, kinds) for _ in range(again)]
        row[f"{name}_ms"] = min(found["step_ms"] for found in runs)
        row["more_percent"] = round(100 * (row.get("top_p_ms", row["greedy_ms"]) / row["greedy_ms"] - 1), 2)
        if name == "greedy":
            del row["more_percent"]


def prefill(part: Part, engine: Any, row: dict[str, Any]) -> None:
    """Prompts alone, in steps as large as the budget."""
    size, budget = engine.config.block_size, engine.config.max_num_batched_tokens
    length = min(budget, engine.max_model_len) - 8
    width, ids = -(-length // size), pack_ids(random.Random(1).choices(range(100, 1000), k=length))

    def once() -> None:
        new = NewSequence(0, "", 0, 1, ids, length, GREEDY, 0, 0, pack_ids(range(width)), 0)
        all_there(engine.execute(Plan(0, 0, 1, b"\0\0", pack_ids([length]), b"", [new])).wait(), 1)
        engine.reset()

    seconds = timed(part, once, 2 if part.tiny else 10)
    row |= {"tokens": length, "ms": round(1e3 * seconds, 2), "tokens_per_s": round(length / seconds)}


def bare_row(part: Part, bare: BareLoop, capacity: Capacity, key: str, streams: int) -> None:
    """The bare loop over what the stack's row ``key`` is asked."""
    with part.row(key) as row:
        asked = gpu_load.one_stream(part, streams).build(Vocabulary(size=capacity.vocab_size))
        bare.run(asked)
        row["bare_tokens_per_s"] = bare.run(asked)["tokens_per_s"]


def engine_alone(part: Part, shape: str) -> None:
    engine, capacity = load_engine(part, shape)
    with part.row("steps") as row:
        decode_steps(part, engine, shape, BATCHES, row)
    with part.row("top_p") as row:
        sampling(part, engine, row)
    with part.row("execute") as row:
        rows, context = (4, 32) if part.tiny else (256, CONTEXT)
        row["median_ms"] = decode(part, engine, rows, context, [GREEDY])["execute_ms"]
    bare_row(part, BareLoop(engine, capacity), capacity, "one", 1)
    with part.row("prefill") as row:
        prefill(part, engine, row)


def without_graphs(part: Part, shape: str) -> None:
    engine, _ = load_engine(part, shape, graphs=False)
    with part.row("steps") as row:
        decode_steps(part, engine, shape, (1, 32), row)


def both(part: Part, shape: str) -> None:
    """The stack, then the bare loop, with one stream and with 32: of both the same is asked."""
    stack: dict[str, dict[str, Any]] = {}
    with gpu_load.serving(part, shape) as served:
        for key, streams in (("one", 1), ("few", 32)):
            with part.row(key) as row:
                row |= served.run(gpu_load.one_stream(part, streams))
            stack[key] = row
    engine, capacity = load_engine(part, shape)
    bare = BareLoop(engine, capacity)
    for key, streams in (("one", 1), ("few", 32)):
        bare_row(part, bare, capacity, key, streams)
        part.note(**{key: stack[key] | part.found[key]})


def experts(part: Part, shape: str) -> None:
    engine, _ = load_engine(part, MOE)
    with part.row("steps") as row:
        decode_steps(part, engine, MOE, (1, 32, 128), row)


def quantized(part: Part, kind: str) -> None:
    """An engine whose weights were rounded at load as ``kind`` says; a head in bf16."""
    engine, _ = load_engine(part, "8b", quantization=kind, **({} if part.tiny else {"max_num_seqs": 16}))
    part.note(replaced=str(engine.backend.report))
    with part.row("steps") as row:
        decode_steps(part, engine, "8b", (1,), row, stored={"fp8": 1.0, "int4": 0.53}[kind])
    with part.row("prefill") as row:
        prefill(part, engine, row)


def loop(part: Part, shape: str) -> None:
    """The bare loop over the workload that the whole stack is given."""
    engine, capacity = load_engine(part, shape)
    bare = BareLoop(engine, capacity)
    vocabulary = Vocabulary(size=capacity.vocab_size)
    with part.row("loop") as row:
        rates = []
        for seed in (1,) if part.tiny else (1, 2, 3):
            rates.append(bare.run(part.workload(seed=seed).build(vocabulary))["tokens_per_s"])
            row |= {"tokens_per_s": statistics.median(rates), "rounds": rates}
        few = part.workload().build(vocabulary)
        row["few_tokens_per_s"] = bare.run(few[: len(few) // 8 or 1])["tokens_per_s"]


# ------------------------------------------------------------------ transformers' own


def peer(part: Part, shape: str) -> None:
    """transformers' continuous batching over the same prompts, the same number of tokens each. With sdpa: it is what
    there is without further packages. Tokens are counted as they come, so that time running out tells how far it was.
    """
    from transformers import ContinuousBatchingConfig, GenerationConfig

    fields = part.fields(shape)
    dtype = torch.bfloat16 if part.cuda else torch.float32
    model = draw_model(fields, part.device, dtype, "paged|sdpa")
    asked = part.workload().build(Vocabulary(size=fields["vocab_size"]))
    output = asked[0].max_tokens
    config = GenerationConfig(max_new_tokens=output, do_sample=False, eos_token_id=-1, pad_token_id=PAD)
    batching = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64) if part.tiny else ContinuousBatchingConfig()
    with model.continuous_batching_context_manager(
        generation_config=config, continuous_batching_config=batching, block=True, timeout=5
    ) as manager:
        for key, requests in (("few", asked[: len(asked) // 8 or 1]), ("all", asked)):
            with part.row(key) as row:
                part.wait()
                began, whole = time.perf_counter(), 0
                made: dict[str, int] = {}
                manager.add_requests([list(r.prompt) for r in requests], max_new_tokens=output, streaming=True)
                while whole < len(requests):
                    result = manager.get_result(timeout=1)
                    if result is None:
                        if not manager.is_running():
                            raise Unavailable("its generation thread ended")
                        continue
                    made[result.request_id] = len(result.generated_tokens)
                    whole += result.is_finished()
                    took = time.perf_counter() - began
                    row |= {"tokens_per_s": round(sum(made.values()) / took, 1), "output_tokens": sum(made.values())}
                    row |= {"ended": f"{whole} of {len(requests)}", "took_s": round(took, 1)}


KINDS_OF_PARTS: dict[str, Callable[[Part, str], None]] = {
    "machine": lambda part, _: machine(part),
    "parity": lambda part, _: parity(part),
    "tests": lambda part, _: run_tests(part),
    "memcheck": lambda part, _: memcheck(part),
    "stack": gpu_load.stack,
    "engine": engine_alone,
    "plain": without_graphs,
    "both": both,
    "moe": experts,
    "fp8": lambda part, _: quantized(part, "fp8"),
    "int4": lambda part, _: quantized(part, "int4"),
    "products": lambda part, _: gpu_products.measure(part),
    "loop": loop,
    "profile": lambda part, shape: gpu_profile.profile(part, shape),
    "transformers": peer,
    "open": gpu_load.open_loops,
    "long": gpu_load.long_context,
    "starts": gpu_load.starts,
    "offload": gpu_offload.offload,
}


def run(part: Part, name: str) -> None:
    kind, _, shape = name.partition("-")
    part.begin(name)
    began = time.perf_counter()
    try:
        KINDS_OF_PARTS[kind](part, shape)
    except Unavailable as error:
        part.note(why=str(error))
    except Exception as error:
        logging.exception(name)
        part.note(why=f"{type(error).__name__}: {str(error)[:300]}")
    part.note(took_s=round(time.perf_counter() - began, 1))
    gc.collect()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("parts", nargs="+")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(levelname)s %(name)s: %(message)s")
    part = Part(args.file, args.tiny)
    with part.open:
        for name in args.parts:
            run(part, name)


if __name__ == "__main__":
    main()
