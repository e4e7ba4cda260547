"""Each format is read as its description says: against float64 matrices written one number at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from protocol.errors import StartError
from tests.workers.torch_engine.quantized import written
from workers.torch_engine.quantized.formats import OF_METHOD, formats_of
from workers.torch_engine.quantized.weights import Fp8Weight, IntWeight, QuantizedWeight

COMPRESSED = {"quant_method": "compressed-tensors"}
GPTQ = {"quant_method": "gptq", "bits": 4}
N, K = 144, 384  # outputs that are no whole block of 128

CASES: dict[str, tuple[dict[str, Any], Any, str]] = {  # quantization_config, what is written, what it becomes
    "fp8 by tensor": ({"quant_method": "fp8"}, lambda r: written.fp8(r, N, K, "tensor"), "fp8"),
    "fp8 by row": ({"quant_method": "fbgemm_fp8"}, lambda r: written.fp8(r, N, K, "row"), "fp8"),
    "fp8 in blocks": (
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        lambda r: written.fp8(r, N, K, "block", "weight_scale_inv"), "fp8",
    ),
    "float-quantized": (COMPRESSED, lambda r: written.fp8(r, N, K, "row"), "fp8"),
    "int-quantized": (COMPRESSED, lambda r: written.int8(r, N, K), "int8"),
    "pack-quantized": (COMPRESSED, lambda r: written.packed(r, N, K, 128), "int4"),
    "pack-quantized with zeros": (
        COMPRESSED, lambda r: written.packed(r, N, K, 64, zeros=True), "int4",
    ),
    "pack-quantized in act-order": (
        COMPRESSED, lambda r: written.packed(r, N, K, 32, zeros=True, act_order=True), "int4",
    ),
    "pack-quantized in 8 bits": (
        COMPRESSED, lambda r: written.packed(r, N, K, K, bits=8), "int8",
    ),
    "nvfp4": (COMPRESSED, lambda r: written.nvfp4(r, N, K, divided=True), "wide"),
    "modelopt nvfp4": ({"quant_method": "modelopt"}, lambda r: written.nvfp4(r, N, K, divided=False), "wide"),
    "modelopt fp8": ({"quant_method": "modelopt"}, lambda r: written.fp8(r, N, K, "tensor"), "fp8"),
    "gptq": (GPTQ, lambda r: written.gptq(r, N, K, 128), "int4"),
    "gptq in act-order": (GPTQ, lambda r: written.gptq(r, N, K, 128, act_order=True), "int4"),
    "gptq with one group": (GPTQ, lambda r: written.gptq(r, N, K, K), "int4"),
    "gptq_v2": (
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"},
        lambda r: written.gptq(r, N, K, 64, version="gptq_v2"), "int4",
    ),
    "gptq in 8 bits": (
        {"quant_method": "gptq", "bits": 8}, lambda r: written.gptq(r, N, K, 128, bits=8, symmetric=True), "wide",
    ),
    "awq": ({"quant_method": "awq", "bits": 4}, lambda r: written.awq(r, N, K, 128), "int4"),
    "auto-round": (
        {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4},
        lambda r: written.gptq(r, N, K, 128, symmetric=True), "int4",
    ),
    "mxfp4": ({"quant_method": "mxfp4"}, lambda r: written.mxfp4(r, 3, 64, 96), "wide"),
}  # fmt: skip


def sources(tensors: dict[str, torch.Tensor], path: Any) -> dict[str, Any]:
    """As they come from a file."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    opened: Any = safe_open(path, framework="pt")
    return {name: opened.get_slice(name) for name in tensors}


def read(stated: dict[str, Any], tensors: dict[str, torch.Tensor], path: Any) -> tuple[Any, list[int]]:
    parts = sources(tensors, path)
    chosen = [each for each in formats_of(stated) if each.takes(parts)]
    assert len(chosen) == 1, "one format takes these tensors"
    found = chosen[0].read(parts)
    assert not isinstance(found, QuantizedWeight) or chosen[0].kind(parts) == found.kind
    return found, chosen[0].shape(parts)


@pytest.mark.parametrize("case", CASES)
def test_a_format_is_read_as_it_is_described(case: str, tmp_path: Any) -> None:
    stated, write, becomes = CASES[case]
    tensors, expected = write(np.random.default_rng(0))
    found, shape = read(stated, tensors, tmp_path / "t.safetensors")
    assert shape == list(expected.shape)
    wide = found.dequantized(torch.float64) if isinstance(found, QuantizedWeight) else found.double()
    np.testing.assert_allclose(wide.numpy(), expected, rtol=3e-7, atol=0)  # one product in float32
    assert (found.kind if isinstance(found, QuantizedWeight) else "wide") == becomes


def test_every_format_is_among_the_cases(tmp_path: Any) -> None:
    seen = set()
    for case, (stated, write, _) in CASES.items():
        parts = sources(write(np.random.default_rng(0))[0], tmp_path / case)
        seen |= {type(each) for each in formats_of(stated) if each.takes(parts)}
    assert seen == {kind for kinds in OF_METHOD.values() for kind in kinds}


def test_a_static_scale_of_inputs_is_kept(tmp_path: Any) -> None:
    tensors, _ = written.fp8(np.random.default_rng(0), N, K, "tensor")
    for name in ("input_scale", "activation_scale"):
        found, _ = read({"quant_method": "fp8"}, {**tensors, name: torch.tensor([0.25])}, tmp_path / name)
        assert isinstance(found, Fp8Weight)
        assert found.input_scale is not None
        assert float(found.input_scale) == 0.25


def test_groups_of_different_sizes_are_widened(tmp_path: Any) -> None:
    tensors, expected = written.gptq(np.random.default_rng(0), 16, 64, 32)
    index = tensors["g_idx"].clone()
    index[0] = 1 - index[0]
    found, _ = read(GPTQ, {**tensors, "g_idx": index}, tmp_path / "t")
    assert not isinstance(found, IntWeight)
    np.testing.assert_allclose(found[:, 1:].double().numpy(), expected[:, 1:], rtol=3e-7)


def test_scales_that_fit_no_weight_are_refused(tmp_path: Any) -> None:
    tensors, _ = written.fp8(np.random.default_rng(0), N, K, "row")
    with pytest.raises(StartError, match="a scale of the shape"):
        read({"quant_method": "fp8"}, {**tensors, "weight_scale": torch.ones(7)}, tmp_path / "t")
