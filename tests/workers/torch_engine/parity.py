"""A small engine, requests for it, and the reference that its greedy outputs are compared with."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from protocol.sampling import SamplingParams
from tests.workers.plan_maker import Sequence
from workers.torch_engine import make
from workers.torch_engine.config import EngineConfig
from workers.torch_engine.engine import TorchEngine

BLOCK = 8
TIE = 1e-4  # a first difference is a tie where the reference's two best logits lie this close


def make_engine(
    path: Path, max_model_len: int | None = None, blocks: int = 96, max_num_seqs: int = 32, **more: Any
) -> TorchEngine:
    engine = make.make_engine(
        EngineConfig(
            model=str(path),
            device="cpu",
            max_model_len=max_model_len or 8 * blocks // 2,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=64,
            kv_cache_memory=64 << 20,
            block_size=BLOCK,
            threads=1,
            **more,
        )
    )
    engine.capacity = engine.load(lambda stage, fraction: None)
    return engine


def reference_of(path: Path) -> Any:
    """The model as transformers has it, in float32. Eager: sdpa drops gemma2's soft cap in transformers 5.17."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")


def make_requests(shortest: int, longest: int, seed: int = 5) -> list[Sequence]:
    """32 requests; every second one that is long enough begins with the same 20 tokens."""
    rng = random.Random(seed)
    common = [rng.randrange(256) for _ in range(20)]
    requests = []
    for i in range(32):
        length = rng.randint(shortest, longest)
        prompt = [rng.randrange(256) for _ in range(length)]
        if i % 2 == 0 and length > 24:
            prompt[:20] = common
        output = rng.randint(20, 28)
        requests.append(Sequence(prompt, SamplingParams(temperature=0, max_tokens=output), joins=rng.randint(0, 30)))
    return requests


@torch.inference_mode()
def first_difference(reference: Any, request: Sequence) -> str | None:
    """None if the output is the reference's greedy one, up to a tie.

    One pass over prompt and output gives the logits before each output token; as long as all earlier tokens
    agree, their argmax is what ``generate`` would have appended; a quarter is generated too.
    """
    ids = torch.tensor([request.prompt + request.output])
    logits = reference(ids, use_cache=False).logits[0, len(request.prompt) - 1 : -1]
    for at, (ours, row) in enumerate(zip(request.output, logits, strict=True)):
        best, second = row.topk(2).values.tolist()
        theirs = int(row.argmax())
        if ours != theirs:
            if best - second <= TIE:
                return None
            return (
                f"token {at} of a prompt of {len(request.prompt)}: {ours} instead of {theirs}, by {best - second:.2g}"
            )
    return None


def generated(reference: Any, request: Sequence) -> list[int]:
    prompt = torch.tensor([request.prompt])
    out = reference.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=request.sampling.max_tokens,
        do_sample=False,
        eos_token_id=None,
    )
    return out[0, prompt.shape[1] :].tolist()
