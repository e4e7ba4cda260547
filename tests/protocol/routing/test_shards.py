"""Which shards there are, and which one a request goes to."""

from __future__ import annotations

import asyncio
import collections
import random
from collections.abc import AsyncIterator

import pytest
import redis

from protocol.errors import InvalidRequest
from protocol.keys import Keys
from protocol.messages import Job, new_rid, shard_of
from protocol.routing.shards import Shard, ShardStore, choose, first_bytes, served

MODEL = "org/model-1:b"
TAGS = [MODEL, *(f"{MODEL}#{k}.0" for k in range(1, 4))]


@pytest.fixture
async def store(redis_url: str, raw: redis.Redis) -> AsyncIterator[ShardStore]:
    made = ShardStore(redis_url)
    yield made
    await made.close()


async def test_every_model_has_the_first(store: ShardStore) -> None:
    assert await store.read(MODEL) == [Shard(MODEL, 0, MODEL)]
    assert await store.read_all() == {}


async def test_shards_are_made_once_however_many_make_them(store: ShardStore) -> None:
    found = await asyncio.gather(*(store.create(MODEL, 4) for _ in range(5)))
    assert all(shards == found[0] for shards in found)
    assert [shard.number for shard in found[0]] == [0, 1, 2, 3]
    assert found[0][0].tag == MODEL, "a producer who knows only that name works for ever"
    assert [Keys(shard.tag).shard for shard in found[0]] == [0, 1, 2, 3]
    assert await store.read("another") == [Shard("another", 0, "another")]


async def test_a_number_is_not_used_again(store: ShardStore) -> None:
    second = (await store.create(MODEL, 2))[1]
    with pytest.raises(InvalidRequest, match="2 open shards"):
        await store.create(MODEL, 1)
    await store.set_state(second, "retired")
    shards = await store.create(MODEL, 2)
    assert [(shard.number, shard.state) for shard in shards] == [(0, "open"), (1, "retired"), (2, "open")]
    assert [shard.number for shard in served(shards)] == [0, 2]


def test_a_rid_tells_its_shard_and_that_of_the_first_looks_as_ever() -> None:
    assert len(new_rid()) == 32
    for shard in (0, 1, 12):
        assert shard_of(new_rid(shard)) == shard
    for other in ("", "abc", "0" * 32 + "sx", "0" * 32 + "s", "s1"):
        assert shard_of(other) == 0


# ------------------------------------------------------------------ choosing


def pick(tenant: str, job: Job, load: dict[str, float] | None = None, tags: list[str] | None = None) -> str:
    loads = load or {}
    return choose(tags or TAGS, str, lambda tag: loads.get(tag, 0.0), tenant, first_bytes(job))


def chat(*turns: str) -> Job:
    messages = [{"role": "system", "content": "s" * 5000}]
    messages += [{"role": ("user", "assistant")[k % 2], "content": turn} for k, turn in enumerate(turns)]
    return Job(messages=messages)


def test_the_turns_of_a_conversation_go_to_one_shard_and_conversations_to_all() -> None:
    counts: collections.Counter[str] = collections.Counter()
    for number in range(400):
        first = f"question {number}"
        chosen = pick("t", chat(first))
        assert pick("t", chat(first, "answer", "and then?")) == chosen
        counts[chosen] += 1
    assert set(counts) == set(TAGS)
    assert min(counts.values()) > 60


def test_a_shard_more_moves_only_what_it_gets() -> None:
    before = {k: pick("t", Job(prompt=f"p{k}"), tags=TAGS[:3]) for k in range(300)}
    after = {k: pick("t", Job(prompt=f"p{k}")) for k in range(300)}
    moved = {k for k in before if before[k] != after[k]}
    assert {after[k] for k in moved} == {TAGS[3]}
    assert 40 < len(moved) < 120


def test_what_begins_alike_is_together_and_tenants_are_apart() -> None:
    same = "x" * 2000
    assert pick("t", Job(prompt=same + "a")) == pick("t", Job(prompt=same + "b"))
    assert pick("t", Job(prompt=[1] * 2000 + [5])) == pick("t", Job(prompt=[1] * 2000 + [6]))
    assert len({pick(f"tenant{k}", Job(prompt=same)) for k in range(40)}) == 4


def test_it_is_left_for_less_waiting_work() -> None:
    job = Job(prompt="p")
    own = pick("t", job)
    assert pick("t", job, {own: 2.0}) == own
    other = pick("t", job, {own: 3.0})
    assert other != own
    assert pick("t", job, {own: 3.0, **{tag: 2.0 for tag in TAGS if tag != own}}) == own


def test_nine_in_ten_turns_find_their_shard_at_70_percent_load() -> None:
    """Four shards of eight places each, a request of exponential length; the loads that gateways know are 0.5 s old."""
    rng, clock, step = random.Random(5), 0.0, 0.05
    busy: dict[str, list[float]] = {tag: [] for tag in TAGS}  # ends
    waiting: dict[str, list[float]] = {tag: [] for tag in TAGS}  # lengths
    known = dict.fromkeys(TAGS, 0.0)
    arrivals, mean, found, turns = 0.7 * 4 * 8 / 2.0, 2.0, 0, 0
    for tick in range(20_000):
        clock += step
        for tag in TAGS:
            busy[tag] = [end for end in busy[tag] if end > clock]
            while waiting[tag] and len(busy[tag]) < 8:
                busy[tag].append(clock + waiting[tag].pop(0))
        if tick % 10 == 0:
            known = {tag: float(len(waiting[tag])) for tag in TAGS}
        for _ in range(sum(rng.random() < arrivals * step / 8 for _ in range(8))):
            job = Job(prompt=f"conversation {rng.randrange(2000)}")
            chosen = pick("t", job, known)
            waiting[chosen].append(rng.expovariate(1 / mean))
            known[chosen] += 1
            turns += 1
            found += chosen == pick("t", job)
    assert turns > 10_000
    assert found / turns > 0.9
