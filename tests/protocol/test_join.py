"""Requests that join one another, script by script: what lands for one lands for all, at the same place, once."""

from __future__ import annotations

import pytest

from protocol.messages import CommitRow, Job
from protocol.sampling import SamplingParams
from tests.protocol.stage import Stage, frame, terminal

KEY = "a" * 64


async def asked(stage: Stage, n: int = 1, **fields: object) -> tuple[str, str]:
    """A request that was admitted, and what `join` said of it."""
    rid = await stage.accept(Job(prompt="x", sampling=SamplingParams(n=n), **fields))  # type: ignore[arg-type]
    await stage.admit(rid)
    record = await stage.bus.read_request(rid)
    assert record is not None
    return rid, await stage.bus.join(stage.epoch, record, KEY)


def row(rid: str, cursor: int, raw: bytes, finish: str | None = None, choice: int = 0) -> CommitRow:
    return CommitRow(rid, choice, 1, cursor, raw, finish)


async def test_rows_of_the_first_land_for_those_that_joined(stage: Stage) -> None:
    subscription = stage.bus.subscribe("reader")
    await subscription.start()
    first, said = await asked(stage)
    assert said == "first"
    await stage.place(first)
    begin = frame(7, "a")
    assert await stage.commit(row(first, 0, begin)) == "l"
    second, said = await asked(stage, reply_to="reader", id="mine")
    assert (said, stage.journal(second)) == ("joined", begin)
    more, end = frame(8, "b" * 300), frame(9, "c", "stop")
    for _ in range(2):  # a repeat changes nothing
        assert await stage.commit(row(first, len(begin), more)) == "l"
    assert await stage.commit(row(first, len(begin + more), end, "stop")) == "l"
    assert stage.journal(first) == stage.journal(second) == begin + more + end
    assert [stage.field(rid, "e0") for rid in (first, second)] == ["stop", "stop"]
    assert not stage.raw.exists(stage.key("live"), stage.key("flights"))
    assert stage.raw.ttl(stage.bus.keys.journal(second, 0)) > 0
    shown = []
    async for rows in subscription:
        shown += [(r.rid, r.choice, r.cursor, r.frames, r.id) for r in rows if r.choice >= 0]
        if len(shown) == 3:
            break
    cursors = (0, len(begin), len(begin + more))
    assert shown == [(second, 0, at, raw, "mine") for at, raw in zip(cursors, (begin, more, end), strict=True)]
    await subscription.close()


@pytest.mark.parametrize("reason", ["abort", "error", "deadline"])
async def test_another_end_is_the_firsts_alone(stage: Stage, reason: str) -> None:
    first, _ = await asked(stage)
    await stage.place(first)
    stage.raw.hset(stage.bus.keys.request(first), "fingerprint", "of its model")
    begin = frame(7, "a")
    await stage.commit(row(first, 0, begin))
    second, third = [(await asked(stage))[0] for _ in range(2)]
    await stage.commit(row(first, len(begin), frame(None, "", reason), reason))
    assert stage.journal(second) == stage.journal(third) == begin
    assert (stage.field(second, "joins"), stage.field(third, "joins")) == (None, second)
    assert stage.field(second, "fingerprint") == "of its model"
    assert stage.raw.hget(stage.key("flights"), KEY) == second.encode()
    freed = [entry[b"r"] for entry in stage.entries("events") if entry[b"k"] == b"j"]
    assert freed == [second.encode()]
    assert (await asked(stage))[1] == "joined"


async def test_what_has_a_placement_of_its_own_is_fed_no_more(stage: Stage) -> None:
    """A leader of an older version took it up."""
    first, _ = await asked(stage)
    second, _ = await asked(stage)
    await stage.place(first)
    await stage.place(second)
    await stage.commit(row(first, 0, frame(7, "a")))
    assert stage.journal(second) == b""
    assert stage.field(second, "joins") is None
    assert await stage.commit(row(second, 0, frame(7, "a"))) == "l"


async def test_who_has_other_choices_cannot_join(stage: Stage) -> None:
    await asked(stage)
    assert (await asked(stage, n=2))[1] == "first"


async def test_one_that_is_to_have_a_result_makes_its_last_token_itself(stage: Stage) -> None:
    """It shares all others; the end with its result is one row of its own, so there is one result whatever dies."""
    first, _ = await asked(stage)
    await stage.place(first)
    begin, end = frame(7, "a"), frame(8, "b", "stop")
    await stage.commit(row(first, 0, begin))
    second, said = await asked(stage, results="mine", id="p1")
    third, _ = await asked(stage, results="mine", id="p2")
    assert (said, stage.journal(second)) == ("joined", begin)
    for _ in range(2):
        assert await stage.commit(row(first, len(begin), end, "stop")) == "l"
    assert (stage.journal(second), stage.field(second, "e0"), stage.field(second, "joins")) == (begin, None, None)
    assert (stage.journal(third), stage.field(third, "joins")) == (begin, second)
    assert [entry[b"r"] for entry in stage.entries("events") if entry[b"k"] == b"j"] == [second.encode()]
    for rid, id in ((second, "p1"), (third, "p2")):
        await stage.place(rid, cursor=len(begin))
        done = CommitRow(rid, 0, 1, len(begin), end, "stop", result=terminal(rid, id=id))
        for _ in range(2):
            assert await stage.commit(done) == "l"
        assert stage.journal(rid) == begin + end
    assert [t.id for _, t in await stage.bus.read_results("mine")] == ["p1", "p2"]
    assert not stage.raw.exists(stage.key("live"), stage.key("flights"))


async def test_a_first_one_that_is_to_end_is_not_joined(stage: Stage) -> None:
    first, _ = await asked(stage)
    await stage.bus.cancel(first, "default")
    second, said = await asked(stage)
    assert said == "first"
    await stage.place(first)
    await stage.commit(row(first, 0, frame(None, "", "abort"), "abort"))
    assert stage.raw.hget(stage.key("flights"), KEY) == second.encode()
