"""What must be refused, one row per fault: over HTTP, by the status and the field that the error names.

Over 400 lines: most are the table of faults.
"""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.edge import MAX_BODY, decode_body
from gateway.openai import bodies
from protocol.errors import Overloaded, RequestError
from protocol.messages import Job, ModelCard
from tests.gateway.backend import MAX_LEN, MODEL, VOCAB, Backend
from tests.gateway.front import Front

SECRET = "a prompt that no error may repeat"
COMPLETION = {"model": MODEL, "prompt": SECRET}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": SECRET}]}
JSON = {"Content-Type": "application/json"}
HUGE = 2**63


def schema_format(json_schema: dict[str, Any]) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": json_schema}}


# (fields, status, param, code)
ANY_ENDPOINT: list[tuple[dict[str, Any], int, str | None, str]] = [
    ({"model": ""}, 400, "model", "invalid_request"),
    ({"model": "test/other"}, 404, "model", "model_not_found"),
    ({"model": 3}, 400, "model", "invalid_request"),
    ({"max_tokens": -1}, 400, "max_tokens", "invalid_request"),
    ({"max_tokens": 1.5}, 400, "max_tokens", "invalid_request"),
    ({"max_tokens": 1e300}, 400, "max_tokens", "invalid_request"),
    ({"max_tokens": "5"}, 400, "max_tokens", "invalid_request"),
    ({"max_tokens": True}, 400, "max_tokens", "invalid_request"),
    ({"max_tokens": 10**400}, 400, "max_tokens", "invalid_request"),
    ({"min_tokens": 5, "max_tokens": 4}, 400, "min_tokens", "invalid_request"),
    ({"n": 0}, 400, "n", "invalid_request"),
    ({"n": 9}, 400, "n", "invalid_request"),
    ({"temperature": -0.1}, 400, "temperature", "invalid_request"),
    ({"temperature": 2.1}, 400, "temperature", "invalid_request"),
    ({"temperature": "hot"}, 400, "temperature", "invalid_request"),
    ({"top_p": -0.1}, 400, "top_p", "invalid_request"),
    ({"top_p": 1.1}, 400, "top_p", "invalid_request"),
    ({"top_k": -2}, 400, "top_k", "invalid_request"),
    ({"min_p": -0.1}, 400, "min_p", "invalid_request"),
    ({"min_p": 1.1}, 400, "min_p", "invalid_request"),
    ({"frequency_penalty": 2.1}, 400, "frequency_penalty", "invalid_request"),
    ({"presence_penalty": -2.1}, 400, "presence_penalty", "invalid_request"),
    ({"repetition_penalty": 0}, 400, "repetition_penalty", "invalid_request"),
    ({"stop": ["a"] * 17}, 400, "stop", "invalid_request"),
    ({"stop": ""}, 400, "stop", "invalid_request"),
    ({"stop": ["a", ""]}, 400, "stop", "invalid_request"),
    ({"stop": "x" * 257}, 400, "stop", "invalid_request"),
    ({"stop": [3]}, 400, "stop[0]", "invalid_request"),
    ({"stop_token_ids": [VOCAB]}, 400, "stop_token_ids", "invalid_request"),
    ({"stop_token_ids": [-1]}, 400, "stop_token_ids", "invalid_request"),
    ({"stop_token_ids": [1] * 65}, 400, "stop_token_ids", "invalid_request"),
    ({"allowed_token_ids": []}, 400, "allowed_token_ids", "invalid_request"),
    ({"allowed_token_ids": [VOCAB]}, 400, "allowed_token_ids", "invalid_request"),
    ({"allowed_token_ids": [1], "guided_regex": "a"}, 400, "allowed_token_ids", "invalid_request"),
    ({"allowed_token_ids": [3], "stop_token_ids": [3], "min_tokens": 1}, 400, "allowed_token_ids", "no_token_left"),
    ({"logit_bias": {"5": 101}}, 400, "logit_bias", "invalid_request"),
    ({"logit_bias": {str(VOCAB): 1}}, 400, "logit_bias", "invalid_request"),
    ({"logit_bias": {"-1": 1}}, 400, "logit_bias", "invalid_request"),
    ({"logit_bias": {"five": 1}}, 400, "logit_bias", "invalid_request"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, 400, "logit_bias", "invalid_request"),
    ({"seed": HUGE}, 400, "seed", "invalid_request"),
    ({"seed": -HUGE - 1}, 400, "seed", "invalid_request"),
    ({"seed": 1.5}, 400, "seed", "invalid_request"),
    ({"stream": "yes"}, 400, "stream", "invalid_request"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options", "invalid_request"),
    ({"stream": True, "stream_options": {"usage": True}}, 400, "stream_options.usage", "unknown_parameter"),
    ({"priority": "urgent"}, 400, "priority", "invalid_request"),
    ({"priority": 1.5}, 400, "priority", "invalid_request"),
    ({"use_beam_search": True}, 400, "use_beam_search", "unsupported_parameter"),
    ({"timeout_s": 0}, 400, "timeout_s", "invalid_request"),
    ({"timeout_s": -5}, 400, "timeout_s", "invalid_request"),
    ({"request_id": "no spaces"}, 400, "request_id", "invalid_request"),
    ({"cache_salt": ""}, 400, "cache_salt", "invalid_request"),
    ({"response_format": {"type": "xml"}}, 400, "response_format.type", "invalid_request"),
    ({"response_format": "json"}, 400, "response_format.type", "invalid_request"),
    ({"response_format": {"type": "json_object", "a": 1}}, 400, "response_format.a", "unknown_parameter"),
    ({"response_format": {"type": "json_schema"}}, 400, "response_format.json_schema", "invalid_request"),
    (schema_format({"schema": 3}), 400, "response_format.json_schema.schema", "invalid_request"),
    (schema_format({"schema": {}, "strict": 1}), 400, "response_format.json_schema.strict", "invalid_request"),
    (schema_format({"schema": {}, "x": 1}), 400, "response_format.json_schema.x", "unknown_parameter"),
    (schema_format({"schema": {"not": {}}}), 400, "response_format.json_schema.schema", "structure_not_supported"),
    ({"structured_outputs": {"regexp": "a"}}, 400, "structured_outputs.regexp", "unknown_parameter"),
    ({"structured_outputs": {}}, 400, "structured_outputs", "invalid_request"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, 400, "structured_outputs", "invalid_request"),
    ({"structured_outputs": {"regex": 3}}, 400, "structured_outputs.regex", "invalid_request"),
    ({"structured_outputs": {"regex": "a" * 65537}}, 400, "structured_outputs.regex", "invalid_request"),
    ({"structured_outputs": {"choice": []}}, 400, "structured_outputs.choice", "invalid_request"),
    ({"structured_outputs": {"choice": [1]}}, 400, "structured_outputs.choice", "invalid_request"),
    ({"guided_json": {"uniqueItems": True}}, 400, "guided_json", "structure_not_supported"),
    ({"guided_json": "{"}, 400, "guided_json", "invalid_request"),
    ({"guided_regex": "a", "guided_choice": ["a"]}, 400, "guided_choice", "invalid_request"),
    ({"bad_words": ["a"] * 65}, 400, "bad_words", "invalid_request"),
    ({"bad_words": [""]}, 400, "bad_words", "invalid_request"),
    ({"bad_words": ["a" * 129]}, 400, "bad_words", "invalid_request"),
    ({"bad_words": "a"}, 400, "bad_words", "invalid_request"),
    ({"logprob_token_ids": [1]}, 400, "logprob_token_ids", "invalid_request"),
    ({"truncate_prompt_tokens": "5"}, 400, "truncate_prompt_tokens", "invalid_request"),
    ({"prompt_logprobs": 21}, 400, "prompt_logprobs", "invalid_request"),
    ({"prompt_logprobs": -1}, 400, "prompt_logprobs", "invalid_request"),
    ({"prompt_logprobs": 1, "stream": True}, 400, "prompt_logprobs", "invalid_request"),
    ({"frequency": 1}, 400, "frequency", "unknown_parameter"),
]

OF_COMPLETIONS: list[tuple[dict[str, Any], int, str | None, str]] = [
    ({"prompt": None}, 400, "prompt", "invalid_request"),
    ({"prompt": ""}, 400, "prompt", "invalid_request"),
    ({"prompt": []}, 400, "prompt", "invalid_request"),
    ({"prompt": [""]}, 400, "prompt", "invalid_request"),
    ({"prompt": [[]]}, 400, "prompt", "invalid_request"),
    ({"prompt": [1, "a"]}, 400, "prompt", "invalid_request"),
    ({"prompt": ["a", [1]]}, 400, "prompt", "invalid_request"),
    ({"prompt": [-1]}, 400, "prompt", "invalid_request"),
    ({"prompt": [VOCAB]}, 400, "prompt", "invalid_request"),
    ({"prompt": [10**30]}, 400, "prompt", "invalid_request"),
    ({"prompt": [True]}, 400, "prompt[0]", "invalid_request"),
    ({"prompt": [1.5]}, 400, "prompt[0]", "invalid_request"),
    ({"prompt": {"text": "a"}}, 400, "prompt", "invalid_request"),
    ({"prompt": ["a"] * 65}, 400, "prompt", "invalid_request"),
    ({"prompt": ["a"] * 33, "n": 4}, 400, "n", "invalid_request"),
    ({"prompt": [1] * MAX_LEN}, 400, "prompt", "context_length_exceeded"),
    ({"prompt": [1] * 10, "max_tokens": MAX_LEN}, 400, "prompt", "context_length_exceeded"),
    ({"logprobs": 21}, 400, "logprobs", "invalid_request"),
    ({"logprobs": -1}, 400, "logprobs", "invalid_request"),
    ({"logprobs": True}, 400, "logprobs", "invalid_request"),
    ({"best_of": 2}, 400, "best_of", "unsupported_parameter"),
    ({"best_of": 1, "n": 2}, 400, "best_of", "invalid_request"),
    ({"prompt": [1], "suffix": "end"}, 400, "suffix", "invalid_request"),
    ({"logprobs": 1, "logprob_token_ids": []}, 400, "logprob_token_ids", "invalid_request"),
    ({"logprobs": 1, "logprob_token_ids": [VOCAB]}, 400, "logprob_token_ids", "invalid_request"),
    ({"logprobs": 1, "logprob_token_ids": [1] * 129}, 400, "logprob_token_ids", "invalid_request"),
    ({"echo": True, "truncate_prompt_tokens": 5}, 400, "echo", "invalid_request"),
    ({"truncate_prompt_tokens": 0}, 400, "truncate_prompt_tokens", "invalid_request"),
    ({"truncate_prompt_tokens": -2}, 400, "truncate_prompt_tokens", "invalid_request"),
    ({"echo": True, "logprobs": 21}, 400, "logprobs", "invalid_request"),
    ({"messages": []}, 400, "messages", "unknown_parameter"),
]

TEXT_PART = {"type": "text", "text": "a"}
IMAGE = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/secret.png"}}
FILE = {"type": "file", "file": {"file_id": "f"}}
TOOL = {"type": "function", "function": {"name": "f"}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content, **more}]}


OF_CHAT: list[tuple[dict[str, Any], int, str | None, str]] = [
    ({"messages": None}, 400, "messages", "invalid_request"),
    ({"messages": []}, 400, "messages", "invalid_request"),
    ({"messages": "hi"}, 400, "messages", "invalid_request"),
    ({"messages": ["hi"]}, 400, "messages[0]", "invalid_request"),
    ({"messages": [{"content": "hi"}]}, 400, "messages[0].role", "invalid_request"),
    ({"messages": [{"role": "robot", "content": "hi"}]}, 400, "messages[0].role", "invalid_request"),
    ({"messages": [{"role": "tool"}]}, 400, "messages[0].content", "invalid_request"),
    ({"messages": [{"role": "user", "content": "a"}] * 1025}, 400, "messages", "invalid_request"),
    (user(None), 400, "messages[0].content", "invalid_request"),
    (user([]), 400, "messages[0].content", "invalid_request"),
    (user(3), 400, "messages[0].content", "invalid_request"),
    (user([TEXT_PART, IMAGE]), 400, "messages[0].content[1].type", "unsupported_parameter"),
    (user([FILE]), 400, "messages[0].content[0].type", "unsupported_parameter"),
    (user([{"type": "text"}]), 400, "messages[0].content[0].text", "invalid_request"),
    (user("a", tool_calls=[{}]), 400, "messages[0].tool_calls", "invalid_request"),
    (user("a", tool_calls=[CALL]), 400, "messages[0].tool_calls", "invalid_request"),
    (
        user("a", role="assistant", tool_calls=[CALL | {"type": "custom"}]),
        400,
        "messages[0].tool_calls[0].type",
        "unsupported_parameter",
    ),
    (user("a", audio={"id": "x"}), 400, "messages[0].audio", "unsupported_parameter"),
    ({"prompt": "hi"}, 400, "prompt", "unknown_parameter"),
    ({"logprobs": 3}, 400, "logprobs", "invalid_request"),
    ({"top_logprobs": 3}, 400, "top_logprobs", "invalid_request"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "invalid_request"),
    ({"logprobs": True, "top_logprobs": -1}, 400, "top_logprobs", "invalid_request"),
    ({"max_completion_tokens": -1}, 400, "max_completion_tokens", "invalid_request"),
    ({"max_completion_tokens": 3, "max_tokens": 4}, 400, "max_tokens", "invalid_request"),
    ({"tools": [TOOL]}, 400, "tools", "unsupported_parameter"),
    ({"tools": [{"type": "web_search"}]}, 400, "tools[0].type", "unsupported_parameter"),
    ({"tools": [{"type": "function"}]}, 400, "tools[0].function", "invalid_request"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, 400, "tools[0].function.name", "invalid_request"),
    ({"tools": [TOOL, TOOL]}, 400, "tools", "invalid_request"),
    (
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
        400,
        "tool_choice",
        "invalid_request",
    ),
    ({"tool_choice": "required"}, 400, "tool_choice", "invalid_request"),
    ({"tool_choice": "perhaps"}, 400, "tool_choice", "invalid_request"),
    ({"add_special_tokens": True}, 400, "add_special_tokens", "unsupported_parameter"),
    (
        {"continue_final_message": True, "add_generation_prompt": True},
        400,
        "continue_final_message",
        "invalid_request",
    ),
    ({"thinking_token_budget": 5}, 400, "thinking_token_budget", "unsupported_parameter"),
    ({"functions": [{"name": "f"}]}, 400, "functions", "unsupported_parameter"),
    ({"function_call": "auto"}, 400, "function_call", "unsupported_parameter"),
    ({"modalities": ["text", "audio"]}, 400, "modalities", "unsupported_parameter"),
    ({"audio": {"voice": "v"}}, 400, "audio", "unsupported_parameter"),
    ({"reasoning_effort": "huge"}, 400, "reasoning_effort", "invalid_request"),
    ({"web_search_options": {}}, 400, "web_search_options", "unsupported_parameter"),
    ({"chat_template": "{{ x }}"}, 400, "chat_template", "unknown_parameter"),
    ({"chat_template_kwargs": {"chat_template": "x"}}, 400, "chat_template_kwargs.chat_template", "invalid_request"),
    ({"chat_template_kwargs": [1]}, 400, "chat_template_kwargs", "invalid_request"),
]

TABLE = [
    *[("/v1/completions", COMPLETION, *row) for row in (*ANY_ENDPOINT, *OF_COMPLETIONS)],
    *[("/v1/chat/completions", CHAT, *row) for row in (*ANY_ENDPOINT, *OF_CHAT)],
    ("/generate", {"prompt": SECRET}, {"prompt": None}, 400, "prompt", "invalid_request"),
    ("/generate", {"prompt": SECRET}, {"prompt": ["a"]}, 400, "prompt", "invalid_request"),
    ("/generate", {"prompt": SECRET}, {"max_tokens": -1}, 400, "max_tokens", "invalid_request"),
    ("/generate", {"prompt": SECRET}, {"top_p": 1}, 400, "top_p", "unknown_parameter"),
    ("/generate", {"prompt": SECRET}, {"model": "test/other"}, 404, "model", "model_not_found"),
    ("/tokenize", {"prompt": SECRET}, {"prompt": None}, 400, "prompt", "invalid_request"),
    ("/detokenize", {"tokens": [1]}, {"tokens": None}, 400, "tokens", "invalid_request"),
    ("/detokenize", {"tokens": [1]}, {"tokens": [-1]}, 400, "tokens", "invalid_request"),
    ("/detokenize", {"tokens": [1]}, {"tokens": [VOCAB]}, 400, "tokens", "invalid_request"),
]  # fmt: skip


def check_error(body: Any, status: int, param: str | None, code: str) -> None:
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (param, code), error
    assert isinstance(error["message"], str)
    assert error["message"]
    assert SECRET not in error["message"]


async def test_the_table_of_fields(front: Front, backend: Backend) -> None:
    wrong = []
    for path, base, fields, status, param, code in TABLE:
        got, body, _ = await front.post(path, {**base, **fields})
        try:
            assert got == status
            check_error(body, status, param, code)
        except AssertionError:
            wrong.append((path, str(fields)[:80], got, body))
    assert wrong == []
    assert backend.running == []


BODIES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "blank": (b"  \n", "empty"),
    "cut off": (b'{"model": "m"', "JSON"),
    "two values": (b'{"model": "m"} {}', "JSON"),
    "array": (b"[1]", "object"),
    "string": (b'"hi"', "object"),
    "null": (b"null", "object"),
    "bad UTF-8": (b'{"prompt": "\xff"}', "UTF-8"),
    "surrogate in UTF-8": (b'{"prompt": "\xed\xa0\x80"}', "UTF-8"),
    "lone surrogate": (b'{"prompt": "\\ud800"}', "JSON"),
    "lone low surrogate": (b'{"prompt": "a\\udc00b"}', "JSON"),
    "NaN": (b'{"temperature": NaN}', "JSON"),
    "Infinity": (b'{"temperature": -Infinity}', "JSON"),
    "byte order mark": (b"\xef\xbb\xbf{}", "JSON"),
    "UTF-16": ('{"model": "m"}'.encode("utf-16"), "UTF-8"),
    "nesting": (b'{"metadata": ' + b"[" * 32 + b"]" * 32 + b"}", "32 levels"),
    "deep nesting": (b'{"metadata": ' + b'{"a":' * 50000 + b"1" + b"}" * 50000 + b"}", "32 levels"),
    "a string of quotes without an end": (
        b'{"metadata": ' + b"[]" * 33 + b'"' + b'\\"' * (MAX_BODY // 2 - 100),
        "JSON",
    ),
    "huge number": (b'{"temperature": 1e400}', "out of range"),
}


@pytest.mark.parametrize("name", BODIES)
async def test_bodies(name: str, front: Front) -> None:
    raw, told = BODIES[name]
    status, body, _ = await front.ask("POST", "/v1/completions", data=raw, headers=JSON)
    assert status == 400
    assert told in body["error"]["message"]
    assert set(body["error"]) == {"message", "type", "param", "code"}


async def test_nesting_counts_levels_not_brackets(front: Front) -> None:
    """Brackets within strings, and many shallow ones, are no nesting."""
    for metadata in ({"a": "[" * 100}, {"a": '\\"[{' * 50}, {"a": [[]] * 100}):
        status, _, _ = await front.post("/v1/completions", {**COMPLETION, "metadata": metadata, "max_tokens": 1})
        assert status == 200
    nested: Any = 1
    for _ in range(31):
        nested = [nested]
    status, _, _ = await front.post("/v1/completions", {**COMPLETION, "metadata": nested, "max_tokens": 1})
    assert status == 200


async def test_headers(front: Front) -> None:
    raw = json.dumps(COMPLETION).encode()
    cases: list[tuple[dict[str, str], int, str]] = [
        ({"Content-Type": "text/plain"}, 415, "unsupported_media_type"),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415, "unsupported_media_type"),
        ({"Content-Type": "application/json; charset=latin-1"}, 415, "unsupported_media_type"),
        ({**JSON, "Content-Encoding": "gzip"}, 415, "unsupported_media_type"),
        ({**JSON, "Content-Encoding": "identity"}, 415, "unsupported_media_type"),
        ({**JSON, "Idempotency-Key": "no spaces"}, 400, "invalid_request"),
        ({**JSON, "Idempotency-Key": "x" * 65}, 400, "invalid_request"),
        ({**JSON, "X-Headrace-Resume": "soon"}, 400, "invalid_request"),
        ({**JSON, "X-Headrace-Resume": "-1"}, 400, "invalid_request"),
        ({**JSON, "X-Headrace-Resume": "nan"}, 400, "invalid_request"),
        ({**JSON, "X-Headrace-Detached": "maybe"}, 400, "invalid_request"),
        ({**JSON, "X-Padding": "x" * 9000}, 431, "headers_too_large"),
        ({**JSON, **{f"X-{i}": "x" for i in range(200)}}, 431, "headers_too_large"),
    ]
    for headers, status, code in cases:
        got, body, _ = await front.ask("POST", "/v1/completions", data=raw, headers=headers)
        assert (got, body["error"]["code"]) == (status, code), headers
    got, _, _ = await front.ask(
        "POST", "/v1/completions", data=raw, headers={"Content-Type": "application/json; charset=UTF-8"}
    )
    assert got == 200


async def test_routes_and_methods(front: Front) -> None:
    for method, path, status, allow in [
        ("POST", "/", 405, "GET, HEAD"),
        ("GET", "/v2/models", 404, None),
        ("GET", "/v1/requests/", 404, None),
        ("POST", "/v1/embeddings", 404, None),
        ("GET", "/v1/completions", 405, "POST"),
        ("DELETE", "/v1/models", 405, "GET, HEAD"),
        ("PUT", "/v1/requests/x", 405, "DELETE, GET, HEAD"),
        ("GET", "/v1/requests/x", 404, None),
        ("DELETE", "/v1/requests/../x", 404, None),
        ("GET", "/v1/requests/%2e%2e%7b%7d", 404, None),
        ("GET", "/v1/streams/a:b", 404, None),
    ]:
        got, body, headers = await front.ask(method, path)
        assert (got, headers.get("Allow")) == (status, allow), path
        assert set(body["error"]) == {"message", "type", "param", "code"}
    got, _, _ = await front.ask("HEAD", "/v1/models")
    assert got == 200


async def test_a_body_over_the_limit(front: Front) -> None:
    big = b'{"model": "test/model", "prompt": "' + b"x" * MAX_BODY + b'"}'
    status, body, _ = await front.ask("POST", "/v1/completions", data=io.BytesIO(big), headers=JSON)
    assert (status, body["error"]["code"]) == (413, "too_large")

    async def chunks() -> Any:  # no Content-Length tells it beforehand
        for at in range(0, len(big), 1 << 16):
            yield big[at : at + (1 << 16)]

    status, body, _ = await front.ask("POST", "/v1/completions", data=chunks(), headers=JSON)
    assert (status, body["error"]["code"]) == (413, "too_large")


async def _raw(front: Front, sent: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", front.gateway.port)
    writer.write(sent)
    await writer.drain()
    try:
        return await asyncio.wait_for(reader.read(), 60)
    finally:
        writer.close()


async def test_a_slow_body(open_gateway: Callable[..., Awaitable[Front]]) -> None:
    front = await open_gateway(body_timeout=0.3)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{"
    answer = await _raw(front, head)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"body_timeout"' in answer


async def test_what_is_no_http(front: Front) -> None:
    for sent in (
        b"\x16\x03\x01\x02\x00\x01",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /a b c HTTP/1.1\r\n\r\n",
        b"\x00" * 100 + b"\r\n\r\n",
    ):
        answer = await _raw(front, sent)
        assert answer.split(b" ")[1] == b"400", sent
        assert b'"error":{' in answer
    answer = await _raw(front, b"GET /" + b"x" * 10000 + b" HTTP/1.1\r\nHost: x\r\n\r\n")
    assert answer.split(b" ")[1] == b"431"


async def test_a_server_that_is_away_is_a_503(open_gateway: Any, backend: Backend, redis_url: str) -> None:
    front = await open_gateway(redis_url="unix:///nowhere/redis.sock")
    for path, body in (("/v1/completions", COMPLETION), ("/tokenize", {"prompt": "x"})):
        status, answer, headers = await front.post(path, body)
        assert (status, answer["error"]["code"], headers["Retry-After"]) == (503, "unavailable", "1")
    for path in ("/ready", "/accepting"):
        status, _, _ = await front.ask("GET", path)
        assert status == 503
    status, _, _ = await front.ask("GET", "/health")
    assert status == 200


async def test_out_of_memory_is_a_503(front: Front, backend: Backend, raw: Any) -> None:
    status, _, _ = await front.post("/v1/completions", COMPLETION)
    assert status == 200
    raw.config_set("maxmemory", 1)
    status, body, headers = await front.post("/v1/completions", COMPLETION)
    raw.config_set("maxmemory", 0)
    assert (status, body["error"]["code"], headers["Retry-After"]) == (503, "unavailable", "1")


async def test_too_much_waiting_is_a_429(open_gateway: Any, backend: Backend) -> None:
    front = await open_gateway(max_waiting_requests=3)
    await backend.bus.write_depth(backend.epoch, {"requests": 3, "tokens": 5000, "rate": 100.0})
    status, body, headers = await front.post("/v1/completions", COMPLETION)
    assert (status, body["error"]["code"]) == (429, Overloaded.code)
    assert 45 <= int(headers["Retry-After"]) <= 55
    await backend.bus.write_depth(backend.epoch, {"requests": 0, "tokens": 0, "rate": 100.0})
    status, _, _ = await front.post("/v1/completions", COMPLETION)
    assert status == 200


# ------------------------------------------------------------------ anything at all

CARD = ModelCard(model=MODEL, created=1, max_model_len=MAX_LEN, vocab_size=VOCAB)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
fields = st.sampled_from([*bodies.CompletionBody.__struct_fields__, *bodies.ChatBody.__struct_fields__, "other"])


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(chat=st.booleans(), changes=st.dictionaries(fields, values, max_size=3))
def test_any_body_becomes_a_job_or_a_named_refusal(chat: bool, changes: dict[str, Any]) -> None:
    base = CHAT if chat else COMPLETION
    raw = json.dumps({**base, **changes}).encode()
    refused: RequestError | None = None
    job: Job | None = None
    try:
        if chat:
            job = bodies.chat_job(decode_body(raw, bodies.chat_decoder), CARD, "default", 1)
        else:
            job = bodies.completion_job(decode_body(raw, bodies.completion_decoder), CARD, "default", 1)
    except RequestError as error:
        refused = error
    if refused is not None:
        assert refused.status in (400, 404)
        assert SECRET not in refused.message
        return
    assert job is not None
    job.sampling.check(VOCAB)


@settings(max_examples=200, deadline=None)
@given(raw=st.binary(max_size=64))
def test_any_bytes_are_refused_as_a_request_error(raw: bytes) -> None:
    with pytest.raises(RequestError):
        bodies.completion_job(decode_body(raw, bodies.completion_decoder), CARD, "default", 1)
