"""Draws: one token id per row, by inverse CDF in vocabulary order, from processed logits.

Temperature, min_p, top_k, top_p, in this order, each renormalising what the one before it kept. The uniform of a draw
is a hash of (seed, choice, position) alone, so a request draws the same tokens wherever and beside whomever it runs.

A backend hands its draw to the sampler: this one, with the search for the nucleus that is quickest on its device, or a
kernel that does all of it, masks of constrained rows included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch

from workers.masks import StepMasks
from workers.torch_engine.staging import to_device

RuleOut = Callable[[torch.Tensor, StepMasks], None]
# (weights [k, vocabulary], goal [k, 1]) -> [k, 1]: the largest t with sum(weights >= t) >= goal
Threshold = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

DRAW_FIELDS = np.dtype(
    [
        ("key", np.uint64),
        ("temperature", np.float32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("top_k", np.int64),
        ("logprobs", np.int64),
    ]
)


class OwnDraw(NamedTuple):
    """What is drawn from the model's own logits. ``kept``: the tokens stand as their seats' next inputs already."""

    tokens: torch.Tensor  # int64 [k]
    finite: torch.Tensor  # bool [k]: whether the largest logit is a number
    kept: bool


class Draw(Protocol):
    """int64 [k] from processed logits [k, vocabulary], DRAW_FIELDS [k] and positions [k]; a temperature of zero is
    greedy. ``masks`` are given only to a draw that ``takes_masks``: for others the sampler writes them into the
    logits before. A draw may have ``of_model`` too, which takes the seats besides and gives an OwnDraw: for steps
    whose logits nothing was done to."""

    @property
    def takes_masks(self) -> bool: ...

    def __call__(
        self, logits: torch.Tensor, fields: np.ndarray, positions: np.ndarray, masks: StepMasks | None = None
    ) -> torch.Tensor: ...


@dataclass(frozen=True)
class TorchDraw:
    """Draws in torch, on any device, without waiting for it. ``threshold`` finds the nucleus of top_p."""

    threshold: Threshold
    takes_masks: bool = False

    def __call__(
        self, logits: torch.Tensor, fields: np.ndarray, positions: np.ndarray, masks: StepMasks | None = None
    ) -> torch.Tensor:
        logits = logits.float()
        tokens = logits.argmax(dim=-1)
        random = np.flatnonzero(fields["temperature"] > 0)
        if not len(random):
            return tokens
        rows = slice(None) if len(random) == len(fields) else to_device(random, logits.device)
        fields = fields[random]
        tokens[rows] = self._random(logits[rows], fields, uniforms(fields["key"], positions[random]))
        return tokens

    def _random(self, logits: torch.Tensor, fields: np.ndarray, uniform: np.ndarray) -> torch.Tensor:
        """int64 [k]: a draw for each row of ``logits`` [k, vocabulary], none of them greedy."""
        device = logits.device

        def column(name: str) -> torch.Tensor:
            return to_device(np.ascontiguousarray(fields[name]), device)[:, None]

        weights = torch.softmax(logits / column("temperature"), dim=-1)
        weights.nan_to_num_(0.0)  # a row of NaN must not fail the others
        if (fields["min_p"] > 0).any():
            weights = weights.masked_fill(weights < column("min_p") * weights.amax(-1, keepdim=True), 0)
        if ((fields["top_k"] > 0) & (fields["top_k"] < weights.shape[-1])).any():
            weights = keep_top_k(weights, fields["top_k"])
        if (fields["top_p"] < 1).any():
            weights = keep_top_p(weights, column("top_p"), self.threshold)
        cdf = weights.cumsum(-1)
        total = cdf[:, -1:]
        target = torch.minimum(to_device(uniform, device)[:, None] * total, torch.nextafter(total, total.new_zeros(())))
        return torch.searchsorted(cdf, target, right=True)[:, 0].clamp_(max=logits.shape[-1] - 1)


def rule_out(logits: torch.Tensor, masks: StepMasks) -> None:
    """Write minus infinity where a row of ``masks`` has no bit, and beyond its bits, into that row of ``logits``."""
    if not len(masks.rows):
        return
    bits = masks.bits
    size = min(logits.shape[-1], 32 * bits.shape[1])
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        of_rows = logits.numpy()
        ruled_out = np.unpackbits((~bits).view(np.uint8), axis=1, count=size, bitorder="little").view(bool)
        for row, out in zip(masks.rows.tolist(), ruled_out, strict=True):
            np.putmask(of_rows[row, :size], out, -np.inf)
            of_rows[row, size:] = -np.inf
        return
    device = logits.device
    words, rows = to_device(bits, device), to_device(masks.rows, device)
    ids = torch.arange(size, device=device)
    own = logits[rows]
    own[:, :size].masked_fill_((words[:, ids >> 5] >> (ids & 31)) & 1 == 0, -torch.inf)
    own[:, size:] = -torch.inf
    logits.index_copy_(0, rows, own)


def uniforms(keys: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """float32 in [0, 1) with 24 random bits for each (key, position): splitmix64's finaliser, twice."""
    with np.errstate(over="ignore"):
        mixed = _mix(keys ^ _mix(positions.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(1)))
    return np.asarray((mixed >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24))


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))


def keep_top_k(weights: torch.Tensor, top_k: np.ndarray) -> torch.Tensor:
    """Zero all but each row's ``top_k`` largest weights (0: keep all); ties with the last one stay."""
    limits = np.where(top_k > 0, np.minimum(top_k, weights.shape[-1]), weights.shape[-1])
    asked = limits < weights.shape[-1]
    most = int(limits[asked].max())
    ranked = weights.topk(most, dim=-1).values
    last = to_device(np.where(asked, limits, 1).astype(np.int64) - 1, weights.device)[:, None]
    least = torch.where(to_device(asked, weights.device)[:, None], ranked.gather(-1, last), 0.0)
    return weights.masked_fill(weights < least, 0)


def keep_top_p(weights: torch.Tensor, top_p: torch.Tensor, threshold: Threshold) -> torch.Tensor:
    """Zero what lies outside each row's nucleus: the fewest largest weights that hold ``top_p`` [k, 1] of the sum.

    The nucleus is {weights >= t}; only t is searched, nothing is sorted. Ties with t stay.
    """
    goal = top_p * weights.sum(-1, keepdim=True)
    return weights.masked_fill(weights < threshold(weights, goal), 0)


def threshold_by_histogram(weights: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
    """The same t as by bisection, in a few passes: for a CPU, where each pass over the vocabulary costs time.

    Buckets are the upper 16 bits of a float in [0, 1], which order as the floats do. The mass of each tells which
    bucket holds t; only what lies in that one is ranked.
    """
    buckets = weights.view(torch.int32).bitwise_right_shift(16).long()
    mass = weights.new_zeros(len(weights), 0x3F81).scatter_add_(1, buckets, weights)
    down_to = mass.flip(-1).cumsum(-1).flip(-1)  # mass of each bucket and all above
    bucket = ((down_to >= goal).sum(-1, keepdim=True) - 1).clamp(min=0)
    above = down_to.gather(-1, bucket) - mass.gather(-1, bucket)
    rows, columns = (buckets == bucket).nonzero(as_tuple=True)
    sizes = rows.bincount(minlength=len(weights))
    ranked = weights.new_zeros(len(weights), int(sizes.max()))
    ranked[rows, torch.arange(len(rows)) - (sizes.cumsum(0) - sizes)[rows]] = weights[rows, columns]
    ranked = ranked.sort(-1, descending=True).values
    last = (above + ranked.cumsum(-1) < goal).sum(-1, keepdim=True)
    return ranked.gather(-1, torch.minimum(last, sizes[:, None] - 1).clamp(min=0))


def threshold_by_bisection(weights: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
    """The largest t [k, 1] with sum(weights >= t) >= goal, halving the interval of float32 bit patterns.

    Positive floats order as their bits do, so 31 halvings end at neighbouring floats: exact, no host sync.
    """
    low = torch.zeros_like(goal, dtype=torch.int32)  # sum(weights >= low) >= goal holds throughout
    high = weights.amax(-1, keepdim=True).view(torch.int32) + 1
    for _ in range(31):
        middle = low + (high - low) // 2
        enough = (weights * (weights >= middle.view(torch.float32))).sum(-1, keepdim=True) >= goal
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return low.view(torch.float32)
