"""Paged attention by the native CPU kernels: decodes and prefill chunks alike, in one call per layer."""

from __future__ import annotations

import numpy as np
import torch

from workers.native.library import Kernels
from workers.native.structs import PANEL, Pool, Rule, Step, make_step
from workers.torch_engine.attention import AttentionRule, PagedAttention
from workers.torch_engine.inputs import StepInputs


class NativeAttention(PagedAttention[StepInputs]):
    """For float32 pools on the CPU, whose keys and values lie in panels of tokens (elementwise.inc, Pool)."""

    panel = PANEL

    def __init__(self, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels

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
        pool = pool_of(keys, values, step.block_size)
        self.kernels.store(_adjacent(key), _adjacent(value), pool, step.slots)
        sinks = None if sinks is None else sinks.float().contiguous()
        out = torch.empty(query.shape[0], query.shape[1], values.shape[2])
        return self.kernels.attention(
            _adjacent(query),
            pool,
            native_step(step, query.shape[1] // keys.shape[1]),
            native_rule(rule, sinks),
            out,
        )


def _adjacent(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def pool_of(keys: torch.Tensor, values: torch.Tensor, block_size: int) -> Pool:
    """One layer's pool tensors as the kernels know them."""
    return Pool(keys.data_ptr(), values.data_ptr(), keys.shape[1], keys.shape[2], values.shape[2], block_size)


def native_rule(rule: AttentionRule, sinks: torch.Tensor | None) -> Rule:
    return Rule(rule.scale, rule.softcap or 0.0, rule.window or 0, None if sinks is None else sinks.data_ptr())


def native_step(step: StepInputs, group: int) -> Step:
    """Made once per step and used in every layer. ``group``: query heads to a key head."""

    def make() -> Step:
        return make_step(
            np.ascontiguousarray(step.block_tables, np.int32),
            step.row_starts.astype(np.int32),
            step.contexts.astype(np.int32),
            step.slots,
            group,
        )

    return step.once(("native", group), make)  # type: ignore[no-any-return]
