"""Which decoder layers a stage of a pipeline has, and how hidden states come in and go out.

A stage's model is transformers' own in which the layers of other stages are stand-ins: names and indices stay as they
are in the checkpoint. The stand-in before its first layer gives what the stage before has sent, the one after its last
sends on. Embedding and head are where they are used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from protocol.errors import StartError
from workers.torch_engine.parallel.group import Group
from workers.torch_engine.parallel.split import on_meta
from workers.torch_engine.replace import like

Span = tuple[int, int]  # from, up to


class Absent(nn.Module):
    """In the place of a layer that another stage has."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states


class Entrance(Absent):
    """Before a stage's first layer."""

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.group = group

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.group.receive(torch.empty_like(hidden_states))


class Exit(Absent):
    """After a stage's last layer."""

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.group = group

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.group.send(hidden_states)
        return hidden_states


class NoEmbedding(nn.Module):
    """Where hidden states come from another stage: zeros in their shape."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("of_type", torch.zeros(0), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        of_type: torch.Tensor = self.of_type  # type: ignore[assignment]
        return of_type.new_zeros(*ids.shape, self.size)


def stage_of(kind: Any, config: Any, group: Group) -> Any:
    """The class ``kind`` of models, as the stage of ``group``. ``config``: of the rank's part. StartError for a model
    that cannot be cut."""
    span = cut(costs_of(on_meta(kind, config)), group.stages)[group.stage]
    first, last = group.stage == 0, group.stage == group.stages - 1
    tied = bool(getattr(config, "tie_word_embeddings", False))
    if not last:
        config.tie_word_embeddings = False  # there is no head here

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, config, *args, **kwargs)
        inner = stack_of(self)
        if not (first or (last and tied)):  # a tied head is the embedding
            inner.embed_tokens = NoEmbedding(config.get_text_config().hidden_size)
        if not last:
            inner.norm = self.lm_head = nn.Identity()
        begin, end = span
        for at, layer in enumerate(inner.layers):
            if not begin <= at < end:
                stand_in = Entrance(group) if at == begin - 1 else Exit(group) if at == end else Absent()
                inner.layers[at] = like(stand_in, layer)

    return type(kind.__name__, (kind,), {"__init__": __init__, "__module__": kind.__module__})


def stack_of(model: Any) -> Any:
    """The part of ``model`` that holds its layers. StartError for a model that is not of the usual build."""
    inner = getattr(model, model.base_model_prefix, None)
    parts: list[Any] = [getattr(inner, name, None) for name in ("embed_tokens", "layers", "norm")]
    usual = all(isinstance(part, nn.Module) for part in (*parts, getattr(model, "lm_head", None)))
    if not usual or len(parts[1]) != model.config.get_text_config().num_hidden_layers:
        raise StartError(f"--pipeline-parallel-size: {type(model).__name__} is not of a build that is cut; use 1")
    return inner


def costs_of(model: Any) -> list[int]:
    """Numbers that a token is multiplied with in each layer of ``model``, and in the head with the last one."""
    text = model.config.get_text_config()
    chosen = getattr(text, "num_experts_per_tok", None) or 1
    costs = []
    for layer in stack_of(model).layers:
        sizes = [p.numel() * chosen // p.shape[0] if p.dim() == 3 else p.numel() for p in layer.parameters()]
        costs.append(sum(sizes))
    costs[-1] += model.lm_head.weight.numel()
    return costs


def cut(costs: list[int], stages: int) -> list[Span]:
    """``costs`` of layers in a row as ``stages`` spans, the dearest of which is as cheap as can be. StartError where
    there are fewer layers than stages."""
    count = len(costs)
    if stages > count:
        raise StartError(f"--pipeline-parallel-size {stages}: the model has {count} layers; at most {count} would do")
    # best[n]: (cost of the dearest, spans) of the first n layers in so many stages as were added
    best: dict[int, tuple[int, list[Span]]] = {n: (sum(costs[:n]), [(0, n)]) for n in range(1, count + 1)}
    for _ in range(stages - 1):
        best = {
            n: min((max(best[m][0], sum(costs[m:n])), [*best[m][1], (m, n)]) for m in range(1, n) if m in best)
            for n in range(2, count + 1)
            if any(m in best for m in range(1, n))
        }
    return best[count][1]
