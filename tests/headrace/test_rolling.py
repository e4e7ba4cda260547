"""One process of each role is asked to leave in turn, as in an upgrade, while clients stream: none of them notices."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from headrace.clients.http import HttpClient
from tests.stack import START_S, Stack

TOKENS = 400


SHARDS = pytest.param(("--shards", "2", "--workers", "4"), marks=pytest.mark.nightly, id="two shards")
RANKS = pytest.param(("--workers", "2", "--tensor-parallel-size", "2"), marks=pytest.mark.nightly, id="two ranks")
STAGES = pytest.param(("--workers", "2", "--pipeline-parallel-size", "2"), marks=pytest.mark.nightly, id="two stages")


@pytest.mark.parametrize("more", [pytest.param(("--workers", "2"), id="plain"), SHARDS, RANKS, STAGES])
async def test_a_rolling_restart_fails_no_request(tmp_path: Path, model_dir: Path, more: tuple[str, ...]) -> None:
    stack = Stack(
        tmp_path / "s", "--model", str(model_dir), "--served-model-name", "org/tiny", "--engine", "simulated",
        "--engine-options", '{"step_us": 10000}',  # each stream lasts through a restart, and little is computed
        "--gateways", "2", "--schedulers", "2", "--drain-timeout", "5", *more,
    )  # fmt: skip
    await asyncio.to_thread(stack.__enter__)
    try:
        urls = [f"http://127.0.0.1:{stack.port + k}" for k in range(2)]
        done = asyncio.Event()
        async with HttpClient(urls, patience=START_S) as client, asyncio.TaskGroup() as group:
            users = [group.create_task(_user(client, k, done)) for k in range(4)]
            for name in ("gateway-0", "scheduler-0", "worker-0"):
                await _restart(stack, name)
            done.set()
        for user in users:
            assert user.result() > 0
    finally:
        await asyncio.to_thread(stack.stop)


async def _user(client: HttpClient, seed: int, done: asyncio.Event) -> int:
    """Streams one request after the other, the same tokens each time; returns how many."""
    first: list[int] | None = None
    streams = 0
    while not done.is_set():
        body = {"model": "org/tiny", "prompt": f"prompt {seed}", "max_tokens": TOKENS, "seed": seed, "ignore_eos": True,
                "return_token_ids": True}  # fmt: skip
        tokens = [t async for c in client.stream(body) for k in c["choices"] for t in k.get("token_ids") or []]
        assert len(tokens) == TOKENS
        first = first or tokens
        assert tokens == first
        streams += 1
    return streams


async def _restart(stack: Stack, name: str) -> None:
    """SIGTERM one process; returns once its successor runs and the service is ready."""
    (old,) = [p["pid"] for p in stack.processes() if p["name"] == name]
    os.kill(int(str(old)), signal.SIGTERM)
    deadline = time.monotonic() + START_S
    while not [p for p in stack.processes() if p["name"] == name and p["pid"] != old]:
        assert time.monotonic() < deadline, stack.output()
        await asyncio.sleep(0.1)
    log = stack.run_dir / "run" / "logs" / f"{name}.log"
    role = name.partition("-")[0]
    says = {"worker": "serving: ", "scheduler": "stands by", "gateway": "listening on"}[role]
    while log.read_text().count(says) < 2:  # the successor does what the first did
        assert time.monotonic() < deadline, stack.output()
        await asyncio.sleep(0.1)
