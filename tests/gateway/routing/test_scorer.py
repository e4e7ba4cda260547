"""A route whose rules go by what a small served model says of the question."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from protocol.messages import Frame
from protocol.records import RequestRecord
from protocol.routing.table import VERDICTS, Route, Routing, Rule
from tests.gateway.backend import Backend
from tests.gateway.front import Front
from tests.gateway.routing.test_router import BIG, SMALL, ask, ready, state

Open = Callable[..., Awaitable[Front]]
JUDGE = "org/judge"
HARD = Rule(models=[BIG], name="hard", complexity=["complex"])
REST = Rule(models=[SMALL], name="rest")


def verdict(record: RequestRecord, choice: int, index: int) -> Frame:
    """As a model would that the grammar leaves three words."""
    question = record.job.messages[-1]["content"]  # type: ignore[index]
    said = "complex" if "prove" in question else "not one of them" if "mumble" in question else "simple"
    return Frame(7, said, "stop")


@pytest.fixture
async def three(redis_url: str, raw: Any) -> AsyncIterator[Backend]:
    async with Backend(redis_url, BIG), Backend(redis_url, SMALL), Backend(redis_url, JUDGE, script=verdict) as judge:
        yield judge


async def opened(redis_url: str, open_gateway: Open, within: float = 30.0) -> Front:
    front = await open_gateway()
    table = Routing(routes={"auto": Route(rules=[HARD, REST], scorer=JUDGE, scorer_within=within)})
    await state(redis_url, table, front)
    await ready(front, BIG, SMALL, JUDGE)
    return front


async def test_the_verdict_decides_and_is_asked_for_once(redis_url: str, three: Backend, open_gateway: Open) -> None:
    front = await opened(redis_url, open_gateway)
    for content, model in (("prove it", BIG), ("hi", SMALL), ("mumble", SMALL)):
        answers = await asyncio.gather(*(ask(front, "auto", content=content) for _ in range(3)))
        assert {(status, answer["model"]) for status, answer, _ in answers} == {(200, model)}
    asked = [running.record.job for running in three.running]
    questions = [job.messages[-1]["content"] for job in asked if job.messages]
    assert questions.count("prove it") == questions.count("hi") == 1
    assert all(job.sampling.structure.choice == list(VERDICTS) for job in asked if job.sampling.structure)
    assert all(job.sampling.structure and job.priority == "interactive" for job in asked)


async def test_one_that_is_late_decides_nothing_and_is_ended(
    redis_url: str, three: Backend, open_gateway: Open
) -> None:
    three.hold = True
    front = await opened(redis_url, open_gateway, within=0.2)
    status, answer, headers = await ask(front, "auto", content="prove it")
    assert (status, answer["model"]) == (200, SMALL)
    assert "rule=rest" in headers["X-Headrace-Route"]
    (running,) = await three.until_running()
    assert three.cancelled == [running.record.rid]
