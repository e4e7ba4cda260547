"""NativeBackend: a model on the native CPU kernels, as far as they give what torch gives."""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

import numpy as np
import torch

from workers.engines.base import Progress
from workers.masks import StepMasks
from workers.native.library import Kernels
from workers.native.structs import DRAW
from workers.torch_engine import verify
from workers.torch_engine.attention import PagedAttention
from workers.torch_engine.backend import Logits
from workers.torch_engine.config import EngineConfig
from workers.torch_engine.cpu.attention import NativeAttention
from workers.torch_engine.cpu.layers import fuse_layers
from workers.torch_engine.cpu.modules import fuse
from workers.torch_engine.cpu.whole_pass import WholePass, whole_pass_of
from workers.torch_engine.draw import rule_out, uniforms
from workers.torch_engine.inputs import StepInputs
from workers.torch_engine.kv_pool import KVPool
from workers.torch_engine.plain.backend import TorchBackend
from workers.torch_engine.replace import agrees


class NativeBackend(TorchBackend):
    """``whole_pass``: the one call that computes a pass from embedding to logits, None where the model's own forward is
    run over replaced modules."""

    def __init__(self, config: EngineConfig, device: torch.device, kernels: Kernels) -> None:
        super().__init__(config, device, NativeDraw(kernels))
        self.kernels = kernels
        self.name = f"native CPU kernels ({kernels.instruction_set})"
        self.whole_pass: WholePass | None = None

    def take(self, model: Any) -> None:
        self.kernels.set_threads(torch.get_num_threads())
        self.whole_pass = None
        super().take(model)

    def _make_attention(self) -> PagedAttention[Any]:
        return NativeAttention(self.kernels)

    def replace_modules(self) -> None:
        fuse(self.model, self.kernels, self.report, int8=self.config.quantization == "int8")

    def replace_layers(self, longest: int) -> None:
        text = torch.arange(verify.LENGTH)
        fuse_layers(
            self.model, self.kernels, self.attention, lambda: verify.paged_logits(self, [text]), self.report
        )  # fmt: skip
        (own,) = verify.paged_logits(self, [text])
        self.whole_pass = whole_pass_of(self.model, longest)
        if self.whole_pass is None:
            return
        if agrees(verify.paged_logits(self, [text])[0], own):
            self.report.fused["pass"] += 1
        else:
            self.whole_pass = None
            self.report.kept["pass"] += 1

    def shorten(self, longest: int) -> None:
        super().shorten(longest)
        self.whole_pass = self.whole_pass and whole_pass_of(self.model, longest)  # its angles may be others

    def ready(self, progress: Progress) -> None:
        take_memory(self.pool, self.kernels)

    def forward(self, step: StepInputs) -> Logits:
        if self.whole_pass is None:
            return super().forward(step)
        self.attention.begin(step)
        found = self.whole_pass.logits(step)
        self.attention.end()
        return found

    def beat(self) -> int:
        return super().beat() + self.kernels.progress.value


class NativeDraw:
    """A sampler's draw (draw.py) as one native call."""

    takes_masks = False

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels

    def __call__(
        self, logits: torch.Tensor, fields: np.ndarray, positions: np.ndarray, masks: StepMasks | None = None
    ) -> torch.Tensor:
        draws = np.empty(len(fields), DRAW)
        for name in ("temperature", "top_p", "min_p", "top_k"):
            draws[name] = fields[name]
        draws["uniform"] = uniforms(fields["key"], positions)
        return self.kernels.draw(logits.float(), draws)

    def rule_out(self, logits: torch.Tensor, masks: StepMasks) -> None:
        """draw.py's, as one native call."""
        if logits.dtype != torch.float32:
            rule_out(logits, masks)
        elif len(masks.rows):
            self.kernels.rule_out(logits, masks.rows, masks.pointers, len(masks.masks[0].bits))


def take_memory(pool: KVPool, kernels: Kernels) -> None:
    """Take the memory of the whole pool, on a thread of the lowest priority.

    A page's first write makes the system find and clear it; on a virtual machine that may take milliseconds, and
    would in the middle of a step.
    """

    def run() -> None:
        if sys.platform == "linux":
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)  # of this thread alone
        for parts in zip(*(tensor.chunk(64) for tensor in (*pool.keys, *pool.values)), strict=True):
            for part in parts:  # those of the blocks that are given out first come first
                kernels.touch(part)

    threading.Thread(target=run, name="touch", daemon=True).start()
