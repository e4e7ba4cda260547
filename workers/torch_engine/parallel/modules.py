"""What a rank's model says to the others: modules around those whose output is a part of the whole.

A product over a split input gives part of a sum; rows of the embedding and of the head are split by vocabulary. Biases
of a sum are the first rank's alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from workers.torch_engine.parallel.group import Group
from workers.torch_engine.parallel.layers import NoEmbedding
from workers.torch_engine.parallel.split import Shares


class Summed(nn.Module):
    """The sum over all ranks of what ``inner`` gives."""

    def __init__(self, inner: nn.Module, group: Group) -> None:
        super().__init__()
        self.inner, self.group = inner, group

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.group.sum(self.inner(*args, **kwargs))


class SplitEmbedding(nn.Module):
    """Rows ``begin`` to ``begin + rows`` of the embedding are here; each id is one rank's, the others add zeros."""

    def __init__(self, inner: nn.Module, group: Group, begin: int, rows: int) -> None:
        super().__init__()
        self.inner, self.group, self.begin, self.rows = inner, group, begin, rows

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        here = ids - self.begin
        mine = (here >= 0) & (here < self.rows)
        found = self.inner(here.clamp(0, self.rows - 1))
        return self.group.sum(torch.where(mine[..., None], found, 0))


class SplitHead(nn.Module):
    """Logits [..., vocabulary] on the first rank, of its own part of the vocabulary alone on the others."""

    def __init__(self, inner: nn.Module, group: Group, vocabulary: int) -> None:
        super().__init__()
        self.inner, self.group, self.vocabulary = inner, group, vocabulary

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.group.gather(self.inner(x))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)[..., : self.vocabulary]


def join(model: Any, group: Group, shares: Shares, vocabulary: int) -> None:
    """Put these modules into a rank's freshly loaded ``model``; ``vocabulary``: rows of the whole embedding."""
    if group.parts == 1:
        return
    begin, end = shares.of_vocabulary(vocabulary)
    for owner in list(model.modules()):
        for name, child in list(owner.named_children()):
            if isinstance(child, NoEmbedding | nn.Identity):
                continue
            if name == "embed_tokens":
                setattr(owner, name, SplitEmbedding(child, group, begin, end - begin))
            elif name == "lm_head":
                setattr(owner, name, SplitHead(child, group, vocabulary))
            elif name == "o_proj" or _gives_part(child):
                _drop_bias(child, group)
                setattr(owner, name, Summed(child, group))


def _gives_part(module: nn.Module) -> bool:
    """Whether ``module`` is an MLP, or the experts of a layer, which end with a product over their split width."""
    down: Any = getattr(module, "down_proj", None)
    return isinstance(down, nn.Linear | nn.Parameter) and (
        hasattr(module, "up_proj") or hasattr(module, "gate_up_proj")
    )


def _drop_bias(module: nn.Module, group: Group) -> None:
    if group.part == 0:
        return
    last: Any = getattr(module, "down_proj", module)
    if isinstance(last, nn.Linear):
        last.register_parameter("bias", None)
    elif (bias := getattr(module, "down_proj_bias", None)) is not None:
        bias.data.zero_()
