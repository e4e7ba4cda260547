from __future__ import annotations

import itertools
import random
from typing import Any

from scheduler.core.sequence import Request, Sequence
from scheduler.core.waiting import WaitingQueue
from tests.factories import arrive

LEVELS = {"interactive": 0, "standard": 1, "batch": 2}


class Line:
    """A queue, and names for what is in it."""

    def __init__(self, **kwargs: Any) -> None:
        self.queue = WaitingQueue(**kwargs)

    def add(self, rid: str, priority: str = "standard", tenant: str = "t", arrived: float = 0.0, prompt: int = 10):
        event = arrive(rid, prompt, priority=priority, tenant=tenant, arrived=arrived)
        sequence = Request(event, LEVELS[priority]).sequences[0]
        self.queue.enter(tenant)
        self.queue.push(sequence, arrived)
        return sequence

    def next(self) -> Sequence:
        sequence = self.queue.head()
        assert sequence is not None
        self.queue.remove(sequence)
        return sequence

    def names(self) -> list[str]:
        taken = []
        while self.queue.head() is not None:
            taken.append(self.next().request.rid)
        return taken


def test_class_before_share_before_arrival():
    line = Line()
    line.add("batch", "batch", arrived=0)
    line.add("second", arrived=2)
    line.add("first", arrived=1)
    line.add("urgent", "interactive", arrived=3)
    assert line.names() == ["urgent", "first", "second", "batch"]


def test_the_tenant_that_was_served_least_goes_next():
    line = Line()
    for k in range(3):
        line.add(f"a{k}", tenant="a", arrived=k)
        line.add(f"b{k}", tenant="b", arrived=10 + k)
    served = []
    for _ in range(6):
        sequence = line.next()
        served.append(sequence.request.rid)
        line.queue.charge(sequence.request.tenant, 100)
    assert served == ["a0", "b0", "a1", "b1", "a2", "b2"]


def test_shares_follow_the_weights():
    line = Line(weights={"a": 3.0})
    for k in range(40):
        line.add(f"a{k}", tenant="a", arrived=k)
        line.add(f"b{k}", tenant="b", arrived=k)
    served = {"a": 0, "b": 0}
    for _ in range(40):
        tenant = line.next().request.tenant
        served[tenant] += 1
        line.queue.charge(tenant, 10)
    assert served == {"a": 30, "b": 10}


def test_nobody_saves_up_a_claim_by_staying_away():
    line = Line()
    line.add("a0", tenant="a")
    line.queue.charge("a", 1000)
    line.add("b0", tenant="b", arrived=1)
    line.add("a1", tenant="a", arrived=0.5)
    assert line.next().request.rid == "a0", "b starts where a stands, so arrival decides"


def test_a_tenant_does_not_lose_its_debt_by_leaving():
    line = Line()
    line.add("b0", tenant="b")
    line.add("a0", tenant="a")
    line.queue.charge("a", 1000)
    a0 = line.queue.head()
    line.queue.remove(next(s for s in line.queue if s.request.rid == "a0"))
    line.queue.leave("a")
    line.add("a1", tenant="a", arrived=0.0)
    line.add("b1", tenant="b", arrived=5.0)
    assert a0 is not None
    assert line.names() == ["b0", "b1", "a1"]


def test_waiting_raises_a_class_and_at_last_only_arrival_counts():
    line = Line(aging_s=10)
    line.add("old", "batch", tenant="greedy", arrived=0)
    line.queue.charge("greedy", 1e9)
    line.add("young", "interactive", arrived=11)
    line.queue.age(11)
    assert line.queue.head().request.rid == "young"
    line.queue.age(25)
    line.add("younger", "interactive", arrived=25)
    line.queue.age(30.5)
    assert line.queue.head().request.rid == "old"
    assert line.names() == ["old", "young", "younger"]


def test_what_is_put_back_has_its_old_place():
    line = Line()
    line.add("first", arrived=1)
    line.add("second", arrived=2)
    first = line.next()
    line.queue.push(first, 50.0)
    assert line.names() == ["first", "second"]


def test_waiting_requests_and_tokens_are_counted_per_tenant():
    line = Line()
    line.add("a", tenant="a", prompt=10)
    line.add("b", tenant="b", prompt=5)
    event = arrive("c", 7, n=3, tenant="b")
    request = Request(event, 1)
    for sequence in request.sequences:
        line.queue.enter("b")
        line.queue.push(sequence, 0.0)
    assert line.queue.waiting == {"a": [1, 10], "b": [2, 26]}
    line.queue.check_integrity()
    line.queue.remove(request.sequences[1])
    assert line.queue.waiting["b"] == [2, 19]
    line.names()
    assert line.queue.waiting == {}
    assert line.queue.sequences == 0


def test_order_holds_for_ten_thousand_in_any_order():
    """Against a plain sort: one class, one tenant each, so arrival alone decides; a third is cancelled midway."""
    rng = random.Random(5)
    line = Line()
    arrivals = list(range(10000))
    rng.shuffle(arrivals)
    sequences = [line.add(str(at), arrived=at) for at in arrivals]
    gone = set()
    for sequence in itertools.islice(sequences, 0, None, 3):
        line.queue.remove(sequence)
        gone.add(sequence.request.rid)
    assert line.names() == [str(at) for at in range(10000) if str(at) not in gone]


def test_the_oldest_is_found_over_tenants_classes_and_aged_entries():
    line = Line(aging_s=10.0)
    assert line.queue.oldest() is None
    old = line.add("old", "batch", tenant="a", arrived=1.0)
    line.add("young", "interactive", tenant="b", arrived=5.0)
    assert line.queue.oldest() == 1.0
    line.queue.age(25.0)  # leaves stale entries in the levels below
    assert line.queue.oldest() == 1.0
    line.queue.remove(old)
    assert line.queue.oldest() == 5.0
    assert line.names() == ["young"]
    assert line.queue.oldest() is None


def shares_over_shards(weights: dict[str, float], demand: list[tuple[str, ...]], seconds: int) -> dict[str, int]:
    """What tenants get of shards that tell each other once a second. ``demand``: who always wants something, by shard;
    each serves four requests of a hundred tokens a second, and always has eight of each waiting."""
    lines = [Line(weights=weights) for _ in demand]
    served: dict[str, int] = {}
    names = itertools.count()
    for line, tenants in zip(lines, demand, strict=True):
        for tenant in tenants * 8:
            line.add(str(next(names)), tenant=tenant)
    for _ in range(seconds):
        for line in lines:
            for _ in range(4):
                tenant = line.next().request.tenant
                line.add(str(next(names)), tenant=tenant)
                line.queue.leave(tenant)
                line.queue.charge(tenant, 100)
                served[tenant] = served.get(tenant, 0) + 100
        charged = [line.queue.take_charged() for line in lines]
        for line, own in zip(lines, charged, strict=True):
            others = [other for other in charged if other is not own]
            sums = {tenant: sum(other.get(tenant, 0.0) for other in others) for other in others for tenant in other}
            line.queue.charge_elsewhere(sums, 10 * sum(own.values()))
    return served


def test_shares_hold_over_all_shards_also_where_one_tenant_floods_one_of_them():
    got = shares_over_shards({}, [("a", "b"), ("a",)], seconds=60)
    assert abs(got["a"] - got["b"]) < 0.1 * got["b"], "a has the other shard to itself, so b gets this one"
    got = shares_over_shards({"a": 3.0}, [("a", "b"), ("a",)], seconds=60)
    assert abs(got["a"] / 3 - got["b"]) < 0.1 * got["b"], "a shares this one too, for its weight"
    got = shares_over_shards({}, [("a", "b"), ("a", "b"), ("b", "c"), ("c",)], seconds=60)
    third = sum(got.values()) / 3
    assert all(abs(tokens - third) < 0.1 * third for tokens in got.values())


def test_nobody_waits_long_for_having_been_served_where_nobody_else_was():
    line = Line()
    for k in range(300):
        line.add(f"a{k}", tenant="a", arrived=k)
        line.add(f"b{k}", tenant="b", arrived=k)
    for _ in range(100):
        line.queue.charge_elsewhere({"a": 100_000.0}, 1000.0)
    served = []
    for _ in range(30):
        served.append(line.next().request.tenant)
        line.queue.charge(served[-1], 100)
    assert served.index("a") == 10
    assert served.count("a") == 10
