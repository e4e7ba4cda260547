"""API keys: default deny, tenants apart, limits, and a file that changes."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from gateway.auth import KeyRing
from gateway.metrics import REGISTRY
from protocol.errors import StartError
from protocol.keys import HOME
from tests.gateway.backend import MODEL, Backend
from tests.waits import eventually

COMPLETION = {"model": MODEL, "prompt": "hi"}


def write_keys(path: Path, **tenants: dict[str, Any]) -> None:
    """One key per tenant: ``key-TENANT``."""
    entries = [
        {"sha256": hashlib.sha256(f"key-{tenant}".encode()).hexdigest(), "tenant": tenant, **limits}
        for tenant, limits in tenants.items()
    ]
    path.write_text(json.dumps(entries))
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 1_000_000))


def bearer(tenant: str) -> dict[str, str]:
    return {"Authorization": f"Bearer key-{tenant}"}


async def test_default_deny(open_gateway: Any, backend: Backend, tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    write_keys(keys, ann={})
    front = await open_gateway(api_keys_file=str(keys))
    for method, path in [
        ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("GET", "/v1/models"),
        ("GET", f"/v1/models/{MODEL}"), ("GET", "/v1/streams/x"), ("GET", "/v1/requests/x"),
        ("DELETE", "/v1/requests/x"), ("POST", "/generate"), ("POST", "/tokenize"), ("POST", "/detokenize"),
        ("GET", "/version"), ("GET", "/metrics"), ("GET", "/unknown"),
    ]:  # fmt: skip
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Basic key-ann"},
            {"Authorization": "Bearer "},
        ):
            status, body, answered = await front.ask(method, path, headers=headers)
            assert (status, body["error"]["code"]) == (401, "invalid_api_key"), (path, headers)
            assert answered["WWW-Authenticate"] == "Bearer"
            assert "wrong" not in json.dumps(body)
    status, _, _ = await front.ask("GET", "/health")
    assert status == 200
    status, _, _ = await front.ask("GET", "/v1/models", headers=bearer("ann"))
    assert status == 200
    status, _, _ = await front.ask("GET", "/metrics", headers=bearer("ann"))
    assert status == 404  # it has a loopback port of its own
    url = f"http://127.0.0.1:{front.gateway.metrics_port}/metrics"
    async with front.session.get(url) as reply:
        assert reply.status == 200
        assert "llm_active_requests" in await reply.text()
    async with openai.AsyncOpenAI(base_url=front.url + "/v1", api_key="key-ann", max_retries=0) as client:
        answer = await client.completions.create(**COMPLETION)
        assert answer.choices[0].finish_reason == "stop"
    assert backend.running[-1].record.tenant == "ann"


async def test_tenants_do_not_see_each_other(open_gateway: Any, backend: Backend, tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    write_keys(keys, ann={}, bob={})
    front = await open_gateway(api_keys_file=str(keys))
    status, body, headers = await front.post("/v1/completions", COMPLETION, headers=bearer("ann"))
    assert status == 200
    rid = headers["X-Request-Id"]
    for method, path in (("GET", "/v1/requests/"), ("GET", "/v1/streams/"), ("DELETE", "/v1/requests/")):
        for name in (rid, body["id"]):
            mine, _, _ = await front.ask(method, path + name, headers=bearer("ann"))
            assert mine == 200
            status, refusal, _ = await front.ask(method, path + name, headers=bearer("bob"))
            unknown, same, _ = await front.ask(method, path + "0" * 32, headers=bearer("bob"))
            assert (status, refusal) == (unknown, same) == (404, same)
    both = {"Idempotency-Key": "same"}
    first = await front.post("/v1/completions", COMPLETION, headers={**bearer("ann"), **both})
    second = await front.post("/v1/completions", {**COMPLETION, "max_tokens": 1}, headers={**bearer("bob"), **both})
    assert (first[0], second[0]) == (200, 200)
    assert first[1]["id"] != second[1]["id"]


async def test_limits(open_gateway: Any, backend: Backend, tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    write_keys(keys, few={"requests_per_minute": 2}, small={"tokens_per_minute": 5}, one={"concurrent": 1}, free={})
    front = await open_gateway(api_keys_file=str(keys))

    async def post(tenant: str, **more: Any) -> tuple[int, Any, Any]:
        return await front.post("/v1/completions", {**COMPLETION, **more}, headers=bearer(tenant))

    assert [(await post("few"))[0] for _ in range(3)] == [200, 200, 429]
    status, body, headers = await post("few")
    assert (status, body["error"]["type"]) == (429, "rate_limit_error")
    assert 1 <= int(headers["Retry-After"]) <= 60
    assert (await post("small"))[0] == 200
    await backend.settle()
    assert (await post("small"))[0] == 429  # 7 tokens were used
    backend.hold = True
    held = asyncio.create_task(post("one", stream=False))
    await eventually(lambda: any(not r.over for r in backend.running))
    assert (await post("one"))[0] == 429
    backend.hold = False
    assert (await asyncio.wait_for(held, 60))[0] == 200
    assert (await post("one"))[0] == 200
    assert [(await post("free"))[0] for _ in range(3)] == [200] * 3


async def test_limits_hold_over_gateways_and_for_requests_without_a_client(
    open_gateway: Any, backend: Backend, tmp_path: Path
) -> None:
    """Detach, leave, and read the answer later: it counts all the same, here and on another gateway."""
    keys = tmp_path / "keys.json"
    write_keys(keys, ann={"concurrent": 1, "tokens_per_minute": 60})
    fronts = [await open_gateway(api_keys_file=str(keys)) for _ in range(2)]
    backend.hold = True
    detached = {**bearer("ann"), "X-Headrace-Detached": "true"}
    reply = await fronts[0].session.post(
        fronts[0].url + "/v1/completions", json={**COMPLETION, "stream": True}, headers=detached
    )
    rid = reply.headers["X-Request-Id"]
    reply.close()
    await eventually(lambda: not fronts[0].gateway.answers.open)
    for front in fronts:
        status, body, _ = await front.post("/v1/completions", COMPLETION, headers=bearer("ann"))
        assert (status, body["error"]["type"]) == (429, "rate_limit_error")
    backend.hold = False
    await eventually(lambda: all(r.landed for r in backend.running))
    status, _, _ = await fronts[1].post("/v1/completions", COMPLETION, headers=bearer("ann"))
    assert status == 200
    await backend.settle()
    left = await backend.bus._link.command("HGET", HOME + "t:ann", "tokens")
    assert 60 - 40 < float(left) <= 60 - 10, "prompt and answer of both; 60 a minute come back slowly"
    assert rid in {r.record.rid for r in backend.running}


async def test_readers_of_requests_begun_before_are_counted(
    open_gateway: Any, backend: Backend, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.json"
    write_keys(keys, ann={"readers": 1})
    front = await open_gateway(api_keys_file=str(keys))
    backend.hold = True
    reply = await front.session.post(
        front.url + "/v1/completions", json={**COMPLETION, "stream": True}, headers=bearer("ann")
    )
    url = f"{front.url}/v1/streams/{reply.headers['X-Request-Id']}"
    first = await front.session.get(url, headers=bearer("ann"))
    assert first.status == 200
    async with front.session.get(url, headers=bearer("ann")) as second:
        assert second.status == 429
    first.close()
    await eventually(lambda: not front.gateway.keys.identify(_request("ann")).readers)
    reply.close()


def _request(tenant: str) -> Any:
    return type("Request", (), {"headers": bearer(tenant)})()


def test_keys_of_one_tenant_name_the_same_limits(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    entries = [{"sha256": c * 64, "tenant": "ann", "concurrent": n} for c, n in (("a", 1), ("b", 2))]
    path.write_text(json.dumps(entries))
    with pytest.raises(StartError, match="ann"):
        KeyRing(str(path))


async def test_the_file_is_read_again(open_gateway: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KeyRing, "CHECK_S", 0.0)
    keys = tmp_path / "keys.json"
    write_keys(keys, ann={})
    front = await open_gateway(api_keys_file=str(keys))

    async def status(tenant: str) -> int:
        return (await front.ask("GET", "/v1/models", headers=bearer(tenant)))[0]

    assert [await status("ann"), await status("bob")] == [200, 401]
    write_keys(keys, bob={})
    assert [await status("ann"), await status("bob")] == [401, 200]
    keys.write_text("not JSON")
    assert [await status("ann"), await status("bob")] == [401, 200]  # the last good keys stay


@pytest.mark.parametrize(
    "content", [None, "{", "{}", '[{"sha256": "ab"}]', '[{"sha256": "' + "a" * 64 + '", "tenant": "a b"}]']
)
def test_a_bad_file_stops_the_start(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(StartError):
        KeyRing(str(path))


async def test_no_prompt_token_or_key_is_logged(
    open_gateway: Any, backend: Backend, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import logging

    from gateway.app import log_requests

    caplog.set_level(logging.DEBUG)
    keys = tmp_path / "keys.json"
    write_keys(keys, ann={})
    log_requests()
    logger = logging.getLogger("headrace.gateway.requests")
    logger.addHandler(caplog.handler)
    try:
        front = await open_gateway(api_keys_file=str(keys))
        secret = {"model": MODEL, "prompt": "SECRET-prompt"}
        status, _, headers = await front.post("/v1/completions", secret, headers=bearer("ann"))
        assert status == 200
        for body in ({**secret, "temperature": 9}, {"SECRET-prompt": 1}):
            await front.post("/v1/completions", body, headers=bearer("ann"))
        await front.post("/v1/completions", secret, headers={"Authorization": "Bearer SECRET-key"})
        await eventually(lambda: not front.gateway.answers.open)
    finally:
        logger.removeHandler(caplog.handler)
    assert "SECRET" not in caplog.text
    assert "key-ann" not in caplog.text
    (line,) = [json.loads(r.getMessage()) for r in caplog.records if r.name == logger.name]
    assert (line["id"], line["model"], line["tenant"], line["status"]) == (headers["X-Request-Id"], MODEL, "ann", 200)
    assert (line["prompt_tokens"], line["output_tokens"], line["finish_reasons"]) == (13, 5, ["stop"])


UNKNOWN = {"status": "404", "code": "model_not_found"}


async def test_metrics(open_gateway: Any, backend: Backend) -> None:
    front = await open_gateway()
    async with aiohttp.ClientSession() as session:
        await front.events("POST", "/v1/completions", json={**COMPLETION, "stream": True})
        before = REGISTRY.get_sample_value("headrace_gateway_errors_total", UNKNOWN) or 0
        await front.post("/v1/completions", {**COMPLETION, "temperature": 9})
        await front.post("/v1/completions", {**COMPLETION, "model": "unknown"})
        assert REGISTRY.get_sample_value("headrace_gateway_errors_total", UNKNOWN) == before + 1
        await eventually(lambda: not front.gateway.answers.open)
        await eventually(lambda: front.gateway.models.readiness()[MODEL]["workers"])
        async with session.get(front.url + "/metrics") as reply:
            assert reply.content_type == "text/plain"
            text = await reply.text()
    for name in (
        f'llm_requests_total{{model="{MODEL}",status="200"}}',
        f'llm_active_requests{{model="{MODEL}"}} 0.0',
        f'llm_request_duration_seconds_count{{model="{MODEL}"}}',
        f'headrace_time_to_first_token_seconds_bucket{{le="+Inf",model="{MODEL}"}}',
        f'headrace_inter_token_latency_seconds_sum{{model="{MODEL}"}}',
        f'headrace_e2e_request_latency_seconds_count{{model="{MODEL}"}}',
        f'headrace_ready_workers{{model="{MODEL}"}} 1.0',
        'headrace_gateway_errors_total{code="invalid_request",status="400"}',
        'headrace_build_info{role="gateway",version="',
        "process_resident_memory_bytes",
    ):
        assert name in text, name


async def test_what_is_left_of_a_keys_limits_is_told(open_gateway: Any, backend: Backend, tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    write_keys(keys, ann={"requests_per_minute": 5, "tokens_per_minute": 6000}, bob={"concurrent": 3})
    front = await open_gateway(api_keys_file=str(keys))
    for stream, left in ((False, "4"), (True, "3")):
        _, _, headers = await front.post("/v1/completions", {**COMPLETION, "stream": stream}, headers=bearer("ann"))
        assert (headers["x-ratelimit-limit-requests"], headers["x-ratelimit-remaining-requests"]) == ("5", left)
        assert headers["x-ratelimit-limit-tokens"] == "6000"
        assert 5000 < int(headers["x-ratelimit-remaining-tokens"]) <= 6000
        assert 0 < float(headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 12 * 2
    for _ in range(4):
        status, _, headers = await front.post("/v1/completions", COMPLETION, headers=bearer("ann"))
    assert (status, headers["x-ratelimit-remaining-requests"]) == (429, "0")  # the refusal tells it too
    assert 0 < float(headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 60
    assert 5000 < int(headers["x-ratelimit-remaining-tokens"]) <= 6000
    assert int(headers["Retry-After"]) >= 1
    _, _, headers = await front.post("/v1/completions", COMPLETION, headers=bearer("bob"))
    assert not [name for name in headers if name.lower().startswith("x-ratelimit")]
