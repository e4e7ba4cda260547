"""The native kernels inside whole models: same logits as the model that they were put into."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests.models import tiny_model
from workers.native.library import KernelsUnavailable, load_kernels
from workers.torch_engine.cpu.modules import PackedLinear, fuse
from workers.torch_engine.replace import FuseReport

try:
    kernels = load_kernels()
except KernelsUnavailable as error:
    pytest.skip(f"native kernels: {error}", allow_module_level=True)

# what must have been replaced, by kind and number, in a model of three layers
EXPECTED = {
    "llama": {"linear": 22, "norm": 7, "mlp": 3, "qkv": 3, "rotary": 3},
    "gemma3": {"linear": 22, "norm": 19, "mlp": 3, "qkv": 3, "rotary": 3},  # norms by 1 + w
    "phi3": {"linear": 13, "norm": 7, "mlp": 3, "rotary": 3},  # qkv and gate_up merged by the model itself
    "gpt2": {"linear": 13},  # Conv1D; layer norms stay torch's
    "gpt_neox": {"linear": 13},  # its rotary covers a part of the head
    "gpt_oss": {"experts": 3, "linear": 13, "norm": 7, "qkv": 3},  # its rotary interleaves: must be left alone
    "deepseek_v3": {"norm": 13},
    "mixtral": {"experts": 3, "linear": 13, "norm": 7, "qkv": 3},
    "qwen2_moe": {"experts": 3, "linear": 25, "norm": 7, "qkv": 3},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_logits_are_the_originals(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    path = tiny_model(tmp_path_factory, name)
    original = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    fused = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    report = FuseReport()
    fuse(fused, kernels, report)
    assert {kind: report.fused[kind] for kind in EXPECTED[name]} == EXPECTED[name], str(report)
    ids = torch.randint(5, 200, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = fused(ids).logits, original(ids).logits
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt_oss"])
def test_bf16_weights_keep_their_precision_with_fp32_arithmetic(
    tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    """Equal to the model whose weights were rounded to bf16 and that then computes in float32."""
    path = tiny_model(tmp_path_factory, name)
    original = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval().float()
    fused = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    fuse(fused, kernels, FuseReport())
    mlp = fused.model.layers[0].mlp
    packed = mlp.gate_up if name == "llama" else mlp.experts.gate_up[0]
    assert packed.weight.dtype == torch.bfloat16
    ids = torch.randint(5, 200, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = fused(ids).logits, original(ids).logits
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_what_differs_is_left_to_torch() -> None:
    """An RMSNorm by name that does something else, and a Linear by name that is a subclass."""

    class OddRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.rand(8) + 0.5), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.weight * x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + self.eps)

    class DoubledLinear(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = nn.ModuleDict({"norm": OddRMSNorm(), "linear": DoubledLinear(8, 8), "plain": nn.Linear(8, 8)})
    report = FuseReport()
    fuse(model, kernels, report)
    assert isinstance(model["norm"], OddRMSNorm)
    assert isinstance(model["linear"], DoubledLinear)
    assert isinstance(model["plain"], PackedLinear)
    assert report.kept == {"OddRMSNorm": 1}


def test_a_tied_embedding_shares_the_packed_head() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(37, 24), nn.Linear(24, 37, bias=False)
            self.head.weight = self.embed.weight

    model = Tied()
    weight = model.embed.weight.detach().clone()
    fuse(model, kernels, FuseReport())
    assert model.embed.packed is model.head.packed
    ids = torch.tensor([[0, 36, 5]])
    torch.testing.assert_close(model.embed(ids), weight[ids])
