"""Streams that lose their publications, their gateway or the server: what is shown is always the journal."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gateway.app import Gateway, GatewayConfig
from gateway.models import Models
from gateway.streams import SILENCE_S, Collector, Outlet
from headrace.serve.embedded import EmbeddedServer
from protocol.bus import HomeBus
from protocol.errors import Expired, Unavailable
from tests.gateway.backend import Backend, word
from tests.gateway.front import CHAT, COMPLETION, Front, event_id, payload, rid_of, split_events
from tests.waits import eventually

FORMS = {
    "chat": ("/v1/chat/completions", CHAT),
    "chat of two": ("/v1/chat/completions", {**CHAT, "n": 2}),
    "completion": ("/v1/completions", COMPLETION),
    "echo of four": ("/v1/completions", {**COMPLETION, "prompt": ["a", "b"], "n": 2, "echo": True}),
    "usage so far": ("/v1/chat/completions", {**CHAT, "n": 2, "stream_options": {"continuous_usage_stats": True}}),
    "logprobs": ("/v1/completions", {**COMPLETION, "logprobs": 1, "return_token_ids": True}),
}


def by_choice(events: list[bytes]) -> dict[int, list[bytes]]:
    """The payloads of each choice, in order; -1: those of none (usage, [DONE])."""
    found: dict[int, list[bytes]] = {}
    for event in events:
        payload = event.split(b"data: ", 1)[1]
        choices = [] if payload.startswith(b"[DONE]") else json.loads(payload)["choices"]
        found.setdefault(choices[0]["index"] if choices else -1, []).append(payload)
    return found


# ------------------------------------------------------------------ resume


@pytest.mark.parametrize("form", FORMS)
async def test_resume_after_every_event_gives_the_identical_rest(
    form: str, front: Front, open_gateway: Callable[..., Awaitable[Front]], backend: Backend
) -> None:
    path, body = FORMS[form]
    events = await front.events("POST", path, json=body)
    assert events[-1].endswith(b"data: [DONE]\n\n")
    rid = rid_of(events)
    other = await open_gateway()  # any gateway can go on
    for seen in range(len(events)):
        after = event_id(events[seen - 1]) if seen else None
        headers = {"Last-Event-ID": after} if after else {}
        rest = await other.events("GET", f"/v1/streams/{rid}", headers=headers)
        if body.get("n", 1) == 1:
            assert rest == events[seen:]
        assert by_choice(rest) == by_choice(events[seen:])
    last = event_id(events[-1])
    status, _, _ = await other.ask("GET", f"/v1/streams/{rid}", params={"after": last})
    assert status == 204  # an EventSource that has read [DONE] stops asking


async def test_resume_while_it_runs(front: Front, open_gateway: Any, backend: Backend) -> None:
    """The first gateway's reader goes away in the middle; the second sees the rest live, not a token twice."""
    backend.hold, backend.tokens = True, 8
    reply = await front.session.post(front.url + "/v1/chat/completions", json=CHAT, headers={"X-Headrace-Resume": "60"})
    rid = reply.headers["X-Request-Id"]
    await backend.until_running()
    for _ in range(3):
        await backend.step()
    seen = []
    while len(seen) < 4:  # the role and three tokens
        seen += split_events(await reply.content.readuntil(b"\n\n"))
    reply.close()
    await backend.step()  # nobody reads this one
    other = await open_gateway()
    async with other.session.get(
        f"{other.url}/v1/streams/{rid}", headers={"Last-Event-ID": event_id(seen[-1])}
    ) as rest:
        assert rest.status == 200
        later = split_events(await rest.content.readuntil(b"\n\n"))
        backend.hold = False
        later += split_events(await rest.read())
    whole = await other.events("GET", f"/v1/streams/{rid}")
    assert seen + later == whole
    assert backend.cancelled == []


async def test_an_event_id_of_other_tokens_is_refused(front: Front, backend: Backend, raw: Any) -> None:
    events = await front.events("POST", "/v1/completions", json=COMPLETION)
    rid = rid_of(events).removeprefix("cmpl-")
    path = f"/v1/streams/{rid}"
    cases = {
        "999999-00000000": (409, "stream_diverged"),  # ahead of the journal
        "3-00000000": (409, "stream_diverged"),  # in the middle of a frame
        event_id(events[0])[:-1] + ("0" if event_id(events[0])[-1] != "0" else "1"): (409, "stream_diverged"),
        "0.0.0-00000000": (409, "stream_diverged"),  # of another number of choices
        "nonsense": (400, "invalid_request"),
        "1-zz": (400, "invalid_request"),
        "-1-00000000": (400, "invalid_request"),
    }
    for after, (wanted, code) in cases.items():
        status, body, _ = await front.ask("GET", path, headers={"Last-Event-ID": after})
        assert (status, body["error"]["code"]) == (wanted, code), after
    # the journal grew anew with other tokens, as after a restart from an older copy
    journal = backend.bus.keys.journal(rid, 0)
    raw.set(journal, raw.get(journal).replace(b"c0-0", b"c0-X"))
    status, body, _ = await front.ask("GET", path, headers={"Last-Event-ID": event_id(events[2])})
    assert (status, body["error"]["code"]) == (409, "stream_diverged")


async def test_unknown_and_expired(front: Front) -> None:
    rid = "0" * 32
    status, body, _ = await front.ask("GET", f"/v1/streams/{rid}")
    assert (status, body["error"]["code"]) == (404, "not_found")
    status, body, _ = await front.ask("GET", f"/v1/streams/{rid}", headers={"Last-Event-ID": "12-00000000"})
    assert (status, body["error"]["code"]) == (410, "expired")


# ------------------------------------------------------------------ lost publications


async def test_a_lost_publication_is_read_from_the_journal(front: Front, backend: Backend, raw: Any) -> None:
    """The middle of the stream, and its end, are never published; the reader gets every token all the same."""
    backend.hold = True
    request = asyncio.create_task(front.events("POST", "/v1/completions", json=COMPLETION))
    running = await backend.until_running()
    await backend.step()
    await backend.silence(raw)
    await backend.step()
    await backend.step()
    raw.hset(backend.bus.keys.live, running[0].record.rid, front.gateway.name)
    await backend.step()  # shows the gap
    await backend.silence(raw)
    await backend.step()  # the last: only the length tells
    events = await asyncio.wait_for(request, 60)
    assert len(events) == 6
    text = "".join(payload(e)["choices"][0]["text"] for e in events[:-1])
    assert text == "".join(word(0, i) for i in range(5))


async def test_without_the_length_check_a_lost_end_is_never_seen(
    front: Front, backend: Backend, raw: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail: with the check taken out, the same loss leaves the reader without its last token."""

    async def never(outlet: Outlet) -> None:
        pass

    monkeypatch.setattr(Outlet, "_check_silent", never)
    backend.hold = True
    request = asyncio.create_task(front.events("POST", "/v1/completions", json=COMPLETION))
    await backend.until_running()
    for _ in range(4):
        await backend.step()
    await backend.silence(raw)
    await backend.step()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(request, 5 * SILENCE_S)


async def test_a_lost_admission(front: Front, backend: Backend, raw: Any) -> None:
    backend.admit, backend.hold = False, True
    request = asyncio.create_task(front.events("POST", "/v1/chat/completions", json=CHAT))
    await eventually(lambda: backend.entries)
    raw.hset(backend.bus.keys.live, backend.entries[0][1].rid, "")
    await backend.admit_next()
    backend.hold = False
    events = await asyncio.wait_for(request, 60)
    assert payload(events[-2])["usage"]["prompt_tokens"] == 2


async def test_the_subscription_is_cut(front: Front, backend: Backend, raw: Any) -> None:
    backend.hold, backend.tokens = True, 6
    request = asyncio.create_task(front.events("POST", "/v1/completions", json=COMPLETION))
    await backend.until_running()
    await backend.step()
    raw.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    for _ in range(5):
        await backend.step()
    assert len(await asyncio.wait_for(request, 60)) == 7


async def test_a_journal_that_went_back_ends_the_stream_with_an_error(front: Front, backend: Backend, raw: Any) -> None:
    backend.hold = True
    request = asyncio.create_task(front.events("POST", "/v1/completions", json=COMPLETION))
    (running,) = await backend.until_running()
    await backend.step()
    await backend.step()
    running.over = True  # the worker has no say in what follows
    raw.set(backend.bus.keys.journal(running.record.rid, 0), running.frames[0])
    events = await asyncio.wait_for(request, 60)
    assert payload(events[-1])["error"]["code"] == "stream_diverged"
    assert not any(b"[DONE]" in e for e in events)
    await eventually(lambda: backend.cancelled == [running.record.rid])  # nobody can read on


async def test_a_journal_of_a_wrong_type_ends_its_stream_alone(front: Front, backend: Backend, raw: Any) -> None:
    backend.hold = True
    streams = [asyncio.create_task(front.events("POST", "/v1/completions", json=COMPLETION)) for _ in range(2)]
    broken, _ = await backend.until_running(2)
    await backend.step()
    journal = backend.bus.keys.journal(broken.record.rid, 0)
    raw.delete(journal)
    raw.lpush(journal, "x")
    broken.over = True
    done, _ = await asyncio.wait(streams, timeout=60, return_when=asyncio.FIRST_COMPLETED)
    (failed,) = done
    assert payload(failed.result()[-1])["error"]["code"] == "store_failed"
    backend.hold = False
    (other,) = set(streams) - done
    assert len(await asyncio.wait_for(other, 60)) == 6


# ------------------------------------------------------------------ the server


async def test_the_server_is_killed_and_comes_back(tmp_path: Path) -> None:
    """Streams stay open and go on without a gap or a repeat; meanwhile new work is a 503."""
    server = EmbeddedServer(tmp_path).start()
    try:
        async with Backend(server.url, hold=True, tokens=6) as backend, _front(server.url) as front:
            request = asyncio.create_task(front.events("POST", "/v1/completions", json=COMPLETION))
            await backend.until_running()
            for _ in range(2):
                await backend.step()
            assert server.process is not None
            server.process.kill()
            server.process.wait()
            status, body, headers = await front.post("/v1/completions", COMPLETION)
            assert (status, body["error"]["code"], headers["Retry-After"]) == (503, "unavailable", "1")
            server.stop()
            server.start()
            for _ in range(4):
                await backend.step()
            events = await asyncio.wait_for(request, 60)
            texts = [payload(e)["choices"][0]["text"] for e in events[:-1]]
            assert texts == [word(0, i) for i in range(6)]
            assert await front.events("GET", f"/v1/streams/{rid_of(events)}") == events
    finally:
        server.stop()


@asynccontextmanager
async def _front(url: str) -> AsyncIterator[Front]:
    async with Gateway(GatewayConfig(redis_url=url, port=0)) as gateway, aiohttp.ClientSession() as session:
        yield Front(gateway, session)


async def test_a_record_looked_for_before_accept_has_landed_ends_nothing() -> None:
    """After an outage a silence check may come through before the accept that is being repeated."""
    follower = Collector("rid", 1)
    follower.accepted = False
    follower.learn(None)
    assert follower.failed is None
    follower.accepted = True
    follower.learn(None)
    assert isinstance(follower.failed, Expired)


async def test_a_gateway_that_has_read_no_registry_says_so(tmp_path: Path) -> None:
    """It must not call a request gone that it could not look for."""
    url = f"unix://{tmp_path}/nobody.sock"
    models = Models(url, "gateway", HomeBus(url))
    with pytest.raises(Unavailable):
        await models.find_request("rid")
