"""Limits of a tenant, reserved in the home slot: requests at once, requests and tokens per minute, over all slots."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from protocol.bus import HomeBus
from protocol.bus import home as home_module
from protocol.bus.base import job_fingerprint
from protocol.errors import BudgetSpent, InvalidRequest, Overloaded, Unavailable, Voided
from protocol.keys import HOME
from protocol.messages import CommitRow, Job, new_rid, pack_ids
from protocol.records import Accepted, Claim, Limits, TenantLimits
from scheduler.sweep import settle, sweep
from tests.bus import Bus
from tests.protocol.stage import Stage, frame

OTHER = "test/other"


class Door:
    """Requests that are accepted under reservations, and the leader's half of the bookkeeping."""

    def __init__(self, stage: Stage, home: HomeBus) -> None:
        self.stage = stage
        self.home = home
        self.settled = 0

    async def accept(self, tenant: TenantLimits | None, job: Job | None = None, **options: Any) -> Accepted:
        options = {"rid": new_rid(), "bus": self.stage.bus, **options}
        return await self.home.accept(options.pop("bus"), job or Job(prompt="x"), tenant_limits=tenant, **options)

    async def running(self, limits: TenantLimits | None, **options: Any) -> str:
        rid = (await self.accept(limits, **options)).rid
        assert await self.stage.admit(rid) == ("new", rid)
        await self.stage.place(rid)
        return rid

    async def end(self, rid: str, cursor: int = 0) -> None:
        assert await self.stage.commit(CommitRow(rid, 0, 1, cursor, frame(7, finish="stop"), "stop")) == "l"

    async def settle(self) -> None:
        stage = self.stage
        self.settled = await settle(self.home, stage.bus, stage.bus.keys.model, stage.epoch, self.settled)

    def held(self, tenant: str = "default") -> set[str]:
        return {rid.decode() for rid in self.stage.raw.hkeys(f"{HOME}run:{tenant}")}

    def left(self, bucket: str = "tokens", tenant: str = "default") -> float:
        return float(self.stage.raw.hget(f"{HOME}t:{tenant}", bucket))


@pytest.fixture
async def door(stage: Stage, redis_url: str) -> AsyncIterator[Door]:
    home = HomeBus(redis_url, patience=5.0)
    yield Door(stage, home)
    await home.close()


@pytest.fixture
async def other(redis_url: str, stage: Stage) -> AsyncIterator[Bus]:
    """Another model's slot."""
    bus = Bus(redis_url, OTHER, patience=5.0)
    yield bus
    await bus.close()


async def test_requests_at_once_are_those_that_have_not_ended_in_any_slot(door: Door, other: Bus) -> None:
    """Detached or read, from whichever gateway: a request counts from accept to its end."""
    one = TenantLimits(concurrent=1)
    rid = await door.running(one)
    for limits in (one, None):  # a client of the queue is held to what the gateway told last
        for bus in (door.stage.bus, other):
            with pytest.raises(Overloaded, match="at once"):
                await door.accept(limits, bus=bus)
    await door.accept(one, Job(prompt="x", tenant="another"))
    await door.end(rid)
    await door.settle()
    assert door.held() == set()
    await door.accept(one, bus=other)


async def test_a_request_that_has_just_ended_makes_room_before_its_leader_settles(door: Door, other: Bus) -> None:
    one = TenantLimits(concurrent=1)
    rid = await door.running(one)
    await door.end(rid)
    second = (await door.accept(one, bus=other)).rid
    assert door.held() == {second}
    await door.settle()  # the end of the first is no end of the second
    assert door.held() == {second}


async def test_a_repeated_accept_counts_once_and_a_joined_one_not_at_all(door: Door) -> None:
    limits = TenantLimits(concurrent=2, requests_per_minute=2)
    rid = (await door.accept(limits, idempotency="k")).rid
    await door.accept(limits, rid=rid, idempotency="k")
    assert (await door.accept(limits, idempotency="k")).joined
    claim = Claim("claim:default:k:m", "m", rid, job_fingerprint(Job(prompt="x")), mine=False)
    assert (await door.accept(limits, rid=rid, idempotency="k", claim=claim)).joined
    assert door.held() == {rid}
    assert door.left("requests") == pytest.approx(1, abs=0.5)


async def test_requests_per_minute(door: Door) -> None:
    limits = TenantLimits(requests_per_minute=2)
    for _ in range(2):
        await door.accept(limits)
    with pytest.raises(Overloaded, match="requests per minute") as refused:
        await door.accept(limits)
    assert 1 <= refused.value.retry_after <= 31
    await door.accept(TenantLimits())  # the limit was taken away


async def test_tokens_are_reserved_set_right_and_charged_once_for_each_row_that_lands(door: Door) -> None:
    stage = door.stage
    rid = (await door.accept(TenantLimits(tokens_per_minute=1000), prompt_tokens=500)).rid
    assert door.left() == pytest.approx(500, abs=20)
    await stage.admit(rid)  # three tokens, really
    await stage.admit(rid)  # its reply was lost
    assert stage.raw.hgetall(stage.key("owed")) == {b"default": b"-497", b"in:default": b"3"}
    await stage.place(rid)
    row = CommitRow(rid, 0, 1, 0, frame(1, "a"))
    assert await stage.commit(row) == "l"
    assert await stage.commit(row) == "l"  # a repeat
    assert await stage.commit(CommitRow(rid, 0, 9, 0, frame(1, "b"))) == "s"
    paid = {b"in:default": b"3", b"out:default": b"1"}
    assert stage.raw.hgetall(stage.key("owed")) == {b"default": b"-496", **paid}
    await door.end(rid, len(frame(1, "a")))
    paid = {b"in:default": b"3", b"out:default": b"2", f"end:{rid}".encode(): b"default"}
    assert stage.raw.hgetall(stage.key("owed")) == {b"default": b"-495", **paid}
    await door.settle()
    assert not stage.raw.exists(stage.key("owed"))
    assert door.left() == pytest.approx(995, abs=5)


async def test_a_batch_counts_once_however_often_and_late_it_is_told(door: Door) -> None:
    stage = door.stage
    rid = await door.running(TenantLimits(concurrent=5, tokens_per_minute=60), prompt_tokens=3)
    number, owed = await stage.bus.collect(stage.epoch, 0)
    assert dict(zip(owed[::2], owed[1::2], strict=True)) == {b"in:default": b"3"}
    await door.end(rid)
    number, owed = await stage.bus.collect(stage.epoch, number)
    told = dict(zip(owed[::2], owed[1::2], strict=True))
    assert told == {b"default": b"1", b"out:default": b"1", f"end:{rid}".encode(): b"default"}
    assert await stage.bus.collect(stage.epoch, 0) == (number, owed)  # a new leader's
    stage.raw.hset(f"{HOME}t:default", "tokens", "-1000")
    for _ in range(3):
        await door.home.settle(stage.bus.keys.model, number, owed)
    assert door.left() == pytest.approx(-1001, abs=0.9)
    assert await stage.bus.collect(stage.epoch, number) == (0, [])
    await door.home.settle(stage.bus.keys.model, number - 1, [b"default", b"500"])
    assert door.left() == pytest.approx(-1001, abs=2)


async def test_an_overdraft_is_paid_first(door: Door) -> None:
    limits = TenantLimits(tokens_per_minute=60)
    rid = await door.running(limits, prompt_tokens=3)
    door.stage.raw.hset(f"{HOME}t:default", "tokens", "-10")
    with pytest.raises(Overloaded, match="tokens per minute") as refused:
        await door.accept(limits, prompt_tokens=5)
    assert 13 <= refused.value.retry_after <= 17
    await door.end(rid)  # what runs goes on, whatever is left


async def test_what_was_never_computed_is_given_back(door: Door) -> None:
    rid = (await door.accept(TenantLimits(tokens_per_minute=100), prompt_tokens=50)).rid
    assert door.left() == pytest.approx(50, abs=2)
    await door.stage.admit_nothing(rid)
    await door.settle()
    assert door.left() == pytest.approx(100, abs=2)
    assert door.held() == set()


async def test_what_is_refused_in_its_slot_is_given_back(door: Door) -> None:
    limits = TenantLimits(concurrent=5, requests_per_minute=5, tokens_per_minute=100)
    with pytest.raises(Overloaded, match="too much work") as refused:
        await door.accept(limits, prompt_tokens=50, limits=Limits(requests=0))
    assert refused.value.left.requests == pytest.approx(4, abs=0.5)
    assert door.held() == set()
    assert door.left() == pytest.approx(100, abs=2)
    assert door.left("requests") == pytest.approx(5, abs=0.2)


async def test_a_prompt_beyond_the_minutes_tokens_can_never_be_accepted(door: Door) -> None:
    with pytest.raises(InvalidRequest, match="in a minute"):
        await door.accept(TenantLimits(tokens_per_minute=100), prompt_tokens=100)
    assert door.stage.entries("jobs") == []


async def test_a_reservation_without_a_request_is_given_back(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its maker died before accept: the rid is void from then on, however late that accept comes."""
    monkeypatch.setattr(home_module, "FIRST_LOOK_MS", 0)
    stage, rid, limits = door.stage, new_rid(), TenantLimits(concurrent=2, tokens_per_minute=100)
    model = stage.bus.keys.model
    running = await door.running(limits)
    await door.home.reserve("default", rid, model, 40, limits)
    assert await sweep(door.home, stage.bus, model) == 1
    assert door.held() == {running}
    assert door.left() == pytest.approx(100, abs=2)
    with pytest.raises(Voided):
        await stage.bus.accept(Job(prompt="x"), rid=rid, reserved=40)
    await door.end(running)
    assert await sweep(door.home, stage.bus, model) == 1
    assert door.held() == set()
    assert stage.raw.keys(f"{HOME}holds:*") == []


async def test_pushes_are_charged(door: Door) -> None:
    stage, job = door.stage, Job(prompt="x", tenant="a", id="p1")
    await door.accept(TenantLimits(concurrent=2, tokens_per_minute=100), Job(prompt="x", tenant="a"))
    await stage.bus.push(b"x")
    entry = (await stage.bus.read_jobs(stage.consumer, 100, 0))[-1].entry_id
    rid, prompts = "a" * 32, [pack_ids([1] * 20)]
    held = await door.home.reserve("a", rid, stage.bus.keys.model, 20)
    assert held.tokens == 20
    verdict = await stage.bus.admit(
        stage.epoch, entry, rid=rid, prompts=prompts, seed=1, job=job, reserved=held.tokens
    )  # fmt: skip
    assert verdict == ("new", rid)
    assert stage.field(rid, "charged") == "20"
    with pytest.raises(Overloaded, match="at once"):
        await door.accept(None, Job(prompt="x", tenant="a"))


PRICES = {"p:test/model": "2.0 10.0", "p:test/other": "1000000.0 0.0"}  # of a million tokens


async def test_money_is_one_sum_over_all_slots(door: Door, other: Bus) -> None:
    """What has landed is paid once, at the price of its model; what is reserved counts until then."""
    stage = door.stage
    assert stage.bus.keys.model == "test/model"
    await door.home.tell_terms({"b:default": "2.0", **PRICES})
    rid = await door.running(None)  # no limits: who has a budget is reserved all the same
    row = CommitRow(rid, 0, 1, 0, frame(1, "a"))
    assert await stage.commit(row) == "l"
    assert await stage.commit(row) == "l"
    await door.settle()
    assert await door.home.spent("default") == pytest.approx(3 * 2e-6 + 10e-6)
    await door.end(rid, len(frame(1, "a")))
    number, owed = await stage.bus.collect(stage.epoch, door.settled)
    for _ in range(3):
        await door.home.settle(stage.bus.keys.model, number, owed)
    assert await door.home.spent("default") == pytest.approx(3 * 2e-6 + 20e-6)
    assert not stage.raw.keys(f"{HOME}held:*")
    await door.accept(None, bus=other, prompt_tokens=1)
    assert await door.home.spent("default") < 1e-4  # not paid yet, but reserved
    dear = (await door.accept(None, bus=other, prompt_tokens=1)).rid
    for bus in (stage.bus, other):  # by every way in: a push has no limits of its own, nor has a client of the queue
        for limits in (None, TenantLimits()):
            with pytest.raises(BudgetSpent, match="for today is spent"):
                await door.accept(limits, bus=bus)
    await door.accept(None, Job(prompt="x", tenant="another"), bus=other, prompt_tokens=100)
    await door.home.give_back("default", dear)
    await door.accept(None, bus=other)


async def test_a_budget_that_leads_to_another_model_is_counted_and_refuses_nothing(door: Door) -> None:
    await door.home.tell_terms({"b:default": "-", **PRICES})
    await door.home.spend("default", 1e9)
    rid = await door.running(None)
    assert door.held() == {rid}
    assert await door.home.spent("default") == 1e9


async def test_terms_are_replaced_whole(door: Door) -> None:
    await door.home.tell_terms({"b:default": "0.0", **PRICES})
    with pytest.raises(BudgetSpent):
        await door.accept(TenantLimits())
    await door.home.tell_terms({"b:another": "0.0"})
    assert door.stage.raw.hgetall(f"{HOME}terms") == {b"b:another": b"0.0"}
    await door.accept(TenantLimits())
    await door.home.tell_terms({"b:default": "0.0"})
    with pytest.raises(BudgetSpent):  # though it had none a moment ago
        await door.home.accept(door.stage.bus, Job(prompt="x"), rid=new_rid(), tenant_limits=TenantLimits())
    await door.home.tell_terms({})
    assert not door.stage.raw.exists(f"{HOME}terms")


async def test_a_reply_that_is_lost_gives_nothing_back(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request may have been accepted."""

    async def lost(*_: object, **__: object) -> Accepted:
        raise Unavailable("no reply")

    monkeypatch.setattr(door.stage.bus, "accept", lost)
    with pytest.raises(Unavailable):
        await door.accept(TenantLimits(concurrent=1), rid="f" * 32)
    assert door.held() == {"f" * 32}


async def test_a_new_leader_makes_the_sets_true(stage: Stage) -> None:
    """What an older version ended without a word leaves them; what it admitted enters."""
    rid = await stage.accept()
    stage.raw.sadd(stage.bus.keys.running("default"), "gone")
    stage.raw.sadd(stage.bus.keys.running("left"), "gone too")
    stage.raw.sadd(stage.bus.keys.tenants, "left", "nobody")
    stage.raw.srem(stage.bus.keys.running("default"), rid)
    assert await stage.bus.recount(stage.epoch, [(rid, "default"), ("f" * 32, "default")]) == 3
    assert stage.raw.smembers(stage.bus.keys.running("default")) == {rid.encode()}
    assert stage.raw.smembers(stage.bus.keys.tenants) == {b"default"}
    assert await stage.bus.recount(stage.epoch, []) == 0
