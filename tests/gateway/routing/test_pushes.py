"""What a producer pushes to an alias or a route runs once, on the model that the table chooses."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from gateway.routing.pushes import Pushes
from headrace import AsyncClient
from protocol.bus import VirtualBus
from protocol.errors import InvalidRequest
from protocol.messages import ModelCard, encode
from protocol.records import InboxEntry
from protocol.routing.table import Route, Routing, Rule, Tenant
from tests.bus import Bus
from tests.gateway.front import Front
from tests.gateway.routing.test_router import BIG, SMALL, state
from tests.waits import eventually

Open = Callable[..., Awaitable[Front]]
AUTO = Route(rules=[Rule(models=[BIG], words=["SQL"]), Rule(models=[SMALL])])
JOBS = "headrace:{auto}:jobs"


def job(id: str | None = None, prompt: str = "hi", **fields: Any) -> dict[str, Any]:
    given = {"id": id} if id else {}
    return {"v": 1, "prompt": prompt, "sampling": {"max_tokens": 3}, "results": "mine", **given, **fields}


@pytest.fixture
async def inboxes(redis_url: str, raw: Any) -> Any:
    """The pushes that each of two models has got; nothing serves them."""
    buses = {name: Bus(redis_url, name) for name in (BIG, SMALL)}
    for name, bus in buses.items():
        await bus.connect()
        await bus.publish_card(ModelCard(model=name, created=1, max_model_len=9, vocab_size=9), None, None)
    yield lambda name: [msgspec.msgpack.decode(fields[b"job"]) for _, fields in raw.xrange(buses[name].keys.jobs)]
    for bus in buses.values():
        await bus.close()


async def test_a_push_goes_where_the_rules_say_and_the_producer_learns_where(
    redis_url: str, inboxes: Any, raw: Any, open_gateway: Open
) -> None:
    fronts = [await open_gateway(), await open_gateway()]
    await state(redis_url, Routing(routes={"auto": AUTO}), *fronts)
    entry = raw.xadd(JOBS, {"job": json.dumps(job(prompt="write SQL"))}).decode()
    for _ in range(2):
        raw.xadd(JOBS, {"job": encode(job("mine-1"))})
    await eventually(lambda: not raw.xlen(JOBS))
    assert [pushed["id"] for pushed in inboxes(BIG)] == [entry]
    assert {**inboxes(BIG)[0], "id": None} == {**job(prompt="write SQL"), "id": None}
    assert [pushed["id"] for pushed in inboxes(SMALL)] == ["mine-1", "mine-1"]  # the model runs an id once
    assert raw.get(f"headrace:{{auto}}:routed:default:{entry}") == BIG.encode()
    assert raw.get("headrace:{auto}:routed:default:mine-1") == SMALL.encode()


async def test_what_was_decided_stays_though_its_gateway_died(
    redis_url: str, inboxes: Any, raw: Any, open_gateway: Open
) -> None:
    """It died after it had pushed the job and before it took the entry; meanwhile the table says something else."""
    virtual = VirtualBus(redis_url, "auto")
    await virtual.open()
    raw.xadd(JOBS, {"job": encode(job("once"))})
    (entry,) = await virtual.read("dead", 10, 10)
    assert await virtual.decide("default", "once", BIG) == BIG
    front = await open_gateway()
    await state(redis_url, Routing(routes={"auto": Route(rules=[Rule(models=[SMALL])])}), front)
    pushes: Pushes = front.gateway._pushes
    await pushes._see_through(virtual, "auto", InboxEntry(entry.entry_id, None, entry.payload))
    assert [pushed["id"] for pushed in inboxes(BIG)] == ["once"]
    assert not inboxes(SMALL)
    assert not raw.xlen(JOBS)
    await virtual.close()


async def test_what_no_model_may_have_ends_with_an_error(
    redis_url: str, inboxes: Any, raw: Any, open_gateway: Open
) -> None:
    front = await open_gateway()
    tenants = {"poor": Tenant(budget=0.0)}
    await state(redis_url, Routing(routes={"auto": AUTO}, tenants=tenants), front)
    raw.xadd(JOBS, {"job": b"no job"})
    raw.xadd(JOBS, {"job": encode(job("dear", tenant="poor"))})
    raw.xadd(JOBS, {"rid": b"0" * 32})
    await eventually(lambda: not raw.xlen(JOBS))
    codes = [fields[b"code"].decode() for _, fields in raw.xrange("headrace:{auto}:dead")]
    assert sorted(codes) == ["budget_exhausted", "invalid_request", "invalid_request"]
    bus = Bus(redis_url, "auto")
    ((_, result),) = await bus.read_results("mine")
    await bus.close()
    assert (result.id, result.rid, result.error["code"]) == ("dear", "", "budget_exhausted")
    assert not inboxes(BIG)
    assert not inboxes(SMALL)


async def test_a_client_of_the_queue_cannot_wait_for_a_name_that_nobody_leads(
    redis_url: str, inboxes: Any, open_gateway: Open
) -> None:
    front = await open_gateway()
    await state(redis_url, Routing(routes={"auto": AUTO}), front)
    with pytest.raises(InvalidRequest, match="push to it"):
        async with AsyncClient(redis_url, "auto"):
            pass
