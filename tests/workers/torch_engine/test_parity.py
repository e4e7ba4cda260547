"""Greedy outputs of the engine equal model.generate's, token for token, for every served architecture.

Thirty-two requests of mixed lengths join at different steps, planned by the real scheduler core. Prefill is
chunked small, the pool is so small that sequences are preempted, prompts share prefixes, and plans go out before
the tokens of earlier ones are known.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from protocol.sampling import SamplingParams
from tests.models import SERVED, tiny_model
from tests.workers.core_driver import CoreDriver
from tests.workers.plan_maker import PlanMaker, Sequence
from workers.native.library import KernelsUnavailable
from workers.torch_engine import make
from workers.torch_engine.config import EngineConfig
from workers.torch_engine.engine import TorchEngine

BLOCK = 8
TIE = 1e-4  # a first difference is a tie where the reference's two best logits lie this close

# Both regimes of longrope; a context that grows out of the first one is another model's (see loader.fix_rotary).
CASES = [(name, 4, 76, None) for name in SERVED if name != "phi3_longrope"]
CASES += [("phi3_longrope", 4, 34, 64), ("phi3_longrope", 66, 90, None)]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_engine(path: Path, max_model_len: int | None = None, blocks: int = 96, **more: Any) -> TorchEngine:
    engine = make.make_engine(
        EngineConfig(
            model=str(path),
            device="cpu",
            max_model_len=max_model_len or 8 * blocks // 2,
            max_num_seqs=32,
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


@pytest.mark.parametrize(("name", "shortest", "longest", "max_model_len"), CASES)
def test_greedy_equals_generate(tmp_path_factory, name, shortest, longest, max_model_len):
    path = tiny_model(tmp_path_factory, name)
    requests = make_requests(shortest, longest)
    engine = make_engine(path, max_model_len)
    blocks = 13 + longest // BLOCK * 3
    counters = CoreDriver(engine, engine.capacity, blocks, budget=24).run(requests)

    assert counters.preemptions > 0
    assert counters.prefix_hits > 0 or longest < 40
    reference = reference_of(path)
    wrong = [text for text in (first_difference(reference, request) for request in requests) if text]
    assert not wrong, "\n".join(wrong)
    exact = [r for r in requests[::4] if generated(reference, r) == r.output]
    assert len(exact) >= 7, "generate itself gives other tokens"  # one tie among eight is let pass
    distinct = [len(set(request.output)) for request in requests]
    assert min(distinct) >= 10, distinct


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt_oss", "deepseek_v3"])
def test_torch_alone_equals_generate(tmp_path_factory, monkeypatch, name):
    """Without the native kernels the plain torch path serves, with window, soft cap, sinks and unequal heads."""

    def unavailable():
        raise KernelsUnavailable("not wanted here")

    monkeypatch.setattr(make, "load_kernels", unavailable)
    path = tiny_model(tmp_path_factory, name)
    requests = make_requests(4, 76)[:16]
    engine = make_engine(path)
    assert type(engine.backend).__name__ == "TorchBackend"
    PlanMaker(engine, blocks=40, block_size=BLOCK, budget=24).run(requests)
    reference = reference_of(path)
    wrong = [text for text in (first_difference(reference, request) for request in requests) if text]
    assert not wrong, "\n".join(wrong)


def test_zeroing_the_pool_is_noticed(tmp_path_factory):
    """The parity test really reads the pool: without its contents most outputs change."""
    path = tiny_model(tmp_path_factory, "llama")
    engine = make_engine(path)
    requests = make_requests(4, 76)[:8]
    PlanMaker(engine, blocks=90, block_size=BLOCK, budget=24).run(
        requests, before_step=lambda _: engine.backend.pool.zero_()
    )
    reference = reference_of(path)
    assert sum(first_difference(reference, request) is not None for request in requests) >= 6
