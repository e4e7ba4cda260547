"""What the hub's ways of quantizing are called in a config.json, and which of them are read: told before any weight is,
and without torch. docs/models.md has the same as a table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

INSTEAD = (
    "take the model's unquantized version, which --quantization rounds as it is loaded, or one in fp8, gptq or awq"
)

READ = ("fp8", "fbgemm_fp8", "compressed-tensors", "modelopt", "gptq", "awq", "auto-round", "mxfp4")
REFUSED = {
    "bitsandbytes": "its layouts (NF4, LLM.int8) are those of one library's kernels and may change with it",
    "aqlm": "its weights are sums of learned codebooks, for which there is no product here",
    "vptq": "its weights are learned codebooks, for which there is no product here",
    "spqr": "its weights are in groups of two levels with outliers apart, for which there is no product here",
    "quip": "its weights are rotated and in lattice codebooks, for which there is no product here",
    "higgs": "its weights are rotated and in grids, for which there is no product here",
    "fp_quant": "its activations must be rotated before each product",
    "hqq": "its files hold the library's own objects, not a documented layout",
    "quanto": "its files hold the library's own objects, not a documented layout",
    "torchao": "its files hold tensor subclasses of one version of torchao, not a documented layout",
    "eetq": "its layout is that of one library's kernels",
    "bitnet": "its ternary layers need activations in int8 with norms of their own",
    "quark": "its exports differ by version, and none is described",
    "sinq": "its weights have scales on both axes, for which there is no product here",
    "mxfp8": "no checkpoint of it was at hand to be compared with",
    "nvfp4": "transformers' own form of NVFP4; the ones of modelopt and compressed-tensors are read",
    "fouroversix": "its blocks choose between two scales, for which there is no product here",
    "metal": "its layout is for another vendor's devices",
}
MODELOPT = {"FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4"}  # quant_algo
COMPRESSED = {"float-quantized", "int-quantized", "naive-quantized", "pack-quantized", "nvfp4-pack-quantized", "dense"}


def refusal(stated: Mapping[str, Any]) -> str | None:
    """Why a checkpoint with this quantization_config is not served, and what would be; None: it is read."""
    method = str(stated.get("quant_method") or ("modelopt" if "quant_algo" in stated else ""))
    if method not in READ:
        why, named = REFUSED.get(method, "it is not known here"), method or "a method that is not named"
        return f"the weights are quantized by {named}, which is not served ({why}); {INSTEAD}"
    reason = _CHECKS.get(method, _no_more)(stated)
    return reason and f"the weights are quantized by {method}, of which this is not served: {reason}; {INSTEAD}"


def widening(stated: Mapping[str, Any]) -> float:
    """About how many times as many bytes weights take as 16-bit floats."""
    form = str(stated.get("format", "")) + str(stated.get("quant_algo", ""))
    in_fours = stated.get("quant_method") in ("gptq", "awq", "auto-round", "mxfp4") or "NVFP4" in form.upper()
    return 3.5 if (in_fours or form == "pack-quantized") and stated.get("bits", 4) == 4 else 2.0


def _no_more(stated: Mapping[str, Any]) -> str | None:
    return None


def _fp8(stated: Mapping[str, Any]) -> str | None:
    if stated.get("fmt", "e4m3") != "e4m3":
        return f"numbers of the form {stated['fmt']}, not e4m3"
    blocks = stated.get("weight_block_size")
    return f"blocks of {blocks}, not [128, 128]" if blocks and list(blocks) != [128, 128] else None


def _integers(stated: Mapping[str, Any]) -> str | None:
    bits = stated.get("bits", stated.get("w_bit", 4))
    return None if bits in (4, 8) else f"{bits} bits, not 4 or 8"


def _awq(stated: Mapping[str, Any]) -> str | None:
    version = str(stated.get("version", "gemm")).lower()
    if version not in ("gemm", "awqformat.gemm"):
        return f"the layout {version}, not gemm"
    return None if stated.get("bits", stated.get("w_bit", 4)) == 4 else f"{stated.get('bits')} bits, not 4"


def _auto_round(stated: Mapping[str, Any]) -> str | None:
    packing = str(stated.get("packing_format", "auto_round:auto_gptq"))
    if "gptq" not in packing and "awq" not in packing:
        return f"the packing {packing}, not that of gptq or awq"
    return _integers(stated)


def _modelopt(stated: Mapping[str, Any]) -> str | None:
    algorithm = str(stated.get("quant_algo"))
    return (
        None if algorithm.upper() in MODELOPT else f"quant_algo {algorithm}, not one of {', '.join(sorted(MODELOPT))}"
    )


def _compressed(stated: Mapping[str, Any]) -> str | None:
    sparse = stated.get("sparsity_config") or {}
    if sparse.get("format", "dense") != "dense":
        return f"sparse weights ({sparse['format']})"
    groups = stated.get("config_groups") or {}
    forms = {str(group["format"]) for group in groups.values() if isinstance(group, dict) and group.get("format")}
    forms = forms or {str(stated.get("format", "dense"))}
    if other := sorted(forms - COMPRESSED):
        return f"the format {other[0]}, not one of {', '.join(sorted(COMPRESSED))}"
    for group in groups.values():
        weights = (group.get("weights") or {}) if isinstance(group, dict) else {}
        if weights.get("num_bits", 8) not in (4, 8):
            return f"weights of {weights['num_bits']} bits, not 4 or 8"
        block = weights.get("block_structure")
        if block and list(block) != [128, 128]:
            return f"blocks of {block}, not [128, 128]"
    return None


_CHECKS = {
    "fp8": _fp8,
    "gptq": _integers,
    "awq": _awq,
    "auto-round": _auto_round,
    "modelopt": _modelopt,
    "compressed-tensors": _compressed,
}
