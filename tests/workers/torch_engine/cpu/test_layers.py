"""Which decoder layers become one native call, and that a request's logits are then its own alone."""

from __future__ import annotations

import os
from itertools import pairwise

import pytest
import torch

from tests.models import SERVED, tiny_model
from tests.workers.torch_engine.parity import BLOCK, make_engine
from workers.native.library import KernelsUnavailable, Packed, load_kernels
from workers.torch_engine import verify
from workers.torch_engine.cpu.layers import Done, NativeLayers

pytestmark = pytest.mark.usefixtures("one_thread")

try:
    load_kernels()
except KernelsUnavailable as error:
    pytest.skip(f"native kernels: {error}", allow_module_level=True)

WHOLE = {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"}
CAPPED = {"gemma2", "gemma3"}  # more happens in a pass than embedding, layers, norm and head


def calls(engine) -> list[int]:
    """How many layers each native call computes."""
    return [len(module.layers) for module in engine.backend.model.modules() if isinstance(module, NativeLayers)]


@pytest.mark.parametrize("name", [name for name in SERVED if name != "phi3_longrope"])
def test_layers_of_the_usual_build_become_one_call(tmp_path_factory, name):
    engine = make_engine(tiny_model(tmp_path_factory, name))
    assert sum(calls(engine)) == (3 if name in WHOLE else 0)
    if name in WHOLE - {"gemma3"}:
        assert calls(engine) == [3]
        assert sum(isinstance(module, Done) for module in engine.backend.model.modules()) == 2


@pytest.mark.parametrize("name", [name for name in SERVED if name != "phi3_longrope"])
def test_a_model_with_nothing_around_its_layers_takes_the_whole_pass(tmp_path_factory, name):
    """That what comes out is the model's own is what test_parity asks of the same engines."""
    assert (make_engine(tiny_model(tmp_path_factory, name)).backend.whole_pass is not None) == (name in WHOLE - CAPPED)


@pytest.mark.parametrize("where", ["LlamaModel", "LlamaForCausalLM"])
def test_a_model_that_mentions_more_takes_no_whole_pass(tmp_path_factory, monkeypatch, where):
    from transformers.models.llama import modeling_llama

    model = getattr(modeling_llama, where)
    original = model.forward

    def forward(self, *args, position_ids=None, **kwargs):
        assert position_ids is None or position_ids.max() < 100000
        return original(self, *args, position_ids=position_ids, **kwargs)

    monkeypatch.setattr(model, "forward", forward)
    assert make_engine(tiny_model(tmp_path_factory, "llama")).backend.whole_pass is None


def test_a_whole_pass_that_gives_something_else_is_not_taken(tmp_path_factory, monkeypatch):
    """No name tells that this head is scaled."""
    from transformers.models.llama import modeling_llama

    original = modeling_llama.LlamaForCausalLM.forward

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, logits_to_keep=0, **kwargs):
        found = original(self, input_ids, attention_mask, position_ids, logits_to_keep=logits_to_keep, **kwargs)
        found["logits"] = found["logits"] * 1.01
        return found

    assert forward.__code__.co_names == ()
    monkeypatch.setattr(modeling_llama.LlamaForCausalLM, "forward", forward)
    assert make_engine(tiny_model(tmp_path_factory, "llama")).backend.whole_pass is None


def test_layers_with_angles_of_their_own_are_not_joined(tmp_path_factory):
    engine = make_engine(tiny_model(tmp_path_factory, "gemma3"))
    kinds = engine.backend.model.config.get_text_config().layer_types
    runs = 1 + sum(a != b for a, b in pairwise(kinds))
    assert len(calls(engine)) == runs > 1


def test_layers_of_a_model_that_does_more_between_them_are_not_joined(tmp_path_factory, monkeypatch):
    """What a pass over short texts does not show: a step between two layers that begins at some position."""
    from transformers.models.llama import modeling_llama

    original = modeling_llama.LlamaModel.forward

    def forward(self, *args, **kwargs):
        positions = kwargs.get("position_ids")
        assert positions is None or positions.max() < 100000
        return original(self, *args, **kwargs)

    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", forward)
    assert calls(make_engine(tiny_model(tmp_path_factory, "llama"))) == [1, 1, 1]


@torch.inference_mode()
def test_a_long_call_shows_signs_of_life(tmp_path_factory):
    engine = make_engine(tiny_model(tmp_path_factory, "llama"))
    engine.backend.make_pool(verify.LENGTH, 64)
    beats, before = engine.beat(), engine.backend.kernels.progress.value
    verify.paged_logits(engine.backend, [torch.arange(2)])
    assert engine.backend.kernels.progress.value - before >= 3
    assert engine.beat() > beats


def test_a_layer_that_mentions_more_is_left_alone(tmp_path_factory, monkeypatch):
    """What a pass over short texts does not show: a scale that begins at some position."""
    from transformers.models.llama import modeling_llama

    original = modeling_llama.LlamaAttention.forward

    def forward(self, hidden_states, *args, **kwargs):
        far = kwargs["position_ids"].max() > 100000 if "position_ids" in kwargs else False
        return original(self, hidden_states * 2 if far else hidden_states, *args, **kwargs)

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", forward)
    engine = make_engine(tiny_model(tmp_path_factory, "llama"))
    assert calls(engine) == []


@torch.inference_mode()
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3"])
def test_logits_do_not_depend_on_the_batch(tmp_path_factory, name):
    """Bit by bit, alone or beside others, in chunks or token by token: so a draw is the same wherever it is made."""
    engine = make_engine(tiny_model(tmp_path_factory, name))
    engine.backend.make_pool(8 * verify.LENGTH, 64)
    texts = [torch.randint(5, 200, (verify.LENGTH,), generator=torch.Generator().manual_seed(i)) for i in range(5)]
    together = verify.paged_logits(engine.backend, texts)
    for text, theirs in zip(texts, together, strict=True):
        (alone,) = verify.paged_logits(engine.backend, [text])
        assert torch.equal(alone, theirs)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])  # gemma2: a norm behind each product
@pytest.mark.parametrize("count", [3, 160])  # 160: so many rows that layers share what they work in
def test_threads_that_lose_their_cores_change_nothing(tmp_path_factory, name, count):
    """More threads than cores: again and again one stands in the middle of a piece, another makes it too, and the first
    comes back when all others are further on."""
    engine = make_engine(tiny_model(tmp_path_factory, name), max_num_seqs=max(32, count))
    engine.backend.make_pool((count + 1) * (verify.LENGTH + BLOCK), 64)
    texts = [torch.randint(5, 200, (verify.LENGTH,), generator=torch.Generator().manual_seed(i)) for i in range(count)]
    alone = verify.paged_logits(engine.backend, texts)
    engine.backend.kernels.set_threads(3 * (os.cpu_count() or 1) + 1)
    try:
        for _ in range(60):
            assert all(map(torch.equal, verify.paged_logits(engine.backend, texts), alone))
    finally:
        engine.backend.kernels.set_threads(1)


@pytest.mark.parametrize("rows", [1, 8, 200])
def test_a_product_by_more_threads_than_cores(rows):
    kernels = load_kernels()
    x, packed = torch.randn(rows, 600), Packed(torch.randn(4000, 600), None)
    kernels.set_threads(1)
    alone = kernels.linear(x, packed, torch.empty(rows, 4000))
    kernels.set_threads(3 * (os.cpu_count() or 1) + 1)
    try:
        for _ in range(300):
            assert torch.equal(kernels.linear(x, packed, torch.full((rows, 4000), torch.nan)), alone)
    finally:
        kernels.set_threads(1)
