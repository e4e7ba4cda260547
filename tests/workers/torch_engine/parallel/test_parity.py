"""Several ranks give what one process gives: generate's greedy tokens, through the real scheduler core with chunked
prefill, prefix hits, copies to host memory and back, and preemption, and the same bits alone, in a batch and after a
preemption."""

from __future__ import annotations

import pytest

from protocol.sampling import SamplingParams
from tests.models import CONFIGS, save_tiny_model, tiny_model
from tests.workers.core_driver import CoreDriver
from tests.workers.plan_maker import PlanMaker, Sequence
from tests.workers.torch_engine.parity import BLOCK, first_difference, make_engine, make_requests, reference_of
from tests.workers.torch_engine.test_structure import check, constrained, request
from workers.engines.ranks import RankedEngine
from workers.torch_engine.config import EngineConfig


def config_of(path, **fields):
    return EngineConfig(
        model=str(path), device="cpu", max_model_len=384, max_num_seqs=32, max_num_batched_tokens=64,
        kv_cache_memory=64 << 20, block_size=BLOCK, threads=1, **fields,
    )  # fmt: skip


def loaded(path, parts, stages=1):
    engine = RankedEngine("torch", config_of(path, kv_offload=8 << 20), parts, stages)
    try:
        engine.capacity = engine.load(lambda stage, fraction: None)
    except BaseException:
        engine.close()
        raise
    return engine


def check_parity(engine, path):
    requests = make_requests(4, 76)
    counters = CoreDriver(engine, engine.capacity, 13 + 76 // BLOCK * 3, budget=24).run(requests)
    assert counters.preemptions > 0
    assert counters.prefix_hits > 0
    assert counters.blocks_loaded > 0, "each rank has copied its own part"
    reference = reference_of(path)
    wrong = [text for text in (first_difference(reference, request) for request in requests) if text]
    assert not wrong, "\n".join(wrong)


def check_grammars_and_logprobs(engine, path):
    """Constrained and free sequences side by side, some preempted: the tokens and logprobs of one process."""

    def run(of, capacity):
        made = [constrained(k, logprobs=3) if k % 2 else request(k, None, logprobs=3) for k in range(12)]
        return made, CoreDriver(of, capacity, 40, budget=24).run(made)

    engine.reset()
    ours, counters = run(engine, engine.capacity)
    assert counters.preemptions > 0
    one = make_engine(path)
    theirs, _ = run(one, one.capacity)
    for sequence, reference in zip(ours, theirs, strict=True):
        if sequence.sampling.structure is not None:
            check(sequence)
        assert sequence.output == reference.output
        for (drawn, ids, best), (theirs, their_ids, their_best) in zip(
            sequence.logprobs, reference.logprobs, strict=True
        ):
            assert drawn == pytest.approx(theirs, abs=1e-4)
            assert dict(zip(ids.tolist(), best.tolist(), strict=True)) == pytest.approx(
                dict(zip(their_ids.tolist(), their_best.tolist(), strict=True)), abs=1e-4
            )


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    path = tiny_model(tmp_path_factory, "llama")
    engine = loaded(path, 2)
    yield engine, path
    engine.close()


def test_two_ranks_equal_generate(llama):
    engine, path = llama
    assert engine.path == "fused modules"
    check_parity(engine, path)


def test_two_ranks_keep_grammars_and_give_logprobs(llama):
    check_grammars_and_logprobs(*llama)


def check_bits(engine):
    """The same bits alone, in a batch and preempted."""

    def drawn(blocks, groups):
        """(outputs, logprobs of the drawn) of the same twelve sequences, run so many at once."""
        params = SamplingParams(temperature=0.9, top_p=0.9, max_tokens=24, logprobs=1)
        sequences = [Sequence(list(range(k, k + 9 + 5 * k)), params, seed=k) for k in range(12)]
        preempted = 0
        for group in (sequences[at : at + groups] for at in range(0, 12, groups)):
            maker = PlanMaker(engine, blocks=blocks, block_size=BLOCK, budget=24)
            engine.reset()
            maker.run(group)
            preempted += maker.preemptions
        return [(s.output, [logprob for logprob, *_ in s.logprobs]) for s in sequences], preempted

    batch, none = drawn(200, 12)
    alone, _ = drawn(200, 1)
    preempted, some = drawn(24, 12)
    assert (none, some > 0) == (0, True)
    assert alone == batch
    assert preempted == batch


def test_a_sequence_is_the_same_alone_in_a_batch_and_preempted(llama):
    check_bits(llama[0])


@pytest.mark.nightly
@pytest.mark.parametrize(("parts", "stages"), [(4, 1), (2, 2)])
def test_on_four_ranks_too(tmp_path_factory, parts, stages):
    engine = loaded(tiny_model(tmp_path_factory, "llama"), parts, stages)
    try:
        check_bits(engine)
    finally:
        engine.close()


def test_two_stages_equal_generate(tmp_path_factory):
    path = tiny_model(tmp_path_factory, "llama")
    engine = loaded(path, 1, 2)
    try:
        assert engine.capacity.stages == 2
        assert engine.path == "fused layers"
        check_parity(engine, path)
        check_grammars_and_logprobs(engine, path)
    finally:
        engine.close()


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3_moe", "gpt_oss", "gemma3"])
def test_four_stages_equal_generate(tmp_path, monkeypatch, name):
    """Of models with a layer more than the other tests have."""
    deeper = {**CONFIGS[name], "num_hidden_layers": 4}
    if "layer_types" in deeper:
        deeper["layer_types"] = [*deeper["layer_types"], "full_attention"]
    monkeypatch.setitem(CONFIGS, name, deeper)
    save_tiny_model(name, tmp_path)
    engine = loaded(tmp_path, 1, 4)
    try:
        check_parity(engine, tmp_path)
        check_grammars_and_logprobs(engine, tmp_path)
    finally:
        engine.close()


@pytest.mark.nightly
@pytest.mark.parametrize(("parts", "stages"), [(2, 1), (4, 1), (1, 2), (1, 3), (2, 2)])
@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3_moe", "mixtral", "gpt_oss", "gemma3", "gemma2"])
def test_ranks_equal_generate(tmp_path_factory, name, parts, stages):
    path = tiny_model(tmp_path_factory, name)
    engine = loaded(path, parts, stages)
    try:
        check_parity(engine, path)
        check_grammars_and_logprobs(engine, path)
    finally:
        engine.close()
