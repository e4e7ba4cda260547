"""The draw in one launch: what torch draws, whatever is asked for, and from a row's own numbers alone."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from protocol.messages import NewSequence, pack_ids
from protocol.sampling import SamplingParams
from tests.workers.torch_engine.cuda.triton_device import DEVICE
from workers.torch_engine.cuda.triton_sampling import BLOCK, TritonDraw
from workers.torch_engine.draw import DRAW_FIELDS, TorchDraw, rule_out, threshold_by_histogram, uniforms
from workers.torch_engine.sampler import Sampler

KINDS = (
    {"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.8}, {"temperature": 1.3, "top_k": 5},
    {"temperature": 1.0, "min_p": 0.1}, {"temperature": 0.9, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
    {"temperature": 2.0, "top_p": 0.05}, {"temperature": 0.5, "top_k": 1},
)  # fmt: skip


def fields_of(kinds, seed=0):
    fields = np.zeros(len(kinds), DRAW_FIELDS)
    for row, kind in enumerate(kinds):
        fields[row] = (
            1000 * seed + row,
            kind["temperature"],
            kind.get("top_p", 1),
            kind.get("min_p", 0),
            kind.get("top_k", 0),
            -1,
        )
    return fields


def masks_of(rows, size, seed=0):
    """About half of the ids of each of ``rows``, and never the first 32."""
    words = np.random.default_rng(seed).integers(-(2**31), 2**31, (len(rows), -(-size // 32)), np.int32)
    words[:, 0] = 0
    return SimpleNamespace(rows=np.array(rows, np.int64), bits=words)


@pytest.mark.parametrize("size", [50, BLOCK + 77])
def test_draws_are_those_of_torch(size):
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(len(KINDS), size, generator=generator) * 3
    fields = fields_of(KINDS)
    positions = np.arange(len(KINDS))
    theirs = TorchDraw(threshold_by_histogram)(logits, fields, positions)
    ours = TritonDraw()(logits.to(DEVICE), fields, positions).cpu()
    assert ours.tolist() == theirs.tolist()


def test_ties_with_the_threshold_stay():
    """All weights alike: top_k and top_p keep all that equal the last one, so any id is drawn."""
    fields = fields_of([{"temperature": 1.0, "top_k": 2, "top_p": 0.5}] * 4)
    wanted = [int(8 * uniform) for uniform in uniforms(fields["key"], np.arange(4))]
    assert len(set(wanted)) > 2
    assert TritonDraw()(torch.zeros(4, 8).to(DEVICE), fields, np.arange(4)).tolist() == wanted


def test_a_mask_is_an_input():
    size = 210
    logits = torch.randn(len(KINDS), size, generator=torch.Generator().manual_seed(1)) * 2
    logits[:, :32] += 20  # what the masks rule out would be drawn
    masks = masks_of([0, 2, 3, 5], size)
    fields, positions = fields_of(KINDS), np.arange(len(KINDS))
    given = logits.clone().to(DEVICE)
    ours = TritonDraw()(given, fields, positions, masks).cpu()
    assert torch.equal(given.cpu(), logits), "no logit is changed"
    ruled = logits.clone()
    rule_out(ruled, masks)
    assert ours.tolist() == TorchDraw(threshold_by_histogram)(ruled, fields, positions).tolist()
    allowed = np.unpackbits(masks.bits.view(np.uint8), axis=1, bitorder="little")
    assert all(allowed[k, ours[row]] for k, row in enumerate(masks.rows))


def test_a_row_of_nonsense_leaves_the_others_alone():
    logits = torch.randn(4, 100, generator=torch.Generator().manual_seed(2))
    fields, positions = fields_of(KINDS[2:6]), np.arange(4)
    clean = TritonDraw()(logits.to(DEVICE), fields, positions).tolist()
    logits[1], logits[2, 5] = float("nan"), float("inf")
    spoiled = TritonDraw()(logits.to(DEVICE), fields, positions).tolist()
    assert [spoiled[0], spoiled[3]] == [clean[0], clean[3]]
    assert all(0 <= token < 100 for token in spoiled)


def test_a_token_depends_on_its_own_row_alone():
    """128 rows of every kind at once, and each of some of them alone: the same tokens, penalties and masks included."""
    rows, size = 128, 300
    logits = (torch.randn(rows, size, generator=torch.Generator().manual_seed(3)) * 3).to(DEVICE, torch.bfloat16)
    more = (
        {"logprobs": 3, "temperature": 0.8},
        {"temperature": 0.8, "repetition_penalty": 1.3},
        {"logit_bias": {5: 4.0}},
    )
    cheap = [KINDS[0], KINDS[1], KINDS[4], *more]
    # a search for a threshold takes ten times as long in the interpreter
    kinds = [KINDS[2 + (seat > 80)] if seat in (5, 70, 95) else cheap[seat % len(cheap)] for seat in range(rows)]

    def make(seats):
        sampler = Sampler(rows, size, [7], DEVICE, TritonDraw())
        for seat in seats:
            params = SamplingParams(**{"max_tokens": 9, **kinds[seat]})
            sampler.add(NewSequence(seat, "r", 0, 1, pack_ids([1, 2, 3]), 3, params, seat, 0, b"", 0))
        return sampler

    masks = masks_of(range(0, rows, 7), size)
    positions = 3 + np.arange(rows)
    together = make(range(rows)).sample(logits.clone(), np.arange(rows), positions, None, masks).tokens.tolist()
    for seat in range(0, rows, 5):
        own = np.flatnonzero(masks.rows == seat)
        mask = SimpleNamespace(rows=np.zeros(len(own), np.int64), bits=masks.bits[own]) if len(own) else None
        row = logits[seat : seat + 1].clone()
        alone = make([seat]).sample(row, np.array([seat]), positions[seat : seat + 1], None, mask)
        assert alone.tokens.tolist() == [together[seat]]


def test_the_draw_tells_rows_that_are_no_numbers_and_keeps_tokens_by_seat():
    """A NaN counts wherever it stands, what a mask rules out included; a mask that leaves nothing is no such fault."""
    logits = torch.randn(6, 100, generator=torch.Generator().manual_seed(4))
    logits[1, 3], logits[2, 5], logits[3], logits[4, :] = float("nan"), float("inf"), float("-inf"), 0.5
    masks = SimpleNamespace(rows=np.array([1, 4], np.int64), bits=np.zeros((2, 4), np.int32))
    draw, seats = TritonDraw(), np.array([7, 0, 3, 2, 1, 5])
    draw.last_id = torch.full((9,), -1, dtype=torch.int64, device=DEVICE)
    fields = fields_of([KINDS[0], *KINDS[:5]])
    found = draw.of_model(logits.to(DEVICE), fields, np.arange(6), masks, seats)
    assert found.finite.tolist() == [True, False, False, False, True, True]
    assert found.kept
    kept = draw.last_id.cpu()
    assert kept[seats].tolist() == found.tokens.tolist()
    assert [int(kept[seat]) for seat in (4, 6, 8)] == [-1, -1, -1]
    assert found.tokens[0] == logits[0].argmax()
