"""Rules of the scheduler (architecture, section 5), each in one test, on tiny workers: tokens, blocks, prefixes."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest

from protocol.messages import unpack_ids
from scheduler.core.blocks import BlockManager
from scheduler.core.events import (
    ChoiceEnded,
    FinishChoice,
    RequestDone,
)
from scheduler.core.scheduler import Core, CoreConfig
from scheduler.core.sequence import State
from tests.factories import arrive, core, hint, only, plans, rows, run, serving

# ------------------------------------------------------------------ tokens and steps


def test_a_prompt_is_planned_whole_then_one_token_a_step():
    c = core()
    c.apply(arrive("r", 6, max_tokens=3), 0.0)
    first, second = plans(c.plan(0.0))
    assert rows(first) == {0: (6, True)}
    new = first.new[0]
    assert (new.rid, new.choice, new.placement, new.prompt_len, new.computed) == ("r", 0, 1, 6, 0)
    assert len(unpack_ids(new.block_table)) == 2
    assert rows(second) == {0: (1, True)}
    assert (second.counts, second.samples) == (b"", b""), "a steady step needs neither"


def test_no_rows_are_planned_past_max_tokens():
    c = core()
    c.apply(arrive("r", 6, max_tokens=3), 0.0)
    effects = run(c)
    assert sum(len(rows(plan)) for plan in plans(effects)) == 3
    done = only(effects, RequestDone)
    assert (done.prompt_tokens, done.output_tokens, done.finish_reasons) == (6, 3, ["length"])


def test_plans_go_out_before_hints_come_but_no_more_than_two_while_step_times_are_unknown():
    c = core()
    c.apply(arrive("r", 6, max_tokens=30), 0.0)
    assert len(plans(c.plan(0.0))) == 2
    assert plans(c.plan(0.0)) == []


def test_a_token_budget_cuts_prompts_in_chunks_and_only_the_last_one_samples():
    c = core(tokens=8)
    c.apply(arrive("r", 20), 0.0)
    work = []
    for _ in range(3):
        for plan in plans(c.plan(0.0)):
            work += rows(plan).values()
            c.apply(hint(plan), 0.0)
    assert work[:3] == [(8, False), (8, False), (4, True)]


def test_decodes_come_first_and_prefills_share_what_is_left():
    c = core(tokens=8)
    c.apply(arrive("a", 6, max_tokens=20), 0.0)
    for plan in plans(c.plan(0.0)):
        c.apply(hint(plan), 0.0)
    c.apply(arrive("b", 10), 0.0)
    plan = plans(c.plan(0.0))[0]
    assert list(rows(plan).values()) == [(1, True), (7, False)]


def test_blocks_are_appended_only_when_a_row_begins_one():
    c = core()
    c.apply(arrive("r", 6, max_tokens=12), 0.0)
    grown = [len(plan.blocks) for plan in plans(run(c))]
    # computed before each step: 0, then 6, 7, 8 ... 16: a new block at 8, 12 and 16
    assert grown == [0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1]


def test_sequences_beyond_max_num_seqs_wait():
    c = core(seqs=2)
    for k in range(3):
        c.apply(arrive(f"r{k}", 4, max_tokens=50), 0.0)
    assert len(plans(c.plan(0.0))[0].new) == 2
    assert c.stats().waiting == 1


def test_a_wait_for_the_next_plan_is_announced():
    c = core(CoreConfig(max_num_batched_tokens=64, plans_ahead=8))
    now = 0.0
    c.apply(arrive("r", 4, max_tokens=60), now)
    for _ in range(30):
        for plan in plans(c.plan(now)):
            now += 0.2
            c.apply(hint(plan, exec_us=200_000), now)
    c.plan(now)
    wake = c.next_wake(now)
    assert wake is not None
    assert now < wake < now + 0.2, "just before the 200 ms step ends"
    assert plans(c.plan(wake - 0.001)) == []
    assert len(plans(c.plan(wake + 0.001))) == 1


def test_short_steps_get_more_plans_ahead_when_the_device_had_to_wait():
    c = core()
    now = 0.0
    c.apply(arrive("r", 4, max_tokens=200), now)
    pending: list = []
    for _ in range(60):
        pending += plans(c.plan(now))
        now += 0.002
        c.apply(hint(pending.pop(0), exec_us=2000, idle_us=1500), now)
    pending += plans(c.plan(now))
    assert len(pending) == CoreConfig().plans_ahead


def paced(c: Core) -> float:
    """Two sequences decode, 10 ms a step; a prefill token takes 1 ms. Returns the time."""
    now = 0.0
    for k in range(2):
        c.apply(arrive(f"decoding{k}", 4, max_tokens=400), now)
    for _ in range(40):
        for plan in plans(c.plan(now)):
            tokens = sum(count for count, _ in rows(plan).values())
            now += 0.01
            c.apply(hint(plan, exec_us=10_000 if len(rows(plan)) == tokens else tokens * 1000), now)
    return now


def chunks(c: Core, now: float, prompt: int) -> list[int]:
    c.apply(arrive("long", prompt, arrived=now), now)
    sizes: list[int] = []
    for _ in range(60):
        for plan in plans(c.plan(now)):
            sizes += [count for count, _ in rows(plan).values() if count > 1]
            prefill = sum(count for count, _ in rows(plan).values() if count > 1)
            now += 0.01 + prefill / 1000
            c.apply(hint(plan, exec_us=10_000 + prefill * 1000), now)
    return sizes


def test_a_long_prompt_goes_in_chunks_that_running_decodes_can_stand():
    c = core(CoreConfig(), blocks=2000, tokens=4096, model_len=4096)
    sizes = chunks(c, paced(c), 400)
    assert sum(sizes) == 400
    assert max(sizes[1:]) <= 20, "the decodes' step takes 10 ms, of which the most is fixed, and a prefill token one"


def test_a_short_prompt_may_slow_a_few_steps_more():
    c = core(CoreConfig(), blocks=2000, tokens=4096, model_len=4096)
    sizes = chunks(c, paced(c), 100)
    assert sum(sizes) == 100
    assert len(sizes) <= 4


def test_where_more_prompts_wait_than_decodes_run_the_prompts_go_first():
    c = core(CoreConfig(), blocks=4000, tokens=4096, model_len=4096, seqs=64)
    now = paced(c)
    for k in range(11):
        c.apply(arrive(f"crowd{k}", 300, arrived=now), now)
    assert chunks(c, now, 300)[0] >= 30, "a knee, for each of those behind waits"


def test_nobody_decodes_so_a_prompt_may_fill_the_budget():
    c = core(CoreConfig(), blocks=2000, tokens=4096, model_len=4096)
    assert chunks(c, 0.0, 400)[0] == 400


def test_prompts_never_appear_in_plans_of_known_sequences():
    """A steady step is small: two bytes a sequence and the blocks that begin."""
    c = core(seqs=100, tokens=1000, blocks=1000)
    for k in range(100):
        c.apply(arrive(f"r{k}", 8, max_tokens=100), 0.0)
    for plan in plans(c.plan(0.0)):
        c.apply(hint(plan), 0.0)
    plan = plans(c.plan(0.0))[0]
    assert len(msgspec.msgpack.encode(plan)) < 100 * 2 + 50


def test_capacity_of_the_worker_bounds_the_configuration():
    c = Core(CoreConfig(max_num_seqs=1000, max_num_batched_tokens=10**6))
    c.apply(serving(seqs=2, tokens=8), 0.0)
    for k in range(3):
        c.apply(arrive(f"r{k}", 3), 0.0)
    work = rows(plans(c.plan(0.0))[0])
    assert len(work) == 2
    assert sum(count for count, _ in work.values()) <= 8


# ------------------------------------------------------------------ what can never fit


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "param"), [(32, None, "prompt"), (40, 1, "prompt"), (30, 3, "max_tokens")]
)
def test_what_can_never_fit_is_ended_at_once(prompt, max_tokens, param):
    c = core(model_len=32)
    final = only(c.apply(arrive("r", prompt, max_tokens=max_tokens), 0.0), FinishChoice)
    assert (final.reason, final.error_code, final.error_param) == ("error", "context_length_exceeded", param)
    done = only(c.apply(ChoiceEnded("r", 0), 0.0), RequestDone)
    assert done.finish_reasons == ["error"]
    assert c.stats().requests == 0


def test_a_small_pool_bounds_the_context_too():
    c = core(blocks=4, model_len=1000)
    assert only(c.apply(arrive("r", 15, max_tokens=2), 0.0), FinishChoice).error_param == "max_tokens"
    assert c.apply(arrive("s", 15, max_tokens=1), 0.0) == []


def test_max_tokens_left_open_becomes_what_the_context_allows():
    c = core(model_len=32)
    c.apply(arrive("r", 10, max_tokens=None), 0.0)
    assert plans(c.plan(0.0))[0].new[0].sampling.max_tokens == 22


@pytest.mark.parametrize(("default", "min_tokens", "gets"), [(8, 0, [8, 8]), (20, 0, [20, 12]), (8, 10, [10, 10])])
def test_a_models_default_length_gives_way_to_each_context(default: int, min_tokens: int, gets: list[int]):
    c = core(model_len=32)
    event = arrive("r", range(10), range(20), max_tokens=None)
    sampling = msgspec.structs.replace(event.sampling, min_tokens=min_tokens)
    c.apply(dataclasses.replace(event, sampling=sampling, default_max_tokens=default), 0.0)
    assert [new.sampling.max_tokens for new in plans(c.plan(0.0))[0].new] == gets


def test_before_any_worker_the_configured_length_counts_and_the_worker_corrects_it():
    c = Core(CoreConfig(max_model_len=64))
    assert only(c.apply(arrive("long", 80), 0.0), FinishChoice).error_code == "context_length_exceeded"
    c.apply(arrive("r", 40), 0.0)
    assert c.plan(0.0) == []
    assert only(c.apply(serving(model_len=32), 0.0), FinishChoice).rid == "r"


def test_without_any_length_known_everything_waits():
    c = Core()
    assert c.apply(arrive("r", 1000), 0.0) == []
    assert c.plan(0.0) == []
    assert c.stats().waiting_tokens == 1000


# ------------------------------------------------------------------ blocks run out


def test_a_whole_prompt_must_fit_before_it_starts():
    c = core(blocks=8)
    c.apply(arrive("a", 16, max_tokens=8), 0.0)
    c.apply(arrive("b", 20, max_tokens=8), 0.0)
    assert [new.rid for plan in plans(c.plan(0.0)) for new in plan.new] == ["a"]


def test_out_of_blocks_the_newest_of_the_lowest_class_gives_way_and_goes_on_from_its_journal():
    c = core(blocks=6)
    c.apply(arrive("batch", 8, max_tokens=9, priority="batch", arrived=0.0), 0.0)
    c.apply(arrive("urgent", 7, max_tokens=9, priority="interactive", arrived=1.0), 1.0)
    effects = run(c)
    placements = [(new.rid, new.placement) for plan in plans(effects) for new in plan.new]
    assert placements == [("urgent", 1), ("batch", 1), ("batch", 2)]
    again = [new for plan in plans(effects) for new in plan.new][-1]
    assert len(again.token_ids) // 4 > again.prompt_len == 8, "what was journaled is known"
    assert again.cursor == 10
    assert sorted(e.preemptions for e in effects if isinstance(e, RequestDone)) == [0, 1]
    assert c.stats().workers["w0"].blocks_used == 0


def test_a_preempted_sequence_starts_again_only_after_its_last_hint():
    c = core(blocks=6, seqs=2)
    c.apply(arrive("a", 8, max_tokens=9, arrived=0.0), 0.0)
    c.apply(arrive("b", 8, max_tokens=9, arrived=1.0), 0.0)
    sent: list = []
    while not c.stats().counters.preemptions:
        sent += plans(c.plan(0.0))
        if not c.stats().counters.preemptions:
            c.apply(hint(sent.pop(0)), 0.0)
    b = c._lifecycle.requests["b"].sequences[0]
    assert b.state is State.LEAVING
    assert b.blocks == []
    mentions = [plan for plan in sent if b.seat in rows(plan)]
    assert mentions
    for plan in mentions:
        assert b.state is State.LEAVING
        c.apply(hint(plan), 0.0)
    assert b.state is State.WAITING
    assert b.placement == 1


@pytest.mark.parametrize("size", [{"seqs": 2}, {"blocks": 10}])
def test_a_waiting_request_takes_the_place_of_a_lower_class_and_of_no_equal(size):
    c = core(**size)
    c.apply(arrive("batch", 15, max_tokens=20, priority="batch", arrived=0.0), 0.0)
    c.apply(arrive("standard", 15, max_tokens=20, arrived=1.0), 0.0)
    for plan in plans(c.plan(0.0)):
        c.apply(hint(plan), 0.0)
    c.apply(arrive("equal", 15, max_tokens=20, arrived=2.0), 0.0)
    c.apply(arrive("equal too", 15, max_tokens=20, arrived=3.0), 0.0)
    plan = plans(c.plan(0.0))[0]
    assert [new.rid for new in plan.new] == ["equal"]
    assert plan.frees == [1], "the batch request's seat"
    assert c.stats().waiting == 2
    c.check_integrity()


# ------------------------------------------------------------------ prefix cache


def test_prefix_hits_are_looked_up_once_for_a_placement(monkeypatch: pytest.MonkeyPatch):
    """Choosing between two workers, checking for room, sizing the chunk and starting: one look at each worker."""
    looked: list[BlockManager] = []
    match = BlockManager.match

    def counting(self: BlockManager, hashes: list[bytes]) -> int:
        looked.append(self)
        return match(self, hashes)

    monkeypatch.setattr(BlockManager, "match", counting)
    c = core()
    c.apply(serving("w1", 2), 0.0)
    c.apply(arrive("a", 40), 0.0)
    c.plan(0.0)
    assert len(looked) == len(set(map(id, looked))) == 2


def test_followers_share_prompt_blocks_within_the_very_plan_that_fills_them():
    c = core()
    prompt = list(range(11))
    c.apply(arrive("a", prompt), 0.0)
    c.apply(arrive("b", [*prompt, 77]), 0.0)
    plan = plans(c.plan(0.0))[0]
    a, b = plan.new
    assert (a.computed, b.computed, b.cached_tokens) == (0, 8, 8)
    assert unpack_ids(a.block_table)[:2] == unpack_ids(b.block_table)[:2]
    assert list(rows(plan).values()) == [(11, True), (4, True)]


def test_the_last_prompt_token_is_always_computed():
    c = core()
    c.apply(arrive("a", range(8)), 0.0)
    c.apply(arrive("b", range(8)), 0.0)
    assert plans(c.plan(0.0))[0].new[1].computed == 4


def test_tenants_and_salts_do_not_share():
    c = core()
    c.apply(arrive("a", range(9), tenant="a"), 0.0)
    c.apply(arrive("b", range(9), tenant="b"), 0.0)
    c.apply(arrive("c", range(9), tenant="a", cache_salt="x"), 0.0)
    assert [new.computed for new in plans(c.plan(0.0))[0].new] == [0, 0, 0]


def test_choices_share_their_prompts_full_blocks():
    c = core()
    c.apply(arrive("r", range(10), n=3), 0.0)
    assert [new.computed for new in plans(c.plan(0.0))[0].new] == [0, 8, 8]


def test_several_prompts_make_choices_of_their_own():
    c = core()
    c.apply(arrive("r", [1, 2, 3], [4, 5], n=2), 0.0)
    new = plans(c.plan(0.0))[0].new
    assert [(n.choice, list(unpack_ids(n.token_ids))) for n in new] == [
        (0, [1, 2, 3]),
        (1, [1, 2, 3]),
        (2, [4, 5]),
        (3, [4, 5]),
    ]


def test_outputs_can_be_found_once_they_are_journaled_and_surely_computed():
    c = core()
    c.apply(arrive("a", range(6), max_tokens=6), 0.0)
    run(c)  # outputs 55, 54, 53, 52, 51, 50
    c.apply(arrive("b", [*range(6), 55, 54, 53, 52, 51, 50, 1]), 0.0)
    # twelve tokens are journaled, but the last was never an input: its KV is not there
    assert plans(c.plan(0.0))[0].new[0].computed == 8


def test_a_new_generation_begins_with_an_empty_cache():
    c = core()
    c.apply(arrive("a", range(9)), 0.0)
    run(c)
    c.apply(serving(gen=2), 0.0)
    c.apply(arrive("b", range(9)), 0.0)
    plan = plans(c.plan(0.0))[0]
    assert (plan.gen, plan.step, plan.new[0].computed) == (2, 1, 0)
