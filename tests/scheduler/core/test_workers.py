"""Workers that join, drain and die, and requests that kill them."""

from __future__ import annotations

import dataclasses
from array import array

import msgspec

from protocol.messages import unpack_ids
from protocol.structures.structure import Structure
from scheduler.core.events import (
    Cancel,
    ChoiceState,
    FinishChoice,
    ReleaseWorker,
    RequestDone,
    Resync,
    Resynced,
    WorkerDraining,
    WorkerLost,
)
from scheduler.core.scheduler import Core
from tests.factories import arrive, core, hint, only, plans, rows, serving

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


def test_a_sequence_waits_for_a_worker_whose_version_can_read_it():
    """As in an update under load: the older worker takes what it can read, the rest waits for a newer one."""
    c = core(level=0)
    structured = arrive("s")
    sampling = msgspec.structs.replace(structured.sampling, structure=Structure(regex="a+"))
    c.apply(dataclasses.replace(structured, sampling=sampling), 0.0)
    c.apply(arrive("plain"), 0.0)
    (first, *_) = plans(c.plan(0.0))
    assert [new.rid for new in first.new] == ["plain"]
    c.apply(serving("w1", 2), 1.0)
    (other, *_) = plans(c.plan(1.0), "w1")
    assert "s" in [new.rid for new in other.new]
