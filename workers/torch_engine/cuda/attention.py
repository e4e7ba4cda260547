"""PagedAttention on a GPU: the step is tables in device memory, rotary and the write of keys and values are one.

A model's attention calls `apply_rotary_pos_emb` and then, with the very tensors that it returned, the attention
function. So rotary can be put off: it returns its arguments as they are and leaves word, and the attention function
rotates them where it reads them anyway. Where the tensors that arrive are not those that were left, the probe notices,
and that module's rotary is computed at once, as the model wrote it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from protocol.errors import EngineFailed
from workers.torch_engine.attention import AttentionRule, PagedAttention
from workers.torch_engine.cuda.step_tables import StepTables
from workers.torch_engine.cuda.triton_attention import TritonAttention
from workers.torch_engine.cuda.triton_kernels import rotate_and_store_kv, store_kv


@dataclass
class Rotation:
    """Queries and keys [1, heads, T, size] that are to be rotated by the tables ``cos`` and ``sin`` [1, T, size]."""

    query: torch.Tensor
    key: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor


class TableAttention(PagedAttention):
    """``begin`` takes StepTables. ``groups``: query heads per key head, as the probe found them."""

    def __init__(self, device: torch.device) -> None:
        self.kernels = TritonAttention(device)
        super().__init__(self.kernels)  # type: ignore[arg-type]  # it reads tables, and writes together with rotary
        self.groups: list[int] = []
        self._left: Rotation | None = None
        self._puts_off = True  # until the probe finds an attention that does not hand on what it rotated
        self._at = 0  # layer of the next call

    def begin(self, step: Any, layer: int = 0) -> None:
        self.step, self._at, self._left = step, layer, None

    def end(self) -> None:
        self.step = None
        if self._at != len(self.shapes):
            raise EngineFailed(f"a pass called {self._at} attention layers instead of {len(self.shapes)}")

    def rotary(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """What takes the place of ``original``, an `apply_rotary_pos_emb`."""

        def apply_rotary(q, k, cos, sin, *args, **kwargs):  # type: ignore[no-untyped-def]
            plain = not args and not kwargs and q.shape[0] == cos.shape[0] == 1 and cos.dim() == 3
            plain = plain and q.shape[-1] == k.shape[-1] == cos.shape[-1] and cos.stride() == sin.stride()
            if not plain or not (self._probing or self.step is not None) or not self._puts_off:
                return original(q, k, cos, sin, *args, **kwargs)
            if self._probing:
                q, k = original(q, k, cos, sin)
            self._left = Rotation(q, k, cos, sin)
            return q, k

        return apply_rotary

    @property
    def _probing(self) -> bool:
        return self.pool is None

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rule: AttentionRule,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        left, self._left = self._left, None
        if left is not None and (left.query is not query or left.key is not key):
            if not self._probing:
                raise EngineFailed(f"{type(module).__name__} changes its queries after they were rotated")
            self._puts_off = False
        if self.pool is None:
            self.groups.append(query.shape[1] // key.shape[1])
            return super().attend(module, query, key, value, rule, sinks)
        self.calls += 1
        step: Any = self.step
        assert isinstance(step, StepTables)
        keys, values = self.pool.keys[self._at], self.pool.values[self._at]
        self._at += 1
        q, k, v = (_adjacent(states[0].transpose(0, 1)) for states in (query, key, value))
        if left is not None:
            q = rotate_and_store_kv(k, v, keys, values, step.slots, q, _adjacent(left.cos[0]), _adjacent(left.sin[0]))
        else:
            store_kv(k, v, keys, values, step.slots)
        return self.kernels.attend(q, keys, values, step.work, step.block_size, rule, sinks)[None]


def _adjacent(states: torch.Tensor) -> torch.Tensor:
    return states if states.stride(-1) == 1 else states.contiguous()
