"""Rounding to few bits: the error is within what the form implies, and joined weights are the parts side by side."""

from __future__ import annotations

import pytest
import torch

from workers.torch_engine.quantized.weights import MAKERS, Fp8Weight, IntWeight, fp8_of, int4_of, joined


def drawn(outputs: int = 48, inputs: int = 256, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp(2 * torch.randn(outputs, 1, generator=generator))
    return torch.randn(outputs, inputs, generator=generator) * sizes


@pytest.mark.parametrize("kind", MAKERS)
def test_the_error_of_a_weight_is_within_its_form(kind: str) -> None:
    w = drawn()
    off = (MAKERS[kind](w).dequantized() - w).abs()
    if kind == "fp8":  # 3 bits behind the first, the smallest steps 2^-9 of a scale
        bound = (w.abs() / 16).maximum(w.abs().amax(1, keepdim=True) / 448 / 2**10)
    elif kind == "int8":
        bound = w.abs().amax(1, keepdim=True) / 254
    else:  # the zero is rounded too: half a step more at the ends
        groups = w.view(len(w), -1, 128)
        bound = ((groups.amax(-1) - groups.amin(-1)) / 15).repeat_interleave(128, 1)
    assert bool((off <= bound * 1.001).all())
    assert float(off.max()) > 0


@pytest.mark.parametrize("kind", MAKERS)
def test_joined_weights_are_their_parts_side_by_side(kind: str) -> None:
    parts = [MAKERS[kind](drawn(seed=seed)) for seed in range(3)]
    whole = joined(parts)
    assert whole is not None
    assert torch.equal(whole.dequantized(), torch.cat([part.dequantized() for part in parts]))


def test_weights_that_do_not_line_up_are_not_joined() -> None:
    w = drawn()
    one, other = int4_of(w), fp8_of(w)
    assert joined([one, other]) is None
    assert joined([one, int4_of(drawn(inputs=128))]) is None
    turned = IntWeight(one.codes, one.scale, one.group, 4, one.zeros, torch.arange(256).flip(0))
    assert joined([one, turned]) is None
    assert joined([turned, turned]) is not None
    static = Fp8Weight(other.values, other.scale, input_scale=torch.tensor(0.5))
    assert joined([other, static]) is None
    assert joined([static, static]) is not None
    blocks = Fp8Weight(other.values, torch.ones(1, 2), blocks=True)
    assert joined([blocks, blocks]) is None, "48 outputs are no whole block"


def test_zeros_appear_where_one_part_has_none() -> None:
    made = int4_of(drawn())
    plain = IntWeight(made.codes, made.scale, made.group)
    whole = joined([plain, made])
    assert whole is not None
    assert torch.equal(whole.dequantized(), torch.cat([plain.dequantized(), made.dequantized()]))


def test_int4_takes_half_a_byte() -> None:
    made = int4_of(drawn().bfloat16())
    assert made.codes.numel() == 48 * 256 // 2
    assert made.nbytes < 0.53 * 48 * 256


def test_rows_are_rounded_as_the_weight_says() -> None:
    x = drawn(3, 256)
    by_row = fp8_of(drawn())
    near = by_row.rounded_inputs(x)
    assert float(((near - x).abs() / x.abs().amax(1, keepdim=True)).max()) < 1 / 16
    static = Fp8Weight(by_row.values, by_row.scale, input_scale=torch.tensor(1.0))
    assert float(static.rounded_inputs(torch.full((1, 256), 1000.0)).max()) == 448
