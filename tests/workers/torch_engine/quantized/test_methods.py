"""What is refused from the config alone, and that docs/models.md names every method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from workers.torch_engine.quantized.formats import formats_of
from workers.torch_engine.quantized.methods import READ, REFUSED, refusal, widening

PAGE = (Path(__file__).parents[4] / "docs" / "models.md").read_text()

REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantized by bitsandbytes, which is not served"),
    ({"quant_method": "secret"}, "quantized by secret, which is not served"),
    ({}, "a method that is not named"),
    ({"quant_method": "gptq", "bits": 3}, "3 bits"),
    ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "gemv"),
    ({"quant_method": "fp8", "fmt": "e5m2"}, "e5m2"),
    ({"quant_method": "fp8", "weight_block_size": [64, 64]}, "[64, 64]"),
    ({"quant_method": "auto-round", "packing_format": "auto_round:llm_compressor"}, "llm_compressor"),
    ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "W4A8_AWQ"),
    ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "marlin-24"),
    ({"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse"),
    (
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"format": "mxfp4-pack-quantized"}}},
        "mxfp4-pack-quantized",
    ),
    (
        {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 2}}}},
        "2 bits",
    ),
]
READABLE: list[dict[str, Any]] = [
    {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]},
    {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
    {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": True},
    {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True},
    {"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:auto_gptq"},
    {"quant_algo": "FP8"},
    {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
    {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 128}}},
    },
]  # fmt: skip


@pytest.mark.parametrize(("stated", "says"), REFUSALS)
def test_what_is_not_read_is_refused_with_the_reason_and_what_to_do(stated: dict[str, Any], says: str) -> None:
    sentence = refusal(stated)
    assert sentence is not None
    assert says in sentence
    assert "take the model's unquantized version" in sentence


@pytest.mark.parametrize("stated", READABLE, ids=lambda stated: stated.get("quant_method", "none"))
def test_what_is_read_has_formats(stated: dict[str, Any]) -> None:
    assert refusal(stated) is None
    assert formats_of(stated)


def test_the_page_names_every_method() -> None:
    table = PAGE.partition("| `quant_method` |")[2].partition("\n\n")[0]
    assert [name for name in (*READ, *REFUSED) if f"`{name}`" not in table] == []


def test_how_much_widening_takes_is_told_from_the_config() -> None:
    assert widening({"quant_method": "fp8"}) == 2
    assert widening({"quant_method": "gptq", "bits": 8}) == 2
    assert widening({"quant_method": "awq", "bits": 4}) == 3.5
    assert widening({"quant_method": "compressed-tensors", "format": "pack-quantized"}) == 3.5
    assert widening({"quant_method": "compressed-tensors", "format": "float-quantized"}) == 2
    assert widening({"quant_method": "modelopt", "quant_algo": "NVFP4"}) == 3.5
