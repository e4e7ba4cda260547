"""One model on several shards: one scheduler process leads them, any gateway or client finds a request."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import msgspec
import pytest
import redis

from gateway.app import Gateway, GatewayConfig
from headrace.clients.queue import AsyncClient
from headrace.tools import shards
from headrace.tools.shards import change
from protocol.keys import SHARDS, Keys
from protocol.messages import Job, ModelCard, encode, shard_of
from protocol.routing.shards import ShardStore
from protocol.sampling import SamplingParams
from scheduler import service
from tests.bus import Bus
from tests.conftest import MODEL, leaked_keys
from tests.gateway.front import Front
from tests.scheduler.conftest import Stage
from tests.scheduler.scripted_worker import ScriptedWorker
from tests.waits import eventually

TAGS = [MODEL, f"{MODEL}#1.0"]


class Sharded:
    """Two shards, a worker in each."""

    def __init__(self, stage: Stage, raw: redis.Redis) -> None:
        self.stage = stage
        self.raw = raw
        self.store = ShardStore(stage.url)
        self.buses = [Bus(stage.url, tag, patience=5.0) for tag in TAGS]
        self.workers: list[ScriptedWorker] = []

    async def start(self, **fields: Any) -> None:
        self.stage.scheduler(shards=2, **fields)
        for bus in self.buses:
            await bus.connect()
            self.workers.append(self.work(bus))
        await self.stage.until(self.served)

    def work(self, bus: Bus) -> ScriptedWorker:
        worker = ScriptedWorker(bus, wid=f"worker-{bus.keys.shard}", step_s=0.005)
        worker.task = asyncio.ensure_future(worker.run())
        self.stage.watch(worker.task)
        return worker

    async def served(self) -> bool:
        owners = [(await bus.read_leader()).owner for bus in self.buses]
        return all(owners) and MODEL in await Bus.models(self.stage.url)

    def requests(self) -> list[set[str]]:
        """rids by shard."""
        return [
            {key.decode().rpartition(":")[2] for key in self.raw.scan_iter(f"{Keys(tag).prefix}r:*")} for tag in TAGS
        ]

    async def ended(self, rid: str) -> Any:
        async def over() -> Any:
            record = await self.buses[shard_of(rid)].read_request(rid)
            return record is not None and not record.open and record

        return await self.stage.until(over)

    async def close(self) -> None:
        await self.store.close()


@pytest.fixture
async def sharded(stage: Stage, raw: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Sharded]:
    monkeypatch.setattr(service, "LOOK_S", 0.1)
    monkeypatch.setattr(shards, "KNOWN_S", 0.0)  # a test that has gateways waits for them
    made = Sharded(stage, raw)
    yield made
    await made.close()
    await stage.close()
    for bus in made.buses:
        await bus.close()


async def test_requests_are_spread_and_every_client_finds_them(sharded: Sharded, raw: redis.Redis) -> None:
    await sharded.start()
    async with AsyncClient(sharded.stage.url) as client, AsyncClient(sharded.stage.url) as other:
        rids = [await client.submit(f"prompt {k}", id=f"k{k}", max_tokens=5) for k in range(12)]
        results = [await other.result(rid) for rid in rids]
        again = [await other.submit(f"prompt {k}", id=f"k{k}", max_tokens=5) for k in range(12)]
    assert again == rids
    assert all(result.choices[0].finish_reason == "length" for result in results)
    found = sharded.requests()
    assert set.union(*found) == set(rids)
    assert all(found), "both shards have some"
    assert [{shard_of(rid) for rid in rids} for rids in found] == [{0}, {1}]
    await sharded.stage.at_rest()
    assert set(leaked_keys(raw, TAGS[0])) & set(leaked_keys(raw, TAGS[1])) == {SHARDS}


async def test_any_gateway_streams_resumes_and_cancels_whatever_shard_a_request_is_in(sharded: Sharded) -> None:
    await sharded.start()
    async with contextlib.AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())
        fronts = []
        for _ in range(2):
            gateway = await stack.enter_async_context(Gateway(GatewayConfig(redis_url=sharded.stage.url, port=0)))
            fronts.append(Front(gateway, session))
        for front in fronts:
            await eventually(lambda f=front: _knows_both(f))
        ids = []
        for number in range(10):
            body = {"model": MODEL, "prompt": f"prompt {number}", "max_tokens": 3}
            key = {"Idempotency-Key": f"k{number}"}
            status, answer, _ = await fronts[number % 2].post("/v1/completions", body, headers=key)
            assert status == 200
            ids.append(answer["id"])
            status, answer, _ = await fronts[1 - number % 2].post("/v1/completions", body, headers=key)
            assert (status, answer["id"]) == (200, ids[-1])
        assert {shard_of(id.removeprefix("cmpl-")) for id in ids} == {0, 1}
        for id in ids:
            for front in fronts:
                async with session.get(f"{front.url}/v1/requests/{id}") as reply:
                    assert (reply.status, (await reply.json())["status"]) == (200, "completed")
        await cancel_elsewhere(sharded, fronts)


async def _knows_both(front: Front) -> bool:
    slots = (await front.gateway.models.get(MODEL)).slots
    return len(slots) == 2 and all(slot.ready for slot in slots.values())


async def cancel_elsewhere(sharded: Sharded, fronts: list[Front]) -> None:
    """A detached request of the second shard is ended by the gateway that did not accept it."""
    for worker in sharded.workers:
        worker.step_s = 1.0
    session = fronts[0].session
    for number in range(100):
        body = {"model": MODEL, "prompt": f"long {number}", "max_tokens": 200, "stream": True}
        headers = {"X-Headrace-Detached": "true"}
        async with session.post(f"{fronts[0].url}/v1/completions", json=body, headers=headers) as reply:
            rid = reply.headers["X-Request-Id"]
        async with session.delete(f"{fronts[1].url}/v1/requests/{rid}") as reply:
            assert (reply.status, (await reply.json())["cancelled"]) == (200, True)
        record = await sharded.ended(rid)
        assert record.ends == ["abort"]
        if shard_of(rid):
            return
    raise AssertionError("no request came to the second shard")


async def test_a_lead_that_is_lost_moves_only_its_shard(sharded: Sharded) -> None:
    await sharded.start()
    before = [await bus.read_leader() for bus in sharded.buses]
    second = sharded.buses[1]
    epoch = await second.lead("somebody", await second.read_leader())
    assert epoch is not None
    await second.release(epoch, "somebody")

    async def led_again() -> bool:
        seen = await second.read_leader()
        return bool(seen.owner) and seen.epoch > epoch

    await sharded.stage.until(led_again)
    assert (await sharded.buses[0].read_leader()).owner == before[0].owner
    async with AsyncClient(sharded.stage.url) as client:
        rids = [await client.submit(f"prompt {k}", max_tokens=5) for k in range(12)]
        assert all([(await client.result(rid)).choices[0].finish_reason == "length" for rid in rids])
    assert {shard_of(rid) for rid in rids} == {0, 1}


async def test_a_shard_drains_and_late_pushes_are_moved_once(
    sharded: Sharded, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it has ends there; what is pushed there later runs in the first shard, under the same ids."""
    await sharded.start()
    first, second = sharded.buses
    sampling = SamplingParams(max_tokens=4, seed=1, temperature=0)
    await second.push(encode(Job(prompt="early", id="early", sampling=sampling, results="r")))
    ((_, result),) = await second.read_results("r", block_ms=20_000)
    assert result.id == "early"
    await change({"redis_url": sharded.stage.url, "model": None, "id": ["1"], "json": False, "action": "drain"})
    assert "draining" in capsys.readouterr().out
    probes = itertools.count()

    async def seen() -> bool:
        """Whether the leader knows: a push that it took before runs where it is."""
        probe = f"probe-{next(probes)}"
        await second.push(encode(Job(prompt="x", id=probe, sampling=sampling)))
        await sharded.stage.until(lambda: _anywhere(sharded, probe))
        return await _found(first, probe)

    await sharded.stage.until(seen)
    pushed = []
    for number in range(8):
        named = f"late-{number}" if number % 2 else None
        entry = await second.push(encode(Job(prompt=f"p{number}", id=named, sampling=sampling, results="r")))
        pushed.append(named or entry)

    async def told() -> Any:
        told = [r for _, r in await first.read_results("r")]
        return len(told) >= len(pushed) and told

    results = await sharded.stage.until(told)
    assert sorted(r.id for r in results) == sorted(pushed)
    assert all(r.finish_reason == "length" for r in results)
    await sharded.stage.at_rest()
    values = {"redis_url": sharded.stage.url, "model": MODEL, "id": ["1"], "json": True}
    assert await change({**values, "action": "retire"}) == 0
    assert [json.loads(line)["state"] for line in capsys.readouterr().out.splitlines()] == ["open", "retired"]
    with pytest.raises(Exception, match=r"WRONGTYPE|wrong kind"):
        await second.push(b"{}")


async def _anywhere(sharded: Sharded, producer_id: str) -> bool:
    return any([await _found(bus, producer_id) for bus in sharded.buses])


async def _found(bus: Bus, producer_id: str) -> bool:
    return await bus.find_request("default", producer_id) is not None


async def test_a_push_under_an_id_that_runs_in_another_shard_runs_no_second_time(sharded: Sharded) -> None:
    await sharded.start()
    sampling = SamplingParams(max_tokens=4, seed=1, temperature=0)
    job = Job(prompt="once", id="once", sampling=sampling, results="r")
    for bus in sharded.buses:
        await bus.push(encode(job))
    other = msgspec.structs.replace(job, prompt="another")
    await sharded.stage.until(lambda: _empty(sharded))
    await sharded.buses[1].push(encode(other))
    await sharded.stage.until(lambda: _empty(sharded))
    assert sum(map(len, sharded.requests())) == 1
    refused = [r for bus in sharded.buses for _, r in await bus.read_results("r") if r.error]
    assert [(r.error or {})["code"] for r in refused] == ["idempotency_conflict"]


async def _empty(sharded: Sharded) -> bool:
    return not any([await bus.inbox_length() for bus in sharded.buses])


async def test_the_card_is_the_first_shards(sharded: Sharded) -> None:
    await sharded.start()
    cards = await Bus.models(sharded.stage.url)
    assert list(cards) == [MODEL]
    assert isinstance(cards[MODEL], ModelCard)
