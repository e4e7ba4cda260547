"""Experts grouped on the device against a loop over tokens, whatever was chosen and however weights lie."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.workers.torch_engine.cuda.triton_device import DEVICE, on_gpu
from workers.torch_engine.cuda import triton_experts as kernels


class Layer:
    def __init__(self, experts=5, size=24, width=40, dtype=torch.float32, bias=False, turned=False, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(DEVICE, dtype)

        self.gate_up, self.down = draw(experts, 2 * width, size), draw(experts, size, width)
        if turned:  # the same numbers, another layout in memory
            self.gate_up, self.down = (
                w.transpose(1, 2).contiguous().transpose(1, 2) for w in (self.gate_up, self.down)
            )
        self.biases = (draw(experts, 2 * width), draw(experts, size)) if bias else (None, None)
        self.draw, self.dtype = draw, dtype

    def ours(self, x, chosen, weights, act, **given):
        return kernels.experts_sum(
            x, chosen, weights, self.gate_up, self.biases[0], self.down, self.biases[1], act, **given
        )

    def expected(self, x, chosen, weights, gate):
        out = torch.zeros(x.shape, dtype=torch.float32, device=DEVICE)
        for token in range(len(x)):
            for expert, weight in zip(chosen[token].tolist(), weights[token].float().tolist(), strict=True):
                both = F.linear(x[token].float(), self.gate_up[expert].float())
                both = both if self.biases[0] is None else both + self.biases[0][expert].float()
                y = F.linear(gate(both), self.down[expert].float())
                out[token] += weight * (y if self.biases[1] is None else y + self.biases[1][expert].float())
        return out


def silu(both):
    gate, up = both.chunk(2, -1)
    return F.silu(gate) * up


def gelu(both):
    gate, up = both.chunk(2, -1)
    return F.gelu(gate, approximate="tanh") * up


def clamped(both):
    gate, up = both[..., ::2].clamp(max=1.0), both[..., 1::2].clamp(-1.0, 1.0)
    return (up + 1) * gate * torch.sigmoid(1.7 * gate)


def choose(tokens, experts, most, seed=0):
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(tokens, experts, generator=generator).topk(most, -1)
    return chosen.indices.to(DEVICE), chosen.values.to(DEVICE)


@pytest.mark.parametrize(
    ("act", "gate", "given"),
    [
        (kernels.SILU, silu, {}),
        (kernels.GELU_TANH, gelu, {}),
        (kernels.CLAMPED, clamped, {"interleaved": True, "limit": 1.0, "alpha": 1.7}),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_gates_biases_and_layouts(act, gate, given, turned):
    layer = Layer(bias=True, turned=turned)
    x, (chosen, weights) = layer.draw(6, 24), choose(6, 5, 2)
    torch.testing.assert_close(
        layer.ours(x, chosen, weights, act, **given), layer.expected(x, chosen, weights, gate), atol=2e-5, rtol=2e-5
    )


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=on_gpu)])
def test_sixteen_bits(dtype):
    layer = Layer(dtype=dtype)
    x, (chosen, weights) = layer.draw(9, 24), choose(9, 5, 3)
    ours = layer.ours(x, chosen, weights.to(dtype), kernels.SILU)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.float(), layer.expected(x, chosen, weights, silu), atol=2e-2, rtol=2e-2)


def test_all_tokens_choose_one_expert_and_fill_many_blocks():
    layer = Layer(experts=3)
    x = layer.draw(70, 24)
    chosen = torch.tensor([[2, 0]] * 70, device=DEVICE)
    weights = torch.rand(70, 2, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    torch.testing.assert_close(
        layer.ours(x, chosen, weights, kernels.SILU), layer.expected(x, chosen, weights, silu), atol=2e-5, rtol=2e-5
    )


def test_padding_chooses_no_expert_and_is_zero(monkeypatch):
    layer = Layer()
    x, (chosen, weights) = layer.draw(8, 24), choose(8, 5, 2)
    slots = torch.tensor([4, 5, 9, -1, -1, 2, -1, -1], device=DEVICE)
    chosen[slots < 0] = 4  # an expert that no other token takes
    chosen[slots >= 0] = torch.tensor([1, 3], device=DEVICE)
    layer.gate_up[4] = float("nan")
    ours = layer.ours(x, chosen, weights, kernels.SILU, slots=slots)
    assert not ours[slots < 0].any()
    real = slots >= 0
    expected = layer.expected(x[real], chosen[real], weights[real], silu)
    torch.testing.assert_close(ours[real], expected, atol=2e-5, rtol=2e-5)


def test_a_row_does_not_depend_on_others():
    layer = Layer()
    x, (chosen, weights) = layer.draw(12, 24), choose(12, 5, 2)
    together = layer.ours(x, chosen, weights, kernels.SILU)
    for token in (0, 5, 11):
        own = slice(token, token + 1)
        assert torch.equal(layer.ours(x[own], chosen[own], weights[own], kernels.SILU)[0], together[token])


@pytest.mark.parametrize("pairs", [1, 7, 16, 100, 5000])
@pytest.mark.parametrize("experts", [4, 64])
def test_there_are_blocks_enough(pairs, experts):
    """However the pairs are spread."""
    rows = kernels.rows_of_block(pairs, experts, 2)
    for seed in range(20):
        spread = torch.rand(experts, generator=torch.Generator().manual_seed(seed)) ** (1 + seed)
        counts = torch.multinomial(spread, pairs, replacement=True).bincount(minlength=experts)
        assert int((-(-counts // rows)).sum()) <= kernels.most_blocks(pairs, experts, rows)


@pytest.mark.parametrize("among_chosen", [False, True])
def test_a_choice_in_one_launch(among_chosen):
    logits = torch.randn(6, 11, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    chosen, weights = kernels.choose_experts(logits, 3, among_chosen, torch.float32)
    expected = logits.softmax(-1).topk(3, -1)
    assert torch.equal(chosen, expected.indices)
    values = expected.values / expected.values.sum(-1, keepdim=True) if among_chosen else expected.values
    torch.testing.assert_close(weights, values)


@pytest.mark.parametrize("rows", [1, 5, 21])
def test_gate_and_up_of_few_rows_in_one_launch(rows):
    layer = Layer(experts=1, bias=True)
    x, bias = layer.draw(rows, 24), layer.biases[0][0]
    ours = kernels.gate_up_rows(x, layer.gate_up[0], bias, kernels.SILU)
    torch.testing.assert_close(ours, silu(F.linear(x, layer.gate_up[0], bias)), atol=2e-5, rtol=2e-5)
