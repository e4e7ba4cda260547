"""Readers of streams that run while something is done to the stack beneath them."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp

from tests.waits import PATIENCE_S, eventually


class Reader:
    """One streamed completion of ``tokens`` tokens."""

    def __init__(self, session: aiohttp.ClientSession, url: str, tokens: int, seed: int) -> None:
        self.tokens = tokens
        self.events: list[dict[str, Any]] = []
        self.ended = False  # by [DONE]
        self._body = {
            "model": "org/tiny", "prompt": "def add(a, b):", "max_tokens": tokens, "seed": seed, "stream": True,
            "ignore_eos": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        self.task = asyncio.create_task(self._read(session, url))

    async def _read(self, session: aiohttp.ClientSession, url: str) -> None:
        async with session.post(url + "/v1/completions", json=self._body) as reply:
            assert reply.status == 200, await reply.text()
            async for line in reply.content:
                if line.startswith(b"data: [DONE]"):
                    self.ended = True
                elif line.startswith(b"data: "):
                    self.events.append(json.loads(line.removeprefix(b"data: ")))

    @property
    def text(self) -> str:
        return "".join(c["text"] for event in self.events for c in event["choices"])

    async def more(self, count: int = 10) -> None:
        """Wait until ``count`` further events have come (or the stream has ended)."""
        seen = len(self.events)
        await eventually(lambda: self.task.done() or len(self.events) >= seen + count, "more tokens")
        if self.task.done():
            self.task.result()

    async def whole(self) -> str:
        """The text of the whole stream, which must have ended as it should."""
        async with asyncio.timeout(PATIENCE_S):
            await self.task
        errors = [event["error"] for event in self.events if "error" in event]
        assert not errors, errors
        assert self.ended
        assert [c["finish_reason"] for e in self.events for c in e["choices"] if c["finish_reason"]] == ["length"]
        assert self.events[-1]["usage"]["completion_tokens"] == self.tokens
        return self.text


async def attempt(session: aiohttp.ClientSession, url: str, **fields: Any) -> tuple[int, dict[str, Any]]:
    """(status, body) of a short completion."""
    body = {"model": "org/tiny", "prompt": "x", "max_tokens": 4, "seed": 1, **fields}
    async with session.post(url + "/v1/completions", json=body) as reply:
        return reply.status, await reply.json() if reply.content_type == "application/json" else {}
