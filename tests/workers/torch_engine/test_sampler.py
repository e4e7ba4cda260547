"""The sampler against plain definitions: what may be drawn, how often, and that rows do not touch each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol.messages import NewSequence, pack_ids
from protocol.sampling import SamplingParams
from workers.engines.checks import NO_TOKEN_LEFT, Refusals
from workers.native.library import KernelsUnavailable, load_kernels
from workers.native.structs import DRAW
from workers.torch_engine.cpu.backend import NativeDraw
from workers.torch_engine.draw import (
    TorchDraw,
    keep_top_k,
    keep_top_p,
    threshold_by_bisection,
    threshold_by_histogram,
    uniforms,
)
from workers.torch_engine.sampler import Sampler, StepClock, TorchStepOutput

V = 50
CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0)


@pytest.fixture(autouse=True, params=["torch", "native"])
def kernels(request, monkeypatch):
    """Every test with both ways to draw on a CPU."""
    if request.param == "native":
        try:
            monkeypatch.setitem(DRAWN_BY, "this", NativeDraw(load_kernels()))
        except KernelsUnavailable as error:
            pytest.skip(f"native kernels: {error}")


TORCH = TorchDraw(threshold_by_histogram)
DRAWN_BY = {"this": TORCH}


def sequence(seat, params, prompt=(1, 2, 3), outputs=(), seed=0, choice=0):
    ids = [*prompt, *outputs]
    return NewSequence(seat, "r", choice, 1, pack_ids(ids), len(prompt), params, seed, 0, b"", 0)


def make(*params, **kwargs):
    """A sampler with one seat for each of ``params``, seat 0 first."""
    made = Sampler(4, V, [7, 9], CPU, DRAWN_BY["this"])
    for seat, each in enumerate(params):
        made.add(sequence(seat, each, **kwargs))
    return made


def sample(made, logits, position=3, seats=None):
    rows = torch.atleast_2d(logits)
    seats = np.arange(len(rows)) if seats is None else np.array(seats)
    return made.sample(rows, seats, np.full(len(rows), position))


def logits_of(seed=0, rows=1):
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * 2


def test_greedy_takes_the_best():
    logits = logits_of(rows=3)
    assert torch.equal(sample(make(GREEDY, GREEDY, GREEDY), logits).tokens, logits.argmax(-1))


def test_greedy_and_random_rows_share_a_batch():
    logits = logits_of(rows=3)
    made = make(GREEDY, SamplingParams(seed=1), GREEDY)
    tokens = sample(made, logits).tokens
    assert tokens[0] == logits[0].argmax()
    assert tokens[2] == logits[2].argmax()


def test_a_row_draws_the_same_alone_and_in_any_batch():
    params = [SamplingParams(temperature=t, top_p=p, top_k=k) for t, p, k in ((1, 1, 0), (0.7, 0.8, 0), (1.3, 0.9, 9))]
    logits = logits_of(rows=3)
    together = sample(make(*params), logits, position=17).tokens
    for row, each in enumerate(params):
        alone = make()
        alone.add(sequence(2, each))
        assert sample(alone, logits[row], position=17, seats=[2]).tokens[0] == together[row]


def test_draws_depend_on_seed_choice_and_position():
    logits = torch.zeros(1, V)

    def drawn(position, **kwargs):
        return int(sample(make(SamplingParams(), **kwargs), logits, position).tokens[0])

    base = [drawn(position) for position in range(40)]
    assert len(set(base)) > 15
    assert base == [drawn(position) for position in range(40)]
    assert base != [drawn(position, seed=1) for position in range(40)]
    assert base != [drawn(position, choice=1) for position in range(40)]


def test_draws_follow_the_distribution():
    logits = logits_of()
    made = make(SamplingParams(temperature=0.8))
    count = 4000
    tokens = made.sample(logits.expand(count, V), np.zeros(count, np.int64), np.arange(count)).tokens.numpy()
    expected = torch.softmax(logits[0] / 0.8, -1).numpy()
    found = np.bincount(tokens, minlength=V) / count
    assert np.abs(found - expected).max() < 5 * np.sqrt(expected.max() / count)
    apart = np.abs(np.cumsum(found) - np.cumsum(expected)).max()
    assert apart < 1.95 / np.sqrt(count)  # by Kolmogorov and Smirnov, one true sample in a thousand is further apart


def test_uniforms_are_pinned():
    """The same on every machine and in every version: a recovered request must draw as it would have."""
    keys = np.array([0, 1, 2**64 - 1, 12345], np.uint64)
    got = uniforms(keys, np.array([0, 1, 2, 1000]))
    assert got.dtype == np.float32
    assert [f"{value:.6f}" for value in got] == ["0.479310", "0.360637", "0.882949", "0.754922"]
    many = uniforms(np.full(20000, 42, np.uint64), np.arange(20000))
    assert abs(many.mean() - 0.5) < 0.01
    assert 0 <= many.min() < many.max() < 1


@pytest.mark.parametrize("k", [1, 3, 20])
def test_top_k(k):
    logits = logits_of()
    allowed = set(logits[0].topk(k).indices.tolist())
    made = make(SamplingParams(top_k=k, temperature=2.0))
    drawn = {int(sample(made, logits, position).tokens[0]) for position in range(300)}
    assert drawn <= allowed
    assert len(drawn) == k or k == 20


def test_top_k_of_each_row_is_its_own():
    weights = torch.softmax(logits_of(rows=3), -1)
    kept = keep_top_k(weights, np.array([0, 2, 999]))
    assert [int((row > 0).sum()) for row in kept] == [V, 2, V]


def test_min_p():
    logits = logits_of()
    weights = torch.softmax(logits[0], -1)
    allowed = set((weights >= 0.2 * weights.max()).nonzero()[:, 0].tolist())
    made = make(SamplingParams(min_p=0.2))
    assert {int(sample(made, logits, position).tokens[0]) for position in range(400)} == allowed


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**31), st.floats(0.01, 0.999), st.floats(0.1, 8), st.sampled_from([3, 40, 700]))
def test_top_p_keeps_the_nucleus(seed, top_p, spread, size):
    """Both searches against the definition by sorting."""
    logits = torch.randn(2, size, generator=torch.Generator().manual_seed(seed)) * spread
    weights = torch.softmax(logits, -1)
    goal = torch.full((2, 1), top_p)
    ranked, order = weights.double().sort(dim=-1, descending=True)
    before = ranked.cumsum(-1) - ranked
    clear = ((ranked.cumsum(-1) - top_p).abs() > 1e-5).all()  # no sum within rounding of the goal
    wanted = torch.zeros_like(weights, dtype=torch.bool).scatter(-1, order, before < top_p)
    kept = keep_top_p(weights, goal, threshold_by_histogram) > 0
    bisected = weights >= threshold_by_bisection(weights, goal * weights.sum(-1, keepdim=True))
    if clear:
        assert torch.equal(kept, wanted & (weights > 0))
        assert torch.equal(bisected, wanted)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 2**31), st.floats(0.05, 1), st.sampled_from([0.0, 0.01, 0.3]), st.sampled_from([0, 1, 7, 300]),
    st.floats(0.1, 8), st.sampled_from([3, 40, 700, 20000]),
)  # fmt: skip
def test_both_ways_draw_the_same(seed, top_p, min_p, top_k, spread, size):
    """But for a draw on the very edge between two tokens, or a threshold within rounding of another weight."""
    if DRAWN_BY["this"] is TORCH:
        return
    logits = torch.randn(2, size, generator=torch.Generator().manual_seed(seed)) * spread
    params = SamplingParams(top_p=top_p, min_p=min_p, top_k=top_k, temperature=0.9)
    samplers = [Sampler(4, size, [], CPU, draw) for draw in (TORCH, DRAWN_BY["this"])]
    drawn = []
    for made in samplers:
        for seat in range(2):
            made.add(sequence(seat, params, seed=seed))
        drawn.append([sample(made, logits, position).tokens.tolist() for position in range(3, 9)])
    different = sum(a != b for x, y in zip(*drawn, strict=True) for a, b in zip(x, y, strict=True))
    assert different <= 1


def test_penalties_follow_their_definitions():
    params = SamplingParams(temperature=0, repetition_penalty=1.7, frequency_penalty=0.3, presence_penalty=0.9)
    logits = logits_of(rows=2)
    made = make(params, GREEDY, prompt=[1, 2, 3], outputs=[4, 4, 5])
    expected = logits[0].clone()
    for token in (1, 2, 3, 4, 5):
        expected[token] = expected[token] / 1.7 if expected[token] > 0 else expected[token] * 1.7
    for token, times in ((4, 2), (5, 1)):
        expected[token] -= 0.3 * times + 0.9
    processed = made._process_logits(logits, np.arange(2), np.array([6, 6]))
    torch.testing.assert_close(processed[0], expected)
    assert torch.equal(processed[1], logits[1])


def test_replayed_outputs_count_like_drawn_ones():
    params = SamplingParams(temperature=0, frequency_penalty=2.0)
    logits = logits_of()
    live = make(params)
    outputs = [int(sample(live, logits, 3 + i).tokens[0]) for i in range(8)]
    assert len(set(outputs)) > 1
    for cut in (3, 6):
        replayed = make(params, outputs=outputs[:cut])
        assert [int(sample(replayed, logits, 3 + i).tokens[0]) for i in range(cut, 8)] == outputs[cut:]


def test_a_seat_that_is_taken_again_starts_clean():
    logits = logits_of()
    made = make(SamplingParams(temperature=0, frequency_penalty=2.0, logit_bias={5: 100.0}, min_tokens=4))
    assert int(sample(made, logits).tokens[0]) == 5
    made.add(sequence(0, GREEDY))
    assert int(sample(made, logits).tokens[0]) == int(logits.argmax())
    made.add(sequence(1, SamplingParams(temperature=0, presence_penalty=2.0)))  # the slot of counts is reused
    assert int(made.penalties.drawn.sum()) == 0


def test_logit_bias_forces_and_forbids():
    logits = logits_of(rows=2)
    best = int(logits[1].argmax())
    made = make(SamplingParams(logit_bias={11: 100.0}), SamplingParams(temperature=0, logit_bias={best: -100.0}))
    tokens = sample(made, logits).tokens
    assert tokens[0] == 11
    assert tokens[1] != best


def test_only_allowed_ids_are_drawn():
    """Greedy and random, beside a free row that must stay as it is. What leaves nothing is told of its own row."""
    free, logits = SamplingParams(temperature=0), logits_of(rows=3)
    greedy = SamplingParams(temperature=0, allowed_token_ids=[11, 4, 11, 30])
    made = make(greedy, free, SamplingParams(temperature=2.0, allowed_token_ids=[5, 7], min_tokens=4))
    untouched = logits.clone()
    for position in range(3, 40):
        first, second, third = sample(made, logits, position).tokens.tolist()
        assert first == max((4, 11, 30), key=lambda id: float(logits[0, id]))
        assert second == int(logits[1].argmax())
        assert third == 5 if position < 7 else third in (5, 7)
    assert torch.equal(logits, untouched)
    ends = make(free, SamplingParams(temperature=0, allowed_token_ids=[7, 9], min_tokens=9), greedy)
    drawn = sample(ends, logits)
    assert (drawn.ruled_rows.tolist(), drawn.left.tolist()) == ([1, 2], [False, True])


def letters(text):
    """A tokenizer of letters, a blank of its own included: a is 20."""
    return [ord(char) - ord("a") + 20 if char != " " else 10 for char in text]


def test_bad_words_rule_out_the_token_that_would_complete_them():
    logits = torch.zeros(1, V)
    logits[0, letters("abc")] = torch.tensor([3.0, 2.0, 1.0])
    for params in (
        SamplingParams(temperature=0, bad_words=["ab"]),
        SamplingParams(temperature=0, bad_words=["ab", "b"]),
    ):
        made = Sampler(4, V, [7, 9], CPU, DRAWN_BY["this"], letters)
        made.add(sequence(0, params, prompt=letters("a")))  # what the prompt ends with does not count
        drawn = sample(made, logits.clone())
        assert drawn.tokens.tolist() == letters("a")
        logits[0, letters("a")] = 0.0
        expected = "b" if "b" not in params.bad_words else "c"
        # after an a no b; then again one, if b alone is no bad word
        found = [int(sample(made, logits.clone(), 4 + i).tokens[0]) for i in range(2)]
        assert found == letters("c" + expected)
        logits[0, letters("a")] = 3.0
    replayed = Sampler(4, V, [7, 9], CPU, DRAWN_BY["this"], letters)
    replayed.add(sequence(0, SamplingParams(temperature=0, bad_words=["xab"]), outputs=letters("xa")))
    logits[0, letters("a")] = 0.0
    assert [int(sample(replayed, logits.clone(), 5 + i).tokens[0]) for i in range(2)] == letters("cb")


def test_bad_words_that_leave_nothing_are_told_of_their_own_row():
    made = Sampler(4, V, [7, 9], CPU, DRAWN_BY["this"], letters)
    made.add(sequence(0, SamplingParams(bad_words=["a", "b"], allowed_token_ids=letters("ab"))))
    made.add(sequence(1, SamplingParams(bad_words=["a", "b"], logprobs=0)))
    drawn = sample(made, logits_of(rows=2))
    assert (drawn.ruled_rows.tolist(), drawn.left.tolist()) == ([0, 1], [False, True])
    clock, seats = StepClock(CPU), np.arange(2)
    sampled = TorchStepOutput(seats, drawn, made.tops(seats), clock, Refusals()).wait()
    assert (sampled.failed, sampled.dropped) == ({0: NO_TOKEN_LEFT}, [])


def test_named_ids_are_told_beside_the_most_probable_ones():
    logits = logits_of(rows=3)
    best = int(logits[1].argmax())
    named = SamplingParams(temperature=0, logprobs=1, logprob_token_ids=[11, best, 4, 11])
    made = make(SamplingParams(temperature=0, logprobs=2), named, SamplingParams(logprobs=0, logprob_token_ids=[3]))
    seats = np.arange(3)
    drawn = sample(made, logits)
    output = TorchStepOutput(seats, drawn, made.tops(seats), StepClock(CPU), Refusals(), names=made.names(seats))
    told, own = output.wait().logprobs, torch.log_softmax(logits, -1)
    ids = {0: own[0].topk(2).indices.tolist(), 1: [best, 11, 4], 2: [3]}
    assert {seat: found.tolist() for seat, (_, found, _) in told.items()} == ids
    for seat, (_, found, values) in told.items():
        np.testing.assert_allclose(values, own[seat][found.tolist()].numpy(), rtol=1e-6)


def test_min_tokens_bans_every_end_until_reached():
    logits = torch.zeros(1, V)
    logits[0, [7, 9, 30]] = 50.0  # both eos ids and a stop id
    made = make(SamplingParams(temperature=0, min_tokens=2, stop_token_ids=[30]))
    ends = {7, 9, 30}
    assert [int(sample(made, logits, position).tokens[0]) in ends for position in (3, 4, 5)] == [False, False, True]


def test_logprobs_are_the_models_own():
    logits = logits_of(rows=3)
    processed = SamplingParams(temperature=0, logprobs=3, logit_bias={11: 100.0}, repetition_penalty=2.0)
    drawn = sample(make(GREEDY, processed, SamplingParams(temperature=0, logprobs=0)), logits)
    own = torch.log_softmax(logits, -1)
    assert drawn.lp_rows.tolist() == [1, 2]
    torch.testing.assert_close(drawn.lp_drawn, torch.stack([own[1, 11], own[2].max()]))
    assert drawn.lp_top_ids[0].tolist() == own[1].topk(3).indices.tolist()


def test_a_row_that_is_not_a_number_leaves_the_others_alone():
    logits = logits_of(rows=3)
    params = [SamplingParams(top_p=0.5), SamplingParams(top_p=0.5, top_k=5, min_p=0.1), GREEDY]
    wanted = sample(make(*params), logits).tokens
    logits[0] = torch.nan
    got = sample(make(*params), logits).tokens
    assert 0 <= got[0] < V
    assert torch.equal(got[1:], wanted[1:])


@pytest.mark.parametrize("at", [0, 7, 16, 33, V - 1])
def test_one_logit_that_is_not_a_number_is_found_wherever_it_stands(at):
    """Beside an infinity too. Greedy rows alone take the shortest way, so both are tried."""
    logits = logits_of(rows=4)
    logits[1, at] = torch.nan
    logits[2, (at + 1) % V], logits[2, at] = torch.inf, torch.nan
    for params in (GREEDY, SamplingParams(seed=1)):
        assert sample(make(params, GREEDY, GREEDY, GREEDY), logits).finite.tolist() == [True, False, False, True]
    if not isinstance(DRAWN_BY["this"], TorchDraw):
        greedy = np.zeros(4, DRAW)
        assert load_kernels().draw(logits, greedy).tolist() == logits.max(-1).indices.tolist()


def test_extreme_parameters_draw_something():
    logits = logits_of(rows=4) * 30
    made = make(
        SamplingParams(temperature=1e-30),
        SamplingParams(temperature=2.0, top_p=1e-9),
        SamplingParams(min_p=1.0),
        SamplingParams(top_k=1, top_p=0.5, min_p=0.5, temperature=2.0),
    )
    assert torch.equal(sample(made, logits).tokens, logits.argmax(-1))


def test_warming_up_leaves_nothing_behind():
    made = make()
    made.warm_up(torch.float32)
    assert not made._has_processors
    assert not made._fields[:4].view(np.uint8).any()
    made.add(sequence(0, SamplingParams(temperature=0)))
    assert sample(made, torch.arange(float(V))).tokens.tolist() == [V - 1]
