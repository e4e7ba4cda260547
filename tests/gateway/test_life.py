"""A request's life as its clients make it: they leave, stall, repeat themselves; it fails, or the gateway leaves.

Over 400 lines: one test for each way in which a request's life can go.
"""

from __future__ import annotations

import asyncio
import gc
import json
import re
import weakref
from typing import Any

import aiohttp
import openai
import pytest

from protocol.errors import Unavailable
from protocol.keys import HOME
from protocol.messages import CommitRow, Frame, Hint, encode
from scheduler.sweep import sweep
from tests.gateway.backend import MODEL, Backend, word
from tests.gateway.front import CHAT, COMPLETION, Front, event_id, payload, rid_of
from tests.waits import eventually

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
    await eventually(lambda: all(r.landed for r in backend.running))
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
    await eventually(lambda: all(r.landed for r in backend.running))
    assert backend.cancelled == []
    status, body, _ = await front.ask("GET", f"/v1/requests/cmpl-{rid}")
    assert (status, body["status"]) == (200, "completed")
    assert body["response"]["choices"][0]["text"] == "".join(word(0, i) for i in range(5))


async def test_a_grace_holds_nothing_of_the_request(front: Front, backend: Backend) -> None:
    """It lasts for up to a day: what waits for its end must not keep the body alive."""
    backend.hold = True
    reply = await front.session.post(
        front.url + "/v1/completions", json=COMPLETION, headers={"X-Headrace-Resume": "3600"}
    )
    await backend.until_running()
    (ask,) = front.gateway.answers.open
    held = weakref.ref(ask), weakref.ref(ask.follower)
    del ask
    reply.close()
    await eventually(lambda: not front.gateway.answers.open)

    def let_go() -> bool:
        gc.collect()
        return all(reference() is None for reference in held)

    await eventually(let_go)
    assert not backend.cancelled, "the grace goes on"


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
    await _send(writer, front, COMPLETION)
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


async def test_a_silent_stream_shows_that_it_lives(
    front: Front, client: openai.AsyncOpenAI, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By comments, which no client takes for an event, wherever they fall."""
    monkeypatch.setattr("gateway.streams.KEEP_ALIVE_LOOKS", 1)
    backend.hold = True
    stream = await client.completions.create(model=MODEL, prompt="x", stream=True)
    reply = await front.session.post(front.url + "/v1/completions", json=COMPLETION)
    await backend.until_running(2)
    assert await asyncio.wait_for(reply.content.readline(), 60) == b":\n"
    await backend.step()
    assert (await asyncio.wait_for(reply.content.readuntil(b"\n\n"), 60)).endswith(b"\n\n")
    assert await asyncio.wait_for(reply.content.readline(), 60) == b":\n"
    backend.hold = False
    assert "".join([c.choices[0].text async for c in stream]) == "".join(word(0, i) for i in range(5))
    await reply.read()


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


async def fail_to_accept(front: Front, body: Any, headers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request whose gateway dies between its claim and accept."""

    async def die(*_: Any, **__: Any) -> None:
        raise Unavailable("it dies here")

    with monkeypatch.context() as patch:
        patch.setattr((await front.gateway.models.get(MODEL)).bus, "accept", die)
        status, _, _ = await front.post("/v1/completions", body, headers=headers)
    assert status == 503


def claimed(raw: Any) -> str:
    """The rid of the only claim."""
    (key,) = raw.scan_iter(f"{HOME}claim:*")
    return str(raw.get(key).split()[1].decode())


async def test_a_claim_without_its_request_is_completed_under_its_rid(
    front: Front, open_gateway: Any, backend: Backend, raw: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers, body = {"Idempotency-Key": "once-3"}, {**COMPLETION, "stream": False}
    await fail_to_accept(front, body, headers, monkeypatch)
    other = await open_gateway()
    answers = [await gateway.post("/v1/completions", body, headers=headers) for gateway in (other, front)]
    assert [(status, sent["X-Request-Id"]) for status, _, sent in answers] == [(200, claimed(raw))] * 2
    assert answers[0][1] == answers[1][1]
    assert len(backend.running) == 1


async def test_a_key_whose_request_was_refused_is_free_for_another_body(
    front: Front, backend: Backend, raw: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers, body = {"Idempotency-Key": "once-5"}, {**COMPLETION, "stream": False}
    await fail_to_accept(front, body, headers, monkeypatch)
    status, _, sent = await front.post("/v1/completions", {**body, "prompt": "other"}, headers=headers)
    assert (status, sent["X-Request-Id"]) == (200, claimed(raw))
    status, refusal, _ = await front.post("/v1/completions", body, headers=headers)
    assert (status, refusal["error"]["code"]) == (409, "idempotency_conflict")


async def test_a_claim_that_nobody_completes_is_freed(
    front: Front, backend: Backend, raw: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers, body = {"Idempotency-Key": "once-4"}, {**COMPLETION, "stream": False}
    home = front.gateway.answers._home
    await fail_to_accept(front, body, headers, monkeypatch)
    first = claimed(raw)
    assert await sweep(home, backend.bus, MODEL) == 0, "not at once"
    assert await backend.bus.void(first)  # a sweep that died before it freed the key
    status, _, sent = await front.post("/v1/completions", body, headers=headers)
    assert (status, sent["Retry-After"]) == (503, "1")
    status, _, sent = await front.post("/v1/completions", body, headers=headers)
    assert (status, sent["X-Request-Id"]) == (200, claimed(raw))
    assert claimed(raw) != first
    (name,) = raw.zrange(f"{HOME}sweep:{MODEL}", 0, -1)
    raw.zadd(f"{HOME}sweep:{MODEL}", {name: 0})
    assert await sweep(home, backend.bus, MODEL) == 0, "its request is kept"
    raw.delete(backend.bus.keys.request(claimed(raw)), backend.bus.keys.idempotency("default", "once-4"))
    raw.zadd(f"{HOME}sweep:{MODEL}", {name: 0})
    assert await sweep(home, backend.bus, MODEL) == 1
    assert not list(raw.scan_iter(f"{HOME}*"))


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
    assert payload(events[-1]) == {
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
    assert [payload(e)["choices"][0]["text"] for e in events[:-1]] == ["a", "", "bc"]


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
    await eventually(lambda: all(r.landed for r in backend.running))
    status, body, _ = await other.ask("GET", f"/v1/requests/{headers['X-Request-Id']}")
    assert (status, body["status"]) == (200, "completed")
    assert backend.cancelled == []


async def test_a_client_that_leaves_while_the_gateway_drains_cancels_too(open_gateway: Any, backend: Backend) -> None:
    backend.hold = True
    front = await open_gateway(drain_timeout=60.0, ready_delay=0.0)
    reply = await front.session.post(front.url + "/v1/completions", json=COMPLETION)
    rid = reply.headers["X-Request-Id"]
    draining = asyncio.create_task(front.gateway.drain())
    await eventually(lambda: front.gateway.answers.draining)
    reply.close()
    await eventually(lambda: backend.cancelled == [rid])
    await asyncio.wait_for(draining, 60)  # nothing is left to wait for


async def test_a_gateway_accepts_without_a_worker_and_tells_of_the_cold_start(
    open_gateway: Any, backend: Backend
) -> None:
    backend.worker_lives = False
    front = await open_gateway()
    await eventually(lambda: _is_led(front))
    model = await front.gateway.models.get(MODEL)
    await eventually(lambda: model.without_workers)
    assert (await front.ask("GET", "/ready"))[0] == 503
    assert (await front.ask("GET", "/accepting"))[:2] == (200, {"accepting": True})
    backend.hold = True
    reply = await front.session.post(front.url + "/v1/completions", json=COMPLETION)
    assert reply.headers["X-Headrace-Waits"] == "no worker serves yet"
    whole = asyncio.create_task(front.post("/v1/completions", {**COMPLETION, "stream": False}))
    await backend.until_running(2)
    backend.worker_lives = True
    await eventually(lambda: _is_ready(front))
    backend.hold = False
    _, _, headers = await asyncio.wait_for(whole, 60)
    assert re.fullmatch(r"cold-start;dur=\d+", headers["Server-Timing"])
    await reply.read()
    _, _, headers = await front.post("/v1/completions", {**COMPLETION, "stream": False})
    assert not {"Server-Timing", "X-Headrace-Waits"} & headers.keys()
    front.gateway.answers.draining = True
    assert (await front.ask("GET", "/accepting"))[:2] == (503, {"accepting": False})
    front.gateway.answers.draining = False


async def _is_ready(front: Front) -> bool:
    return (await front.ask("GET", "/ready"))[0] == 200


async def _is_not_ready(front: Front) -> bool:
    return (await front.ask("GET", "/ready"))[0] == 503


async def test_a_record_that_says_serving_is_not_enough(open_gateway: Any, backend: Backend) -> None:
    """After everything was killed, the dead worker's record still says so, while a new scheduler leads."""
    backend.worker_lives = False
    front = await open_gateway()
    await eventually(lambda: _is_led(front))
    assert (await front.ask("GET", "/ready"))[0] == 503
    backend.worker_lives = True
    await eventually(lambda: _is_ready(front))


async def _is_led(front: Front) -> bool:
    _, body, _ = await front.ask("GET", "/ready")
    return any(model["scheduler"] for model in body["models"].values())


async def test_ready_tells_the_truth(front: Front, backend: Backend) -> None:
    await eventually(lambda: _is_ready(front))
    await backend.bus.heartbeat("w0", backend.gen, "draining")
    await eventually(lambda: _is_not_ready(front))
    (worker,) = await backend.bus.list_workers()
    backend.gen = await backend.bus.register("w0", worker.capacity, "serving")  # a draining one never comes back
    await eventually(lambda: _is_ready(front))
    backend._tasks[0].cancel()  # the leader's beat stops
    await eventually(lambda: _is_not_ready(front))
    status, _, _ = await front.ask("GET", "/health")
    assert status == 200
