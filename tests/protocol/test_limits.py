"""Limits of a tenant, kept by the scripts: requests at once, requests and tokens per minute, over all gateways."""

from __future__ import annotations

import pytest

from protocol.errors import InvalidRequest, Overloaded
from protocol.messages import CommitRow, Job, pack_ids
from protocol.records import TenantLimits
from tests.protocol.stage import Stage, frame


def running(stage: Stage, tenant: str = "default") -> set[bytes]:
    return stage.raw.smembers(stage.bus.keys.running(tenant))


def left(stage: Stage, bucket: str = "tokens", tenant: str = "default") -> float:
    return float(stage.raw.hget(stage.bus.keys.limits(tenant), bucket))


async def end(stage: Stage, rid: str, cursor: int = 0) -> None:
    assert await stage.commit(CommitRow(rid, 0, 1, cursor, frame(7, finish="stop"), "stop")) == "l"


async def test_requests_at_once_are_those_that_have_not_ended(stage: Stage) -> None:
    """Detached or read, from whichever gateway: a request counts from accept to its end."""
    one = TenantLimits(concurrent=1)
    rid = await stage.running(tenant_limits=one)
    for limits in (one, None):  # a client of the queue is held to what the gateway told last
        with pytest.raises(Overloaded, match="at once"):
            await stage.accept(tenant_limits=limits)
    await stage.accept(Job(prompt="x", tenant="other"), tenant_limits=one)
    await end(stage, rid)
    assert running(stage) == set()
    await stage.accept(tenant_limits=one)


async def test_a_repeated_accept_counts_once_and_a_joined_one_not_at_all(stage: Stage) -> None:
    limits = TenantLimits(concurrent=2, requests_per_minute=2)
    rid = await stage.accept(tenant_limits=limits, idempotency="k")
    await stage.bus.accept(Job(prompt="x"), rid=rid, idempotency="k", tenant_limits=limits)
    assert (await stage.bus.accept(Job(prompt="x"), rid="f" * 32, idempotency="k", tenant_limits=limits)).joined
    assert running(stage) == {rid.encode()}
    assert left(stage, "requests") == pytest.approx(1, abs=0.5)


async def test_requests_per_minute(stage: Stage) -> None:
    limits = TenantLimits(requests_per_minute=2)
    for _ in range(2):
        await stage.accept(tenant_limits=limits)
    with pytest.raises(Overloaded, match="requests per minute") as refused:
        await stage.accept(tenant_limits=limits)
    assert 1 <= refused.value.retry_after <= 31
    await stage.accept(tenant_limits=TenantLimits())  # the limit was taken away


async def test_tokens_are_reserved_set_right_and_charged_once_for_each_row_that_lands(stage: Stage) -> None:
    limits = TenantLimits(tokens_per_minute=100_000)
    rid = await stage.accept(tenant_limits=limits, prompt_tokens=500)
    assert left(stage) == 99_500
    await stage.admit(rid)  # three tokens, really
    assert left(stage) == 99_997
    await stage.admit(rid)  # its reply was lost
    assert left(stage) == 99_997
    await stage.place(rid)
    row = CommitRow(rid, 0, 1, 0, frame(1, "a"))
    assert await stage.commit(row) == "l"
    assert await stage.commit(row) == "l"  # a repeat
    assert await stage.commit(CommitRow(rid, 0, 9, 0, frame(1, "b"))) == "s"
    assert left(stage) == 99_996
    await end(stage, rid, len(frame(1, "a")))
    assert left(stage) == 99_995


async def test_an_overdraft_is_paid_first(stage: Stage) -> None:
    limits = TenantLimits(tokens_per_minute=60)
    rid = await stage.running(tenant_limits=limits, prompt_tokens=3)
    stage.raw.hset(stage.bus.keys.limits("default"), "tokens", "-10")
    with pytest.raises(Overloaded, match="tokens per minute") as refused:
        await stage.accept(tenant_limits=limits, prompt_tokens=5)
    assert 13 <= refused.value.retry_after <= 17
    await end(stage, rid)  # what runs goes on, whatever is left
    assert left(stage) < -10


async def test_what_was_never_computed_is_given_back(stage: Stage) -> None:
    rid = await stage.accept(tenant_limits=TenantLimits(tokens_per_minute=100), prompt_tokens=50)
    assert left(stage) == 50
    await stage.admit_nothing(rid)
    assert left(stage) == 100
    assert running(stage) == set()


async def test_a_prompt_beyond_the_minutes_tokens_can_never_be_accepted(stage: Stage) -> None:
    with pytest.raises(InvalidRequest, match="in a minute"):
        await stage.accept(tenant_limits=TenantLimits(tokens_per_minute=100), prompt_tokens=100)
    assert stage.entries("jobs") == []


async def test_pushes_are_charged_and_wait_in_the_inbox(stage: Stage) -> None:
    await stage.accept(Job(prompt="x", tenant="a"), tenant_limits=TenantLimits(concurrent=2, tokens_per_minute=100))
    job = Job(prompt="x", tenant="a", id="p1")
    await stage.bus.push(b"x")
    entry = (await stage.bus.read_jobs(stage.consumer, 100, 0))[-1].entry_id

    async def admit() -> tuple[str, str]:
        return await stage.bus.admit(stage.epoch, entry, rid="a" * 32, prompts=[pack_ids([1] * 20)], seed=1, job=job)

    stage.raw.hset(stage.bus.keys.limits("a"), "tokens", "-10")
    verdict, wait_ms = await admit()
    assert verdict == "wait"
    assert 15_000 <= int(wait_ms) <= 19_000
    assert entry.encode() in {entry_id for entry_id, _ in stage.raw.xrange(stage.bus.keys.jobs)}
    stage.raw.hset(stage.bus.keys.limits("a"), "tokens", "60")
    assert await admit() == ("new", "a" * 32)
    assert left(stage, tenant="a") == pytest.approx(40, abs=5)
    assert len(running(stage, "a")) == 2
    with pytest.raises(Overloaded, match="at once"):
        await stage.accept(Job(prompt="x", tenant="a"))


async def test_a_new_leader_makes_the_sets_true(stage: Stage) -> None:
    """What an older version ended without a word leaves them; what it admitted enters."""
    rid = await stage.accept()
    stage.raw.sadd(stage.bus.keys.running("default"), "gone")
    stage.raw.sadd(stage.bus.keys.running("left"), "gone too")
    stage.raw.sadd(stage.bus.keys.tenants, "left", "nobody")
    stage.raw.srem(stage.bus.keys.running("default"), rid)
    assert await stage.bus.recount(stage.epoch, [(rid, "default"), ("f" * 32, "default")]) == 3
    assert running(stage) == {rid.encode()}
    assert stage.raw.smembers(stage.bus.keys.tenants) == {b"default"}
    assert await stage.bus.recount(stage.epoch, []) == 0
