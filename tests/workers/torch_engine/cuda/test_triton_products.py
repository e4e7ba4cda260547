"""Products with quantized weights against the same product of what the weights stand for."""

from __future__ import annotations

import pytest
import torch

from tests.workers.torch_engine.cuda.triton_device import DEVICE, triton
from workers.torch_engine.cuda import triton_products as products
from workers.torch_engine.quantized import weights

KINDS_OF_ROWS = [torch.float32] if DEVICE.type == "cpu" else [torch.float32, torch.bfloat16, torch.float16]
WITHIN = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # 16 bits: in which sums are given


def drawn(rows: int, outputs: int, inputs: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=generator)
    w = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
    w *= torch.exp(torch.randn(outputs, 1, generator=generator))  # a scale for each output that matters
    return x.to(DEVICE), w.to(DEVICE)


def in_blocks(w: torch.Tensor) -> weights.Fp8Weight:
    """A scale for each block of 128 x 128, far from each other."""
    outputs, inputs = w.shape
    scale = torch.exp(torch.randn(-(-outputs // 128), -(-inputs // 128), generator=torch.Generator().manual_seed(1)))
    scale = scale.to(DEVICE) / 100
    wide = scale.repeat_interleave(128, 0)[:outputs].repeat_interleave(128, 1)[:, :inputs]
    return weights.Fp8Weight((w / wide).clamp(-448, 448).to(weights.FP8), scale, blocks=True)


def with_order(w: torch.Tensor) -> weights.IntWeight:
    made = weights.int4_of(w)
    order = torch.randperm(w.shape[1], generator=torch.Generator().manual_seed(3)).to(DEVICE)
    return weights.IntWeight(made.codes, made.scale, made.group, 4, made.zeros, order)


def symmetric(w: torch.Tensor) -> weights.IntWeight:
    made = weights.int4_of(w)
    return weights.IntWeight(made.codes, made.scale, made.group)


KINDS = {**weights.MAKERS, "fp8 in blocks": in_blocks, "int4 with order": with_order, "int4 symmetric": symmetric}


def near(ours: torch.Tensor, theirs: torch.Tensor, within: float = 1e-5) -> None:
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < within


@pytest.mark.parametrize("dtype", KINDS_OF_ROWS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 96, 256), (5, 144, 1024), (40, 80, 384)])
def test_a_weight_is_widened_within_the_product(kind, rows, outputs, inputs, dtype):
    """On a GPU in the dtypes whose numbers are made of bits, which the interpreter cannot run."""
    x, w = drawn(rows, outputs, inputs)
    weight, x = KINDS[kind](w), x.to(dtype)
    near(products.widened(x, weight, None).float(), x.float() @ weight.dequantized().T, WITHIN[dtype])
    for tile in products.FEW:
        near(products.widened(x, weight, None, tile=tile).float(), x.float() @ weight.dequantized().T, WITHIN[dtype])


@pytest.mark.parametrize("kind", ["fp8", "int8", "fp8 in blocks"])
def test_inputs_need_not_be_whole_rounds(kind):
    x, w = drawn(3, 48, 208)
    weight = KINDS[kind](w)
    near(products.widened(x, weight, None), x @ weight.dequantized().T)


@pytest.mark.parametrize("group", [32, 64])
def test_smaller_groups(group):
    x, w = drawn(2, 64, 3 * group)
    weight = weights.int4_of(w)
    assert weight.group == group
    near(products.widened(x, weight, None), x @ weight.dequantized().T)


@pytest.mark.parametrize("rows", [2, 40, 130])
def test_inputs_cut_into_pieces_are_added_in_their_order_again_and_again(rows, monkeypatch):
    monkeypatch.setattr(products, "_multiprocessors", lambda device: 4)
    x, w = drawn(rows, 64, 2048)
    weight = weights.int4_of(w)
    bias = torch.randn(64, device=DEVICE)
    assert products._pieces(1, 2048, DEVICE, 99) == 4
    first = products.widened(x, weight, bias)
    near(first, x @ weight.dequantized().T + bias)
    assert torch.equal(first, products.widened(x, weight, bias)), "the counters are where they began"
    assert not products._partial(DEVICE)[1].any()


def test_pieces_have_room_for_their_sums(monkeypatch):
    monkeypatch.setattr(products, "_multiprocessors", lambda device: 132)
    for outputs in (1024, 4096, 6144, 14336, 128256):
        for rows in (1, 17, 33, 100, 128, 129, 2048):
            for tile in (*products.FEW, products.MANY):
                height = max(16, min(products.STRIP, triton.next_power_of_2(rows)))
                programs = -(-outputs // tile.columns) * -(-rows // height)
                room = min(products.COUNTERS, products.SUMS // (tile.columns * height))
                pieces = products._pieces(programs, 14336, DEVICE, room)
                assert pieces == 1 or programs * pieces * tile.columns * height <= products.SUMS
                assert pieces == 1 or programs <= products.COUNTERS
    assert products._pieces(64, 4096, DEVICE, 1024) == 8


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
def test_a_row_that_is_no_number_stays_so_alone():
    x, w = drawn(40, 64, 256)
    x[3, 5], x[7, 200] = float("nan"), float("inf")
    for found in (
        products.widened(x, weights.int4_of(w), None),
        products.product_in_fp8(x, weights.fp8_of(w), None),
        products.product_in_fp8(x, in_blocks(w), None),
    ):
        assert sorted(set((~found.isfinite()).nonzero()[:, 0].tolist())) == [3, 7]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("act", [products.SILU, products.GELU_TANH])
def test_gate_and_up_are_one_launch_with_the_activation(kind, act):
    x, w = drawn(3, 2 * 80, 256)
    weight, bias = KINDS[kind](w), torch.randn(160, device=DEVICE)
    if kind == "fp8 in blocks":  # whose blocks would lie across both
        x, w = drawn(3, 2 * 128, 256)
        weight, bias = in_blocks(w), torch.randn(256, device=DEVICE)
    gate, up = (x @ weight.dequantized().T + bias).chunk(2, -1)
    gated = (
        torch.nn.functional.silu(gate) if act == products.SILU else torch.nn.functional.gelu(gate, approximate="tanh")
    )
    near(products.widened(x, weight, bias, act), gated * up)


@pytest.mark.parametrize("kind", ["int4", "fp8"])
def test_a_row_does_not_depend_on_the_rows_beside_it(kind):
    x, w = drawn(16, 64, 1024)
    weight = KINDS[kind](w)
    alone = torch.cat([products.widened(row[None], weight, None) for row in x])
    assert torch.equal(products.widened(x, weight, None), alone)


@pytest.mark.parametrize("kind", ["fp8", "fp8 in blocks"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_in_fp8_is_that_of_rounded_rows(kind, bias):
    x, w = drawn(37, 144, 384)
    weight = KINDS[kind](w)
    more = torch.randn(144, device=DEVICE, dtype=torch.bfloat16) if bias else None
    ours = products.product_in_fp8(x.bfloat16(), weight, more).float()
    theirs = weight.rounded_inputs(x.bfloat16()).float() @ weight.dequantized().T
    near(ours, theirs + (0 if more is None else more.float()), within=1e-2)


def test_rows_are_rounded_each_by_its_own_scale_or_by_that_of_the_checkpoint():
    x, w = drawn(4, 32, 256)
    x[1] *= 1000
    for blocks in (False, True):
        weight = in_blocks(w) if blocks else weights.fp8_of(w)
        small, scale = products.rounded(x, weight)
        wide = scale.repeat_interleave(128, 1) if blocks else scale
        pieces = x.view(4, 2, 128) if blocks else x.view(4, 1, 256)
        torch.testing.assert_close(scale, pieces.abs().amax(-1) / 448)
        assert float(((small.float() * wide - x).abs() / (wide * 448)).max()) < 1 / 16
    given = weights.Fp8Weight(weight.values, weight.scale, True, torch.tensor(0.25, device=DEVICE))
    given = weights.Fp8Weight(
        weights.fp8_of(w).values, weights.fp8_of(w).scale, False, torch.tensor(0.25, device=DEVICE)
    )
    small, scale = products.rounded(torch.full((1, 256), 500.0, device=DEVICE), given)
    assert (small.float() == 448).all(), "beyond the largest number, not NaN"
    assert scale.flatten().tolist() == [0.25]
