"""Each rule of the scheduler (architecture, section 5) in one test, on tiny workers: blocks of 4 tokens."""

from __future__ import annotations

from array import array

import msgspec
import pytest

from protocol.messages import CLOSED, LANDED, STALE, pack_ids, unpack_ids
from scheduler.core import Core, CoreConfig
from scheduler.events import (
    Cancel,
    ChoiceEnded,
    ChoiceState,
    FinishChoice,
    ReleaseWorker,
    RequestDone,
    Resync,
    Resynced,
    WorkerDraining,
    WorkerLost,
)
from scheduler.sequence import IllegalTransition, Request, State
from tests.factories import arrive, capacity, core, hint, plans, rows, serving


def only(effects: list, kind: type):
    found = [e for e in effects if isinstance(e, kind)]
    assert len(found) == 1, effects
    return found[0]


def run(c: Core, wid: str = "w0", *, finish_at: int = 10**6, most: int = 1000) -> list:
    """Plan and hint in turn until nothing is left to send; ``max_tokens`` ends sequences. All effects."""
    effects, seen, rest = [], {}, {}
    for _ in range(most):
        made = c.plan(0.0)
        effects += made
        sent = plans(made, wid)
        if not sent:
            return effects
        for plan in sent:
            for new in plan.new:
                rest[new.seat] = new.sampling.max_tokens - (len(new.token_ids) // 4 - new.prompt_len)
                seen[new.seat] = new
            finish, tokens = {}, {}
            for seat, (_, samples) in rows(plan).items():
                if samples and rest.get(seat, 0) > 0:
                    rest[seat] -= 1
                    tokens[seat] = [50 + rest[seat]]
                    if not rest[seat]:
                        finish[seat] = "length"
            effects += c.apply(hint(plan, tokens, finish=finish, wid=wid), 0.0)
            c.check_integrity()
    raise AssertionError("never at rest")


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
    assert max(sizes) == 16, "the least, where twice the decode time would be ten tokens"


def test_a_short_prompt_may_slow_a_few_steps_more():
    c = core(CoreConfig(), blocks=2000, tokens=4096, model_len=4096)
    assert chunks(c, paced(c), 100) == [64, 36]


def test_where_more_prompts_wait_than_decodes_run_the_prompts_go_first():
    c = core(CoreConfig(), blocks=4000, tokens=4096, model_len=4096, seqs=64)
    now = paced(c)
    for k in range(39):
        c.apply(arrive(f"crowd{k}", 30, arrived=now), now)
    assert sum(chunks(c, now, 30)[:7]) == 200, "forty wait for two: twenty times ten tokens in the first step"


def test_nobody_decodes_so_a_prompt_may_fill_the_budget():
    c = core(CoreConfig(), blocks=2000, tokens=4096, model_len=4096)
    assert chunks(c, 0.0, 400)[0] == 400


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
    b = c._ledger.requests["b"].sequences[0]
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


# ------------------------------------------------------------------ ends


def test_a_stop_found_by_the_worker_frees_the_blocks_and_later_rows_count_for_nothing():
    c = core()
    c.apply(arrive("r", 6, max_tokens=50), 0.0)
    first, second = plans(c.plan(0.0))
    done = only(c.apply(hint(first, finish={0: "stop"}), 0.0), RequestDone)
    assert (done.output_tokens, done.finish_reasons) == (1, ["stop"])
    assert c.stats().workers["w0"].blocks_used == 0
    assert c.apply(hint(second, {}), 0.0) == []
    c.check_integrity()


def test_a_seat_is_reused_only_after_the_hint_of_the_plan_that_emptied_it():
    c = core(seqs=1)
    sent: list = []
    for k in range(4):
        c.apply(arrive(f"r{k}", 6, max_tokens=50, arrived=k), 0.0)
    taken: dict[int, str] = {}
    last: dict[int, int] = {}
    hinted = 0
    for _ in range(40):
        sent += plans(c.plan(0.0))
        if not sent:
            break
        plan = sent.pop(0)
        for seat in plan.frees:
            del taken[seat]
        for new in plan.new:
            assert new.seat not in taken
            assert last.get(new.seat, 0) <= hinted, "rows of the seat's last sequence were not hinted"
            taken[new.seat] = new.rid
        last.update(dict.fromkeys(rows(plan), plan.step))
        stopping = {new.seat: "stop" for new in plan.new}
        live = {seat: [1] for seat in stopping}
        c.apply(hint(plan, live, finish=stopping), 0.0)
        hinted = plan.step
        c.check_integrity()
    assert c.stats().requests == 0


def test_cancel_of_a_running_request_travels_in_a_plan_and_frees_its_blocks_at_once():
    c = core()
    c.apply(arrive("r", 6, max_tokens=50), 0.0)
    sent = plans(c.plan(0.0))
    assert c.apply(Cancel("r"), 0.0) == []
    assert c.stats().workers["w0"].blocks_used == 0
    (end,) = plans(c.plan(0.0))
    assert (end.seats, end.ends) == (b"", [(0, "abort")]), "a plan may carry nothing but ends"
    for plan in sent:
        c.apply(hint(plan), 0.0)
    done = only(c.apply(hint(end, finish={0: "abort"}), 0.0), RequestDone)
    assert done.finish_reasons == ["abort"]


def test_a_stop_that_was_on_its_way_wins_over_the_cancel():
    c = core()
    c.apply(arrive("r", 6, max_tokens=50), 0.0)
    first, second = plans(c.plan(0.0))
    c.apply(Cancel("r"), 0.0)
    (end,) = plans(c.plan(0.0))
    assert only(c.apply(hint(first, finish={0: "stop"}), 0.0), RequestDone).finish_reasons == ["stop"]
    for plan in (second, msgspec.structs.replace(end, ends=[])):
        assert c.apply(hint(plan, {}), 0.0) == []
    c.check_integrity()


def test_cancel_of_a_waiting_request_is_finished_by_the_scheduler():
    c = core(seqs=1)
    c.apply(arrive("a", 6, max_tokens=50), 0.0)
    c.apply(arrive("b", 6, arrived=1.0), 0.0)
    c.plan(0.0)
    final = only(c.apply(Cancel("b"), 0.0), FinishChoice)
    assert (final.placement, final.cursor, final.reason) == (0, 0, "abort")
    assert c.apply(Cancel("b"), 0.0) == [], "once"


def test_choices_of_one_request_end_each_in_their_own_way_and_the_request_once():
    c = core(seqs=1)
    c.apply(arrive("r", 6, n=2, max_tokens=50), 0.0)
    sent = plans(c.plan(0.0))
    final = only(c.apply(Cancel("r"), 0.0), FinishChoice)
    assert final.choice == 1
    sent += plans(c.plan(0.0))
    assert c.apply(ChoiceEnded("r", 1), 0.0) == []
    effects = [e for plan in sent for e in c.apply(hint(plan, finish=dict(plan.ends)), 0.0)]
    assert only(effects, RequestDone).finish_reasons == ["abort", "abort"]


def test_a_deadline_ends_what_waits_and_what_runs():
    c = core(seqs=1)
    c.apply(arrive("a", 6, max_tokens=50, deadline=7.0), 0.0)
    c.apply(arrive("b", 6, arrived=1.0, deadline=5.0), 0.0)
    for plan in plans(c.plan(0.0)):
        c.apply(hint(plan), 0.0)
    final = only([e for e in c.plan(5.0) if isinstance(e, FinishChoice)], FinishChoice)
    assert (final.rid, final.reason) == ("b", "deadline")
    assert plans(c.plan(7.0))[0].ends == [(0, "deadline")]


def test_the_next_deadline_asks_for_a_wake():
    c = Core()
    for deadline in (7.0, 5.0):
        c.apply(arrive(deadline=deadline), 0.0)
    assert c.next_wake(0.0) == 5.0
    assert c.plan(5.0)
    assert c.next_wake(5.0) == 7.0


def test_an_end_refused_for_its_cursor_is_asked_for_again_at_the_true_one():
    c = core()
    c.apply(arrive("r", 300), 0.0)
    state = ChoiceState(array("i", [5]), 33, 2)
    assert (again := only(c.apply(Resynced("r", 0, state), 0.0), FinishChoice)).cursor == 33
    assert (again.placement, again.error_code) == (2, "context_length_exceeded")


# ------------------------------------------------------------------ hints that tell of trouble


def test_a_repeated_hint_changes_nothing():
    c = core()
    c.apply(arrive("r", 6, max_tokens=50), 0.0)
    first, second = plans(c.plan(0.0))
    c.apply(hint(first), 0.0)
    c.apply(hint(second), 0.0)
    c.apply(hint(first), 0.0)
    assert len(c._ledger.requests["r"].sequences[0].output) == 2


def test_one_hint_may_speak_for_several_steps():
    c = core()
    c.apply(arrive("r", 6, max_tokens=50), 0.0)
    _, second = plans(c.plan(0.0))
    assert c.apply(hint(second, {0: [5, 6]}), 0.0) == []
    sequence = c._ledger.requests["r"].sequences[0]
    assert (list(sequence.output), sequence.state) == ([5, 6], State.RUNNING)


def test_a_gap_in_the_hints_makes_the_core_read_the_journal():
    c = core()
    c.apply(arrive("r", 6, max_tokens=50), 0.0)
    _, second = plans(c.plan(0.0))
    effects = c.apply(hint(second, {0: [6]}), 0.0)  # the first token is missing
    assert only(effects, Resync) == Resync("r", 0)
    c.apply(Resynced("r", 0, ChoiceState(array("i", [5, 6]), 20, 1)), 0.0)
    new = plans(c.plan(0.0))[0].new[0]
    assert (list(unpack_ids(new.token_ids))[-2:], new.cursor, new.placement) == ([5, 6], 20, 2)


def test_a_stale_row_makes_the_core_read_the_journal_once_nothing_is_outstanding():
    c = core()
    c.apply(arrive("r", 6, max_tokens=50), 0.0)
    first, second = plans(c.plan(0.0))
    assert c.apply(hint(first, verdicts=STALE), 0.0) == []
    assert only(c.apply(hint(second, {}), 0.0), Resync).rid == "r"
    c.check_integrity()


def test_a_closed_row_means_that_the_choice_has_ended_elsewhere():
    c = core()
    c.apply(arrive("r", 6, max_tokens=50), 0.0)
    c.apply(arrive("s", 6, max_tokens=50), 0.0)
    first, second = plans(c.plan(0.0))
    assert only(c.apply(hint(first, verdicts=CLOSED + LANDED), 0.0), RequestDone).rid == "r"
    assert c.apply(hint(second, {1: [1]}), 0.0) == []
    assert c.stats().requests == 1
    c.check_integrity()


# ------------------------------------------------------------------ workers


def two_workers(**kwargs) -> Core:
    c = core(**kwargs)
    c.apply(serving("w1", 2, **kwargs), 0.0)
    return c


def test_sequences_spread_over_workers_and_follow_their_prefix():
    c = two_workers(seqs=8)
    c.apply(arrive("a", range(40), max_tokens=50), 0.0)
    c.apply(arrive("b", 40, max_tokens=50), 0.0)
    effects = c.plan(0.0)
    home = {new.rid: wid for wid in ("w0", "w1") for plan in plans(effects, wid) for new in plan.new}
    assert sorted(home.values()) == ["w0", "w1"]
    for wid in ("w0", "w1"):
        for plan in plans(effects, wid):
            c.apply(hint(plan, wid=wid), 0.0)
    c.apply(arrive("c", [*range(40), 1]), 0.0)
    effects = c.plan(0.0)
    assert [new.computed for plan in plans(effects, home["a"]) for new in plan.new] == [40]


def test_a_lost_worker_s_sequences_continue_at_their_journals_end_with_a_higher_placement():
    c = two_workers()
    c.apply(arrive("r", 6, max_tokens=50), 0.0)
    sent = plans(c.plan(0.0))
    c.apply(hint(sent[0]), 0.0)
    assert c.rids_in_flight("w0") == ["r"]
    assert c.sequences_on("w0") == [("r", 0)]
    journal = ChoiceState(array("i", [1, 8, 9]), 30, 1)
    assert c.apply(WorkerLost("w0", 1, {("r", 0): journal}), 0.0) == []
    new = plans(c.plan(0.0), "w1")[0].new[0]
    assert (list(unpack_ids(new.token_ids))[-3:], new.cursor, new.placement) == ([1, 8, 9], 30, 2)
    assert c.apply(hint(sent[1]), 0.0) == [], "its late hints are void"
    c.check_integrity()


def test_a_loss_that_does_not_tell_of_a_sequence_makes_the_core_ask():
    c = two_workers()
    c.apply(arrive("r", 6, max_tokens=50), 0.0)
    c.plan(0.0)
    assert only(c.apply(WorkerLost("w0", 1), 0.0), Resync).rid == "r"
    assert only(c.apply(Resynced("r", 0, ChoiceState(finish="stop")), 0.0), RequestDone).finish_reasons == ["stop"]


def test_an_end_that_its_worker_committed_before_its_death_is_an_end():
    c = core()
    c.apply(arrive("r", 6, max_tokens=50), 0.0)
    c.plan(0.0)
    states = {("r", 0): ChoiceState(array("i", [1]), 9, 1, "stop")}
    assert only(c.apply(WorkerLost("w0", 1, states), 0.0), RequestDone).finish_reasons == ["stop"]
    c.check_integrity()


def test_an_end_that_its_worker_took_to_the_grave_is_written_by_the_scheduler():
    c = core()
    c.apply(arrive("r", 6, max_tokens=50), 0.0)
    c.plan(0.0)
    c.apply(Cancel("r"), 0.0)
    c.plan(0.0)
    final = only(c.apply(WorkerLost("w0", 1, {("r", 0): ChoiceState(array("i", [1]), 9, 1)}), 0.0), FinishChoice)
    assert (final.reason, final.cursor, final.placement) == ("abort", 9, 1)


def test_a_draining_worker_s_sequences_move_and_it_may_leave():
    c = two_workers()
    c.apply(arrive("r", 6, max_tokens=50), 0.0)
    sent = plans(c.plan(0.0))
    assert c.apply(WorkerDraining("w0", 1), 0.0) == []
    assert plans(c.plan(0.0), "w1") == [], "not before its last planned step is hinted"
    effects = [e for plan in sent for e in c.apply(hint(plan), 0.0)]
    assert only(effects, ReleaseWorker) == ReleaseWorker("w0", 1)
    assert plans(c.plan(0.0), "w1")[0].new[0].placement == 2


def test_alone_a_draining_worker_finishes_what_it_has_and_takes_no_more():
    c = core()
    c.apply(arrive("r", 6, max_tokens=3), 0.0)
    for plan in plans(c.plan(0.0)):
        c.apply(hint(plan), 0.0)
    c.apply(WorkerDraining("w0", 1), 0.0)
    c.apply(arrive("late", 6), 0.0)
    (last,) = plans(c.plan(0.0))
    effects = c.apply(hint(last, finish={0: "length"}), 0.0)
    assert {type(e) for e in effects} == {RequestDone, ReleaseWorker}
    assert c.plan(0.0) == []
    assert c.stats().waiting == 1
    c.apply(serving("w1", 2), 0.0)
    assert plans(c.plan(0.0), "w1")[0].new[0].rid == "late"


def test_a_long_request_waits_for_the_worker_that_can_hold_it():
    c = core(model_len=32)
    c.apply(serving("big", 2, model_len=128), 0.0)
    c.apply(WorkerLost("big", 2), 0.0)
    c.apply(arrive("long", 60), 0.0)
    c.apply(arrive("short", 6, arrived=1.0), 0.0)
    assert [new.rid for plan in plans(c.plan(0.0)) for new in plan.new] == ["short"]
    c.check_integrity()
    c.apply(serving("big", 3, model_len=128), 0.0)
    assert [new.rid for plan in plans(c.plan(0.0), "big") for new in plan.new] == ["long"]


# ------------------------------------------------------------------ poison


def die(c: Core, gen: int, *rids: str) -> list:
    states = {(rid, 0): ChoiceState(placement=gen) for rid in rids}
    effects = c.apply(WorkerLost("w0", gen, states), 0.0)
    c.apply(serving(gen=gen + 1), 0.0)
    return effects


def test_after_two_deaths_a_sequence_runs_alone_and_a_death_alone_is_its_end():
    c = core()
    for rid in ("good", "bad"):
        c.apply(arrive(rid, 6, max_tokens=50), 0.0)
    for gen in (1, 2):
        assert len(plans(c.plan(0.0))[0].new) == 2, "after one death they rerun as before"
        assert die(c, gen, "good", "bad") == []
    (alone,) = plans(c.plan(0.0))
    assert [new.rid for new in alone.new] == ["good"]
    assert plans(c.plan(0.0)) == [], "nothing beside it, nothing behind it"
    c.apply(hint(alone), 0.0)
    (good,) = plans(c.plan(0.0))
    assert not good.new
    assert plans(c.plan(0.0)) == []
    c.apply(hint(good), 0.0)
    (alone,) = plans(c.plan(0.0))
    assert [new.rid for new in alone.new] == ["bad"]
    assert len(rows(alone)) == 1
    final = only(die(c, 3, "good", "bad"), FinishChoice)
    assert (final.rid, final.reason, final.error_code, final.dead) == ("bad", "error", "engine_failed", True)
    assert [new.rid for new in plans(c.plan(0.0))[0].new] == ["good"]
    c.check_integrity()


def test_a_worker_that_left_in_order_is_nobody_s_fault():
    c = core()
    c.apply(arrive("r", 6, max_tokens=50, attempts=1), 0.0)
    c.plan(0.0)
    c.apply(WorkerLost("w0", 1, {("r", 0): ChoiceState(placement=1)}, died=False), 0.0)
    c.apply(serving(gen=2), 0.0)
    assert len(plans(c.plan(0.0))) == 2, "not alone"


# ------------------------------------------------------------------ recovery and states


def test_a_recovered_request_goes_on_where_its_choices_stand():
    c = core()
    states = [
        ChoiceState(array("i", [5, 6]), 25, 3),
        ChoiceState(finish="stop"),
        ChoiceState(array("i", [1] * 4), 40, 1),
    ]
    effects = c.apply(arrive("r", range(6), n=3, max_tokens=4, choices=states), 0.0)
    assert (only(effects, FinishChoice).choice, only(effects, FinishChoice).reason) == (2, "length")
    (new,) = plans(c.plan(0.0))[0].new
    assert (new.choice, new.placement, new.cursor, list(unpack_ids(new.token_ids))) == (0, 4, 25, [*range(6), 5, 6])


def test_a_request_that_arrives_twice_is_one():
    c = core()
    event = arrive("r", 6)
    c.apply(event, 0.0)
    assert c.apply(event, 0.0) == []
    assert c.stats().waiting == 1


def test_an_illegal_transition_raises_and_changes_nothing():
    sequence = Request(arrive("r"), 1).sequences[0]
    with pytest.raises(IllegalTransition, match="waiting -> leaving"):
        sequence.move(State.LEAVING)
    assert sequence.state is State.WAITING


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
    assert capacity().pools[0].unit_tokens == 4
    assert pack_ids([1]) == b"\1\0\0\0"
