"""Models with quantized weights on the Triton kernels: what was replaced, and that the logits stay."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.workers.torch_engine.cuda.launches import counted, of_a_layer
from tests.workers.torch_engine.cuda.test_graphs import make_engine, serve, small_llama
from tests.workers.torch_engine.cuda.triton_device import DEVICE
from tests.workers.torch_engine.parity import first_difference, reference_of
from tests.workers.torch_engine.quantized.models import METHODS, pair
from tests.workers.torch_engine.quantized.test_checkpoint import load, logits
from workers.torch_engine.cuda.quantized import product_candidates
from workers.torch_engine.quantized.linear import QuantizedLinear, quantize_linears
from workers.torch_engine.replace import FuseReport, SeededInput, replace


def fused(model):
    report = FuseReport()
    replace(product_candidates(model, SeededInput(torch.float32, DEVICE)), report)
    return report


@torch.inference_mode()
def difference(model, expected):
    found = model(input_ids=torch.arange(3, 40)[None].to(DEVICE), use_cache=False).logits.cpu()
    return float((found - expected).abs().max() / expected.abs().max())


def few(model, expected):
    """The same for so few tokens that rows are not rounded."""
    with torch.inference_mode():
        found = model(input_ids=torch.arange(3, 40)[None, :20].to(DEVICE), use_cache=False).logits.cpu()
    return float((found - expected[:, :20]).abs().max() / expected.abs().max())


@pytest.mark.parametrize("method", METHODS)
def test_quantized_layers_are_replaced_by_products(method):
    path, reference = pair(method)
    model = load(path, keep=True).to(DEVICE)
    report, expected = fused(model), logits(reference)
    kind = next(iter(report.fused)).rpartition("(")[2].rstrip(")")
    if (
        method == "gptq in act-order" or method == "fp8 in blocks"
    ):  # gate and up have orders of their own, as q, k and v
        assert report.fused == {f"linear ({kind})": 14}
    else:
        assert report.fused == {f"mlp ({kind})": 2, f"qkv ({kind})": 2, f"linear ({kind})": 2}
    assert not report.kept
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
    assert few(model, expected) < 1e-4
    if kind != "fp8":
        assert difference(model, expected) < 1e-4
        return
    rounding = load(path, keep=True)  # 37 rows are rounded, by torch here
    for module in rounding.modules():
        if isinstance(module, QuantizedLinear):
            module.register_forward_pre_hook(
                lambda own, args: (own.quantized.rounded_inputs(args[0].flatten(0, 1)).view_as(args[0]),)
            )
    assert difference(model, logits(rounding)) < 0.03  # a number near the middle of two may become either
    assert 0.01 < difference(model, expected) < 0.5, "each number is off by up to 1/16, and attention is sensitive"


@pytest.mark.parametrize("kind", ["fp8", "int8", "int4"])
def test_weights_rounded_at_load(kind):
    """Against the same model with the rounded weights widened; and they are near the ones that were rounded."""
    _, original = pair("fp8")
    model = copy.deepcopy(original).to(DEVICE)
    assert quantize_linears(model, kind, DEVICE) > 0
    assert type(model.lm_head) is torch.nn.Linear, "the head stays"
    wide = widened(copy.deepcopy(model))
    expected = logits(wide.cpu())
    report = fused(model)
    assert sum(report.fused.values()) == 6
    assert few(model, expected) < 1e-4
    whole = logits(original)
    far = float((expected - whole).norm() / whole.norm())
    assert far < {"fp8": 0.2, "int8": 0.1, "int4": 0.9}[kind]
    assert far > 1e-4


def widened(model):
    """The model with each quantized layer's weight in float32."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, QuantizedLinear):
                linear = torch.nn.Linear(child.in_features, child.out_features, bias=False)
                linear.weight.data = child.quantized.dequantized()
                setattr(module, name, linear)
    return model


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", ["int4"])
def test_an_engine_that_rounds_at_load_gives_the_tokens_of_the_rounded_model(kind, tmp_path):
    """Its steps are of few rows, whose activations stay as they are. A layer has no more launches than a dense one."""
    launches = []
    for layers in (1, 2):
        path = small_llama(tmp_path / str(layers), layers)
        engine = make_engine(path, quantization=kind, graphs=False)
        assert engine.backend.name == "Triton kernels"
        with torch.inference_mode(), counted() as seen:
            engine.backend.steps.run(engine.backend._padding(1))
        launches.append(seen)
    each = of_a_layer(*launches, 1)
    assert sum(each.values()) <= 7, each
    reference = reference_of(path)
    quantize_linears(reference, kind, torch.device("cpu"))
    reference, served = widened(reference), serve(engine)
    assert not [text for text in (first_difference(reference, request) for request in served) if text]
    assert engine.backend.report.fused[f"mlp ({kind})"] == 2
