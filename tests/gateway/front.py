"""A gateway under test with its client, and what its tests send and read."""

from __future__ import annotations

import json
from typing import Any

import aiohttp

from gateway.app import Gateway
from tests.gateway.backend import MODEL

CHAT = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "hi"}],
    "stream": True,
    "stream_options": {"include_usage": True},
}
COMPLETION = {"model": MODEL, "prompt": "hi", "stream": True}


def event_id(event: bytes) -> str | None:
    """The id of an event, if it has one."""
    first = event.split(b"\n")[0]
    return first.removeprefix(b"id: ").decode() if first.startswith(b"id: ") else None


def payload(event: bytes) -> Any:
    return json.loads(event.split(b"data: ", 1)[1])


def rid_of(events: list[bytes]) -> str:
    """The public id of the request that a stream belongs to."""
    return str(payload(events[0])["id"])


def followers(gateway: Gateway) -> int:
    """Readers of every model's streams."""
    return sum(len(slot.outlet.everyone()) for model in gateway.models._open.values() for slot in model.slots.values())


class Front:
    """One gateway and its clients."""

    def __init__(self, gateway: Gateway, session: aiohttp.ClientSession) -> None:
        self.gateway = gateway
        self.session = session
        self.url = f"http://127.0.0.1:{gateway.port}"

    async def ask(self, method: str, path: str, **kwargs: Any) -> tuple[int, Any, Any]:
        """(status, body decoded, headers)."""
        async with self.session.request(method, self.url + path, **kwargs) as reply:
            body = await reply.json() if reply.content_type == "application/json" else await reply.read()
            return reply.status, body, reply.headers

    async def post(self, path: str, body: Any, **kwargs: Any) -> tuple[int, Any, Any]:
        return await self.ask("POST", path, json=body, **kwargs)

    async def events(self, method: str, path: str, **kwargs: Any) -> list[bytes]:
        """A whole stream, split into its events, with their ids: it asks for resuming, with no grace."""
        kwargs["headers"] = {"X-Headrace-Resume": "0", **(kwargs.get("headers") or {})}
        async with self.session.request(method, self.url + path, **kwargs) as reply:
            assert reply.status == 200, await reply.text()
            assert reply.content_type == "text/event-stream"
            return split_events(await reply.read())


def split_events(raw: bytes) -> list[bytes]:
    assert raw.endswith(b"\n\n") or not raw
    return [event + b"\n\n" for event in raw.split(b"\n\n")[:-1]]
