"""Mixture-of-experts layers on packed weights: each expert computes the tokens that chose it, in one product.

transformers keeps the experts of a layer as three-dimensional parameters, `gate_up_proj` and `down_proj`, and says by
flags how they lie (use_experts_implementation). Each expert's matrices are packed like a linear layer's; a gate that
is not the usual one (gpt-oss's) stays the model's own function.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from workers.native.library import ACTIVATIONS, Kernels
from workers.native.packed import Packed
from workers.native.structs import PANEL
from workers.torch_engine.replace import Candidate, children_of


class NativeExperts(nn.Module):
    """``act`` indexes ACTIVATIONS, None: ``gate`` makes [rows, width] of gate_up's output."""

    def __init__(self, kernels: Kernels, gate_up: list[Packed], down: list[Packed], act: int | None, gate: Any) -> None:
        super().__init__()
        self.kernels, self.gate_up, self.down, self.act, self.gate = kernels, gate_up, down, act, gate

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """[T, C] from hidden states [T, C] and, for each token, the experts [T, k] it chose and their weights."""
        tokens, chosen = top_k_index.shape
        rows = hidden_states.contiguous()
        experts = top_k_index.reshape(-1).numpy()
        order = np.argsort(experts, kind="stable")
        found, begins = np.unique(experts[order], return_index=True)
        outputs = torch.empty(tokens * chosen, rows.shape[1])
        for expert, at in zip(found, np.split(order, begins[1:]), strict=True):
            where = torch.from_numpy(at)
            outputs[where] = self._run(int(expert), rows[where // chosen])
        weighted = outputs * top_k_weights.reshape(-1, 1)
        return weighted.view(tokens, chosen, -1).sum(dim=1)  # in the order of choice, whatever else is in the batch

    def _run(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        gate_up, down = self.gate_up[expert], self.down[expert]
        if self.act is not None:
            hidden = self.kernels.gate_up(x, gate_up, self.act, torch.empty(len(x), down.inputs))
        else:
            hidden = self.gate(self.kernels.linear(x, gate_up, torch.empty(len(x), gate_up.outputs))).contiguous()
        return self.kernels.linear(hidden, down, torch.empty(len(x), down.outputs))


def expert_candidates(
    model: nn.Module, kernels: Kernels, generator: torch.Generator, int8: bool
) -> Iterator[Candidate]:
    """The experts that can be replaced, before anything widens their weights."""
    for owner, name, child in children_of(model):
        if not _is_experts(child):
            continue
        yield _candidate(owner, name, child, kernels, generator, int8)
        ours = getattr(owner, name)
        if isinstance(ours, NativeExperts) and ours.act is None:  # its gate is bound to the module: without weights
            del child.gate_up_proj, child.down_proj


def _is_experts(module: nn.Module) -> bool:
    weights = [getattr(module, name, None) for name in ("gate_up_proj", "down_proj")]
    return all(isinstance(w, torch.Tensor) and w.dim() == 3 for w in weights) and hasattr(module, "_apply_gate")


def _candidate(
    owner: nn.Module, name: str, experts: Any, kernels: Kernels, generator: torch.Generator, int8: bool
) -> Candidate:
    kind = "experts" + (" (int8)" if int8 else "")
    if not getattr(experts, "has_gate", True) or getattr(experts, "has_post_expert_norm", False):
        return Candidate(kind, owner, (name,), ())
    own = copy.deepcopy(experts).float()
    gate_up, down = (_pack(experts, part, int8) for part in ("gate_up_proj", "down_proj"))
    count, width = len(down), down[0].outputs
    x = torch.randn(5, width, generator=generator)
    index = torch.stack([torch.randperm(count, generator=generator)[: min(2, count)] for _ in range(5)])
    weights = torch.rand(index.shape, generator=generator)
    if int8:  # compared with the experts of the rounded weights
        for part, packed in (("gate_up_proj", gate_up), ("down_proj", down)):
            rounded = torch.stack([each.unpacked() for each in packed])
            getattr(own, part).copy_(rounded.transpose(1, 2) if experts.is_transposed else rounded)
    acts: list[int | None] = [*range(len(ACTIVATIONS))] if down[0].inputs % PANEL == 0 else []
    attempts = [
        (NativeExperts(kernels, gate_up, down, act, experts._apply_gate if act is None else None),)
        for act in [*acts, None]
    ]
    inputs = (x, index, weights)
    return Candidate(kind, owner, (name,), attempts, inputs, (own(*inputs),))


def _pack(experts: Any, name: str, int8: bool) -> list[Packed]:
    weights, bias = getattr(experts, name), getattr(experts, name + "_bias", None)
    return [
        Packed((w.t() if experts.is_transposed else w).detach(), None if bias is None else bias[i], int8=int8)
        for i, w in enumerate(weights)
    ]
