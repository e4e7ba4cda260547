"""HttpClient: streams over HTTP that continue after any failure, from the last event, on any gateway.

    async with HttpClient(["http://gateway-0:8000", "http://gateway-1:8000"]) as client:
        async for chunk in client.stream({"model": "m", "prompt": "def add(a, b):", "max_tokens": 64}):
            print(chunk["choices"][0]["text"], end="")

It asks for a grace period, so that the request continues after a lost connection, and sends an idempotency key, so that
a repeated POST joins the request instead of running it twice. To continue, it needs only the last event's id.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import aiohttp

from protocol.errors import EngineFailed, HeadraceError, RequestError, Unavailable

SILENCE_S = 45.0  # a stream without any byte for so long is resumed elsewhere
PASSING_STATUS = (429, 500, 502, 503, 504)
PASSING_CODES = ("unavailable", "overloaded")  # of error events: the request itself continues
MOST_BACKOFF_S = 5.0


class _Interrupted(Exception):
    """Not the end of the request: try again. ``wait_s``: what the server asked for, if it did."""

    def __init__(self, wait_s: float | None = None) -> None:
        self.wait_s = wait_s


class HttpClient:
    """``urls`` are gateways of one service. ``grace`` is how long, in seconds, a request continues
    without its client; ``patience`` how long to try without an answer before Unavailable is raised."""

    def __init__(
        self, urls: str | Sequence[str], *, api_key: str | None = None, grace: float = 60.0, patience: float = 120.0
    ) -> None:
        self.urls = [u.rstrip("/").removesuffix("/v1") for u in ([urls] if isinstance(urls, str) else urls)]
        self.grace = grace
        self.patience = patience
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._next = itertools.cycle(random.sample(self.urls, len(self.urls)))
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> HttpClient:
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=SILENCE_S), headers=self._headers
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def stream(self, body: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """The chunks of one completion or chat completion (told apart by ``messages``), each exactly once.

        Raises RequestError for what is wrong with the request, EngineFailed for what ended it, Unavailable when nothing
        arrived for ``patience`` seconds. A request whose iteration is left early ends after its grace period.
        """
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        headers = {"Idempotency-Key": secrets.token_hex(16), "X-Headrace-Resume": f"{self.grace:g}"}
        stream = _Stream(path, {**body, "stream": True}, headers)
        heard, tries = time.monotonic(), 0
        while not stream.ended:
            wait_s: float | None = None
            try:
                async for chunk in self._attempt(stream):
                    heard, tries = time.monotonic(), 0
                    yield chunk
            except _Interrupted as interrupted:
                wait_s = interrupted.wait_s
            except (aiohttp.ClientError, ConnectionError, TimeoutError, asyncio.IncompleteReadError):
                pass
            if stream.ended:
                return
            if time.monotonic() - heard > self.patience:
                raise Unavailable(f"nothing came from {', '.join(self.urls)} for {self.patience:g} s")
            backoff = min(MOST_BACKOFF_S, 0.1 * 2 ** min(tries, 10)) * random.uniform(0.5, 1.0)
            tries += 1
            await asyncio.sleep(backoff if wait_s is None else wait_s)

    async def _attempt(self, stream: _Stream) -> AsyncIterator[dict[str, Any]]:
        """One connection: the first sends the request, later ones continue after the last event."""
        if self._session is None:
            raise RuntimeError("use `async with HttpClient(...)`")
        url = next(self._next)
        if stream.request_id is None:
            call = self._session.post(url + stream.path, json=stream.body, headers=stream.headers)
        else:
            after = {"Last-Event-ID": stream.last_id} if stream.last_id else {}
            call = self._session.get(f"{url}/v1/streams/{stream.request_id}", headers=after)
        async with call as reply:
            if reply.status == 204:  # all of it has been read
                stream.ended = True
                return
            if reply.status != 200:
                raise await _refusal(reply)
            stream.request_id = reply.headers["X-Request-Id"]
            async for chunk in stream.read(reply.content):
                yield chunk


class _Stream:
    """The state of one stream: what is needed to continue it."""

    def __init__(self, path: str, body: Mapping[str, Any], headers: Mapping[str, str]) -> None:
        self.path, self.body, self.headers = path, body, headers
        self.request_id: str | None = None
        self.last_id = ""
        self.ended = False

    async def read(self, content: aiohttp.StreamReader) -> AsyncIterator[dict[str, Any]]:
        """Chunks to [DONE]. An event counts as seen once its data was yielded."""
        event_id = ""
        async for line in content:
            if line.startswith(b"id:"):
                event_id = line[3:].strip().decode()
            if not line.startswith(b"data:"):
                continue
            raw = line[5:].strip()
            if raw == b"[DONE]":
                self.ended = True
                return
            if not line.endswith(b"\n"):
                break  # cut off
            event = json.loads(raw)
            if "error" in event:
                raise _error_of(event["error"])
            self.last_id = event_id or self.last_id
            yield event
        raise _Interrupted


async def _refusal(reply: aiohttp.ClientResponse) -> Exception:
    """What an HTTP error means: try again, or an error of the request."""
    if reply.status in PASSING_STATUS:
        try:
            return _Interrupted(float(reply.headers["Retry-After"]))
        except (KeyError, ValueError):
            return _Interrupted()
    try:
        error = (await reply.json())["error"]
    except (aiohttp.ContentTypeError, ValueError, KeyError, TypeError):
        error = {"message": f"HTTP {reply.status}"}
    return RequestError(str(error.get("message")), param=error.get("param"), code=error.get("code"))


def _error_of(error: Mapping[str, Any]) -> HeadraceError | _Interrupted:
    """An error event: some only say that this connection ends."""
    code, message = str(error.get("code") or ""), str(error.get("message") or "the request failed")
    if code in PASSING_CODES:
        return _Interrupted()
    if error.get("type") == "server_error":
        return EngineFailed(f"{code}: {message}" if code else message)
    return RequestError(message, param=error.get("param"), code=code or None)
