"""A pass through a model as one native call, where all its decoder layers are one.

Embedding, rotary angles, layers, final norm, head: in most models a pass consists of nothing else, yet transformers'
forward around the layers (masks and caches that are not used here) takes a tenth of a decode step of a small model.
That nothing else happens is checked as for layers (layers.py): the forwards mention only the names below, and the
logits are compared with the model's own before the call is used. Angles are a table by position, made once; it is
tested whether the model's angles depend on anything but the position.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import nn

from workers.native.structs import Pass
from workers.torch_engine.cpu.layers import MODEL_NAMES, Done, NativeLayers, names_of
from workers.torch_engine.cpu.modules import NativeRMSNorm, PackedEmbedding, PackedLinear
from workers.torch_engine.inputs import StepInputs

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


class WholePass:
    """The parts of a pass; ``angles``: cosine and sine [positions, rot]."""

    def __init__(
        self, embed: nn.Module, angles: tuple[torch.Tensor, torch.Tensor], layers: NativeLayers, norm: NativeRMSNorm,
        head: PackedLinear,
    ) -> None:  # fmt: skip
        cosine, sine = self.angles = angles
        self.embed, self.layers, self.norm, self.head = embed, layers, norm, head
        self.embeds = isinstance(embed, PackedEmbedding)  # in the call itself
        self.whole = Pass(
            ctypes.addressof(layers.layers), len(layers.layers), cosine.data_ptr(), sine.data_ptr(), cosine.stride(0),
            embed.packed.pointer if isinstance(embed, PackedEmbedding) else None, head.packed.pointer,
            norm.weight.data_ptr(), norm.eps,
        )  # fmt: skip

    def logits(self, step: StepInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """[k, vocabulary] of the rows that are wanted, and the id of each one's largest, int64 [k]."""
        ids: torch.Tensor | None = step.input_ids[0]
        x: torch.Tensor | None = None
        if not self.embeds:
            ids, x = None, self.embed(step.input_ids)[0].float().contiguous()
        count = len(step.logit_rows)
        logits, best = torch.empty(count, self.head.packed.outputs), torch.empty(count, dtype=torch.int64)
        self.layers.kernels.logits(
            self.whole, *self.layers.begin(), ids, x, step.positions[0], step.logit_rows, logits, best
        )
        return logits, best


MOST_ANGLES = 256 << 20  # bytes: 262,144 positions of heads of 128


def _angles(rotary: nn.Module, length: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Cosine and sine [length, rot] by position; None where that is much, or not all that they depend on."""
    x = torch.zeros(1, 1, 1)
    positions = torch.arange(length)[None]
    try:
        if 8 * length * rotary(x, position_ids=positions[:, :1])[0].shape[-1] > MOST_ANGLES:
            return None
        table = rotary(x, position_ids=positions)
        some = [positions[:, :1], positions[:, -1:], positions[:, length // 3 : length // 2 + 1]]
        same = all(
            torch.equal(a[:, p[0]], b) for p in some for a, b in zip(table, rotary(x, position_ids=p), strict=True)
        )
    except (TypeError, RuntimeError, AttributeError, ValueError):  # another signature than usual
        return None
    cosine, sine = (angle[0].contiguous() for angle in table)
    return (cosine, sine) if same and cosine.dtype == sine.dtype == torch.float32 else None


def whole_pass_of(model: Any, length: int) -> WholePass | None:
    """The whole pass through ``model`` for contexts of up to ``length`` tokens, if it is of the usual build and all its
    layers are one call."""
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
    if not isinstance(norm, NativeRMSNorm) or not isinstance(head, PackedLinear):
        return None
    angles = _angles(rotary, length)
    return WholePass(embed, angles, first, norm, head) if angles else None
