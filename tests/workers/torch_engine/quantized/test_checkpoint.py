"""Whole models of each method, loaded and served: what they say is what the model with their widened weights says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from protocol.errors import ModelRefused, StartError
from tests.workers.core_driver import CoreDriver
from tests.workers.torch_engine.parity import first_difference, make_engine, make_requests
from tests.workers.torch_engine.quantized.models import METHODS, copied, pair
from workers.torch_engine import loader
from workers.torch_engine.config import EngineConfig
from workers.torch_engine.quantized import checkpoint
from workers.torch_engine.quantized.linear import QuantizedLinear
from workers.torch_engine.quantized.weights import MAKERS, Fp8Weight, IntWeight


def load(path: Path, keep: bool) -> Any:
    config = loader.load_config(str(path))
    kind = loader.causal_lm_class(config)
    model, found = checkpoint.load(
        kind, loader.files_of(str(path)), config, MAKERS if keep else (), torch.float32, attn_implementation="eager",
        output_loading_info=True,
    )  # fmt: skip
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    return model.eval()


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=torch.arange(3, 40)[None], use_cache=False).logits
    return found


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "widened"])
@pytest.mark.parametrize("method", METHODS)
def test_logits_are_those_of_the_widened_model(method: str, keep: bool) -> None:
    path, reference = pair(method)
    model, expected = load(path, keep), logits(reference)
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == (14 if keep else 0)
    assert float((logits(model) - expected).abs().max() / expected.abs().max()) < 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_greedy_tokens_on_a_cpu_are_those_of_the_widened_model(method: str) -> None:
    path, reference = pair(method)
    engine = make_engine(path)
    requests = make_requests(4, 40)[:6]
    CoreDriver(engine, engine.capacity, 60, budget=24).run(requests)
    assert [first_difference(reference, request) for request in requests] == [None] * 6


@pytest.mark.parametrize(("method", "scales"), [("fp8 in blocks", "weight_scale_inv"), ("gptq", "scales")])
def test_a_wrong_order_of_scales_is_another_model(method: str, scales: str, tmp_path: Path) -> None:
    """What the tests above would see."""
    path, expected = copied(method, tmp_path / "m"), logits(pair(method)[1])
    tensors = load_file(path / "model.safetensors")
    moved = {name: t.flip(0) if name.endswith("proj." + scales) else t for name, t in tensors.items()}
    save_file({name: t.contiguous() for name, t in moved.items()}, path / "model.safetensors")
    assert float((logits(load(path, keep=True)) - expected).abs().max() / expected.abs().max()) > 0.1


def test_experts_are_widened_one_by_one() -> None:
    path, reference = pair("fp8", "qwen3_moe")
    model = load(path, keep=True)
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 8
    expected = logits(reference)
    assert float((logits(model) - expected).abs().max() / expected.abs().max()) < 1e-4


@pytest.mark.parametrize("method", ["gptq", "fp8 in blocks"])
def test_nothing_is_widened_while_it_is_loaded(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that would not fit a device in 16 bits is never there so."""
    for kind in (Fp8Weight, IntWeight):
        monkeypatch.setattr(kind, "dequantized", None)
    model = load(pair(method)[0], keep=True)
    small = [module.quantized.nbytes for module in model.modules() if isinstance(module, QuantizedLinear)]
    wide = sum(p.numel() for name, p in pair(method)[1].named_parameters() if name.endswith("_proj.weight"))
    assert sum(small) < {"gptq": 0.6, "fp8 in blocks": 1.01}[method] * wide


def test_a_checkpoint_that_is_quantized_is_not_rounded_again_unless_it_is_widened() -> None:
    path, _ = pair("fp8")
    with pytest.raises(StartError, match="--dequantize"):
        make_engine(path, quantization="int8")
    assert make_engine(path, quantization="int8", dequantize=True).capacity.dtype == "int8"


def test_the_fingerprint_tells_how_weights_are_computed() -> None:
    path, _ = pair("gptq")
    ways: list[dict[str, Any]] = [{}, {"dequantize": True}, {"dequantize": True, "quantization": "int8"}]
    assert len({make_engine(path, **way).capacity.fingerprint for way in ways}) == 3


def test_scales_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    path = copied("fp8", tmp_path / "m")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight_scale"].fill_(float("nan"))
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(StartError, match=r"damaged: model\.layers\.1\.mlp\.up_proj\.weight"):
        make_engine(path)


def test_codes_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    path = copied("fp8", tmp_path / "m")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"].view(torch.uint8)[3, 4] = 255
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(StartError, match="damaged"):
        make_engine(path)


def test_tensors_that_belong_to_no_format_are_refused(tmp_path: Path) -> None:
    path = copied("gptq", tmp_path / "m")
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.scales"]
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(StartError, match=r"model\.layers\.0\.self_attn\.q_proj: g_idx, qweight, qzeros"):
        make_engine(path)


def test_modelopts_own_file_is_read(tmp_path: Path) -> None:
    path, reference = copied("fp8", tmp_path / "m"), pair("fp8")[1]
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    (path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    expected = logits(reference)
    assert float((logits(load(path, keep=True)) - expected).abs().max() / expected.abs().max()) < 1e-4


def test_a_method_that_is_not_read_is_refused_by_name(tmp_path: Path) -> None:
    path = copied("fp8", tmp_path / "m")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelRefused, match="quantized by bitsandbytes, which is not served"):
        loader.load_model(EngineConfig(str(path)), loader.load_config(str(path)), torch.device("cpu"), lambda *_: None)
