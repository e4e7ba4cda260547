"""Streams that lose their reader, their publications or their gateway: what is shown is always the journal."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from gateway.app import Gateway, GatewayConfig
from headrace.embedded import EmbeddedServer
from protocol.bus import CommitRow
from protocol.messages import Frame, Hint, encode
from tests.gateway.backend import MODEL, Backend, word
from tests.gateway.conftest import Front, eventually, split_events

CHAT = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "hi"}],
    "stream": True,
    "stream_options": {"include_usage": True},
}
COMPLETION = {"model": MODEL, "prompt": "hi", "stream": True}
FORMS = {
    "chat": ("/v1/chat/completions", CHAT),
    "chat of two": ("/v1/chat/completions", {**CHAT, "n": 2}),
    "completion": ("/v1/completions", COMPLETION),
    "echo of four": ("/v1/completions", {**COMPLETION, "prompt": ["a", "b"], "n": 2, "echo": True}),
    "logprobs": ("/v1/completions", {**COMPLETION, "logprobs": 1, "return_token_ids": True}),
}


def event_id(event: bytes) -> str | None:
    first = event.split(b"\n")[0]
    return first.removeprefix(b"id: ").decode() if first.startswith(b"id: ") else None


def rid_of(events: list[bytes]) -> str:
    return str(json.loads(events[0].split(b"data: ", 1)[1])["id"])


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
    journal = front.gateway.models._open[MODEL].bus.keys.journal(rid, 0)
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
    text = "".join(json.loads(e.split(b"data: ")[1])["choices"][0]["text"] for e in events[:-1])
    assert text == "".join(word(0, i) for i in range(5))


async def test_a_lost_admission(front: Front, backend: Backend, raw: Any) -> None:
    backend.admit, backend.hold = False, True
    request = asyncio.create_task(front.events("POST", "/v1/chat/completions", json=CHAT))
    await eventually(lambda: backend.entries)
    raw.hset(backend.bus.keys.live, backend.entries[0][1].rid, "")
    await backend.admit_next()
    backend.hold = False
    events = await asyncio.wait_for(request, 60)
    assert json.loads(events[-2].split(b"data: ")[1])["usage"]["prompt_tokens"] == 2


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
    raw.set(backend.bus.keys.journal(running.record.rid, 0), running.frames[0])
    events = await asyncio.wait_for(request, 60)
    assert json.loads(events[-1].split(b"data: ")[1])["error"]["code"] == "stream_diverged"
    assert not any(b"[DONE]" in e for e in events)


# ------------------------------------------------------------------ readers that go away


async def test_a_closed_stream_cancels_at_once(front: Front, backend: Backend) -> None:
    backend.hold = True
    reply = await front.session.post(front.url + "/v1/completions", json=COMPLETION)
    rid = reply.headers["X-Request-Id"]
    await backend.until_running()
    await backend.step()
    await reply.content.readuntil(b"\n\n")
    reply.close()
    await eventually(lambda: backend.cancelled == [rid])
    await eventually(lambda: all(r.over for r in backend.running))
    status, body, _ = await front.ask("GET", f"/v1/requests/{rid}")
    assert (status, body["status"]) == (200, "cancelled")


@pytest.mark.parametrize("admit", [True, False], ids=["running", "queued"])
async def test_a_client_that_waits_for_a_whole_answer_and_leaves_cancels(
    admit: bool, front: Front, backend: Backend
) -> None:
    backend.hold, backend.admit = True, admit
    body = {**COMPLETION, "stream": False}
    request = asyncio.create_task(front.post("/v1/completions", body))
    rid = (await eventually(lambda: backend.entries or [(0, r.record) for r in backend.running]))[0][1].rid
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    await eventually(lambda: backend.cancelled == [rid])


@pytest.mark.parametrize(
    "kept", [{"headers": {"X-Headrace-Detached": "true"}}, {"body": {"background": True}}], ids=["header", "body"]
)
async def test_a_detached_request_outlives_its_client(kept: dict, front: Front, backend: Backend) -> None:
    backend.hold = True
    reply = await front.session.post(
        front.url + "/v1/completions", json={**COMPLETION, **kept.get("body", {})}, headers=kept.get("headers")
    )
    rid = reply.headers["X-Request-Id"]
    await backend.until_running()
    reply.close()
    await eventually(lambda: not front.gateway.answers.open)
    backend.hold = False
    await eventually(lambda: all(r.over for r in backend.running))
    assert backend.cancelled == []
    status, body, _ = await front.ask("GET", f"/v1/requests/cmpl-{rid}")
    assert (status, body["status"]) == (200, "completed")
    assert body["response"]["choices"][0]["text"] == "".join(word(0, i) for i in range(5))


async def test_a_grace_that_nobody_uses_ends(front: Front, backend: Backend) -> None:
    backend.hold = True
    reply = await front.session.post(
        front.url + "/v1/completions", json=COMPLETION, headers={"X-Headrace-Resume": "0.3"}
    )
    rid = reply.headers["X-Request-Id"]
    reply.close()
    await eventually(lambda: backend.cancelled == [rid])


async def test_a_second_reader_keeps_the_request(front: Front, open_gateway: Any, backend: Backend) -> None:
    """Two readers of one stream, on two gateways: the first one's leaving cancels nothing, the second one's does."""
    backend.hold = True
    first = await front.session.post(front.url + "/v1/completions", json=COMPLETION)
    rid = first.headers["X-Request-Id"]
    other = await open_gateway()
    second = await other.session.get(f"{other.url}/v1/streams/{rid}")
    assert second.status == 200
    first.close()
    await eventually(lambda: not front.gateway.answers.open)
    await backend.until_running()
    await backend.step()
    await second.content.readuntil(b"\n\n")
    assert backend.cancelled == []
    second.close()
    await eventually(lambda: backend.cancelled == [rid])


async def test_delete_cancels(front: Front, backend: Backend) -> None:
    backend.hold = True
    request = asyncio.create_task(front.post("/v1/completions", {**COMPLETION, "stream": False}))
    (running,) = await backend.until_running()
    await backend.step()
    rid = running.record.rid
    status, body, _ = await front.ask("GET", f"/v1/requests/{rid}")
    assert (status, body["status"], body["response"]) == (200, "running", None)
    status, body, _ = await front.ask("DELETE", f"/v1/requests/{rid}")
    assert (status, body["cancelled"]) == (200, True)
    status, body, _ = await asyncio.wait_for(request, 60)
    assert (status, body["choices"][0]["finish_reason"], body["choices"][0]["text"]) == (200, "abort", word(0, 0))
    status, body, _ = await front.ask("DELETE", f"/v1/requests/{rid}")
    assert (status, body["cancelled"]) == (200, False)


# ------------------------------------------------------------------ slow readers


async def test_a_slow_reader_gets_everything(open_gateway: Any, backend: Backend) -> None:
    """While its socket is full its rows stay in the journal; nothing piles up in the gateway."""
    text = "x" * 40000
    backend.script = lambda record, choice, index: Frame(index, text, "stop" if index == 249 else None)
    front = await open_gateway()
    reader, writer = await asyncio.open_connection("127.0.0.1", front.gateway.port, limit=2**12)
    await _send(writer, front, COMPLETION)
    await eventually(lambda: backend.running and backend.running[0].emitted > 180)
    (ask,) = front.gateway.answers.open
    assert ask.follower._held < 1 << 20
    assert ask.follower._transport.get_write_buffer_size() < 1 << 20
    raw = b""
    while not raw.endswith(b"0\r\n\r\n"):
        raw += await asyncio.wait_for(reader.read(1 << 20), 60)
    assert raw.count(text.encode()) == 250
    assert raw.count(b"[DONE]") == 1
    writer.close()


async def test_a_stalled_reader_is_dropped_and_can_resume(open_gateway: Any, backend: Backend) -> None:
    text = "x" * 40000
    backend.script = lambda record, choice, index: Frame(index, text, "stop" if index == 249 else None)
    front = await open_gateway(stall_timeout=0.5)
    _, writer = await asyncio.open_connection("127.0.0.1", front.gateway.port, limit=2**12)
    await _send(writer, front, {**COMPLETION, "background": True})
    await eventually(lambda: front.gateway.answers.open)
    rid = next(iter(front.gateway.answers.open)).follower.rid
    await eventually(lambda: not front.gateway.answers.open)  # dropped
    writer.close()
    events = await asyncio.wait_for(front.events("GET", f"/v1/streams/{rid}"), 120)
    assert len(events) == 251
    assert backend.cancelled == []


async def _send(writer: asyncio.StreamWriter, front: Front, body: dict[str, Any]) -> None:
    raw = json.dumps(body).encode()
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
    writer.write(b"Content-Length: %d\r\n\r\n" % len(raw) + raw)
    await writer.drain()


# ------------------------------------------------------------------ idempotency


async def test_the_same_key_and_body_is_the_same_request(front: Front, open_gateway: Any, backend: Backend) -> None:
    backend.hold = True
    headers = {"Idempotency-Key": "once-1"}
    body = {**COMPLETION, "stream": False}
    other = await open_gateway()
    first = asyncio.create_task(front.post("/v1/completions", body, headers=headers))
    await backend.until_running()
    await backend.step()
    second = asyncio.create_task(other.post("/v1/completions", body, headers=headers))
    await eventually(lambda: other.gateway.answers.open)
    backend.hold = False
    answers = await asyncio.wait_for(asyncio.gather(first, second), 60)
    assert [status for status, _, _ in answers] == [200, 200]
    assert answers[0][1] == answers[1][1]
    third = await front.post("/v1/completions", body, headers=headers)  # also after its end
    assert third[1] == answers[0][1]
    assert len(backend.running) == 1
    status, refusal, _ = await front.post("/v1/completions", {**body, "prompt": "other"}, headers=headers)
    assert (status, refusal["error"]["code"]) == (409, "idempotency_conflict")


async def test_streams_join_too(front: Front, backend: Backend) -> None:
    headers = {"Idempotency-Key": "once-2"}
    first = await front.events("POST", "/v1/chat/completions", json=CHAT, headers=headers)
    second = await front.events("POST", "/v1/chat/completions", json=CHAT, headers=headers)
    assert first == second
    assert len(backend.running) == 1


# ------------------------------------------------------------------ failures


async def test_a_failure_before_the_first_token_is_an_http_error(front: Front, backend: Backend) -> None:
    backend.refuse = ("context_length_exceeded", "too long: 300 of 256 tokens", "prompt")
    for stream in (False, True):
        status, body, headers = await front.post("/v1/completions", {**COMPLETION, "stream": stream})
        assert status == 400
        assert body["error"] == {
            "message": "too long: 300 of 256 tokens",
            "type": "invalid_request_error",
            "param": "prompt",
            "code": "context_length_exceeded",
        }
        assert headers["X-Request-Id"]


async def test_a_failure_later_is_an_error_event(client: openai.AsyncOpenAI, front: Front, backend: Backend) -> None:
    def script(record: Any, choice: int, index: int) -> Frame:
        if index < 2:
            return Frame(index, "a")
        return Frame(None, "", "error", {"code": "engine_failed", "message": "it broke", "param": None})

    backend.script = script
    events = await front.events("POST", "/v1/completions", json=COMPLETION)
    assert json.loads(events[-1].split(b"data: ")[1]) == {
        "error": {"message": "it broke", "type": "server_error", "param": None, "code": "engine_failed"}
    }
    assert len(events) == 3
    again = await front.events("GET", f"/v1/streams/{rid_of(events)}", headers={"Last-Event-ID": event_id(events[0])})
    assert again == events[1:]
    stream = await client.completions.create(model=MODEL, prompt="x", stream=True)
    with pytest.raises(openai.APIError, match="it broke"):
        async for _ in stream:
            pass
    status, body, _ = await front.post("/v1/completions", {**COMPLETION, "stream": False})
    assert (status, body["error"]["code"]) == (500, "engine_failed")
    status, body, _ = await front.ask("GET", f"/v1/requests/{rid_of(events)}")
    assert (body["status"], body["error"]["code"]) == ("failed", "engine_failed")


async def test_a_deadline_in_the_queue_is_a_504(front: Front, backend: Backend) -> None:
    backend.script = lambda record, choice, index: Frame(None, "", "deadline")
    status, body, _ = await front.post("/v1/completions", {**COMPLETION, "stream": False, "timeout_s": 1})
    assert (status, body["error"]["code"]) == (504, "deadline_exceeded")
    backend.script = lambda record, choice, index: Frame(3, "a") if index == 0 else Frame(None, "", "deadline")
    status, body, _ = await front.post("/v1/completions", {**COMPLETION, "stream": False, "timeout_s": 1})
    assert (status, body["choices"][0]["finish_reason"], body["choices"][0]["text"]) == (200, "deadline", "a")


async def test_several_frames_in_one_row_are_several_events(front: Front, backend: Backend, raw: Any) -> None:
    backend.hold = True
    request = asyncio.create_task(front.events("POST", "/v1/completions", json=COMPLETION))
    (running,) = await backend.until_running()
    frames = [Frame(1, "a"), Frame(2, ""), Frame(3, "bc", "stop")]
    row = CommitRow(running.record.rid, 0, 1, 0, b"".join(map(encode, frames)), "stop")
    running.over = True
    await backend.bus.commit("w0", backend.epoch, backend.gen, [row], Hint("w0", backend.gen, 9))
    events = await asyncio.wait_for(request, 60)
    assert [json.loads(e.split(b"data: ")[1])["choices"][0]["text"] for e in events[:-1]] == ["a", "", "bc"]


# ------------------------------------------------------------------ leaving


async def test_drain(open_gateway: Any, backend: Backend) -> None:
    """/ready turns first, what can end ends, and what cannot is broken off so that it can be resumed."""
    backend.hold = True
    front = await open_gateway(drain_timeout=1.0, ready_delay=0.3)
    await eventually(lambda: _is_ready(front))
    reply = await front.session.post(front.url + "/v1/completions", json=COMPLETION)
    rid = reply.headers["X-Request-Id"]
    whole = asyncio.create_task(front.post("/v1/completions", {**COMPLETION, "stream": False}))
    await backend.until_running(2)
    draining = asyncio.create_task(front.gateway.drain())
    await eventually(lambda: _is_not_ready(front))
    await draining
    with pytest.raises(aiohttp.ClientPayloadError):  # never taken for the end of the stream
        await reply.read()
    status, body, headers = await asyncio.wait_for(whole, 60)
    assert (status, body["error"]["code"]) == (503, "unavailable")
    backend.hold = False
    other = await open_gateway()
    events = await other.events("GET", f"/v1/streams/{rid}")
    assert len(events) == 6
    await eventually(lambda: all(r.over for r in backend.running))
    status, body, _ = await other.ask("GET", f"/v1/requests/{headers['X-Request-Id']}")
    assert (status, body["status"]) == (200, "completed")
    assert backend.cancelled == []


async def _is_ready(front: Front) -> bool:
    return (await front.ask("GET", "/ready"))[0] == 200


async def _is_not_ready(front: Front) -> bool:
    return (await front.ask("GET", "/ready"))[0] == 503


async def test_ready_tells_the_truth(front: Front, backend: Backend) -> None:
    await eventually(lambda: _is_ready(front))
    await backend.bus.pulse("w0", backend.gen, "draining")
    await eventually(lambda: _is_not_ready(front))
    await backend.bus.pulse("w0", backend.gen, "serving")
    await eventually(lambda: _is_ready(front))
    backend._tasks[0].cancel()  # the leader's beat stops
    await eventually(lambda: _is_not_ready(front))
    status, _, _ = await front.ask("GET", "/health")
    assert status == 200


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
            texts = [json.loads(e.split(b"data: ")[1])["choices"][0]["text"] for e in events[:-1]]
            assert texts == [word(0, i) for i in range(6)]
            assert await front.events("GET", f"/v1/streams/{rid_of(events)}") == events
    finally:
        server.stop()


@asynccontextmanager
async def _front(url: str) -> AsyncIterator[Front]:
    async with Gateway(GatewayConfig(redis_url=url, port=0)) as gateway, aiohttp.ClientSession() as session:
        yield Front(gateway, session)
