"""The order of admission: fair between tenants by bytes, short before long, bounded, and never forgotten. Pure."""

from __future__ import annotations

import random
from collections import Counter

from scheduler.admission import MOST_TENANTS, Admission, FairQueue, Ticket

KIB = 1 << 10
SHORT = 16 * KIB


def admission(short: int = 4, long: int = 2, tenant_bytes: int = 1 << 30, **weights: float) -> Admission:
    return Admission(FairQueue(short, tenant_bytes, weights), FairQueue(long, tenant_bytes, weights), SHORT, 2)


def ticket(name: str, tenant: str = "a", size: int = KIB, deadline_ms: int = 0) -> Ticket:
    return Ticket(name, name, tenant, size, deadline_ms)


def drain(queue: Admission) -> list[str]:
    """The whole order, one at a time."""
    order = []
    while (given := queue.next()) is not None:
        order.append(given.entry_id)
        queue.done(given)
    return order


def test_one_tenants_jobs_of_one_length_go_in_the_order_of_their_coming() -> None:
    queue = admission()
    for k in range(9):
        queue.add(ticket(str(k)), now=0.0)
    assert drain(queue) == [str(k) for k in range(9)]
    assert len(queue) == 0


def test_a_flood_stands_before_nobody_elses_jobs() -> None:
    queue = admission(long=1)
    for k in range(200):
        queue.add(ticket(f"flood-{k}", "flooder", 1024 * KIB), now=0.0)
    working = queue.next()
    assert working is not None
    queue.add(ticket("mine", "other", 100 * KIB), now=1.0)
    assert queue.next() is None  # no place is free
    queue.done(working)
    turn = queue.next()
    assert turn is not None
    assert turn.entry_id == "mine"


def test_tenants_share_by_bytes_and_by_weight() -> None:
    queue = admission(heavy=2.0)
    for k in range(400):
        queue.add(ticket(f"h{k}", "heavy", 4 * KIB), now=0.0)
        queue.add(ticket(f"l{k}", "light", 4 * KIB), now=0.0)
        queue.add(ticket(f"b{k}", "big", 16 * KIB), now=0.0)
    served: Counter[str] = Counter()
    for _ in range(300):
        given = queue.next()
        assert given is not None
        served[given.tenant] += given.size
        queue.done(given)
    assert abs(served["heavy"] - 2 * served["light"]) <= 32 * KIB
    assert abs(served["big"] - served["light"]) <= 32 * KIB


def test_a_tenant_that_comes_back_has_saved_nothing_up() -> None:
    queue = admission()
    for k in range(100):
        queue.add(ticket(f"a{k}", "a"), now=0.0)
    for _ in range(50):
        given = queue.next()
        assert given is not None
        queue.done(given)
    for k in range(50):
        queue.add(ticket(f"b{k}", "b"), now=1.0)
    first = [given.tenant for given in [queue.next(), queue.next(), queue.next(), queue.next()] if given]
    assert Counter(first) == {"a": 2, "b": 2}


def test_a_long_text_never_takes_the_place_of_a_short_one() -> None:
    queue = admission(short=4, long=2)
    for k in range(8):
        queue.add(ticket(f"long-{k}", size=1024 * KIB), now=0.0)
    assert [given.entry_id for _ in range(3) if (given := queue.next())] == ["long-0", "long-1"]
    queue.add(ticket("short"), now=9.0)
    given = queue.next()
    assert given is not None
    assert given.entry_id == "short"


def test_within_a_tenant_shorter_texts_go_first_and_longer_ones_age() -> None:
    queue = admission(long=1)
    queue.add(ticket("megabyte", size=1024 * KIB), now=0.0)
    queue.add(ticket("chapter", size=64 * KIB), now=5.0)
    queue.add(ticket("much later", size=64 * KIB), now=60.0)
    assert drain(queue) == ["chapter", "megabyte", "much later"]


def test_a_tenants_bytes_in_preparation_are_bounded_but_one_job_may_always_run() -> None:
    queue = admission(long=4, tenant_bytes=256 * KIB)
    for k in range(3):
        queue.add(ticket(f"large-{k}", "a", 1024 * KIB), now=0.0)
    queue.add(ticket("other", "b", 100 * KIB), now=0.0)
    given = [one for _ in range(4) if (one := queue.next())]
    assert sorted(one.entry_id for one in given) == ["large-0", "other"]
    queue.done(next(one for one in given if one.tenant == "a"))
    following = queue.next()
    assert following is not None
    assert following.entry_id == "large-1"


def test_what_is_cancelled_or_late_goes_before_all_and_once() -> None:
    queue = admission(long=1)
    for k in range(5):
        queue.add(ticket(f"long-{k}", size=1024 * KIB, deadline_ms=1000 if k == 3 else 0), now=0.0)
    assert queue.next() is not None
    assert queue.cancelled("long-4")
    assert not queue.cancelled("long-4")
    assert not queue.cancelled("nobody")
    assert not queue.late(999)
    assert queue.late(1000)
    given = [one for _ in range(5) if (one := queue.next())]
    assert [one.entry_id for one in given] == ["long-4", "long-3"]
    for one in given:
        queue.done(one)
    assert len(queue) == 2


def test_whatever_comes_every_ticket_is_given_once_and_every_place_comes_back() -> None:
    for seed in range(20):
        draw = random.Random(seed)
        queue = admission(short=3, long=2, tenant_bytes=64 * KIB)
        names = [str(k) for k in range(300)]
        waiting, running, seen = list(names), [], []
        while len(seen) < len(names) or running:
            match draw.randrange(4):
                case 0 if waiting:
                    size = draw.choice([0, 1, KIB, SHORT, SHORT + 1, 256 * KIB])
                    tenant = f"t{draw.randrange(40)}"
                    queue.add(ticket(waiting.pop(), tenant, size, draw.choice([0, 50])), now=draw.random())
                case 1 if (given := queue.next()) is not None:
                    running.append(given)
                    seen.append(given.entry_id)
                case 2 if running:
                    queue.done(running.pop(draw.randrange(len(running))))
                case 3:
                    queue.cancelled(draw.choice(names))
                    queue.late(draw.randrange(100))
        assert sorted(seen) == sorted(names)
        assert len(queue) == 0


def test_tenants_without_jobs_are_forgotten() -> None:
    queue = FairQueue(1, 1 << 20, {})
    for k in range(5000):
        queue.add(ticket(str(k), f"tenant-{k}"), now=0.0)
        given = queue.next()
        assert given is not None
        queue.done(given)
    assert len(queue._tenants) <= MOST_TENANTS


def push(name: str, tenant: str = "a", deadline_ms: int = 0) -> Ticket:
    return Ticket(name, None, tenant, KIB, deadline_ms)


def test_pushes_of_a_tenant_at_its_limit_wait_and_are_tried_one_after_the_other() -> None:
    queue = admission()
    for k in range(3):
        queue.add(push(str(k)), now=0.0)
    first = queue.next(0.0)
    assert first is not None
    queue.postpone(first, 0.0, wait_s=10.0)
    others = [one for _ in range(4) if (one := queue.next(1.0))]
    assert [one.entry_id for one in others] == ["1", "2"], "they were queued before; each meets the limit by itself"
    for one in reversed(others):
        queue.postpone(one, 1.0, wait_s=10.0)
    queue.add(push("later"), now=2.0)
    queue.add(ticket("accepted"), now=2.0)
    queue.add(push("other", "b"), now=2.0)
    given = [one.entry_id for _ in range(4) if (one := queue.next(5.0))]
    assert sorted(given) == ["accepted", "other"]
    assert len(queue) == 4
    order = []
    while (one := queue.next(20.0)) is not None:
        assert queue.next(20.0) is None, "one at a time shows whether there is room again"
        order.append(one.entry_id)
        queue.done(one)
    assert order == ["1", "2", "0", "later"]
    assert len(queue) == 0


def test_a_postponed_push_that_is_late_goes_at_once() -> None:
    queue = admission()
    queue.add(push("a", deadline_ms=500), now=0.0)
    given = queue.next(0.0)
    assert given is not None
    queue.postpone(given, 0.0, wait_s=1000.0)
    assert queue.next(1.0) is None
    assert queue.late(600)
    late = queue.next(1.0)
    assert late is not None
    assert late.entry_id == "a"
    queue.done(late)
    assert queue.next(2000.0) is None
