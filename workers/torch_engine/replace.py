"""Whether a replacement gives what the original gives, and what was replaced."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch

TOLERANCE = 1e-4  # relative to the largest value of the original's output


@dataclass
class FuseReport:
    """How many modules of each kind run natively, and which were left to torch."""

    fused: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        said = ", ".join(f"{count} {kind}" for kind, count in sorted(self.fused.items()))
        left = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kept.items()))
        return said + (f"; left to torch: {left}" if left else "")


def agrees(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two outputs are the same but for the order of summation."""
    scale = theirs.abs().max().clamp_min(1e-6)
    return ours.shape == theirs.shape and bool(((ours - theirs).abs().max() / scale) < TOLERANCE)
