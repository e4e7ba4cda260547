"""What only a GPU can show. Kernels and graphs are tested on one too where there is one: see triton_device."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.gpu_parity import KINDS, bf16_distances, host_waits, waits_in
from protocol.messages import NewSequence, pack_ids
from protocol.sampling import SamplingParams
from tests.models import CONFIGS, build, byte_tokenizer, tiny_model
from tests.workers.plan_maker import PlanMaker, Sequence
from workers.torch_engine import verify
from workers.torch_engine.config import EngineConfig
from workers.torch_engine.draw import TorchDraw, threshold_by_histogram
from workers.torch_engine.sampler import Sampler

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def load(path, **fields):
    from workers.torch_engine.make import make_engine

    given = {
        "device": "cuda", "max_model_len": 128, "max_num_seqs": 8, "max_num_batched_tokens": 64,
        "kv_cache_memory": 16 << 20, "block_size": 16,
    }  # fmt: skip
    engine = make_engine(EngineConfig(model=str(path), **{**given, **fields}))
    engine.load(lambda stage, fraction: None)
    return engine


def new(seat, kind, ids=range(9)):
    params = SamplingParams(**{"max_tokens": 40, **kind})
    blocks = pack_ids(range(3 * seat, 3 * seat + 3))
    return NewSequence(seat, "", 0, 1, pack_ids(ids), len(ids), params, seat, 0, blocks, 0)


def test_queueing_a_step_never_waits_for_the_device(tmp_path_factory):
    engine = load(tiny_model(tmp_path_factory, "llama"))
    assert type(engine.backend).__name__ == "CudaBackend"
    assert engine.backend.steps.buckets
    assert waits_in(lambda: torch.ones(1, device="cuda").item()), "a wait is noticed"
    assert host_waits(engine) == []


def test_no_kind_of_sampling_compiles_anything_after_the_start(tmp_path_factory):
    from workers.torch_engine.cuda.triton_sampling import draw_rows

    engine = load(tiny_model(tmp_path_factory, "llama"))
    before = {device: len(caches[0]) for device, caches in draw_rows.device_caches.items()}
    assert sum(before.values()) >= 1
    host_waits(engine)  # steps of every kind
    assert {device: len(caches[0]) for device, caches in draw_rows.device_caches.items()} == before


def test_draws_on_the_device_are_those_on_the_host():
    from workers.torch_engine.cuda.triton_sampling import TritonDraw

    logits = torch.randn(len(KINDS), 300, generator=torch.Generator().manual_seed(1)) * 3
    drawn = []
    draws = (torch.device("cpu"), TorchDraw(threshold_by_histogram)), (torch.device("cuda"), TritonDraw())
    for device, draw in draws:
        sampler = Sampler(8, 300, [7], device, draw)
        for seat, kind in enumerate(KINDS):
            sampler.add(new(seat, kind))
        tokens = []
        for step in range(20):
            result = sampler.sample(logits.to(device), np.arange(len(KINDS)), np.full(len(KINDS), 9 + step))
            tokens.append(result.tokens.tolist())
        drawn.append(tokens)
    assert drawn[0] == drawn[1]


def test_a_bf16_model_is_as_near_to_float32_as_transformers_own(tmp_path):
    build(CONFIGS["qwen2"]).to(torch.bfloat16).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    engine = load(tmp_path)
    assert engine.backend.model.dtype == torch.bfloat16
    served = [
        Sequence(list(range(k, k + 5 + 7 * k)), SamplingParams(temperature=0, max_tokens=12)) for k in range(1, 6)
    ]  # fmt: skip
    PlanMaker(engine, blocks=40, block_size=16, budget=48, seats=8).run(served)
    texts = [torch.arange(start, start + verify.LENGTH, device="cuda") for start in (3, 90)]
    eager = {"dtype": torch.bfloat16, "attn_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, **eager).cuda()
    far = bf16_distances(engine.backend, model, texts)  # widens the model
    assert far.ours < 1.25 * far.theirs
    # logits off by at most d choose a token that is at most 2 d behind
    with torch.inference_mode():
        for request in served:
            text = torch.tensor(request.prompt + request.output, device="cuda")
            logits = model(text[None], use_cache=False).logits[0, len(request.prompt) - 1 : -1]
            behind = logits.amax(-1) - logits.gather(-1, text[len(request.prompt) :, None])[:, 0]
            assert behind.max() <= 2 * 1.5 * far.theirs_at_most


def test_torch_alone_serves_on_the_device_too(tmp_path_factory, monkeypatch):
    from workers.torch_engine.engine import TorchEngine
    from workers.torch_engine.make import torch_alone

    config = EngineConfig(
        model=str(tiny_model(tmp_path_factory, "llama")), device="cuda", max_model_len=96, max_num_seqs=4,
        max_num_batched_tokens=32, kv_cache_memory=4 << 20, block_size=8,
    )  # fmt: skip
    device = torch.device("cuda")
    plain, fused = (
        TorchEngine(config, device, [torch_alone(config, device)]),
        load(config.model, max_model_len=96, block_size=8),
    )
    plain.load(lambda stage, fraction: None)
    tokens = []
    for engine in (plain, fused):
        served = [Sequence(list(range(k, k + 20)), SamplingParams(temperature=0, max_tokens=10)) for k in range(3)]
        PlanMaker(engine, blocks=30, block_size=8, budget=32, seats=8).run(served)
        tokens.append([request.output for request in served])
    assert tokens[0] == tokens[1]
