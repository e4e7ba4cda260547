"""The bus as the services use it: one request's life, step by step, on a real server."""

from __future__ import annotations

import asyncio

import pytest

from protocol import messages
from protocol.errors import Conflict, Fenced, NotFound, Overloaded, StoreFailed
from protocol.messages import (
    Capacity,
    CommitRow,
    Frame,
    Hint,
    HintRow,
    Job,
    NewSequence,
    Plan,
    PoolCapacity,
    Terminal,
    pack_ids,
)
from protocol.records import Limits
from protocol.sampling import SamplingParams
from tests.bus import Bus
from tests.conftest import leaked_keys

CAPACITY = Capacity("test/model", 256, 8, 512, [PoolCapacity("full", 16, 64)], 1000)


async def leader(bus: Bus) -> int:
    epoch = await bus.lead("me", await bus.read_leader())
    assert epoch is not None
    return epoch


def frame(token: int | None, text: str, finish: str | None = None) -> bytes:
    return messages.encode(Frame(token, text, finish))


async def test_one_request_from_accept_to_end(bus: Bus, raw) -> None:
    epoch = await leader(bus)
    subscription = bus.subscribe("gw0")
    await subscription.start()
    job = Job(prompt="hello", sampling=SamplingParams(max_tokens=2), results="res", id="mine")
    rid = messages.new_rid()
    accepted = await bus.accept(job, rid=rid, reply_to="gw0")
    assert accepted.rid == rid
    assert not accepted.joined

    (entry,) = await bus.read_jobs("term-1", 10, 100)
    assert entry.rid == rid
    verdict = await bus.admit(epoch, entry.entry_id, rid=rid, prompts=[pack_ids([1, 2, 3])], seed=7, producer_id="mine")
    assert verdict == ("new", rid)
    assert await bus.inbox_length() == 0
    record = await bus.read_request(rid)
    assert record is not None
    assert (record.seed, record.prompts, record.open, record.placements) == (7, [pack_ids([1, 2, 3])], 1, [0])
    assert record.job == job

    gen = await bus.register("w0", CAPACITY, "serving")
    (worker,) = await bus.list_workers()
    assert (worker.wid, worker.gen, worker.state, worker.capacity) == ("w0", gen, "serving", CAPACITY)
    new = NewSequence(0, rid, 0, 1, pack_ids([1, 2, 3]), 3, job.sampling, 7, 0, pack_ids([5]), 0)
    await bus.plan(epoch, "w0", gen, Plan(epoch, gen, 1, new=[new]))
    ((plan_id, plan),) = await bus.read_plans("w0", "0-0", 100)
    assert plan.new == [new]

    first, last = frame(11, "a"), frame(12, "b", "stop")
    hint = Hint("w0", gen, 1, [HintRow(0, pack_ids([11]), len(first))])
    row = CommitRow(rid, 0, 1, 0, first, id="mine")
    assert await bus.commit("w0", epoch, gen, [row], hint, executed=plan_id) == "l"
    result = messages.encode(Terminal(rid=rid, id="mine", finish_reason="stop", text="ab"))
    row = CommitRow(rid, 0, 1, len(first), last, "stop", result, "mine")
    assert await bus.commit("w0", epoch, gen, [row], Hint("w0", gen, 2, [])) == "l"
    assert await bus.read_plans("w0", "0-0", 0) == []

    kinds = [(e.kind, e.hint and e.hint.step) for e in await bus.read_events("0-0", 10, 0)]
    assert kinds == [("worker", None), ("hint", 1), ("hint", 2)]
    assert await bus.read_journal(rid, 0) == first + last
    ((_, terminal),) = await bus.read_results("res")
    assert terminal.text == "ab"
    record = await bus.read_request(rid)
    assert record is not None
    assert (record.open, record.ends) == (0, ["stop"])
    assert await bus.scan_live() == {}
    assert leaked_keys(raw) == []

    rows = []
    async for got in subscription:
        rows += got
        if len(rows) == 3:
            break
    assert [(r.rid, r.choice, r.cursor, r.id) for r in rows] == [
        (rid, -1, 0, "mine"),
        (rid, 0, 0, "mine"),
        (rid, 0, len(first), "mine"),
    ]
    assert rows[2].frames == last
    await subscription.close()


async def test_fences(bus: Bus) -> None:
    epoch = await leader(bus)
    gen = await bus.register("w0", CAPACITY, "serving")
    with pytest.raises(Fenced) as caught:
        await bus.commit("w0", epoch + 1, gen, [], Hint("w0", gen, 1))
    assert caught.value.cause == "epoch"
    with pytest.raises(Fenced) as caught:
        await bus.commit("w0", epoch, gen + 1, [], Hint("w0", gen, 1))
    assert caught.value.cause == "gen"


async def test_accept_limits_joins_and_conflicts(bus: Bus) -> None:
    job = Job(prompt="x")
    first = await bus.accept(job, rid=messages.new_rid(), idempotency="k", reply_to="a")
    again = await bus.accept(job, rid=messages.new_rid(), idempotency="k", reply_to="b")
    assert (again.rid, again.joined, again.attached) == (first.rid, True, 1)
    assert await bus.scan_live() == {first.rid: ["a", "b"]}
    with pytest.raises(Conflict):
        await bus.accept(Job(prompt="y"), rid=messages.new_rid(), idempotency="k")
    with pytest.raises(Overloaded) as caught:
        await bus.accept(job, rid=messages.new_rid(), limits=Limits(requests=1))
    assert 1 <= caught.value.retry_after <= 60
    with pytest.raises(NotFound):
        await bus.cancel(first.rid, "somebody-else")
    assert not await bus.cancel(first.rid, "default", attached=0)
    assert await bus.cancel(first.rid, "default", attached=1)


async def test_a_subscription_that_is_cut_tells_so(bus: Bus, raw) -> None:
    subscription = bus.subscribe("gw0")
    await subscription.start()
    stream = aiter(subscription)
    waiting = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)  # the reader waits now
    assert raw.execute_command("CLIENT", "KILL", "TYPE", "pubsub") == 1
    assert await asyncio.wait_for(waiting, 10) == []
    await subscription.close()


async def test_an_inbox_whose_ids_are_used_up_is_made_anew(bus: Bus, raw) -> None:
    """A producer may choose the id of its entry, also the last that there is: nothing can be added after it."""
    epoch = await leader(bus)
    raw.xadd(bus.keys.jobs, {"job": "x"}, id=f"{2**64 - 1}-{2**64 - 1}")
    job, rid = Job(prompt="hello", sampling=SamplingParams(max_tokens=2)), messages.new_rid()
    for _ in range(2):  # not accepted, also where it is repeated
        with pytest.raises(StoreFailed):
            await bus.accept(job, rid=rid)
    assert await bus.scan_live() == {}
    [entry] = await bus.read_jobs("me", 8, 0)
    await bus.trim_events("0-0", epoch=epoch)
    assert await bus.inbox_length() == 1  # it stays until it was taken
    await bus.reject(epoch, entry.entry_id, payload_hash="", error={"code": "invalid_request", "message": "no"})
    await bus.trim_events("0-0", epoch=epoch)
    assert (await bus.accept(job, rid=rid)).rid == rid
    [entry] = await bus.read_jobs("me", 8, 0)
    assert entry.rid == rid
