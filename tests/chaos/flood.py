"""A flood of long texts that their length alone cannot refuse: over HTTP and as pushes, all of them to be refused.

The model of the chaos suite has a tokenizer that folds spaces, so a megabyte of text may be one token and has to be
tokenized in full (scheduler/prompts/length_bound.py). Each text must end with one error that says so, whatever dies.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from protocol.errors import Unavailable
from tests.bus import Bus
from tests.chaos.history import History

TEXT = "x    " * 200_000  # a megabyte
STANDSTILL_S = 120.0
CODE = "context_length_exceeded"
RESULTS = "flood"
LATE = (408, 429, 500, 502, 503, 504)  # what a gateway may answer while something is down


def fold_spaces(model: Path) -> None:
    """Let the tokenizer of ``model`` take any number of spaces for one, so that no length refuses a text."""
    path = model / "tokenizer.json"
    parts = json.loads(path.read_text())
    parts["normalizer"] = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
    path.write_text(json.dumps(parts))


@dataclass
class Flood:
    """``at_once`` texts on their way, half of them by HTTP, the others pushed by a tenant of its own."""

    urls: list[str]
    model: str
    bus: Bus
    history: History
    at_once: int = 64
    seconds: float = 15.0
    pushed: set[str] = field(default_factory=set)  # ids that were acknowledged
    results: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # id -> codes
    answers: Counter[str] = field(default_factory=Counter)  # over HTTP
    _asking: list[asyncio.Task[None]] = field(default_factory=list)
    _after: str = "0-0"
    _reading: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def run(self) -> None:
        """Keep the texts on their way for a while. What is then still on its way is waited for by ``drained``."""
        until = time.monotonic() + self.seconds
        self._asking.append(asyncio.create_task(self._ask_all(until)))
        while time.monotonic() < until:
            await self._push(until)
            await self._read_results()
            await asyncio.sleep(0.05)

    async def drained(self) -> None:
        """Until each text has been refused, or none has been for long: how long all of them take is the machine's
        affair, since they are tokenized at a low priority."""
        moved, left = time.monotonic(), -1
        while (on_way := self.waiting + sum(not task.done() for task in self._asking)) > 0:
            told = len(self.results) + self.answers.total()
            if told != left:
                moved, left = time.monotonic(), told
            elif time.monotonic() - moved > STANDSTILL_S:
                self.history.blame(f"flood: nothing is refused any more, and {on_way} wait")
                break
            await self._read_results()
            await asyncio.sleep(0.2)
        for task in self._asking:
            task.cancel()

    @property
    def waiting(self) -> int:
        return sum(name not in self.results for name in self.pushed)

    def judge(self) -> None:
        for name in self.pushed:
            if self.results[name] != [CODE]:
                self.history.blame(f"flood: push {name} ended with {self.results[name]}")

    async def _ask_all(self, until: float) -> None:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5)
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
            await asyncio.gather(*(self._ask(session, number, until) for number in range(self.at_once // 2)))

    async def _ask(self, session: aiohttp.ClientSession, number: int, until: float) -> None:
        body = json.dumps({"model": self.model, "prompt": f"{number:<16}" + TEXT, "max_tokens": 1})
        headers = {"Content-Type": "application/json"}
        turn = number
        while time.monotonic() < until:
            turn += 1
            try:
                url = self.urls[turn % len(self.urls)]
                async with session.post(f"{url}/v1/completions", data=body, headers=headers) as reply:
                    told = await reply.json(content_type=None)
            except (aiohttp.ClientError, OSError, ValueError, TimeoutError):
                await asyncio.sleep(0.3)
                continue
            code = str((told.get("error") or {}).get("code"))
            self.answers[code] += 1
            if reply.status in LATE:
                await asyncio.sleep(0.3)
            elif code != CODE:
                self.history.blame(f"flood: a text that fits nowhere was answered {reply.status} {code}")

    async def _push(self, until: float) -> None:
        while self.waiting < self.at_once // 2 and time.monotonic() < until:
            name = f"flood-{secrets.token_hex(8)}"
            job = {"v": 1, "id": name, "tenant": "flooder", "prompt": name + TEXT,
                   "sampling": {"max_tokens": 1}, "results": RESULTS}  # fmt: skip
            try:
                await self.bus.push(json.dumps(job).encode())
            except Unavailable:
                self.history.failures["push refused"] += 1
                await asyncio.sleep(0.3)
            else:
                self.pushed.add(name)

    async def _read_results(self) -> None:
        async with self._reading:  # one flood may still be drained while the next one runs
            try:
                for entry_id, terminal in await self.bus.read_results(RESULTS, self._after):
                    self._after = entry_id
                    self.results[terminal.id or ""].append((terminal.error or {}).get("code", terminal.finish_reason))
            except Unavailable:
                await asyncio.sleep(0.3)
