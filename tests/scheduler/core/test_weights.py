"""A request that has begun goes on with the weights that it has begun with, or ends with an error that says so."""

from __future__ import annotations

from array import array

from scheduler.core.events import ChoiceState, FinishChoice, ReleaseWorker, WorkerDraining, WorkerLost
from scheduler.core.scheduler import Core, CoreConfig
from tests.factories import arrive, core, hint, only, plans, serving

GRACE_S = 60.0
JOURNAL = {("r", 0): ChoiceState(array("i", [1]), 10, 1)}


def begun_on_old(**kwargs) -> Core:
    """ "r" has a token from "w0", which has the old weights; "w1" has new ones. "r"'s next plans are not sent yet."""
    c = core(CoreConfig(max_num_batched_tokens=64, plans_ahead=1, weights_grace_s=GRACE_S), fingerprint="old", **kwargs)
    c.apply(arrive("r", 6, max_tokens=50), 0.0)
    c.apply(hint(plans(c.plan(0.0))[0]), 0.0)
    c.apply(serving("w1", 2, fingerprint="new"), 0.0)
    return c


def test_a_lost_worker_s_request_waits_for_its_weights_and_goes_on_with_them():
    c = begun_on_old()
    c.apply(WorkerLost("w0", 1, JOURNAL), 1.0)
    c.apply(arrive("another", 6), 1.0)
    effects = c.plan(1.0)
    assert [new.rid for new in plans(effects, "w1")[0].new] == ["another"], "what has not begun goes anywhere, past it"
    c.check_integrity()
    c.apply(serving("w2", 3, fingerprint="old"), 30.0)
    assert [new.rid for new in plans(c.plan(30.0), "w2")[0].new] == ["r"]
    c.check_integrity()


def test_others_overtake_it_on_workers_with_other_weights():
    c = core(CoreConfig(max_num_batched_tokens=64), fingerprint="old", seqs=1)
    c.apply(arrive("runs", 6, max_tokens=50), 0.0)
    c.plan(0.0)
    c.apply(serving("w1", 2, fingerprint="new", seqs=1), 0.0)
    for number in range(3):
        c.apply(arrive(f"begun {number}", 6, fingerprint="old", choices=[JOURNAL["r", 0]]), 0.0)
    c.apply(arrive("another", 6, arrived=1.0), 1.0)
    assert [new.rid for new in plans(c.plan(1.0), "w1")[0].new] == ["another"]
    assert c.stats().waiting == 3
    c.check_integrity()


def test_after_the_grace_it_ends_with_an_error_that_says_so():
    c = begun_on_old()
    c.apply(WorkerLost("w0", 1, JOURNAL), 1.0)
    assert plans(c.plan(1.0), "w1") == []
    c.apply(serving("w2", 3, fingerprint="newer"), 40.0)  # which does not begin the grace anew
    assert c.plan(40.0) == []
    assert c.next_wake(40.0) == 1.0 + GRACE_S
    end = only(c.plan(1.0 + GRACE_S), FinishChoice)
    assert (end.rid, end.reason, end.error_code, end.cursor) == ("r", "error", "weights_changed", 10)
    assert "weights" in (end.error_message or "")
    c.check_integrity()


def test_without_any_worker_it_waits_as_long_as_it_takes():
    c = begun_on_old()
    c.apply(WorkerLost("w1", 2), 1.0)
    c.apply(WorkerLost("w0", 1, JOURNAL), 1.0)
    assert c.plan(1e6) == []
    c.apply(serving("w3", 4, fingerprint="old"), 1e6)
    assert [new.rid for new in plans(c.plan(1e6), "w3")[0].new] == ["r"]


def test_a_draining_worker_keeps_what_no_other_may_go_on_with():
    c = begun_on_old()
    c.apply(WorkerDraining("w0", 1), 1.0)
    (plan,) = plans(c.plan(1.0))
    assert (plan.frees, len(plan.seats)) == ([], 2)
    effects = c.apply(hint(plan, finish={0: "stop"}), 1.0)
    assert only(effects, ReleaseWorker).wid == "w0"
    same = core(CoreConfig(plans_ahead=1), fingerprint="old")
    same.apply(arrive("r", 6, max_tokens=50), 0.0)
    same.apply(hint(plans(same.plan(0.0))[0]), 0.0)
    same.apply(serving("w1", 2, fingerprint="old"), 0.0)
    same.apply(WorkerDraining("w0", 1), 1.0)
    assert [new.rid for new in plans(same.plan(1.0), "w1")[0].new] == ["r"]


def test_a_new_leader_knows_from_the_record():
    for journaled, goes_to_the_new in ((JOURNAL["r", 0], False), (ChoiceState(placement=1), True)):
        c = core(fingerprint="new")
        c.apply(arrive("r", 6, max_tokens=50, fingerprint="old", choices=[journaled]), 0.0)
        assert bool(plans(c.plan(0.0))) == goes_to_the_new


def test_all_choices_of_a_request_run_with_the_same_weights():
    c = core(CoreConfig(plans_ahead=1), fingerprint="old", seqs=1)
    c.apply(serving("w1", 2, fingerprint="new", seqs=1), 0.0)
    c.apply(arrive("r", 6, max_tokens=50, n=2), 0.0)
    effects = c.plan(0.0)
    assert len(plans(effects, "w0")) + len(plans(effects, "w1")) == 1


def test_older_workers_do_not_tell_and_are_trusted():
    c = core(CoreConfig(plans_ahead=1), fingerprint="")
    c.apply(arrive("r", 6, max_tokens=50), 0.0)
    c.apply(hint(plans(c.plan(0.0))[0]), 0.0)
    c.apply(serving("w1", 2, fingerprint="new"), 0.0)
    c.apply(WorkerDraining("w0", 1), 0.0)
    assert [new.rid for new in plans(c.plan(0.0), "w1")[0].new] == ["r"]
