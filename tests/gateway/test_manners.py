"""What real clients expect of the door: plain events, request ids, lenient where nothing can be misread."""

from __future__ import annotations

import json
import re
from typing import Any

import openai
import pytest

from tests.gateway.backend import MODEL, Backend
from tests.gateway.front import CHAT, COMPLETION, Front, event_id, split_events

PATHS = {"/v1/chat/completions": CHAT, "/v1/completions": COMPLETION}


async def stream(front: Front, path: str, body: Any, headers: dict[str, str] | None = None) -> list[bytes]:
    """The events of a stream exactly as a client that knows nothing of Headrace gets them."""
    async with front.session.post(front.url + path, json=body, headers=headers) as reply:
        assert reply.status == 200, await reply.text()
        return split_events(await reply.read())


@pytest.mark.parametrize("path", PATHS)
async def test_a_plain_stream_has_no_ids(path: str, open_gateway: Any, backend: Backend) -> None:
    """`vllm bench serve` strips "data: " from each event. The server's own grace asks for nothing."""
    front = await open_gateway(resume_grace=30.0)
    *events, done = await stream(front, path, PATHS[path])
    assert done == b"data: [DONE]\n\n"
    for event in events:
        assert event.startswith(b"data: ")
        assert event.count(b"\n") == 2
        assert json.loads(event.removeprefix(b"data: "))["object"]


@pytest.mark.parametrize(
    "header", [("X-Headrace-Resume", "0"), ("X-Headrace-Detached", "true"), ("Last-Event-ID", "0-00000000")]
)
async def test_who_asks_for_resuming_gets_ids(header: tuple[str, str], front: Front, backend: Backend) -> None:
    events = await stream(front, "/v1/completions", COMPLETION, dict([header]))
    assert len(events) == 6
    assert all(event_id(event) for event in events)


# ------------------------------------------------------------------ headers


async def test_every_answer_has_a_request_id_and_a_time(front: Front, backend: Backend) -> None:
    asked: list[tuple[str, str, dict[str, Any]]] = [
        ("POST", "/v1/chat/completions", {"json": {}}),
        ("POST", "/v1/completions", {"data": b"{"}),
        ("POST", "/v1/completions", {"json": {**COMPLETION, "stream": False}}),
        ("POST", "/v1/completions", {"json": COMPLETION}),
        ("GET", "/v1/models", {}),
        ("GET", "/nowhere", {}),
        ("PUT", "/v1/models", {}),
        ("GET", "/health", {}),
    ]
    ids = set()
    for method, path, more in asked:
        _, _, headers = await front.ask(method, path, **more)
        assert re.fullmatch("[0-9a-f]{32}", headers["X-Request-Id"]), path
        assert headers["openai-processing-ms"].isdigit(), path
        ids.add(headers["X-Request-Id"])
    assert len(ids) == len(asked)


async def test_clients_of_openai_find_the_request_id(client: openai.AsyncOpenAI, front: Front) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.completions.create(model=MODEL, prompt="")
    assert caught.value.request_id
    models = await client.models.with_raw_response.list()
    assert models.request_id


async def test_the_fingerprint_is_the_same_whole_streamed_and_resumed(front: Front, backend: Backend) -> None:
    _, whole, headers = await front.post("/v1/chat/completions", {**CHAT, "stream": False, "stream_options": None})
    events = await stream(front, "/v1/chat/completions", CHAT)
    again = await front.events("GET", f"/v1/streams/{headers['X-Request-Id']}")
    found = {json.loads(e.split(b"data: ")[1])["system_fingerprint"] for e in (*events[:-1], *again[:-1])}
    assert found == {whole["system_fingerprint"]}
    assert re.fullmatch("fp_[0-9a-f]{10}", whole["system_fingerprint"])


PREFLIGHT = {
    "Origin": "http://localhost:3000",
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}


async def test_pages_of_other_origins(open_gateway: Any, backend: Backend) -> None:
    front = await open_gateway(cors_origins="https://a.example, http://localhost:3000/")
    path, origin = "/v1/chat/completions", {"Origin": "http://localhost:3000"}
    status, _, headers = await front.ask("OPTIONS", path, headers=PREFLIGHT)
    assert status == 204
    assert headers["Access-Control-Allow-Origin"] == "http://localhost:3000"
    assert "POST" in headers["Access-Control-Allow-Methods"]
    assert headers["Access-Control-Allow-Headers"] == "authorization,content-type"
    for body in ({**CHAT, "stream": False, "stream_options": None}, CHAT, {}):
        _, _, headers = await front.post(path, body, headers=origin)
        assert headers["Access-Control-Allow-Origin"] == "http://localhost:3000"
        assert "X-Request-Id" in headers["Access-Control-Expose-Headers"]
    status, body, headers = await front.ask("OPTIONS", path, headers={**PREFLIGHT, "Origin": "https://b.example"})
    assert (status, body["error"]["code"]) == (403, "origin_not_allowed")
    assert "Access-Control-Allow-Origin" not in headers


async def test_by_default_no_other_origin_may_call(front: Front, backend: Backend) -> None:
    status, _, headers = await front.ask("OPTIONS", "/v1/chat/completions", headers=PREFLIGHT)
    assert status == 403
    assert "Access-Control-Allow-Origin" not in headers
    _, _, headers = await front.ask("GET", "/v1/models", headers={"Origin": "http://localhost:3000"})
    assert "Access-Control-Allow-Origin" not in headers


# ------------------------------------------------------------------ bodies and paths


@pytest.mark.parametrize("path", ["/v1/chat/completions/", "/chat/completions", "/chat/completions/"])
async def test_other_spellings_of_a_path(path: str, front: Front, backend: Backend) -> None:
    assert len(await stream(front, path, CHAT)) == 8


async def test_lists_of_models(front: Front) -> None:
    listed = [(await front.ask("GET", path))[1] for path in ("/v1/models", "/models", "/v1/models/")]
    (model,) = listed[0]["data"]
    assert listed[1] == listed[2] == listed[0]
    assert (model["max_model_len"], model["context_length"]) == (256, 256)
    assert (await front.ask("GET", f"/models/{MODEL}"))[1] == model


LENIENT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "integers with a point": ({"max_tokens": 4.0, "stop_token_ids": [7.0]}, {"max_tokens": 4, "stop_token_ids": [7]}),
    "unknown and null": ({"mirostat": None, "stream_options": {"nothing": None}}, {}),
    "both, beside a bias": ({"x": None, "logit_bias": {"5": 1}, "n": 1.0}, {"logit_bias": {5: 1.0}}),
    "greedy": ({"top_p": 0}, {"temperature": 0.0, "top_p": 1.0}),
    "no beams": ({"use_beam_search": False, "spaces_between_special_tokens": True}, {}),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", LENIENT)
async def test_what_cannot_be_misread(case: str, path: str, front: Front, backend: Backend) -> None:
    fields, sampling = LENIENT[case]
    await stream(front, path, {**PATHS[path], **fields})
    made = backend.running[-1].record.job.sampling
    assert {name: getattr(made, name) for name in sampling} == sampling


async def test_no_alternatives_of_no_logprobs_say_nothing(front: Front, backend: Backend) -> None:
    await stream(front, "/v1/chat/completions", {**CHAT, "logprobs": False, "top_logprobs": 0})
    assert backend.running[-1].record.job.sampling.logprobs is None


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/embeddings", "/embeddings", "/v1/files", "/v1/batches/b1"])
async def test_what_is_not_served_is_a_404_that_says_so(path: str, front: Front) -> None:
    for method in ("GET", "POST"):
        status, body, headers = await front.ask(method, path)
        assert (status, body["error"]["code"]) == (404, "route_not_found")
        assert "not served" in body["error"]["message"]
        assert headers["X-Request-Id"]


async def test_the_rest_stays_refused_by_name(front: Front) -> None:
    for fields, param in (
        ({"mirostat": 2, "max_tokens": 4.0}, "mirostat"),
        ({"max_tokens": 4.5, "mirostat": None}, "max_tokens"),
        ({"seed": "4", "mirostat": None}, "seed"),
        ({"stream_options": {"nothing": 1}}, "stream_options.nothing"),
    ):
        status, body, _ = await front.post("/v1/completions", {**COMPLETION, **fields})
        assert (status, body["error"]["param"]) == (400, param)


@pytest.mark.parametrize(("given", "priority"), [(-3, "interactive"), (0, "standard"), (5, "batch"), (2.0, "batch")])
async def test_an_integer_priority(given: float, priority: str, front: Front, backend: Backend) -> None:
    await stream(front, "/v1/completions", {**COMPLETION, "priority": given})
    assert backend.running[-1].record.job.priority == priority


async def test_tools_that_cannot_be_called(front: Front, backend: Backend) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    for fields in ({"tools": [tool], "tool_choice": "none"}, {"tools": [], "tool_choice": "auto"}):
        assert len(await stream(front, "/v1/chat/completions", {**CHAT, **fields})) == 8


async def test_cache_control_in_a_part(front: Front, backend: Backend) -> None:
    part = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}
    await stream(front, "/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": [part]}]})
    assert backend.running[-1].record.job.messages == [{"role": "user", "content": "a"}]


# ------------------------------------------------------------------ usage


@pytest.mark.parametrize("path", PATHS)
async def test_usage_in_every_chunk(path: str, front: Front, backend: Backend) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *events, last, _ = await stream(front, path, {**PATHS[path], "stream_options": options, "max_tokens": 3})
    usages = [json.loads(event.removeprefix(b"data: "))["usage"] for event in events]
    opening = [0] if "chat" in path else []
    assert [usage["completion_tokens"] for usage in usages] == [*opening, 1, 2, 3]
    assert {usage["prompt_tokens"] for usage in usages} == {2}
    total = json.loads(last.removeprefix(b"data: "))
    assert (total["choices"], total["usage"]["total_tokens"]) == ([], 5)
