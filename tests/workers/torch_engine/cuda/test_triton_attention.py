"""The paged attention kernels against plain torch: every rule, cut and uncut, decodes and chunks side by side."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from tests.workers.torch_engine.cuda.triton_device import DEVICE, on_gpu
from workers.torch_engine.attention import AttentionRule
from workers.torch_engine.cuda.triton_attention import Fresh, TritonAttention, Work, choose_launch, tile_tokens
from workers.torch_engine.cuda.work_list import ITEM, WorkShape, fill_decodes, fill_work
from workers.torch_engine.inputs import StepInputs
from workers.torch_engine.plain.attention import TorchAttention

PAGE = 8


class Case:
    """A batch of rows (tokens in this step, tokens before it) over a pool whose blocks lie in no order."""

    def __init__(self, rows, heads, kv_heads, key_size, value_size, dtype=torch.float32, seed=0):
        torch.manual_seed(seed)
        rng = random.Random(seed)
        counts = np.array([count for count, _ in rows], np.int64)
        contexts = np.array([count + before for count, before in rows], np.int64)
        widths = -(-contexts // PAGE)
        blocks = int(widths.sum()) + 3
        order = iter(rng.sample(range(blocks), blocks))
        self.seats = rng.sample(range(2 * len(rows)), len(rows))
        tables = np.zeros((2 * len(rows), int(widths.max()) + 1), np.int32)
        for seat, width in zip(self.seats, widths, strict=True):
            tables[seat, :width] = [next(order) for _ in range(width)]
        slots = blocks * PAGE
        self.keys = torch.randn(slots, kv_heads, key_size).to(DEVICE, dtype)
        self.values = torch.randn(slots, kv_heads, value_size).to(DEVICE, dtype)
        self.query = torch.randn(int(counts.sum()), heads, key_size).to(DEVICE, dtype)
        self.tables = tables
        starts = np.concatenate([[0], np.cumsum(counts)])
        nobody = torch.zeros(0, dtype=torch.int64, device=DEVICE)
        self.step = StepInputs(
            torch.zeros(1, len(self.query), dtype=torch.int64, device=DEVICE), nobody, nobody, nobody,
            np.array(self.seats), counts, contexts, starts, tables[self.seats], PAGE, np.zeros(0), np.zeros(0),
        )  # fmt: skip

    def expected(self, rule, sinks=None):
        """Keys and values of this step are read from the pool too, as the plain backend would be given them."""
        positions = np.concatenate(
            [np.arange(n - c, n) for c, n in zip(self.step.counts, self.step.contexts, strict=True)]
        )
        row = np.repeat(np.arange(len(self.step.counts)), self.step.counts)
        slot = torch.from_numpy(self.step.block_tables[row, positions // PAGE].astype(np.int64) * PAGE)
        slot = (slot + torch.from_numpy(positions % PAGE)).to(DEVICE)
        pools = (self.keys.float(), self.values.float())
        fresh = tuple(pool[slot] for pool in pools)
        self.step.slots = slot
        return TorchAttention().attend(self.query.float(), *fresh, *pools, self.step, rule, sinks)

    def ours(self, rule, sinks=None, *, tile=None, extra=4, shortest=16, spare=(0, 0), turn=0, fresh=None):
        rows, tokens = len(self.seats) + spare[0], len(self.query) + spare[1]
        group = self.query.shape[1] // self.keys.shape[1]
        shape = WorkShape.of(
            tokens, rows, tile_tokens(group, self.query.element_size()) if tile is None else tile, extra, shortest
        )
        items = np.full((shape.items, ITEM), 7, np.int32)
        fill_work(shape, tokens, self.step.counts, self.step.contexts, np.array(self.seats), items)
        self.cut = int((items[items[:, 1] > 0, 6] >= 0).sum())
        items = np.ascontiguousarray(np.roll(items, turn, 0))
        work = Work(shape, *(torch.from_numpy(array).to(DEVICE) for array in (items, self.tables)))
        query = torch.nn.functional.pad(self.query, (0, 0, 0, 0, 0, spare[1]))
        kernels = TritonAttention(DEVICE)
        out = kernels.attend(query, self.keys, self.values, work, PAGE, rule, sinks, fresh)
        assert not kernels._done.any(), "the next launch finds all counters at zero"
        assert not out[len(self.query) :].any()  # padding is computed with, so it must be something
        return out[: len(self.query)].float()

    def check(self, rule=None, sinks=None, **given):
        rule = rule or AttentionRule(self.query.shape[2] ** -0.5)
        tolerance = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}[self.query.dtype]
        torch.testing.assert_close(
            self.ours(rule, sinks, **given), self.expected(rule, sinks), atol=tolerance, rtol=tolerance
        )


MIXED = [(1, 40), (5, 0), (1, 0), (9, 23), (1, 90)]


def test_decodes_and_chunks_in_one_batch():
    case = Case(MIXED, 4, 2, 16, 16)
    case.check()
    assert case.cut > 0


def test_one_row_alone_is_cut_into_stretches():
    case = Case([(1, 120)], 4, 2, 16, 16)
    case.check(tile=1, extra=6)
    assert case.cut == 4


@pytest.mark.parametrize("last", [0, 1, 2])
def test_whoever_comes_last_merges_in_the_order_of_slots(last):
    """Programs run in the order of the table here: turned round, another one is the last, and bits stay the same."""
    case = Case([(1, 120)], 4, 2, 16, 16)
    outs = [case.ours(AttentionRule(0.25), tile=1, extra=6, turn=turn) for turn in (0, last)]
    assert case.cut == 4
    assert torch.equal(*outs)


def test_without_a_cut():
    case = Case(MIXED, 4, 2, 16, 16)
    case.check(shortest=512)
    assert case.cut == 0


def test_a_tile_of_one_token_serves_chunks_too():
    Case(MIXED, 4, 2, 16, 16).check(tile=1)


def test_rows_and_tokens_that_are_not_there_do_nothing():
    Case(MIXED, 4, 2, 16, 16).check(spare=(3, 11))


@pytest.mark.parametrize("window", [1, 5, 16, 200])
def test_window(window):
    Case(MIXED, 4, 2, 16, 16).check(AttentionRule(0.25, window=window))


def test_softcap_and_sinks():
    case = Case(MIXED, 4, 2, 16, 16)
    sinks = torch.linspace(-1, 2, 4, device=DEVICE)
    case.check(AttentionRule(0.25, softcap=3.0))
    case.check(AttentionRule(0.25), sinks)
    case.check(AttentionRule(0.3, window=20, softcap=5.0), sinks, shortest=512)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "key_size", "value_size"),
    [(4, 4, 16, 16), (7, 1, 24, 24), (14, 2, 64, 64), (4, 2, 24, 16), (2, 1, 80, 80), (2, 2, 8, 8), (16, 1, 128, 128)],
)
def test_every_grouping_and_head_size(heads, kv_heads, key_size, value_size):
    Case([(1, 33), (6, 11)], heads, kv_heads, key_size, value_size).check()


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=on_gpu)])
def test_sixteen_bit_pools(dtype):
    Case([(1, 33), (6, 11)], 4, 2, 32, 32, dtype).check()


FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize("window", [None, 16])
def test_pools_in_fp8(window):
    """Against the plain attention over what FP8 makes of keys and values."""
    case = Case(MIXED, 4, 2, 16, 16)
    case.keys, case.values = case.keys.to(FP8), case.values.to(FP8)
    case.check(AttentionRule(0.25, window=window))
    case.check(AttentionRule(0.25, softcap=3.0), torch.linspace(-1, 2, 4, device=DEVICE), shortest=512)


@pytest.mark.parametrize("rotate", [True, False])
def test_decodes_bring_their_keys_to_a_pool_in_fp8_and_see_them_as_they_are_there(rotate):
    case = Case([(1, 40), (1, 0), (1, 7), (1, 90)], 6, 2, 24, 16)
    angles = torch.randn(4, 24, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    cos, sin = angles.cos(), angles.sin()

    def turn(x):
        low, high = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat([-high, low], -1) * sin[:, None] if rotate else x

    query, key, value = (torch.randn(4, n, size, device=DEVICE) for n, size in ((6, 24), (2, 24), (2, 16)))
    positions = torch.tensor([40, 0, 7, 90])
    slots = torch.from_numpy(case.tables[case.seats][np.arange(4), positions // PAGE]).long() * PAGE + positions % PAGE
    case.keys, case.values = case.keys.to(FP8).float(), case.values.to(FP8).float()
    case.keys[slots], case.values[slots] = turn(key).to(FP8).float(), value.to(FP8).float()
    case.query = turn(query)
    expected, stored = case.expected(AttentionRule(0.2)), (case.keys[slots], case.values[slots])
    case.keys[slots], case.values[slots], case.query = 1.0, 1.0, query
    case.keys, case.values = case.keys.to(FP8), case.values.to(FP8)
    ours = case.ours(AttentionRule(0.2), tile=1, fresh=Fresh(*((key, value, cos, sin) if rotate else (key, value))))
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=2e-5)
    assert torch.equal(case.keys.float()[slots], stored[0])
    assert torch.equal(case.values.float()[slots], stored[1])


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("given", [{}, {"extra": 6}, {"spare": (2, 2)}])
def test_a_step_of_decodes_brings_its_own_keys(rotate, given):
    """They are not in the pool before; afterwards they are, rotated, and the rows have seen them."""
    case = Case([(1, 40), (1, 0), (1, 7), (1, 90)], 6, 2, 24, 16)
    angles = torch.randn(4, 24, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    cos, sin = angles.cos(), angles.sin()

    def turn(x):
        low, high = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat([-high, low], -1) * sin[:, None] if rotate else x

    query, key, value = (torch.randn(4, n, size, device=DEVICE) for n, size in ((6, 24), (2, 24), (2, 16)))
    positions = torch.tensor([40, 0, 7, 90])
    slots = torch.from_numpy(case.tables[case.seats][np.arange(4), positions // PAGE]).long() * PAGE + positions % PAGE
    case.keys[slots], case.values[slots], case.query = turn(key), value, turn(query)
    expected = case.expected(AttentionRule(0.2, window=50, softcap=3.0))
    case.keys[slots], case.values[slots], case.query = float("nan"), float("nan"), query
    spare = given.get("spare", (0, 0))[1]
    padded = [torch.nn.functional.pad(x, (0, 0) * (x.dim() - 1) + (0, spare)) for x in (key, value, cos, sin)]
    fresh = Fresh(*(padded if rotate else padded[:2]))
    ours = case.ours(AttentionRule(0.2, window=50, softcap=3.0), tile=1, fresh=fresh, **given)
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(case.keys[slots], turn(key))
    assert torch.equal(case.values[slots], value)


def test_queries_may_be_strided():
    case = Case([(1, 33), (6, 11)], 4, 2, 16, 16)
    wide = torch.randn(len(case.query), 10, 16, device=DEVICE)
    wide[:, 3:7] = case.query
    case.query = wide[:, 3:7]
    case.check()


@pytest.mark.parametrize("seed", range(20))
def test_the_work_list_covers_every_key_of_every_token_once(seed):
    rng = random.Random(seed)
    rows = [(rng.choice([1, 1, 1, rng.randint(1, 70)]), rng.choice([0, rng.randint(0, 900)])) for _ in range(24)]
    counts, contexts = np.array([c for c, _ in rows]), np.array([c + b for c, b in rows])
    tokens = int(counts.sum()) + rng.choice([0, rng.randint(0, 99)])
    shape = WorkShape.of(tokens, 24, rng.choice([1, 4, 16]), rng.choice([1, 3, 40]), 16)
    items = np.full((shape.items, ITEM), 7, np.int32)
    fill_work(shape, tokens, counts, contexts, np.arange(24), items)

    used = items[(items[:, 1] > 0) & (items[:, 5] > 0)]
    padding = items[(items[:, 1] > 0) & (items[:, 5] == 0)]
    assert (padding[:, 6] == -1).all()
    seen = {}
    for token, count, position, table, begin, end, slot, first, slots, *_ in used.tolist():
        seen.setdefault((token, count, position, table), []).append((begin, end, slot, first, slots))
    covered = [at for token, count, *_ in padding.tolist() for at in range(token, token + count)]
    taken = []
    for (token, count, position, table), stretches in seen.items():
        assert count <= shape.tile
        assert token - (counts.cumsum() - counts)[table] == position - (contexts - counts)[table]
        assert [stretch[0] for stretch in stretches] == [0, *(stretch[1] for stretch in stretches[:-1])]
        assert stretches[-1][1] == position + count
        if len(stretches) > 1:
            first = stretches[0][2]
            assert [stretch[2:] for stretch in stretches] == [
                (first + k, first, len(stretches)) for k in range(len(stretches))
            ]
            taken += range(first, first + len(stretches))
        else:
            assert stretches[0][2] == -1
        covered += range(token, token + count)
    assert sorted(taken) == list(range(len(taken)))
    assert len(taken) <= shape.slots
    assert sorted(covered) == list(range(tokens))


def test_stretches_of_a_tile_are_about_as_long():
    """Neither nine pieces of which the last has one key, nor a row cut in two for the sake of one."""
    for rows, extra, pieces in ((1, 33, 7), (32, 33, 32), (7, 33, 35), (3, 8, 9)):
        shape = WorkShape.of(rows, rows, 1, extra)
        items = np.zeros((shape.items, ITEM), np.int32)
        fill_work(shape, rows, np.ones(rows, int), np.full(rows, 513), np.arange(rows), items)
        lengths = (items[:, 5] - items[:, 4])[items[:, 1] > 0]
        assert lengths.sum() == rows * 513
        assert lengths.min() > 0.3 * lengths.max(), lengths
        assert len(lengths) == pieces


def test_what_a_launch_stages_fits_the_multiprocessor():
    for key_size, itemsize, shared in (
        (64, 2, 180 << 10),
        (128, 4, 180 << 10),
        (256, 4, 180 << 10),
        (256, 2, 80 << 10),
    ):
        launch = choose_launch(64, key_size, key_size, itemsize, shared)
        assert launch.stages * launch.keys * 2 * key_size * itemsize + 64 * key_size * itemsize <= shared
        assert launch.keys >= 16


@pytest.mark.parametrize(("rows", "tokens", "longest"), [(1, 1, 60), (5, 8, 90), (40, 40, 300), (3, 4, 2000)])
def test_a_list_of_decodes_is_the_general_one(rows: int, tokens: int, longest: int) -> None:
    """``longest`` 2000 among three rows is cut, the others are not."""
    shape = WorkShape.of(tokens, tokens, 1, 8)
    contexts = np.random.default_rng(rows).integers(1, longest + 1, rows)
    contexts[0] = longest
    ours, general = (np.full((shape.items, ITEM), 7, np.int32) for _ in range(2))
    tables = np.arange(rows)[::-1]
    fill_decodes(shape, tokens, contexts, tables, ours)
    fill_work(shape, tokens, np.ones(rows, np.int64), contexts, tables, general)
    for listed in (ours, general):
        listed[:, 9:] = 0  # nobody reads them
        listed[listed[:, 1] == 0] = 0
    assert ours.tolist() == general.tolist()
    assert (general[:, 8] > 1).any() == (longest == 2000)
