"""Which engine serves a configuration: on a GPU the one with Triton kernels and CUDA graphs, if there is Triton."""

from __future__ import annotations

import logging

from workers.torch_engine.config import EngineConfig
from workers.torch_engine.engine import TorchEngine
from workers.torch_engine.loader import choose_device

log = logging.getLogger(__name__)


def make_engine(config: EngineConfig) -> TorchEngine:
    """Raises StartError for a device that is not there."""
    if choose_device(config.device).type == "cuda":
        try:
            from workers.torch_engine.cuda.backend import CudaEngine
        except ImportError as error:
            log.warning("no Triton kernels (%s): torch alone serves, which is slower", error)
        else:
            return CudaEngine(config)
    return TorchEngine(config)
