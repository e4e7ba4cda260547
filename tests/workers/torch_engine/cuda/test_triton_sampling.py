"""The nucleus' smallest weight: exact against a sorted definition, whatever the rows look like."""

from __future__ import annotations

import pytest
import torch

from tests.workers.torch_engine.cuda.triton_device import DEVICE
from workers.torch_engine.cuda.triton_sampling import nucleus_threshold


def expected(row, goal):
    """The largest weight that, with all above it, holds ``goal``."""
    ranked = row.double().sort(descending=True).values
    mass = ranked.cumsum(0)
    last = int((mass < goal).sum())
    return ranked[min(last, len(ranked) - 1)].item()


@pytest.mark.parametrize("size", [50, 2048, 5000])
def test_threshold(size):
    generator = torch.Generator().manual_seed(size)
    weights = torch.softmax(
        torch.randn(6, size, generator=generator) * torch.tensor([[0.1], [1], [3], [9], [2], [2]]), -1
    )
    weights[4] = 1 / size  # all alike
    weights[5, size // 2 :] = 0
    top_p = torch.tensor([[0.9], [0.5], [0.1], [0.99], [0.3], [0.7]])
    goal = top_p * weights.sum(-1, keepdim=True)
    ours = nucleus_threshold(weights.to(DEVICE), goal.to(DEVICE)).cpu()
    for row in range(6):
        held = weights[row][weights[row] >= ours[row]].double().sum()
        above = weights[row][weights[row] > ours[row]].double().sum()
        assert held >= goal[row] * (1 - 1e-5)
        assert above <= goal[row] * (1 + 1e-5)
        assert ours[row].item() in weights[row]
        if row in (2, 3):
            assert ours[row].item() == pytest.approx(expected(weights[row], goal[row].item()))


def test_the_whole_row_and_almost_nothing():
    weights = torch.tensor([[0.5, 0.25, 0.125, 0.125, 0.0]])
    both = nucleus_threshold(weights.repeat(2, 1).to(DEVICE), torch.tensor([[1.0], [1e-9]], device=DEVICE))
    assert both.flatten().tolist() == [0.125, 0.5]
