"""Blocks that the pool has no room for, in host memory: a conversation that returns is copied, not computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from protocol.errors import EngineFailed
from protocol.messages import Plan, pack_ids
from protocol.sampling import SamplingParams
from tests.models import CONFIGS, build, byte_tokenizer, tiny_model
from tests.workers.core_driver import CoreDriver
from tests.workers.plan_maker import Sequence
from tests.workers.torch_engine.parity import BLOCK, make_engine
from workers.torch_engine.kv_pool import HostPool, KVPool, LayerShape

pytestmark = pytest.mark.usefixtures("one_thread")


def ids(count, seed):
    return np.random.default_rng(seed).integers(0, 256, count).tolist()


def conversation(engine, *, turn, others, size, blocks):
    """A first turn of ``turn`` tokens, ``others`` of ``size`` tokens that take its blocks, and its next turn."""
    params = SamplingParams(temperature=0, max_tokens=8)
    first = Sequence(ids(turn, 0), params)
    between = [Sequence(ids(size, 1 + k), params, joins=2 * turn // 64 + 20) for k in range(others)]
    driver = CoreDriver(engine, engine.capacity, blocks, budget=64)
    driver.run([first, *between])
    again = Sequence([*first.prompt, *first.output, *ids(5, 99)], params)
    before = driver.core.stats().counters
    computed, hits = before.prompt_tokens, before.host_hits
    counters = driver.run([again])
    engine.reset()
    outputs = [request.output for request in (first, *between, again)]
    return outputs, counters.prompt_tokens - computed, counters.host_hits - hits, driver.core.stats().workers["w0"]


def test_a_conversation_that_returns_is_copied_and_goes_on_as_if_it_had_been_computed(tmp_path):
    turn = 2048
    build(CONFIGS["llama"] | {"num_hidden_layers": 1, "max_position_embeddings": turn + 128}).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    sizes = {"turn": turn, "others": 3, "size": turn - 200, "blocks": turn // BLOCK + 6}
    without = make_engine(tmp_path, max_model_len=turn + 128, max_num_seqs=2)
    outputs, computed, hits, _ = conversation(without, **sizes)
    assert (computed, hits) == (turn + 13, 0), "the others took its blocks"
    offered = make_engine(tmp_path, max_model_len=turn + 128, max_num_seqs=2, kv_offload=64 << 20)
    same, computed, hits, worker = conversation(offered, **sizes)
    assert same == outputs
    assert computed <= 2 * BLOCK, "what fills no block is computed"
    assert hits == turn + 13 - computed
    assert 0 < worker.host_used <= worker.host_total


def test_a_new_core_finds_nothing_of_what_was_kept_for_the_one_before(tmp_path_factory):
    engine = make_engine(tiny_model(tmp_path_factory, "llama"), kv_offload=1 << 20)
    params = SamplingParams(temperature=0, max_tokens=4)
    for _ in range(2):  # epochs
        driver = CoreDriver(engine, engine.capacity, blocks=12, budget=64)
        counters = driver.run([Sequence(ids(80, k), params, joins=40 * k) for k in range(3)])
        assert counters.blocks_saved > 0
        assert (counters.host_hits, counters.prefix_hits) == (0, 0)
        engine.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_come_back_as_they_were(dtype):
    pool = filled_pool(dtype)
    host = HostPool(pool, 3)
    before = [part.clone() for part in pool.parts()]
    host.follow(plan(out=[(4, 0), (1, 2)]))
    for part in pool.parts():
        part.zero_()
    host.follow(plan(into=[(2, 0), (0, 3)]))
    for part, held in zip(pool.parts(), before, strict=True):
        assert torch.equal(part[0], held[1])
        assert torch.equal(part[3], held[4])
        assert not part[[1, 2, 4]].any()


def test_what_is_copied_out_is_there_for_a_copy_in_of_the_same_plan():
    pool = filled_pool()
    held = [part[1].clone() for part in pool.parts()]
    HostPool(pool, 1).follow(plan(out=[(1, 0)], into=[(0, 4)]))
    assert all(torch.equal(part[4], block) for part, block in zip(pool.parts(), held, strict=True))


@pytest.mark.parametrize(
    "wrong",
    [{"out": [(5, 0)]}, {"out": [(0, 3)]}, {"into": [(3, 0)]}, {"into": [(0, -1)]}, {"out": [(0, 1), (2, 1)]}],
)
def test_a_copy_of_what_is_not_there_ends_the_engine(wrong):
    with pytest.raises(EngineFailed, match="copies blocks"):
        HostPool(filled_pool(), 3).follow(plan(**wrong))


def filled_pool(dtype=torch.float32):
    """Five blocks of four tokens, two layers of which one has values of another size than keys."""
    pool = KVPool([LayerShape(2, 8, 8), LayerShape(1, 6, 4)], 5, 4, dtype, torch.device("cpu"))
    for tensor in (*pool.keys, *pool.values):
        tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)))
    return pool


def plan(out=(), into=()):
    pairs = [pack_ids(number for pair in given for number in pair) for given in (out, into)]
    return Plan(0, 0, 1, copies_out=pairs[0], copies_in=pairs[1])
