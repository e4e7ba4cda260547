"""A pass through a model whose layers are one native call, without the code around them.

Embed, turn, layers, norm, head: for most models nothing else happens in a pass, yet transformers' own way through it
costs a decode of a small model a tenth of its time, masks and caches that nobody reads included. Whether nothing else
happens is seen as with layers (layers.py): the forwards mention only the names below, and what comes out is compared
with the model's own logits before it is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from workers.torch_engine.inputs import StepInputs
from workers.torch_engine.layers import MODEL_NAMES, Done, NativeLayers, names_of

_HEAD_NAMES = frozenset(
    [
        "CausalLMOutputWithPast",
        "attentions",
        "config",
        "hidden_states",
        "int",
        "isinstance",
        "last_hidden_state",
        "lm_head",
        "logits_to_keep",
        "loss_function",
        "model",
        "past_key_values",
        "slice",
        "slice_logits_to_keep",
        "vocab_size",
    ]
)


@dataclass
class Shortcut:
    """The parts of a pass, in their order."""

    embed: nn.Module
    rotary: nn.Module
    layers: NativeLayers
    norm: nn.Module
    head: nn.Module

    def logits(self, step: StepInputs) -> torch.Tensor:
        """[k, vocabulary] of the rows that are wanted."""
        hidden = self.embed(step.input_ids)
        angles = self.rotary(hidden, position_ids=step.positions)
        hidden = self.layers(hidden, position_embeddings=angles)
        logits: torch.Tensor = self.head(self.norm(hidden[:, step.logit_rows]))
        return logits[0]


def shortcut_of(model: Any) -> Shortcut | None:
    """The shortcut through ``model``, if it is of the usual build and all its layers are one call."""
    inner: Any = getattr(model, "model", None)
    parts: list[Any] = [getattr(inner, name, None) for name in ("embed_tokens", "rotary_emb", "layers", "norm")]
    parts.append(getattr(model, "lm_head", None))
    if not all(isinstance(part, nn.Module) for part in parts):
        return None
    if not (names_of(model) <= _HEAD_NAMES and names_of(inner) <= MODEL_NAMES):
        return None
    embed, rotary, stack, norm, head = parts
    first, *others = stack
    if not isinstance(first, NativeLayers) or not all(isinstance(other, Done) for other in others):
        return None
    return Shortcut(embed, rotary, first, norm, head)
