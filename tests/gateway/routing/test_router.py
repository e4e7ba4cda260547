"""Names that mean several models, over real HTTP: aliases, rules, fallbacks, rights, budgets and upstreams."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from gateway.routing.router import Router
from protocol.errors import Overloaded
from protocol.routing.store import RoutingStore
from protocol.routing.table import Price, Route, Routing, Rule, Tenant, Terms, Upstream
from tests.gateway.backend import Backend
from tests.gateway.front import Front, payload, split_events
from tests.waits import eventually

BIG, SMALL = "org/big", "org/small"
Open = Callable[..., Awaitable[Front]]


@pytest.fixture
async def two(redis_url: str, raw: Any) -> AsyncIterator[dict[str, Backend]]:
    async with Backend(redis_url, BIG) as big, Backend(redis_url, SMALL) as small:
        yield {BIG: big, SMALL: small}


async def state(redis_url: str, table: Routing, *fronts: Front) -> None:
    """Put a table in force, for these gateways."""
    store = RoutingStore(redis_url)
    made = await store.change(lambda now: table)
    await store.close()
    for front in fronts:
        await front.gateway.models.refresh()
        assert front.gateway.models.routing == made


async def ready(front: Front, *names: str) -> None:
    await eventually(lambda: all(front.gateway.models.readiness().get(n, {}).get("ready") for n in names))


async def ask(front: Front, model: str, **body: Any) -> tuple[int, Any, Any]:
    messages = [{"role": "user", "content": body.pop("content", "hi")}]
    headers = body.pop("headers", {})
    return await front.post(
        "/v1/chat/completions", {"model": model, "messages": messages, "max_tokens": 3, **body}, headers=headers
    )


async def test_an_alias_moves_for_all_gateways_and_a_repeat_stays_where_it_began(
    redis_url: str, two: dict[str, Backend], open_gateway: Open
) -> None:
    fronts = [await open_gateway(), await open_gateway()]
    await state(redis_url, Routing(aliases={"prod": {SMALL: 1}}), *fronts)
    key = {"Idempotency-Key": "k1"}
    status, first, headers = await ask(fronts[0], "prod", headers=key)
    assert (status, first["model"]) == (200, SMALL)
    assert headers["X-Headrace-Route"] == f"model={SMALL}; asked=prod; why=alias"
    await state(redis_url, Routing(aliases={"prod": {BIG: 1, "org/removed": 1000}}), *fronts)
    for front in fronts:
        _, answer, _ = await ask(front, "prod")
        assert answer["model"] == BIG
        _, again, told = await ask(front, "prod", headers=key)
        assert (again["id"], again["model"]) == (first["id"], SMALL)
        assert "why=accepted before" in told["X-Headrace-Route"]
    _, listed, _ = await fronts[0].ask("GET", "/v1/models")
    assert [model["id"] for model in listed["data"]] == [BIG, SMALL, "prod"]
    assert (await fronts[0].ask("GET", "/v1/models/prod"))[0] == 200
    assert (await fronts[0].post("/tokenize", {"model": "prod", "prompt": "abc"}))[1]["count"] == 3


async def test_a_repeat_finds_the_request_by_its_claim_though_the_name_means_another_model(
    redis_url: str, two: dict[str, Backend], open_gateway: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a look at the models' own keys does not show it: it came while the first was being accepted."""

    async def unseen(*_: Any) -> None:
        return None

    async def full(*_: Any, **__: Any) -> None:
        raise Overloaded("full", retry_after=1.0)

    monkeypatch.setattr(Router, "_accepted_before", unseen)
    fronts = [await open_gateway(), await open_gateway()]
    await state(redis_url, Routing(aliases={"prod": {SMALL: 1}}), *fronts)
    key, other = {"Idempotency-Key": "k1"}, {"Idempotency-Key": "k2"}
    status, first, _ = await ask(fronts[0], "prod", headers=key)
    assert (status, first["model"]) == (200, SMALL)
    with monkeypatch.context() as patch:
        patch.setattr((await fronts[0].gateway.models.get(SMALL)).bus, "accept", full)
        assert (await ask(fronts[0], "prod", headers=other))[0] == 429
    await state(redis_url, Routing(aliases={"prod": {BIG: 1}}), *fronts)
    for front in fronts:
        _, again, told = await ask(front, "prod", headers=key)
        assert (again["id"], again["model"]) == (first["id"], SMALL)
        assert "why=its idempotency key" in told["X-Headrace-Route"]
    _, refused_before, _ = await ask(fronts[0], "prod", headers=other)
    assert refused_before["model"] == BIG, "what was refused binds nobody"


async def test_rules_choose_and_the_header_says_which(
    redis_url: str, two: dict[str, Backend], open_gateway: Open
) -> None:
    front = await open_gateway()
    rules = [
        Rule(models=[BIG], name="code", words=["SQL"]),
        Rule(models=[BIG], name="long", min_prompt_tokens=20),
        Rule(models=[BIG, SMALL], name="rest", choose="cheapest"),
    ]
    terms = {BIG: Terms(price=Price(input=5, output=10)), SMALL: Terms(price=Price(input=1, output=2))}
    await state(redis_url, Routing(routes={"auto": Route(rules=rules)}, models=terms), front)
    await ready(front, BIG, SMALL)
    for content, model, rule, why in (
        ("write SQL", BIG, "code", "first"), ("x" * 20, BIG, "long", "first"), ("x" * 19, SMALL, "rest", "cheapest"),
    ):  # fmt: skip
        status, answer, headers = await ask(front, "auto", content=content)
        assert (status, answer["model"]) == (200, model)
        assert headers["X-Headrace-Route"] == f"model={model}; asked=auto; rule={rule}; why={why}"
    text = (await front.ask("GET", "/metrics"))[1].decode()
    assert f'headrace_routed_requests_total{{asked="auto",model="{SMALL}",rule="rest",tenant="default"}} 1.0' in text
    tokens = 19, 3
    cost = (tokens[0] * 1 + tokens[1] * 2) / 1e6
    assert f'headrace_cost_total{{model="{SMALL}",rule="rest",tenant="default"}} {cost}' in text


async def test_a_rule_may_choose_by_load_and_by_the_first_token(
    redis_url: str, two: dict[str, Backend], open_gateway: Open
) -> None:
    front = await open_gateway()
    rules = [
        Rule(models=[BIG, SMALL], words=["load"], choose="least-loaded"),
        Rule(models=[BIG, SMALL], choose="fastest"),
    ]
    await state(redis_url, Routing(routes={"auto": Route(rules=rules)}), front)
    await ready(front, BIG, SMALL)
    slow, quick = {"requests": 1, "tokens": 9000, "rate": 1.0}, {"requests": 5, "tokens": 10, "rate": 1.0}
    for big, small, least, fastest in ((slow, quick, BIG, SMALL), (quick, slow, SMALL, BIG)):
        for name, depth in ((BIG, big), (SMALL, small)):
            await two[name].bus.write_depth(two[name].epoch, depth)
        seen = front.gateway.models._open
        await eventually(lambda: [seen[n].waiting_tokens for n in (BIG, SMALL)] == [big["tokens"], small["tokens"]])  # noqa: B023
        for content, model, why in (("load", least, "least-loaded"), ("time", fastest, "fastest")):
            _, answer, headers = await ask(front, "auto", content=content)
            assert (answer["model"], headers["X-Headrace-Route"].split("why=")[1]) == (model, why)


async def test_the_request_log_tells_route_money_and_trace(
    redis_url: str, two: dict[str, Backend], open_gateway: Open, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="headrace.gateway.requests")
    front = await open_gateway()
    table = Routing(routes={"auto": Route(rules=[Rule(models=[SMALL], name="all")])},
                    models={SMALL: Terms(price=Price(input=1e6, output=2e6))})  # fmt: skip
    await state(redis_url, table, front)
    _, answer, headers = await ask(front, "auto")
    line = json.loads(caplog.records[-1].message)
    told = {name: line[name] for name in ("id", "model", "tenant", "asked", "rule", "status", "cost", "trace")}
    rid = headers["X-Request-Id"]
    used = answer["usage"]["prompt_tokens"] + 2 * answer["usage"]["completion_tokens"]
    assert told == {
        "id": rid, "model": SMALL, "tenant": "default", "asked": "auto", "rule": "all", "status": 200, "cost": used,
        "trace": rid,
    }  # fmt: skip


async def test_a_candidate_that_is_full_or_down_is_passed_over(
    redis_url: str, two: dict[str, Backend], open_gateway: Open
) -> None:
    front = await open_gateway()
    rule = Rule(models=[SMALL], fallbacks=[BIG], max_waiting=10)
    table = Routing(routes={"auto": Route(rules=[rule])}, models={SMALL: Terms(max_waiting_requests=2)})
    await state(redis_url, table, front)
    await ready(front, BIG, SMALL)
    small = two[SMALL]
    await small.bus.write_depth(small.epoch, {"requests": 2, "tokens": 5, "rate": 1.0})
    status, answer, headers = await ask(front, "auto")  # refused by accept: the next one is asked
    assert (status, answer["model"], headers["X-Headrace-Route"]) == (
        200, BIG, f"model={BIG}; asked=auto; rule=rule-1; why=fallback",
    )  # fmt: skip
    assert (await ask(front, SMALL))[0] == 429  # by its own name it is itself
    await small.bus.write_depth(small.epoch, {"requests": 11, "tokens": 5, "rate": 1.0})
    await eventually(lambda: front.gateway.models._open[SMALL].waiting_requests == 11)
    assert "why=fallback (org/small passed over)" in (await ask(front, "auto"))[2]["X-Headrace-Route"]
    small.worker_lives = False
    await small.bus.heartbeat("w0", small.gen, state="draining")
    await eventually(lambda: not front.gateway.models._open[SMALL].ready)
    assert (await ask(front, "auto"))[1]["model"] == BIG


async def test_rights_and_budgets(redis_url: str, two: dict[str, Backend], open_gateway: Open, tmp_path: Path) -> None:
    keys = [{"sha256": hashlib.sha256(name.encode()).hexdigest(), "tenant": name} for name in ("gold", "plain")]
    (tmp_path / "keys.json").write_text(json.dumps(keys))
    front = await open_gateway(api_keys_file=str(tmp_path / "keys.json"))
    gold, plain = ({"Authorization": f"Bearer {name}"} for name in ("gold", "plain"))
    terms = {BIG: Terms(tenants=["gold"], price=Price(output=1e6)), SMALL: Terms(price=Price(output=0.0))}
    table = Routing(
        aliases={"best": {BIG: 1}},
        models=terms,
        tenants={"gold": Tenant(budget=5.0), "plain": Tenant(budget=0.0, over_budget=SMALL)},
    )
    await state(redis_url, table, front)
    assert (await ask(front, BIG, headers=gold))[0] == 200
    await two[SMALL].bus.withdraw_card()
    await front.gateway.models.refresh()
    for headers, expected in ((gold, 402), (plain, 404)):  # without a name the only model is meant: the same terms hold
        await state(redis_url, Routing(models=terms, tenants={"gold": Tenant(budget=0.0)}), front)
        status, _, _ = await front.post("/v1/completions", {"prompt": "hi"}, headers=headers)
        assert status == expected
    await two[SMALL].bus.publish_card(two[SMALL].card, None)
    await front.gateway.models.refresh()
    for name in (BIG, "best"):
        await state(redis_url, Routing(aliases=table.aliases, models=terms), front)
        status, body, _ = await ask(front, name, headers=plain)
        assert (status, body["error"]["code"]) == (404, "model_not_found")
    _, listed, _ = await front.ask("GET", "/v1/models", headers=plain)
    assert [model["id"] for model in listed["data"]] == [SMALL, "best"]

    await state(redis_url, table, front)
    status, answer, headers = await ask(front, "best", headers=plain)  # what it may not use is not needed
    assert (status, answer["model"]) == (200, SMALL)
    assert headers["X-Headrace-Route"] == f"model={SMALL}; asked={SMALL}; why=over budget"
    for spent, expected in ((4.0, 200), (1.0, 402)):
        await front.gateway.home.spend("gold", spent)
        status, body, _ = await ask(front, BIG, headers=gold)
        assert status == expected, body
    assert (body["error"]["type"], body["error"]["code"]) == ("insufficient_quota", "budget_exhausted")


# ------------------------------------------------------------------ upstreams


@pytest.fixture
async def far(redis_url: str, raw: Any, open_gateway: Open) -> AsyncIterator[tuple[Front, Backend]]:
    """Another service over a database of its own: what OpenAI-compatible servers are."""
    url = f"{redis_url}?db=1" if redis_url.startswith("unix") else f"{redis_url.rpartition('/')[0]}/1"
    async with Backend(url, "far/model") as backend:
        yield await open_gateway(redis_url=url), backend


async def test_an_upstream_is_streamed_through_and_its_tokens_are_counted(
    redis_url: str, two: dict[str, Backend], far: tuple[Front, Backend], open_gateway: Open, raw: Any
) -> None:
    front = await open_gateway()
    cloud = Upstream(url=far[0].url + "/v1", model="far/model", price=Price(input=1e6, output=1e6))
    rule = Rule(models=["cloud"], name="out", fallbacks=[SMALL])
    tenants = {"default": Tenant(budget=100.0)}
    table = Routing(routes={"auto": Route(rules=[rule])}, upstreams={"cloud": cloud}, tenants=tenants)
    await state(redis_url, table, front)
    status, answer, headers = await ask(front, "auto")
    assert (status, answer["model"], answer["usage"]["completion_tokens"]) == (200, "cloud", 3)
    assert headers["X-Headrace-Route"] == "model=cloud; asked=auto; rule=out; why=first"
    url = front.url + "/v1/chat/completions"
    body = {"model": "auto", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "stream": True}
    async with front.session.post(url, json=body) as reply:
        events = split_events(await reply.read())
    assert events[-1] == b"data: [DONE]\n\n"
    chunks = [payload(event) for event in events[:-1]]
    assert all(chunk["choices"] and chunk["model"] == "cloud" and "usage" not in chunk for chunk in chunks)
    whole = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert whole == answer["choices"][0]["message"]["content"]
    async with front.session.post(url, json=body | {"stream_options": {"include_usage": True}}) as reply:
        assert payload(split_events(await reply.read())[-2])["usage"]["completion_tokens"] == 3
    assert await front.gateway.home.spent("default") == 6 + 9
    status, body, _ = await ask(front, "auto", background=True)  # needs a journal: ours
    assert (status, body.get("model")) == (200, SMALL), body
    status, body, _ = await ask(front, "cloud", temperature=9)
    assert (status, body["error"]["code"]) == (400, "upstream_refused")


async def test_an_upstream_that_is_down_or_leads_back_is_not_the_end(
    redis_url: str, two: dict[str, Backend], open_gateway: Open
) -> None:
    front = await open_gateway()
    table = Routing(
        routes={"auto": Route(rules=[Rule(models=["gone"], fallbacks=[SMALL])]),
                "round": Route(rules=[Rule(models=["mirror"])])},
        upstreams={"gone": Upstream(url="http://127.0.0.1:9/v1"),
                   "mirror": Upstream(url=front.url + "/v1", model="round")},
    )  # fmt: skip
    await state(redis_url, table, front)
    await ready(front, SMALL)
    status, answer, headers = await ask(front, "auto")
    assert (status, answer["model"]) == (200, SMALL)
    assert "why=fallback" in headers["X-Headrace-Route"]
    status, body, _ = await ask(front, "gone")
    assert (status, body["error"]["code"]) == (503, "upstream_unavailable")
    status, body, _ = await asyncio.wait_for(ask(front, "round"), 30)
    assert (status, body["error"]["code"]) == (503, "upstream_unavailable")  # its 508 is told as what it is to us


async def test_an_upstreams_key_is_read_from_the_environment_and_its_bound_is_a_full_queue(
    redis_url: str, two: dict[str, Backend], far: tuple[Front, Backend], open_gateway: Open, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "keys.json").write_text(json.dumps([{"sha256": hashlib.sha256(b"s3cret").hexdigest(), "tenant": "us"}]))
    behind = await open_gateway(redis_url=far[0].gateway.config.redis_url, api_keys_file=str(tmp_path / "keys.json"))
    front = await open_gateway()
    cloud = Upstream(url=behind.url + "/v1", model="far/model", key_env="FAR_KEY", max_concurrent=1)
    rule = Rule(models=["cloud"], fallbacks=[SMALL])
    await state(redis_url, Routing(routes={"auto": Route(rules=[rule])}, upstreams={"cloud": cloud}), front)
    await ready(front, SMALL)
    monkeypatch.delenv("FAR_KEY", raising=False)
    for key in (None, "wrong"):
        if key is not None:
            monkeypatch.setenv("FAR_KEY", key)
        assert (await ask(front, "cloud"))[1]["error"]["code"] == "upstream_unavailable"
        assert (await ask(front, "auto"))[1]["model"] == SMALL
    monkeypatch.setenv("FAR_KEY", "s3cret")
    far[1].hold = True
    first = asyncio.create_task(ask(front, "cloud"))
    (running,) = await far[1].until_running()
    assert running.record.tenant == "us"
    assert (await ask(front, "cloud"))[0] == 429
    assert (await ask(front, "auto"))[1]["model"] == SMALL
    far[1].hold = False
    assert (await first)[0] == 200
    assert (await ask(front, "auto"))[1]["model"] == "cloud"


@pytest.mark.parametrize("events", [0, 1])
async def test_an_upstream_that_breaks_off_is_replaced_only_before_its_first_event(
    redis_url: str, two: dict[str, Backend], open_gateway: Open, events: int
) -> None:
    async def breaks(request: web.BaseRequest) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        for _ in range(events):
            await answer.write(b'data: {"model": "x", "choices": [{"delta": {"content": "one"}}]}\n\n')
        assert request.transport is not None
        request.transport.close()
        return answer

    front = await open_gateway()
    server = web.ServerRunner(web.Server(breaks))
    await server.setup()
    await web.TCPSite(server, "127.0.0.1", 0).start()
    cloud = Upstream(url=f"http://127.0.0.1:{server.addresses[0][1]}/v1")
    rule = Rule(models=["cloud"], fallbacks=[SMALL])
    await state(redis_url, Routing(routes={"auto": Route(rules=[rule])}, upstreams={"cloud": cloud}), front)
    await ready(front, SMALL)
    body = {"model": "auto", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    async with front.session.post(front.url + "/v1/chat/completions", json=body) as reply:
        told = split_events(await reply.read())
    await server.cleanup()
    assert reply.headers["X-Headrace-Route"].startswith(f"model={'cloud' if events else SMALL};")
    if events:
        assert [payload(event).get("model") for event in told] == ["cloud", None]
        assert "cannot be resumed" in payload(told[-1])["error"]["message"]
    else:
        assert told[-1] == b"data: [DONE]\n\n"
