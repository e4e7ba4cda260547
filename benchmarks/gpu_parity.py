"""Parity on a GPU, before anything is timed: the tokens are transformers' own.

Models are drawn on the CPU: a recording that failed may have left the device's random numbers unusable.
"""

from __future__ import annotations

import logging
import random
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_part import Part, draw_model, without_files
from protocol.messages import NewSequence, Plan, pack_ids
from protocol.sampling import SamplingParams
from workers.torch_engine.config import EngineConfig
from workers.torch_engine.make import make_engine
from workers.torch_engine.verify import paged_logits

CPU = torch.device("cpu")


def generate(engine: Any, prompts: list[list[int]], output: int, budget: int = 48) -> list[list[int]]:
    """Greedy ids, prompts joining two steps apart, chunked, steps queued ahead as on a server."""
    size = engine.config.block_size
    params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
    block, todo, made = 0, [len(p) for p in prompts], [[] for _ in prompts]  # type: list[Any], list[int], list[Any]
    planned = [0] * len(prompts)
    joined, step = 0, 0
    running: deque[Any] = deque()

    def collect() -> None:
        sampled = running.popleft().wait()
        for seat, token in zip(sampled.seats.tolist(), sampled.tokens.tolist(), strict=True):
            made[seat].append(token)

    while any(n < output for n in planned):
        new, rows, left = [], [], budget
        if step % 2 == 0 and joined < len(prompts):
            width = -(-(len(prompts[joined]) + output) // size)
            ids = pack_ids(prompts[joined])
            blocks = pack_ids(range(block, block + width))
            new.append(NewSequence(joined, "", joined, 1, ids, len(prompts[joined]), params, 0, 0, blocks, 0))
            block += width
            joined += 1
        for seat in range(joined):
            if todo[seat] and left > 0:
                count = min(todo[seat], left)
                todo[seat] -= count
                left -= count
                rows.append((seat, count, not todo[seat]))
            elif not todo[seat] and planned[seat] < output:
                rows.append((seat, 1, True))
        seats, counts, samples = zip(*rows, strict=True)
        for seat, _, sampled in rows:
            planned[seat] += sampled
        step += 1
        packed = b"".join(seat.to_bytes(2, "little") for seat in seats)
        running.append(engine.execute(Plan(0, 0, step, packed, pack_ids(counts), bytes(samples), new)))
        if len(running) > 1:
            collect()
    while running:
        collect()
    engine.reset()
    return made


PARITY = {
    "llama": {"model_type": "llama"},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 24},
    "gemma2": {
        "model_type": "gemma2", "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 16,
        "attn_logit_softcapping": 6.0, "final_logit_softcapping": 10.0, "hidden_activation": "gelu_pytorch_tanh",
    },
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {
        "model_type": "gpt_oss", "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
        "sliding_window": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}  # fmt: skip
SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 512,
}  # fmt: skip
TIE = 1e-3


@torch.inference_mode()
def parity(part: Part) -> None:
    """float32: greedy tokens are transformers' own, up to ties. bf16: logits lie as near to float32's as its own do."""
    rng = random.Random(7)
    for name, own in PARITY.items():
        fields = {**SMALL, **own}
        try:
            with without_files(fields, torch.float32, CPU):
                engine = make_engine(
                    EngineConfig(
                        model=name, device=part.device.type, max_model_len=192, max_num_seqs=16,
                        max_num_batched_tokens=64, kv_cache_memory=32 << 20, threads=1,
                    )
                )  # fmt: skip
                engine.load(lambda stage, fraction: None)
            prompts = [[rng.randrange(512) for _ in range(rng.randint(3, 90))] for _ in range(12)]
            outputs = generate(engine, prompts, 24)
            reference = draw_model(fields, CPU, torch.float32, "eager", lively=True).to(part.device)
            distinct = len({token for output in outputs for token in output})
            wrong = sum(differs(reference, prompt, output) for prompt, output in zip(prompts, outputs, strict=True))
            if name == "llama":
                part.note(host_waits=host_waits(engine) if part.cuda else "no GPU")
            steps = getattr(engine, "steps", None)
            graphs = "launch by launch" if steps is None or not steps.buckets else f"{len(steps.buckets)} graphs"
            torch_alone = " on torch alone" if part.cuda and steps is None else ""
            part.note(
                **{f"float32 {name}": f"{len(prompts) - wrong} of 12 equal ({distinct} tokens), {graphs}{torch_alone}"}
            )
        except Exception as error:
            logging.exception(name)
            part.note(**{f"float32 {name}": f"{type(error).__name__}: {str(error)[:200]}"})
    bf16_distance(part)


def differs(reference: Any, prompt: list[int], output: list[int]) -> bool:
    ids = torch.tensor([prompt + output], device=reference.device)
    logits = reference(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    for ours, row in zip(output, logits, strict=True):
        best, second = row.topk(2).values.tolist()
        if ours != int(row.argmax()):
            return best - second > TIE
    return False


KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0}, {"temperature": 0.9, "top_p": 0.8, "top_k": 40, "min_p": 0.01},
    {"temperature": 0.7, "repetition_penalty": 1.2, "frequency_penalty": 0.3, "min_tokens": 9}, {"logprobs": 3},
    {"temperature": 0.5, "logit_bias": {5: 2.0}},
]  # fmt: skip


def host_waits(engine: Any) -> list[str]:
    """Where the host waited for the GPU while it queued steps of every kind of sampling: file:line. None is right."""
    width = 3 * 16 // engine.config.block_size
    new = [
        NewSequence(
            seat, "", seat, 1, pack_ids(range(9)), 9, SamplingParams(max_tokens=40, **kind), 0, 0,
            pack_ids(range(seat * width, (seat + 1) * width)), 0,
        )
        for seat, kind in enumerate(KINDS)
    ]  # fmt: skip
    seats = b"".join(seat.to_bytes(2, "little") for seat in range(len(KINDS)))
    outputs = [engine.execute(Plan(0, 0, 1, seats, pack_ids([9] * len(KINDS)), b"", new))]
    outputs += [engine.execute(Plan(0, 0, step, seats)) for step in (2, 3)]  # buffers are made by now
    found = waits_in(lambda: outputs.extend(engine.execute(Plan(0, 0, step, seats)) for step in (4, 5)))
    for output in outputs:
        output.wait()
    engine.reset()
    return found


def waits_in(run: Callable[[], Any]) -> list[str]:
    """file:line of each place in ``run`` where the host waited for the device, as torch notices it."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{Path(found.filename).name}:{found.lineno}" for found in seen if tells_a_wait(str(found.message))]


def tells_a_wait(message: str) -> bool:
    """Setting the mode itself warns, once a process, that it is a prototype and does not detect all "synchronizing
    operations": that is none."""
    return "synchroniz" in message and "prototype" not in message


def bf16_distance(part: Part) -> None:
    """Root mean square distance of logits from the float32 model's, ours over transformers' in bf16."""
    fields = {**part.fields("500m"), "num_hidden_layers": 4}
    dtype = torch.bfloat16
    with without_files(fields, dtype, CPU):
        engine: Any = make_engine(
            EngineConfig(
                model="500m", device=part.device.type, max_model_len=128, max_num_seqs=8, max_num_batched_tokens=64,
                kv_cache_memory=64 << 20, threads=1, graphs=False,
            )
        )  # fmt: skip
        engine.load(lambda stage, fraction: None)
    texts = [torch.arange(start, start + 21, device=part.device) for start in (3, 500)]
    model = draw_model(fields, CPU, dtype, "eager", lively=True).to(part.device)
    far = bf16_distances(engine.backend, model, texts)
    part.note(bf16_distance=round(far.ours, 6), bf16_distance_transformers=round(far.theirs, 6))
    part.note(bf16_ratio=round(far.ours / far.theirs, 3))


@dataclass(frozen=True)
class Distances:
    """From the logits of the same weights in float32: root mean squares, and the largest of transformers' own."""

    ours: float
    theirs: float
    theirs_at_most: float


@torch.inference_mode()
def bf16_distances(backend: Any, model: Any, texts: list[torch.Tensor]) -> Distances:
    """``model``: transformers' own, in bf16, with the backend's weights. It is widened to float32."""
    ours = torch.cat(paged_logits(backend, texts))
    theirs = torch.cat([model(text[None], use_cache=False).logits[0].float() for text in texts])
    exact = torch.cat([model.float()(text[None], use_cache=False).logits[0] for text in texts])
    far, own = ((logits - exact).pow(2).mean().sqrt().item() for logits in (ours, theirs))
    return Distances(far, own, (theirs - exact).abs().max().item())
