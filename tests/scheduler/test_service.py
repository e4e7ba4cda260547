"""The life of a request through the real scheduler, a real server, and a worker made of bus calls."""

from __future__ import annotations

from tests.scheduler.conftest import Stage
from tests.scheduler.scripted_worker import expected_tokens


async def test_a_text_is_ingested_planned_and_ends(stage: Stage) -> None:
    stage.scheduler()
    stage.worker()
    rid = await stage.accept("hello", max_tokens=5)
    frames = await stage.frames(rid)
    assert [f.token for f in frames] == expected_tokens(list(b"hello"), 7, 0, 5)
    assert frames[-1].finish == "length"
    await stage.at_rest()
