"""Headers that every answer has, whatever route gave it: the request's id, the time taken, and what browsers on other
origins ask for (CORS, the Fetch standard)."""

from __future__ import annotations

import re
import time
from collections.abc import MutableMapping
from typing import Any

from aiohttp import web

from protocol.errors import RatesLeft, RequestError, StartError
from protocol.messages import new_rid
from protocol.records import TenantLimits

request_key: Any = getattr(web, "RequestKey", lambda name, _: name)  # aiohttp before 3.14 keys a request by strings
ARRIVED = request_key("headrace.arrived", float)
ORIGIN = request_key("headrace.origin", dict)
RATE_HEADERS = [f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining", "reset") for of in ("requests", "tokens")]
OWN_HEADERS = ["X-Request-Id", "X-Headrace-Route", "X-Headrace-Cache", "Retry-After", "openai-processing-ms"]
EXPOSED = ", ".join([*OWN_HEADERS, *RATE_HEADERS])
PREFLIGHT_S = 600  # how long a browser may keep the answer to a preflight
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s,]+")
_NAMES = re.compile(r"[A-Za-z0-9_-]+(?:\s*,\s*[A-Za-z0-9_-]+)*")


class OriginRefused(RequestError):
    status, code = 403, "origin_not_allowed"


def parse_origins(given: str | None) -> frozenset[str]:
    """``https://a.example,http://localhost:3000``, or ``*`` for every origin. StartError names what is none."""
    origins = frozenset(one.strip().rstrip("/").lower() for one in (given or "").split(",") if one.strip())
    for origin in origins:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise StartError(f"--cors-origins: an origin is scheme://host[:port], or * for all, not {origin!r}")
    return origins


class Origins:
    """Which origins a browser may call from, besides this service's own."""

    def __init__(self, allowed: frozenset[str]) -> None:
        self.allowed = allowed

    def headers(self, request: web.BaseRequest) -> dict[str, str]:
        """What tells a browser that a page of the request's origin may read the answer; empty if it may not."""
        origin = request.headers.get("Origin", "")
        if not origin or not self.allowed:
            return {}
        if "*" in self.allowed:
            return {"Access-Control-Allow-Origin": "*", "Access-Control-Expose-Headers": EXPOSED}
        if origin.lower() not in self.allowed:
            return {"Vary": "Origin"}
        return {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Expose-Headers": EXPOSED,
            "Vary": "Origin",
        }

    def preflight(self, request: web.BaseRequest) -> web.StreamResponse | None:
        """The answer to a preflight, which never carries a key; None if the request is none. OriginRefused."""
        if request.method != "OPTIONS" or "Access-Control-Request-Method" not in request.headers:
            return None
        if "Access-Control-Allow-Origin" not in self.headers(request):
            raise OriginRefused("pages of this origin may not call: the gateway's --cors-origins names those that may")
        asked = request.headers.get("Access-Control-Request-Headers", "").strip()
        headers = {
            "Access-Control-Allow-Methods": "GET, HEAD, POST, DELETE",
            "Access-Control-Max-Age": str(PREFLIGHT_S),
        }
        if _NAMES.fullmatch(asked):
            headers["Access-Control-Allow-Headers"] = asked
        return web.Response(status=204, headers=headers)


def rate_headers(limits: TenantLimits, told: RatesLeft) -> dict[str, str]:
    """What is left of the caller's limits per minute, and in how many seconds all of it is back. OpenAI's names."""
    headers = {}
    for of, size, left in (
        ("requests", limits.requests_per_minute, told.requests),
        ("tokens", limits.tokens_per_minute, told.tokens),
    ):
        if size is not None and left is not None:
            headers[f"x-ratelimit-limit-{of}"] = str(size)
            headers[f"x-ratelimit-remaining-{of}"] = str(max(0, int(left)))
            headers[f"x-ratelimit-reset-{of}"] = f"{max(0.0, (size - left) * 60 / size):.3f}s"
    return headers


def arrived(request: web.BaseRequest, origins: Origins) -> None:
    """Note what the answer's headers need."""
    request[ARRIVED] = time.monotonic()
    request[ORIGIN] = origins.headers(request)


def tell(request: web.BaseRequest, headers: MutableMapping[str, str]) -> None:
    """Add the headers of every answer. An answer to a request that runs has its id already."""
    headers.update(request.get(ORIGIN, {}))
    if (began := request.get(ARRIVED)) is not None:
        headers["openai-processing-ms"] = str(round((time.monotonic() - began) * 1000))
    if "X-Request-Id" not in headers:
        headers["X-Request-Id"] = new_rid()
