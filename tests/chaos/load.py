"""The clients of the chaos suite: they stream, break off and resume, detach, wait for whole answers, and push jobs.

None of them ever gives a request up: whatever dies, they go on at another gateway with the last event id
(or the same idempotency key) until the request has ended. So at rest each must have seen its whole journal.
"""

from __future__ import annotations

import asyncio
import json
import random
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

from protocol.errors import Unavailable
from protocol.messages import Terminal
from tests.chaos.calls import SCHEMA, STRUCTURED_TOKENS, CallsSeen, asked, thought
from tests.chaos.history import History, View
from tests.chaos.shards import Shards

Broken = (aiohttp.ClientError, ConnectionError, TimeoutError, asyncio.IncompleteReadError)
SILENCE_S = 45.0  # a stream that says nothing for so long is taken up elsewhere
GIVE_UP_S = 240.0


class StreamBroken(Exception):
    """The stream ended without [DONE], or with an error that may be tried again."""


@dataclass
class Load:
    """``urls`` of the gateways. ``gaps`` are (end of the gap, seconds) between two pieces of one stream."""

    urls: list[str]
    model: str
    history: History
    rng: random.Random
    shards: Shards
    session: aiohttp.ClientSession = None  # type: ignore[assignment]
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    gaps: list[tuple[float, float]] = field(default_factory=list)
    done: int = 0
    resumed: int = 0
    structured: float = 0.3  # share of the requests that ask for a structure

    async def run(self, streams: int, detached: int, wholes: int, producers: int, calls: int = 0) -> None:
        """Keep so many clients of each kind busy until ``stop`` is set, then let them end."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=SILENCE_S)
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as self.session:
            kinds = [self._stream] * streams + [self._detach] * detached + [self._whole] * wholes
            kinds += [self._call] * calls
            async with asyncio.TaskGroup() as group:
                reader = group.create_task(self._read_results())
                clients = [group.create_task(self._repeat(kind)) for kind in kinds + [self._push] * producers]
                await asyncio.wait(clients)
                for _ in range(100):  # results of the last pushes
                    if all(self.history.results.entries[(rid, 0)] for rid in self.history.wants_result):
                        break
                    await asyncio.sleep(0.1)
                reader.cancel()

    async def _repeat(self, kind: Any) -> None:
        while not self.stop.is_set():
            await kind()
            self.done += 1

    # -------------------------------------------------------------- requests

    def _body(self, **more: Any) -> dict[str, Any]:
        if self.rng.random() < self.structured:
            format = {"type": "json_schema", "json_schema": {"name": "chaos", "schema": SCHEMA}}
            more |= {"response_format": format, "max_tokens": STRUCTURED_TOKENS}
        return {
            "model": self.model, "prompt": [self.rng.randrange(5, 200) for _ in range(self.rng.randint(3, 60))],
            "max_tokens": self.rng.randint(10, 160), "n": self.rng.choice((1, 1, 1, 2)), "temperature": 1.0,
            "ignore_eos": True, "return_token_ids": True, **more,
        }  # fmt: skip

    def _url(self) -> str:
        return self.rng.choice(self.urls)

    async def _stream(self) -> None:
        body = self._body(stream=True, stream_options={"include_usage": True})
        await self._follow(body, {"X-Headrace-Resume": "120"}, breaks=self.rng.random() < 0.4)

    async def _call(self) -> None:
        """A chat that must call a function, streamed."""
        body = {
            "model": self.model, "max_tokens": STRUCTURED_TOKENS, "n": 1, "stream": True, "return_token_ids": True,
            "stream_options": {"include_usage": True}, **asked(self.rng.random()),
        }  # fmt: skip
        if self.rng.random() < 0.5:
            body |= thought(self.rng.random())
        await self._follow(body, {"X-Headrace-Resume": "120"}, breaks=self.rng.random() < 0.4)

    async def _detach(self) -> None:
        """Open a stream that outlives its client, leave at once, come back later and read it all."""
        body = self._body(stream=True, stream_options={"include_usage": True})
        view = await self._open(body, {"X-Headrace-Detached": "true"}, leave=True)
        if view is None:
            return
        await asyncio.sleep(self.rng.uniform(0, 3))
        await self._resume(view, "")

    async def _follow(self, body: dict[str, Any], headers: dict[str, str], breaks: bool) -> None:
        view = await self._open(body, headers, leave=False, breaks=breaks)
        if view is not None and not view.whole:
            await self._resume(view, view.last_id, breaks)

    async def _open(
        self, body: dict[str, Any], headers: dict[str, str], leave: bool, breaks: bool = False
    ) -> FollowedView | None:
        """POST until some gateway accepts it. The idempotency key makes a second POST join the first."""
        headers = {**headers, "Idempotency-Key": secrets.token_hex(12)}
        begun = time.monotonic()
        view: FollowedView | None = None
        while time.monotonic() - begun < GIVE_UP_S:
            try:
                path = "chat/completions" if "messages" in body else "completions"
                async with self.session.post(f"{self._url()}/v1/{path}", json=body, headers=headers) as reply:
                    if reply.status in (429, 500, 502, 503, 504):
                        self.history.failures[f"{reply.status} at accept"] += 1
                        await asyncio.sleep(0.3)
                        continue
                    if reply.status != 200:
                        self.history.blame(f"POST answered {reply.status}: {(await reply.text())[:200]}")
                        return None
                    rid = reply.headers["X-Request-Id"]
                    self.history.accept(rid, body["n"])
                    view = FollowedView("stream", rid, body["n"], calls=CallsSeen() if "tools" in body else None)
                    self.history.views.append(view)
                    if "tools" in body or "response_format" in body:
                        self.history.watched.add(rid)
                    if leave:
                        return view
                    await self._read(reply, view, breaks)
                    return view
            except (*Broken, StreamBroken):
                if view is not None:
                    return view
                await asyncio.sleep(0.2)
        self.history.blame("a request was not accepted for four minutes")
        return None

    async def _resume(self, view: FollowedView, last_id: str, breaks: bool = False) -> None:
        begun = time.monotonic()
        while not view.whole and time.monotonic() - begun < GIVE_UP_S:
            headers = {"Last-Event-ID": view.last_id} if view.last_id else {}
            try:
                url = f"{self._url()}/v1/streams/{view.rid}"
                async with self.session.get(url, headers=headers) as reply:
                    if reply.status in (429, 500, 502, 503, 504):
                        self.history.failures[f"{reply.status} at resume"] += 1
                        await asyncio.sleep(0.3)
                        continue
                    if reply.status != 200:
                        self.history.blame(f"{view.rid}: resume answered {reply.status}: {(await reply.text())[:200]}")
                        return
                    self.resumed += 1
                    await self._read(reply, view, breaks and self.rng.random() < 0.5)
            except (*Broken, StreamBroken):
                await asyncio.sleep(0.2)
        if not view.whole:
            self.history.blame(f"{view.rid}: not ended after four minutes")

    async def _read(self, reply: aiohttp.ClientResponse, view: FollowedView, breaks: bool) -> None:
        """Read events into ``view`` to [DONE]; with ``breaks``, leave after some of them."""
        patience = self.rng.randint(1, 40) if breaks else 1 << 30
        event_id = ""
        view.silent_since = view.silent_since or time.monotonic()  # the silence of a lost reader is one with its next
        async for line in reply.content:
            if line.startswith(b"id:"):
                event_id = line[3:].strip().decode()
            if not line.startswith(b"data:"):
                continue
            text = line[5:].strip()
            if text == b"[DONE]":
                view.whole = True
                return
            event = json.loads(text)
            if "error" in event:
                self.history.failures[f"error event: {event['error'].get('code')}"] += 1
                raise StreamBroken
            view.take(event)
            view.last_id = event_id
            now = time.monotonic()
            self.gaps.append((now, now - view.silent_since))
            view.silent_since = now
            patience -= 1
            if patience == 0:
                view.silent_since = 0.0  # left on purpose
                raise StreamBroken
        raise StreamBroken

    async def _whole(self) -> None:
        """One answer without streaming, asked for again with the same key until it comes."""
        body = self._body()
        headers = {"Idempotency-Key": secrets.token_hex(12), "X-Headrace-Resume": "120"}
        begun = time.monotonic()
        while time.monotonic() - begun < GIVE_UP_S:
            with suppress(*Broken):
                async with self.session.post(f"{self._url()}/v1/completions", json=body, headers=headers) as reply:
                    if reply.status == 200:
                        answer = await reply.json()
                        rid = reply.headers["X-Request-Id"]
                        self.history.accept(rid, body["n"])
                        self.history.answers.append((rid, answer))
                        return
                    if reply.status not in (429, 500, 502, 503, 504):
                        self.history.blame(f"POST answered {reply.status}: {(await reply.text())[:200]}")
                        return
                    self.history.failures[f"{reply.status} at whole"] += 1
            await asyncio.sleep(0.3)
        self.history.blame("a whole answer did not come for four minutes")

    async def _push(self) -> None:
        """A producer's push, sometimes twice; its terminal entry is read by `_read_results`."""
        name = secrets.token_hex(8)
        sampling: dict[str, Any] = {"max_tokens": self.rng.randint(5, 80), "ignore_eos": True}
        if self.rng.random() < self.structured:
            sampling |= {"structure": {"json": SCHEMA}, "max_tokens": STRUCTURED_TOKENS}
        what: dict[str, Any] = {"prompt": [self.rng.randrange(5, 200) for _ in range(self.rng.randint(3, 40))]}
        if "structure" in sampling and self.rng.random() < 0.5:
            what = asked(self.rng.random())
            del sampling["structure"]
        job = msgspec.msgpack.encode({"v": 1, "id": name, "sampling": sampling, "results": "chaos", **what})
        for _ in range(self.rng.choice((1, 1, 2))):
            await self._push_once(job)
        begun = time.monotonic()
        while name not in self.history.results.rids:
            if time.monotonic() - begun > GIVE_UP_S:
                self.history.blame(f"push {name}: no result after four minutes")
                return
            await asyncio.sleep(0.1)
        rid = self.history.results.rids[name]
        self.history.accept(rid, 1)
        self.history.wants_result.add(rid)

    async def _push_once(self, job: bytes) -> None:
        while True:
            try:
                await self.shards.push(job, self.rng)
                return
            except Unavailable:  # the server has no memory to spare
                self.history.failures["push refused"] += 1
                await asyncio.sleep(0.3)

    async def _read_results(self) -> None:
        await self.shards.read_results("chaos", self._saw_result)

    def _saw_result(self, terminal: Terminal) -> None:
        results = self.history.results
        results.entries[(terminal.rid, terminal.choice)].append(terminal)
        if terminal.id and results.rids.setdefault(terminal.id, terminal.rid) != terminal.rid:
            self.history.blame(f"push {terminal.id} ran twice")


@dataclass
class FollowedView(View):
    last_id: str = ""
    silent_since: float = 0.0  # monotonic; 0: nobody listens

    def take(self, event: dict[str, Any]) -> None:
        if event.get("usage"):
            self.usage = event["usage"]
        for choice in event["choices"]:
            if self.calls is not None:
                self.calls.take(choice)
                self.saw(0, [], "", choice["finish_reason"])
                continue
            self.saw(choice["index"], choice.get("token_ids") or [], choice["text"], choice["finish_reason"])
