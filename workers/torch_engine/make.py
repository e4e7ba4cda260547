"""The factory: which backends may serve a configuration, best first. The one common file that knows cpu/ and cuda/."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch

from protocol.errors import StartError
from workers.engines.base import ALONE, Place
from workers.native.library import KernelsUnavailable, load_kernels
from workers.torch_engine.backend import Backend
from workers.torch_engine.config import EngineConfig
from workers.torch_engine.cpu.backend import NativeBackend
from workers.torch_engine.draw import Draw, TorchDraw, threshold_by_bisection, threshold_by_histogram
from workers.torch_engine.engine import TorchEngine
from workers.torch_engine.loader import choose_device
from workers.torch_engine.plain.backend import TorchBackend

FP8_CAPABILITY = (8, 9)

log = logging.getLogger(__name__)


def make_engine(config: EngineConfig, place: Place = ALONE) -> TorchEngine:
    """Raises StartError for a device that is not there, or a precision that it does not serve."""
    device = choose_device(config.device, place.device if place.ranks > 1 else None)
    if config.kv_cache_dtype == "fp8":
        _check_fp8_pool(device)
    if config.quantization == "fp8" and device.type == "cpu":
        raise StartError("--quantization fp8 is served on a GPU: on a CPU say int8 or int4, or leave it out")
    if place.stages > 1:
        config = dataclasses.replace(config, graphs=False)  # hidden states are sent between launches
    backends = _on_cpu(config, device) if device.type == "cpu" else _on_gpu(config, device)
    return TorchEngine(config, device, backends, place)


def _on_cpu(config: EngineConfig, device: torch.device) -> list[Backend[Any]]:
    rounded = config.quantization is not None
    try:
        native = NativeBackend(config, device, load_kernels())
    except KernelsUnavailable as reason:
        if rounded:
            raise StartError(f"--quantization {config.quantization} needs the native CPU kernels: {reason}") from reason
        log.warning("native CPU kernels %s; torch serves alone, more slowly", reason)
        return [torch_alone(config, device)]
    return [native] if rounded else [native, torch_alone(config, device)]


def _on_gpu(config: EngineConfig, device: torch.device) -> list[Backend[Any]]:
    from workers.torch_engine.cuda import compiles

    compiles.keep_in(config.kernel_cache)
    try:
        from workers.torch_engine.cuda.backend import CudaBackend
    except ImportError as error:
        if config.kv_cache_dtype == "fp8":
            raise StartError(f"--kv-cache-dtype fp8 needs the Triton kernels: {error}") from error
        log.warning("no Triton kernels (%s): torch alone serves, which is slower", error)
        return [torch_alone(config, device)]
    if config.kv_cache_dtype == "fp8":  # which torch alone does not read
        return [CudaBackend(config, device)]
    return [CudaBackend(config, device), torch_alone(config, device)]


def _check_fp8_pool(device: torch.device) -> None:
    if device.type != "cuda":
        raise StartError("--kv-cache-dtype fp8 is served on a GPU: leave it out on a CPU")
    if (found := torch.cuda.get_device_capability(device)) < FP8_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise StartError(
            f"--kv-cache-dtype fp8 needs a GPU of compute capability 8.9: {name} has {found[0]}.{found[1]}"
        )


def torch_alone(config: EngineConfig, device: torch.device) -> TorchBackend:
    return TorchBackend(config, device, _draw(device))


def _draw(device: torch.device) -> Draw:
    """The quickest draw on ``device`` that needs no kernels of ours on a CPU."""
    if device.type == "cpu":
        return TorchDraw(threshold_by_histogram)
    try:
        from workers.torch_engine.cuda.triton_sampling import TritonDraw
    except ImportError:
        return TorchDraw(threshold_by_bisection)
    return TritonDraw()
