"""What real clients expect of the door: plain events, request ids, lenient where nothing can be misread."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.gateway.backend import Backend
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
