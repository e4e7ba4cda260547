"""The HTTP edge: routes, body rules, and error objects for everything that can go wrong before a route runs.

aiohttp's low-level server with a route table of our own: so that every answer, even to bytes that
are no HTTP, has the form of this service. An error body always has the four keys that OpenAI's clients read.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import msgspec
from aiohttp import web, web_response
from aiohttp.http_exceptions import LineTooLong

from gateway.auth import Caller
from gateway.headers import request_key, tell
from gateway.lenient import mended
from gateway.metrics import ERRORS
from protocol.errors import HeadraceError, InvalidRequest, NotFound, RequestError, ServiceError, TooLarge

log = logging.getLogger("headrace.gateway")

MAX_BODY = 1 << 20  # bytes
BODY = request_key("headrace.body", bytes)
MAX_NESTING = 32  # levels of arrays and objects in a body
LINGER_S = 2.0  # how long a refused body is still read, so that the client reads the answer


# What OpenAI's clients may ask for and find elsewhere, or not at all.
NOT_SERVED = {
    "responses": "Responses are not served: POST /v1/chat/completions answers the same questions",
    "embeddings": "embeddings are not served",
    "files": "files are not served: prompts go into the request",
    "batches": "batches are not served: headrace submit --file runs a file of jobs, and any producer may push them",
}


def _no_route(path: str) -> NotFound:
    kind = path.removeprefix("/v1").split("/")[1:2]
    return NotFound(NOT_SERVED.get("".join(kind), "there is no such route"), code="route_not_found")


class MethodNotAllowed(RequestError):
    status, code = 405, "method_not_allowed"

    def __init__(self, method: str, allowed: list[str]) -> None:
        super().__init__(f"{method} is not allowed here, only {', '.join(allowed)}")
        self.allowed = allowed


class SlowBody(RequestError):
    status, code, type = 408, "body_timeout", "timeout_error"


class UnsupportedMediaType(RequestError):
    status, code = 415, "unsupported_media_type"


class HeadersTooLarge(RequestError):
    status, code = 431, "headers_too_large"


# ------------------------------------------------------------------ answers

encode_json = msgspec.json.Encoder().encode


def error_object(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error body. All four keys are always there."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_body(error: HeadraceError) -> dict[str, Any]:
    if isinstance(error, RequestError | ServiceError):
        return error_object(error.message, error.type, error.param, error.wire_code)
    return error_object("internal error", "server_error", None, "internal_error")


def error_answer(error: HeadraceError, headers: dict[str, str] | None = None) -> web.Response:
    status, code = 500, "internal_error"
    if isinstance(error, RequestError | ServiceError):
        status, code = error.status, error.wire_code
    ERRORS.labels(str(status), code).inc()
    headers = dict(headers or {})
    if isinstance(error, MethodNotAllowed):
        headers["Allow"] = ", ".join(error.allowed)
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, ServiceError):
        if error.retry_after is not None:
            headers["Retry-After"] = str(max(1, round(error.retry_after)))
        elif status in (429, 503):
            headers["Retry-After"] = "1"
    return json_answer(error_body(error), status, headers)


def json_answer(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    raw = body if isinstance(body, bytes) else encode_json(body)
    return web.Response(body=raw, status=status, content_type="application/json", headers=headers)


# ------------------------------------------------------------------ bodies

Body = Any
_AT = re.compile(r" - at `(?:key` in `)?\$\.?([^`]*)`")
_UNKNOWN = re.compile(r"unknown field `([^`]*)`")
# A string without an end is one token too: looked for again from each quote within it, a body of 1 MB took an hour.
_BRACKETS = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[{\]}]', re.DOTALL)


async def read_body(request: web.BaseRequest, timeout_s: float, limit: int = MAX_BODY) -> bytes:
    """The whole body, or what was put in its place under BODY. UnsupportedMediaType, TooLarge or SlowBody say what is
    wrong with it."""
    given: bytes | None = request.get(BODY)
    if given is not None:
        return given
    headers = request.headers
    if headers.get("Content-Encoding"):
        raise UnsupportedMediaType("a compressed body is not accepted: send no Content-Encoding")
    charset = (request.charset or "utf-8").lower()
    if request.content_type != "application/json" or charset not in ("utf-8", "utf8"):
        raise UnsupportedMediaType("Content-Type must be application/json, in UTF-8")
    if request.content_length is not None and request.content_length > limit:
        raise TooLarge(f"the body may have at most {limit} bytes")
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(timeout_s):
            while chunk := await request.content.readany():
                size += len(chunk)
                if size > limit:
                    raise TooLarge(f"the body may have at most {limit} bytes")
                chunks.append(chunk)
    except TimeoutError:
        raise SlowBody(f"the body did not arrive within {timeout_s:g} s") from None
    except web.RequestPayloadError:
        raise InvalidRequest("the body was cut off or badly framed") from None
    return b"".join(chunks)


def decode_body(raw: bytes, decoder: msgspec.json.Decoder[Body]) -> Body:
    """A typed body. InvalidRequest names the wrong field and never repeats a value."""
    if not raw.strip():
        raise InvalidRequest("the body is empty; it must be a JSON object")
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidRequest("the body is not valid UTF-8") from None
    if raw.count(b"[") + raw.count(b"{") > MAX_NESTING:
        _check_nesting(raw)
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as error:
        if (again := mended(raw, decoder.type)) is None:
            raise _field_error(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise InvalidRequest(
            "the body is not valid JSON (NaN, Infinity and lone surrogates are not part of it)"
        ) from None
    try:
        return msgspec.convert(again, decoder.type, str_keys=True)
    except msgspec.ValidationError as error:
        raise _field_error(str(error)) from None


def _check_nesting(raw: bytes) -> None:
    depth = 0
    for token in _BRACKETS.finditer(raw):
        first = token.group()[0]
        if first in b"[{":
            depth += 1
            if depth > MAX_NESTING:
                raise InvalidRequest(f"the body is nested more than {MAX_NESTING} levels deep")
        elif first in b"]}":
            depth -= 1


def _field_error(text: str) -> InvalidRequest:
    """msgspec's messages hold types and the path, never the value."""
    found = _AT.search(text)
    path = found.group(1) if found else ""
    reason = _AT.sub("", text)
    if unknown := _UNKNOWN.search(reason):
        name = ".".join(p for p in (path, unknown.group(1)) if p)[:80]
        return InvalidRequest(f"unknown parameter: {name}", param=name, code="unknown_parameter")
    if "missing required field" in reason:
        name = ".".join(p for p in (path, reason.split("`")[-2]) if p)
        return InvalidRequest(f"{name} is required", param=name)
    if not path and reason.startswith("Expected `object`"):
        return InvalidRequest("the body must be a JSON object")
    path = path[:80]
    return InvalidRequest(f"{path}: {reason[:1].lower()}{reason[1:]}" if path else reason, param=path or None)


# ------------------------------------------------------------------ routes

Handler = Callable[[web.BaseRequest, Caller, str], Awaitable[web.StreamResponse]]


@dataclass
class Routes:
    """Exact paths, and prefixes whose rest is handed to the handler (it may contain slashes)."""

    exact: dict[str, dict[str, Handler]] = field(default_factory=dict)
    prefixes: dict[str, dict[str, Handler]] = field(default_factory=dict)

    def add(self, method: str, path: str, handler: Handler, *, head: bool = True) -> None:
        """``path`` ending in "/" is a prefix. GET serves HEAD too, unless ``head`` says no (a stream cannot)."""
        table = self.prefixes if path.endswith("/") and path != "/" else self.exact
        methods = table.setdefault(path, {})
        methods[method] = handler
        if method == "GET" and head:
            methods["HEAD"] = handler

    def knows(self, path: str) -> bool:
        return (path.rstrip("/") or "/") in self.exact or any(path.startswith(prefix) for prefix in self.prefixes)

    def find(self, method: str, path: str) -> tuple[Handler, str]:
        rest = ""
        path = path.rstrip("/") or "/"
        methods = self.exact.get(path)
        if methods is None:
            prefix = next((p for p in self.prefixes if path.startswith(p) and len(path) > len(p)), None)
            if prefix is None:
                raise _no_route(path)
            methods, rest = self.prefixes[prefix], path[len(prefix) :]
        handler = methods.get(method)
        if handler is None:
            raise MethodNotAllowed(method, sorted(methods))
        return handler, rest


class Connection(web.RequestHandler):
    """One client connection. What aiohttp would answer in plain text becomes an error object."""

    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun already")
        if status < 500:
            if isinstance(exc, LineTooLong) or "Too many headers" in (message or ""):
                answer = error_answer(HeadersTooLarge("the request line or headers are too large"))
            else:
                answer = error_answer(InvalidRequest("the request is not valid HTTP"))
        else:
            log.error("a request failed: %s", type(exc).__name__, exc_info=exc)
            answer = error_answer(HeadraceError())
        tell(request, answer.headers)
        answer.force_close()
        return answer


web_response.SERVER_SOFTWARE = "headrace"  # type: ignore[attr-defined]  # the library would name its version and Python's


class Server(web.Server):
    """A handler is cancelled at once when its client disconnects."""

    CONNECTION: ClassVar[dict[str, Any]] = {
        "access_log": None,
        "auto_decompress": False,
        "keepalive_timeout": 75.0,
        "lingering_time": LINGER_S,
        "logger": log,
    }

    def __init__(self, handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]) -> None:
        super().__init__(handler, handler_cancellation=True)

    def __call__(self) -> Connection:
        return Connection(self, loop=asyncio.get_running_loop(), **self.CONNECTION)
