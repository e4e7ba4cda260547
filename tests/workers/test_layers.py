"""Which decoder layers become one native call, and that a request's logits are then its own alone."""

from __future__ import annotations

import pytest
import torch

from tests.models import SERVED, tiny_model
from tests.workers.test_parity import make_engine, one_thread
from workers.native import KernelsUnavailable, load_kernels
from workers.torch_engine import verify
from workers.torch_engine.layers import NativeLayer

__all__ = ["one_thread"]  # the autouse fixture

try:
    load_kernels()
except KernelsUnavailable as error:
    pytest.skip(f"native kernels: {error}", allow_module_level=True)

WHOLE = {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"}


@pytest.mark.parametrize("name", [name for name in SERVED if name != "phi3_longrope"])
def test_layers_of_the_usual_build_become_one_call(tmp_path_factory, name):
    engine = make_engine(tiny_model(tmp_path_factory, name))
    count = sum(isinstance(module, NativeLayer) for module in engine.model.modules())
    assert count == (3 if name in WHOLE else 0)


def test_a_layer_that_mentions_more_is_left_alone(tmp_path_factory, monkeypatch):
    """What a pass over short texts does not show: a scale that begins at some position."""
    from transformers.models.llama import modeling_llama

    original = modeling_llama.LlamaAttention.forward

    def forward(self, hidden_states, *args, **kwargs):
        far = kwargs["position_ids"].max() > 100000 if "position_ids" in kwargs else False
        return original(self, hidden_states * 2 if far else hidden_states, *args, **kwargs)

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", forward)
    engine = make_engine(tiny_model(tmp_path_factory, "llama"))
    assert not any(isinstance(module, NativeLayer) for module in engine.model.modules())


@torch.inference_mode()
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3"])
def test_logits_do_not_depend_on_the_batch(tmp_path_factory, name):
    """Bit by bit, alone or beside others, in chunks or token by token: so a draw is the same wherever it is made."""
    engine = make_engine(tiny_model(tmp_path_factory, name))
    engine._make_pool(8 * verify.LENGTH, 64)
    texts = [torch.randint(5, 200, (verify.LENGTH,), generator=torch.Generator().manual_seed(i)) for i in range(5)]
    together = engine._paged_logits(texts)
    for text, theirs in zip(texts, together, strict=True):
        (alone,) = engine._paged_logits([text])
        assert torch.equal(alone, theirs)
