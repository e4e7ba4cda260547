"""/tokenize and /detokenize in their process: whatever becomes of it, the gateway goes on. A real gateway."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from gateway import tokenizer
from gateway.tokenizer import Turns
from protocol.errors import Overloaded
from tests.gateway.backend import MAX_LEN, Backend
from tests.gateway.front import Front

PATIENCE_S = 60.0


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def loaded(front: Front) -> int:
    """The pid of the process that holds the tokenizer."""
    (model,) = front.gateway.models._open.values()
    assert model._tokenizer is not None
    process = model._tokenizer._home._process
    assert process is not None
    return process.pid


async def post(front: Front, text: str) -> tuple[int, int]:
    status, body, _ = await front.post("/tokenize", {"prompt": text})
    return status, body.get("count", -1)


async def test_nothing_is_started_before_it_is_needed(front: Front) -> None:
    assert [model._tokenizer for model in front.gateway.models._open.values()] in ([], [None])
    assert await post(front, "ab") == (200, 2)
    assert loaded(front)


async def test_the_gateway_answers_while_a_text_is_tokenized_without_end(front: Front) -> None:
    assert await post(front, "ab") == (200, 2)
    (worker,) = children(loaded(front))
    os.kill(worker, signal.SIGSTOP)  # it will never answer
    stuck = [asyncio.ensure_future(post(front, "x" * 100_000)) for _ in range(64)]
    for _ in range(20):
        status, body, _ = await front.ask("GET", "/health")
        assert (status, body) == (200, {"status": "ok"})
    assert not any(task.done() for task in stuck)
    os.kill(worker, signal.SIGCONT)
    assert await asyncio.gather(*stuck) == [(200, 100_000)] * 64


@pytest.mark.parametrize("which", ["worker", "loaded"])
async def test_a_killed_process_costs_one_answer(front: Front, which: str) -> None:
    assert await post(front, "ab") == (200, 2)
    home = loaded(front)
    (worker,) = children(home)
    os.kill(worker, signal.SIGSTOP)
    asked = asyncio.ensure_future(post(front, "cd"))
    await asyncio.sleep(0)
    os.kill(worker if which == "worker" else home, signal.SIGKILL)
    status, _ = await asked
    assert status in (200, 500, 503)  # 200: it had not reached the process yet, and another one answered
    async with asyncio.timeout(PATIENCE_S):
        while (answer := await post(front, "efg"))[0] == 503:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert answer == (200, 3)


async def test_ids_that_no_tokenizer_knows_and_empty_texts(front: Front) -> None:
    assert await post(front, "") == (200, 0)
    status, body, _ = await front.post("/detokenize", {"tokens": []})
    assert (status, body) == (200, {"prompt": ""})


async def test_the_shortest_goes_first_and_a_cancelled_one_stands_in_nobodys_way() -> None:
    turns, order = Turns(), []
    await turns.take(1)

    async def one(size: int) -> None:
        await turns.take(size)
        order.append(size)
        turns.give()

    waiting = [asyncio.ensure_future(one(size << 20)) for size in (9, 3, 5, 1)]
    await asyncio.sleep(0)
    waiting[2].cancel()
    turns.give()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert order == [1 << 20, 3 << 20, 9 << 20]
    await turns.take(1)  # it is free again


async def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "MAX_WAITING", 100)
    turns = Turns()
    await turns.take(1)
    first = asyncio.ensure_future(turns.take(1000))  # one alone may be larger
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await turns.take(1)
    turns.give()
    await first


async def test_a_chat_is_tokenized_by_the_scheduler(front: Front, backend: Backend) -> None:
    """Here by one that is older and makes a token all the same: what it made is not shown."""
    chat = {"messages": [{"role": "user", "content": "ab"}]}
    status, body, headers = await front.post("/tokenize", {**chat, "return_token_strs": True})
    assert (status, body) == (
        200, {"count": 2, "max_model_len": MAX_LEN, "tokens": [97, 98], "token_strs": body["token_strs"]}
    )  # fmt: skip
    assert len(body["token_strs"]) == 2
    assert headers["X-Request-Id"]
    job = backend.running[-1].record.job
    assert job.tokenize
    assert job.sampling.max_tokens == 1
    for wrong, field in (
        ({}, "prompt"),
        ({"prompt": "a", **chat}, "messages"),
        ({"prompt": "a", "tools": []}, "tools"),
    ):
        status, body, _ = await front.post("/tokenize", wrong)
        assert (status, body["error"]["param"]) == (400, field)
    status, body, _ = await front.ask("GET", "/tokenizer_info")
    assert (status, body) == (200, {"tokenizer_class": "Bytes"})
