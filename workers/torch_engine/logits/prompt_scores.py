"""Logprobs of prompt tokens, read off the logits of the tokens before them.

A step has no more of such rows than the scheduler leaves room for (scheduler/core/batch.py): with those that sample, as
many rows of logits as the largest step of the warm-up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from workers.engines.base import Scores
from workers.torch_engine.inputs import ScoredRow
from workers.torch_engine.staging import to_device


@dataclass(frozen=True)
class PromptScores:
    """Those of one step. ``tensors``: logprobs float32 [s], ranks int64 [s], top ids int64 [s, most] and theirs."""

    rows: Sequence[ScoredRow]
    asked: Sequence[int]  # alternatives, by row
    tensors: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, logits: torch.Tensor, rows: Sequence[ScoredRow], asked: Mapping[int, int]) -> PromptScores:
        """``logits`` [s, vocabulary] of the tokens of ``rows``; ``asked``: alternatives by seat."""
        wanted = [asked[row.seat] for row in rows]
        following = to_device(np.concatenate([row.following for row in rows]), logits.device)[:, None]
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        own = logprobs.gather(-1, following)
        ranks = (logprobs > own).sum(-1) + 1
        top = logprobs.topk(max(wanted), dim=-1)
        return cls(rows, wanted, (own[:, 0], ranks, top.indices, top.values))

    def by_seat(self, on_host: Sequence[np.ndarray | None]) -> dict[int, Scores]:
        """``on_host``: these, which are someone else's afterwards."""
        arrays = [array for array in on_host if array is not None]
        found, first = {}, 0
        for row, count in zip(self.rows, self.asked, strict=True):
            own, ranks, ids, top = (array[first : first + len(row.following)] for array in arrays)
            found[row.seat] = Scores(
                own.copy(), ranks.astype(np.int32), ids[:, :count].astype(np.int32), top[:, :count].copy()
            )  # fmt: skip
            first += len(row.following)
        return found
