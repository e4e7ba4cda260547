"""Claims of idempotency keys in the home slot, as the sweep of a leader leaves them."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from protocol.bus import HomeBus
from protocol.bus import home as home_module
from protocol.keys import HOME
from protocol.messages import CommitRow, Job, new_rid
from protocol.records import Claim
from scheduler.sweep import AT_ONCE, sweep
from tests.protocol.stage import Stage, frame


@pytest.fixture
async def home(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[HomeBus]:
    monkeypatch.setattr(home_module, "FIRST_LOOK_MS", 0)
    home = HomeBus(redis_url, patience=5.0)
    yield home
    await home.close()


async def claimed(home: HomeBus, stage: Stage, key: str, rid: str = "") -> Claim:
    return await home.claim("default", key, "m", model=stage.bus.keys.model, rid=rid or new_rid(), body="b")


async def test_a_look_takes_all_that_are_due(home: HomeBus, stage: Stage) -> None:
    """Else hundreds of keys a second would outgrow the looks, and claims stay for ever."""
    many = 2 * AT_ONCE + 1
    for number in range(many):
        await claimed(home, stage, f"k{number}")
    assert await sweep(home, stage.bus, stage.bus.keys.model) == many
    assert stage.raw.keys(f"{HOME}*") == []


async def test_the_claim_of_a_request_that_has_ended_expires_a_little_before_its_record(
    home: HomeBus, stage: Stage
) -> None:
    model, raw = stage.bus.keys.model, stage.raw
    rid = (await stage.bus.accept(Job(prompt="x"), rid=new_rid())).rid
    claim = await claimed(home, stage, "once", rid)
    assert await stage.admit(rid) == ("new", rid)
    await stage.place(rid)
    assert await sweep(home, stage.bus, model) == 0
    assert raw.ttl(HOME + claim.name) == -1, "it runs"
    assert raw.zcard(f"{HOME}sweep:{model}") == 1
    assert await stage.commit(CommitRow(rid, 0, 1, 0, frame(7, finish="stop"), "stop")) == "l"
    assert await sweep(home, stage.bus, model) == 0
    assert 8_000 < raw.pttl(stage.bus.keys.request(rid)) - raw.pttl(HOME + claim.name) <= 10_100
    assert raw.zcard(f"{HOME}sweep:{model}") == 0, "nobody has to look again"
    assert not raw.exists(f"{stage.bus.keys.prefix}void:{rid}")
    assert (await claimed(home, stage, "once")).rid == rid
