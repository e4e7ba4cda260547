"""A model that accepted a request and says nothing gives it to the next candidate: once; nothing is said twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from protocol.bus import GatewayBus
from protocol.routing.table import Route, Routing, Rule
from tests.gateway.backend import Backend
from tests.gateway.front import Front, payload
from tests.gateway.routing.test_router import BIG, SMALL, ask, ready, state
from tests.waits import eventually

Open = Callable[..., Awaitable[Front]]
QUICKLY = Rule(models=[BIG], fallbacks=[SMALL], first_token_within=0.05)
BODY = {"model": "auto", "messages": [{"role": "user", "content": "hi"}], "stream": True}


@pytest.fixture
async def silent(redis_url: str, raw: Any) -> AsyncIterator[tuple[Backend, Backend]]:
    """The first says nothing until it is told to; the second answers at once."""
    async with Backend(redis_url, BIG, hold=True) as big, Backend(redis_url, SMALL) as small:
        yield big, small


async def opened(redis_url: str, open_gateway: Open, rule: Rule = QUICKLY) -> Front:
    front = await open_gateway()
    await state(redis_url, Routing(routes={"auto": Route(rules=[rule])}), front)
    await ready(front, BIG, SMALL)
    return front


@pytest.mark.parametrize("stream", [False, True])
async def test_the_next_candidate_answers_and_the_first_id_finds_it(
    redis_url: str, silent: tuple[Backend, Backend], open_gateway: Open, stream: bool
) -> None:
    big, _ = silent
    front, other = await opened(redis_url, open_gateway), await open_gateway()
    if stream:
        events = await front.events("POST", "/v1/chat/completions", json=BODY)
        answer = payload(events[0])
    else:
        status, answer, headers = await ask(front, "auto")
        assert (status, answer["model"]) == (200, SMALL)
        assert headers["X-Headrace-Route"] == f"model={SMALL}; asked=auto; rule=rule-1; why=fallback ({BIG} was slow)"
    (first,) = await eventually(lambda: big.moved, "the first model learns that it is rid of it")
    for gateway in (front, other):
        status, found, _ = await gateway.ask("GET", f"/v1/requests/{first}")
        assert (status, found["id"], found["status"]) == (200, answer["id"], "completed")
        assert found["model"] == SMALL
    if stream:
        again = await other.events("GET", f"/v1/streams/{first}")
        assert again == events
    assert not await big.bus.unfinished()


async def test_one_that_begins_meanwhile_stays_and_the_other_is_ended(
    redis_url: str, silent: tuple[Backend, Backend], open_gateway: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    big, small = silent
    small.hold = True
    front = await opened(redis_url, open_gateway)
    move = GatewayBus.move

    async def late(bus: GatewayBus, *args: Any) -> bool:
        await big.step()
        big.hold = False
        return await move(bus, *args)

    monkeypatch.setattr(GatewayBus, "move", late)
    events = await front.events("POST", "/v1/chat/completions", json=BODY)
    assert {payload(e)["model"] for e in events if b"[DONE]" not in e} == {BIG}
    (running,) = await small.until_running()
    await eventually(lambda: small.cancelled == [running.record.rid], "the other one is cancelled")
    assert not big.moved


async def test_a_down_model_is_not_waited_for(
    redis_url: str, silent: tuple[Backend, Backend], open_gateway: Open
) -> None:
    """It goes down while the request is with it: no need to wait until its time is over."""
    big, _ = silent
    front = await opened(redis_url, open_gateway, Rule(models=[BIG], fallbacks=[SMALL], first_token_within=3600))
    asked = asyncio.create_task(ask(front, "auto"))
    await big.until_running()
    big.worker_lives = False
    await big.bus.heartbeat("w0", big.gen, state="draining")
    status, answer, _ = await asked
    assert (status, answer["model"]) == (200, SMALL)


async def test_a_repeat_of_its_key_finds_where_it_went(
    redis_url: str, silent: tuple[Backend, Backend], open_gateway: Open, raw: Any
) -> None:
    big, small = silent
    front, other = await opened(redis_url, open_gateway), await open_gateway()
    await other.gateway.models.refresh()
    key = {"Idempotency-Key": "k1"}
    _, first, _ = await ask(front, "auto", headers=key)
    for gateway in (front, other):
        status, again, _ = await ask(gateway, "auto", headers=key)
        assert (status, again["id"], again["model"]) == (200, first["id"], SMALL)
    assert len(small.running) == 1
    rid = first["id"].removeprefix("chatcmpl-")
    raw.delete(small.bus.keys.request(rid), small.bus.keys.journal(rid, 0))  # as after the retention
    assert (await ask(front, "auto", headers=key))[0] == 503
    big.hold = False
    status, anew, _ = await ask(front, "auto", headers=key)
    assert (status, anew["model"]) == (200, BIG)
    assert anew["id"] != first["id"]


async def test_a_reader_of_the_first_id_is_sent_on(
    redis_url: str, silent: tuple[Backend, Backend], open_gateway: Open
) -> None:
    """It reads on another gateway while the request is moved: its stream breaks off, and the same id then finds it."""
    big, _ = silent
    front, other = await opened(redis_url, open_gateway), await open_gateway()
    front.gateway.models.routing.routes["auto"].rules[0].first_token_within = 1.0
    asked = asyncio.create_task(ask(front, "auto"))
    rid = (await big.until_running())[0].record.rid
    read = asyncio.create_task(other.ask("GET", f"/v1/streams/{rid}"))
    status, answer, _ = await asked
    assert (status, answer["model"]) == (200, SMALL)
    with pytest.raises(Exception, match=r"payload|Payload|disconnected"):
        await read
    events = await other.events("GET", f"/v1/streams/{rid}")
    assert payload(events[0])["id"] == answer["id"]


async def test_a_repeat_is_moved_where_the_gateway_that_accepted_it_is_gone(
    redis_url: str, silent: tuple[Backend, Backend], open_gateway: Open
) -> None:
    """Its client asks another gateway under the same key: that one is as patient as the first would have been."""
    big, small = silent
    dying = await opened(redis_url, open_gateway, Rule(models=[BIG], fallbacks=[SMALL], first_token_within=3600))
    headers = {"Idempotency-Key": "k1", "X-Headrace-Resume": "3600"}
    asked = asyncio.create_task(ask(dying, "auto", headers=headers))
    rid = (await big.until_running())[0].record.rid
    asked.cancel()  # nobody reads there, and nobody will move it
    other = await opened(redis_url, open_gateway)
    status, answer, told = await ask(other, "auto", headers=headers)
    assert (status, answer["model"]) == (200, SMALL)
    assert told["X-Headrace-Route"] == f"model={SMALL}; asked=auto; rule=rule-1; why=fallback ({BIG} was slow)"
    await eventually(lambda: big.moved == [rid], "the first model learns that it is rid of it")
    again = await ask(dying, "auto", headers=headers)
    assert (again[1]["id"], len(small.running)) == (answer["id"], 1)


async def test_two_gateways_that_lose_patience_with_one_request_move_it_once(
    redis_url: str, silent: tuple[Backend, Backend], open_gateway: Open
) -> None:
    """Whoever comes second says so, and finds the answer when it asks again."""
    big, small = silent
    headers = {"Idempotency-Key": "k1"}
    fronts = [await opened(redis_url, open_gateway), await open_gateway()]
    await ready(fronts[1], BIG, SMALL)
    small.hold = True
    asked = [asyncio.create_task(ask(front, "auto", headers=headers)) for front in fronts]
    await eventually(lambda: len(big.moved) == 1)
    small.hold = False
    found = await asyncio.gather(*asked)
    assert {status for status, *_ in found} <= {200, 503}
    (answer,) = {answer["id"] for status, answer, _ in found if status == 200}
    for front in fronts:
        assert (await ask(front, "auto", headers=headers))[1]["id"] == answer
    assert len({running.record.rid for running in small.running} - set(small.cancelled)) == 1
