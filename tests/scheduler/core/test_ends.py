"""How sequences end, what hints may tell, and where recovered requests go on."""

from __future__ import annotations

from array import array

import msgspec
import pytest

from protocol.messages import CLOSED, LANDED, STALE, unpack_ids
from scheduler.core.events import (
    Cancel,
    ChoiceEnded,
    ChoiceState,
    FinishChoice,
    RequestDone,
    Resync,
    Resynced,
)
from scheduler.core.scheduler import Core
from scheduler.core.sequence import IllegalTransition, Request, State
from tests.factories import arrive, core, hint, only, plans, rows

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
    assert len(c._lifecycle.requests["r"].sequences[0].output) == 2


def test_one_hint_may_speak_for_several_steps():
    c = core()
    c.apply(arrive("r", 6, max_tokens=50), 0.0)
    _, second = plans(c.plan(0.0))
    assert c.apply(hint(second, {0: [5, 6]}), 0.0) == []
    sequence = c._lifecycle.requests["r"].sequences[0]
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
