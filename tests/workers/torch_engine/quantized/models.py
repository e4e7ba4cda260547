"""Tiny models whose linear layers are quantized, each beside the same model with the weights that these stand for."""

from __future__ import annotations

import atexit
import json
import math
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from tests.models import CONFIGS, build, byte_tokenizer
from tests.workers.torch_engine.quantized import written

# More than one block of 128 both ways, and groups of 32 in all of them.
SIZES = {"hidden_size": 160, "intermediate_size": 288, "num_hidden_layers": 2, "moe_intermediate_size": 160}
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SCALES = ("weight_scale", "weight_scale_inv", "scales")
METHODS: dict[str, tuple[dict[str, Any], Callable[..., written.Written]]] = {
    "fp8": ({"quant_method": "fp8"}, lambda r, n, k: written.fp8(r, n, k, "tensor")),
    "fbgemm_fp8": ({"quant_method": "fbgemm_fp8"}, lambda r, n, k: written.fp8(r, n, k, "row")),
    "fp8 in blocks": (
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        lambda r, n, k: written.fp8(r, n, k, "block", "weight_scale_inv"),
    ),
    "int-quantized": ({"quant_method": "compressed-tensors", "format": "int-quantized"}, written.int8),
    "pack-quantized": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        lambda r, n, k: written.packed(r, n, k, 32, zeros=True),
    ),
    "gptq": ({"quant_method": "gptq", "bits": 4}, lambda r, n, k: written.gptq(r, n, k, 32)),
    "gptq in act-order": (
        {"quant_method": "gptq", "bits": 4, "desc_act": True},
        lambda r, n, k: written.gptq(r, n, k, 32, act_order=True),
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "version": "gemm"}, lambda r, n, k: written.awq(r, n, k, 32)),
}


@cache
def pair(method: str, architecture: str = "llama") -> tuple[Path, Any]:
    """(the folder of the quantized model, not to be changed; the same model in float32)."""
    stated, write = METHODS[method]
    model = build({**CONFIGS[architecture], **SIZES})
    tensors = dict(model.state_dict())
    rng = np.random.default_rng(0)

    def put(name: str, weight: torch.Tensor) -> None:
        parts, wide = _sized(*write(rng, *weight.shape))
        weight.copy_(torch.from_numpy(wide))
        tensors.update({f"{name}.{part}": tensor for part, tensor in parts.items()})

    with torch.no_grad():
        for name, module in model.named_modules():
            if type(module) is nn.Linear and name.rpartition(".")[2] in LAYERS:
                del tensors[name + ".weight"]
                put(name, module.weight)
            elif name.endswith(".experts"):  # one by one in the files
                experts: Any = module
                del tensors[name + ".gate_up_proj"], tensors[name + ".down_proj"]
                for at, (both, down) in enumerate(zip(experts.gate_up_proj, experts.down_proj, strict=True)):
                    for part, weight in zip(("gate_proj", "up_proj", "down_proj"), (*both.chunk(2), down), strict=True):
                        put(f"{name}.{at}.{part}", weight)
    path = Path(tempfile.mkdtemp(prefix="quantized-"))
    atexit.register(shutil.rmtree, path)
    model.config.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "dtype": "float32", "quantization_config": stated}))
    byte_tokenizer().save_pretrained(path)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    return path, model.eval()


def copied(method: str, path: Path) -> Path:
    """A folder of one's own."""
    return Path(shutil.copytree(pair(method)[0], path))


def _sized(parts: written.Tensors, wide: np.ndarray) -> written.Written:
    """With scales times a power of two, so that activations keep their size."""
    factor = 2.0 ** round(math.log2(2.0 / math.sqrt(wide.shape[1]) / wide.std()))
    parts = {name: (t.float() * factor).to(t.dtype) if name in SCALES else t for name, t in parts.items()}
    return parts, wide * factor
