"""Paged attention by the native CPU kernels: decodes and prefill chunks alike, in one call per layer."""

from __future__ import annotations

import numpy as np
import torch

from workers.native import Kernels
from workers.torch_engine.attention import AttentionRule
from workers.torch_engine.inputs import StepInputs


class NativeAttention:
    """Backend for float32 pools on the CPU. The index tensors are made once per step and used in every layer."""

    panel = 1

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels

    def write(
        self, key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, step: StepInputs
    ) -> None:
        keys.index_put_((step.slots,), key)
        values.index_put_((step.slots,), value)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        step: StepInputs,
        rule: AttentionRule,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        tables, starts, contexts = step.once("native", lambda: _indices(step))
        if query.stride(2) != 1:
            query = query.contiguous()
        out = torch.empty(query.shape[0], query.shape[1], values.shape[2])
        self.kernels.attention(
            query, keys.view(-1, step.block_size, *keys.shape[1:]), values.view(-1, step.block_size, *values.shape[1:]),
            out, tables, starts, contexts, scale=rule.scale, softcap=rule.softcap or 0.0, window=rule.window or 0,
            sinks=None if sinks is None else sinks.float().contiguous(),
        )  # fmt: skip
        return out


def _indices(step: StepInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Block tables [R, widest], row starts [R + 1] and contexts [R], all int32."""
    return (
        torch.from_numpy(np.ascontiguousarray(step.block_tables, np.int32)),
        torch.from_numpy(step.row_starts.astype(np.int32)),
        torch.from_numpy(step.contexts.astype(np.int32)),
    )
