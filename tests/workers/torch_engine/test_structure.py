"""Constrained sequences on the torch engine keep their grammar, whatever else runs and wherever they are resumed."""

from __future__ import annotations

import json
import threading
from array import array
from typing import Any

import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator

from protocol.messages import NewSequence, Plan, pack_ids
from protocol.sampling import SamplingParams
from protocol.structures.grammar import MaskRow
from protocol.structures.structure import Structure
from tests.models import EOS, tiny_model
from tests.workers.core_driver import CoreDriver
from tests.workers.plan_maker import Sequence
from tests.workers.torch_engine.parity import BLOCK, make_engine
from workers.masks import StepMasks
from workers.native.library import load_kernels
from workers.torch_engine.cpu.backend import NativeDraw
from workers.torch_engine.draw import rule_out

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEMAS: list[Any] = [
    {"type": "object", "properties": {"name": {"type": "string", "maxLength": 6}, "tags": {
        "type": "array", "items": {"enum": ["red", "green", 3]}, "maxItems": 3}},
     "required": ["name", "tags"], "additionalProperties": False},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    {"enum": ["yes", "no", {"maybe": [1, 2]}]},
]  # fmt: skip


def request(number: int, structure: Structure | None, **fields: Any) -> Sequence:
    params = {
        "max_tokens": 120 if structure else 24,
        "temperature": (0.0, 0.8, 1.3)[number % 3],
        "structure": structure,
    }
    prompt = [(7 * number + 3 * at) % 250 for at in range(5 + 4 * (number % 5))]
    ends = frozenset([EOS]) if structure else frozenset()
    return Sequence(prompt, SamplingParams(**{**params, **fields}), seed=number, joins=number % 7, end_ids=ends)


def constrained(number: int, **fields: Any) -> Sequence:
    return request(number, Structure(json=SCHEMAS[number % len(SCHEMAS)]), **fields)


def text_of(sequence: Sequence) -> str:
    return bytes(token for token in sequence.output if token < 256).decode()


def check(sequence: Sequence) -> None:
    structure = sequence.sampling.structure
    assert structure is not None
    assert sequence.output[-1] == EOS, text_of(sequence)
    Draft202012Validator(structure.json).validate(json.loads(text_of(sequence)))


def test_results_validate_and_are_the_same_alone_in_a_crowd_and_after_preemption(tmp_path_factory):
    path = tiny_model(tmp_path_factory, "llama")

    def requests():
        made = [request(number, None) for number in range(16)]
        for number in (1, 2, 4, 5, 7, 8, 10, 11, 13, 14):
            penalty = (0.0, 0.4)[number // 2 % 2]
            made[number] = constrained(number, top_p=(1.0, 0.9)[number % 2], frequency_penalty=penalty, min_tokens=9)
        return made

    together, alone = requests(), requests()
    engine = make_engine(path)
    counters = CoreDriver(engine, engine.capacity, 40, budget=24).run(together)
    assert counters.preemptions > 0
    for number, sequence in enumerate(together):
        if sequence.sampling.structure is not None:
            check(sequence)
        if number % 2:
            driver = CoreDriver(make_engine(path), engine.capacity, 128, budget=512, late=0)
            driver.run([alone[number]])
            assert alone[number].output == sequence.output


def test_others_draw_what_they_would_have_drawn_without_constrained_ones_beside_them(engine):
    plain = [request(number, None, temperature=(0.0, 1.0)[number % 2]) for number in range(6)]
    CoreDriver(engine, engine.capacity, 128, budget=64).run(plain)
    engine.reset()
    again = [request(number, None, temperature=(0.0, 1.0)[number % 2]) for number in range(6)]
    CoreDriver(engine, engine.capacity, 128, budget=64).run([*again, *(constrained(n) for n in range(20, 24))])
    assert [s.output for s in again] == [s.output for s in plain]


def test_nobody_waits_for_a_grammar_that_takes_long(engine, monkeypatch):
    """Its row is given up in the step and placed anew, until the matcher is there; then it ends as it would have."""
    alone, slow = constrained(1), constrained(1)
    plain = [request(number, None) for number in (0, 3, 6)]
    CoreDriver(engine, engine.capacity, 128, budget=64).run([alone])
    engine.reset()
    grammars, others_ended = engine.masks._grammars, threading.Event()

    def matcher(structure: Structure, stop_ids: Any = ()) -> Any:
        others_ended.wait()
        return type(grammars).matcher(grammars, structure, stop_ids)

    driver = CoreDriver(engine, engine.capacity, 128, budget=64)

    def hint(plan: Plan, output: Any) -> Any:
        told = CoreDriver._hint(driver, plan, output)
        if all(sequence.finished for sequence in plain):
            others_ended.set()
        return told

    monkeypatch.setattr(grammars, "matcher", matcher)
    monkeypatch.setattr(driver, "_hint", hint)
    try:
        driver.run([slow, *plain])
    finally:
        others_ended.set()
    assert driver.resyncs > 0
    assert slow.output == alone.output
    check(slow)


def decode(engine: Any, new: NewSequence, steps: int) -> list[int]:
    """The output of one sequence: its prefill, then ``steps`` - 1 decodes, two plans ahead of what is read."""
    count = len(new.token_ids) // 4
    seat = array("H", [new.seat]).tobytes()
    outputs = [engine.execute(Plan(0, 0, 1, seat, pack_ids([count]), b"\1", new=[new]))]
    outputs += [engine.execute(Plan(0, 0, 2 + at, seat)) for at in range(steps - 1)]
    return [int(output.wait().tokens[0]) for output in outputs]


def placed(prompt: list[int], output: list[int], seed: int, **fields: Any) -> NewSequence:
    params = SamplingParams(**{"max_tokens": 60, **fields})
    blocks = pack_ids(range(-(-(len(prompt) + 80) // BLOCK)))
    return NewSequence(0, "r", 0, 1, pack_ids([*prompt, *output]), len(prompt), params, seed, 0, blocks, 0)


@pytest.mark.parametrize("seed", range(3))
def test_a_sequence_that_moves_in_mid_object_ends_in_the_same_tokens(engine, seed):
    prompt = [5, 6, 7, 8, 9]
    structure = Structure(json=SCHEMAS[0], after=[200])
    fields = {"structure": structure, "temperature": 1.2, "logit_bias": {200: 6.0}}
    whole = decode(engine, placed(prompt, [], seed, **fields), 60)
    assert 200 in whole, "the grammar never began"
    for cut in (1, whole.index(200), whole.index(200) + 1, whole.index(200) + 9, 40):
        engine.reset()
        resumed = decode(engine, placed(prompt, whole[:cut], seed, **fields), 60 - cut)
        assert whole[:cut] + resumed == whole


def test_a_journal_that_the_grammar_does_not_admit_ends_its_own_sequence_alone(engine):
    bad = placed([5, 6], list(b"{x"), 0, structure=Structure(json=SCHEMAS[1]))
    good = NewSequence(
        1, "s", 0, 1, pack_ids([1, 2, 3, 4]), 4, SamplingParams(max_tokens=9), 7, 0, pack_ids([20, 21]), 0
    )
    seats = array("H", [0, 1]).tobytes()
    sampled = engine.execute(Plan(0, 0, 1, seats, pack_ids([4, 4]), b"\1\1", new=[bad, good])).wait()
    (code, message) = sampled.failed.pop(0)
    assert code == "grammar_failed"
    assert "{x" not in message
    assert not sampled.failed
    again = engine.execute(Plan(0, 0, 2, seats)).wait()
    assert set(again.failed) == {0}


def test_logprobs_are_the_models_own(engine):
    prompt = [5, 6, 7, 8, 9]
    free = SamplingParams(max_tokens=4, temperature=0, logprobs=3)
    ruled = SamplingParams(max_tokens=4, temperature=0, logprobs=3, structure=Structure(choice=["zebra"]))
    found = []
    for params in (free, ruled):
        engine.reset()
        new = NewSequence(0, "r", 0, 1, pack_ids(prompt), 5, params, 0, 0, pack_ids(range(4)), 0)
        sampled = engine.execute(Plan(0, 0, 1, b"\0\0", pack_ids([5]), b"\1", new=[new])).wait()
        found.append((int(sampled.tokens[0]), *sampled.logprobs[0]))
    (_, _, ids, top), (token, logprob, ruled_ids, ruled_top) = found
    assert token == ord("z")
    assert np.array_equal(ids, ruled_ids)
    assert np.array_equal(top, ruled_top)
    assert logprob < top[-1]


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_touches_its_own_rows_alone(dtype, native):
    logits = torch.randn(4, 100).to(dtype)
    before = logits.clone()
    masks = [MaskRow(2), MaskRow(2)]
    masks[0].bits[0], masks[1].bits[1] = 1 << 5, -(1 << 31)
    ways = {False: rule_out, True: NativeDraw(load_kernels()).rule_out}
    ways[native](logits, StepMasks(np.array([3, 1]), masks))
    assert torch.equal(logits[[0, 2]], before[[0, 2]])
    assert torch.isfinite(logits[3]).nonzero().flatten().tolist() == [5]
    assert torch.isfinite(logits[1]).nonzero().flatten().tolist() == [63]
    assert logits[3, 5] == before[3, 5]


def test_native_and_plain_ways_rule_out_the_same():
    rng = np.random.default_rng(0)
    masks = [MaskRow(40) for _ in range(8)]
    for number, mask in enumerate(masks):
        mask.bits[:] = (0, -1, 1)[number % 3]
        mask.bits[::7] = rng.integers(-(2**31), 2**31, len(mask.bits[::7]))
    first = torch.randn(16, 1270)
    second = first.clone()
    step = StepMasks(rng.permutation(16)[:8], masks)
    rule_out(first, step)
    NativeDraw(load_kernels()).rule_out(second, step)
    assert torch.equal(first, second)
