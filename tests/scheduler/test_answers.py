"""The cache of answers through the real scheduler, server and gateway: hits, requests that join one another, ends."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
import redis

from gateway.app import Gateway, GatewayConfig
from protocol.bus import GatewayBus
from protocol.formats.families import TOOLS
from protocol.formats.spec import FormatSpec
from protocol.messages import Frame, Job, Terminal, encode, new_rid, pack_ids
from protocol.records import RequestRecord
from protocol.sampling import SamplingParams
from scheduler.answers import _result, model_fingerprint
from tests.conftest import MODEL, leaked_keys
from tests.scheduler.conftest import HASTY, Stage
from tests.scheduler.scripted_worker import ScriptedWorker, expected_tokens

PROMPT = "the same question"
WHOLE = expected_tokens(list(PROMPT.encode()), 7, 0, 40)


async def weights(stage: Stage) -> str:
    """What all workers run, as the model's card says; nothing is cached before."""
    cards = await GatewayBus.models(stage.url)
    return cards[MODEL].fingerprint if MODEL in cards else ""


async def ask(stage: Stage, tokens: int = 40, **fields: Any) -> str:
    """A greedy request, with a seed that the scripted worker heeds all the same."""
    await stage.until(lambda: weights(stage))
    sampling = SamplingParams(max_tokens=tokens, seed=7, **{"temperature": 0.0, **fields.pop("sampling", {})})
    rid = new_rid()
    await stage.bus.accept(Job(prompt=PROMPT, sampling=sampling, **fields), rid=rid)
    return rid


async def record_of(stage: Stage, rid: str) -> RequestRecord:
    record = await stage.bus.read_request(rid)
    assert record is not None
    return record


async def said(stage: Stage, rid: str) -> str:
    """What the cache said of a request, once it has been asked."""

    async def cache() -> str:
        return (await record_of(stage, rid)).cache

    return str(await stage.until(cache))


async def answered(stage: Stage, **fields: Any) -> tuple[str, list[int]]:
    rid = await ask(stage, **fields)
    tokens = await stage.tokens(rid)
    return (await record_of(stage, rid)).cache, tokens


async def kept(stage: Stage) -> bool:
    return bool(await stage.bus._link.command("EXISTS", stage.bus.keys.prefix + "answers"))


def passes(worker: ScriptedWorker) -> int:
    return worker.steps


async def test_the_same_question_is_computed_once(stage: Stage, raw: redis.Redis) -> None:
    stage.scheduler(response_cache=True)
    worker = stage.worker()
    assert await answered(stage) == ("miss", WHOLE)
    await stage.until(lambda: kept(stage))
    before = passes(worker)
    rid = await ask(stage)
    frames = await stage.frames(rid)
    assert [f.token for f in frames if f.token is not None] == WHOLE
    assert frames[-1].finish == "length"
    assert (frames[0].extra or {})["cached"] == len(PROMPT)
    assert (await said(stage, rid), passes(worker)) == ("hit", before)
    await stage.at_rest()
    assert leaked_keys(raw) == []


@pytest.mark.parametrize(
    "other",
    [
        {"tenant": "another"}, {"cache_salt": "mine"}, {"tokens": 39}, {"sampling": {"logprobs": 1}},
        {"cache": "refresh"},
    ],
    ids=str,
)  # fmt: skip
async def test_what_shapes_an_answer_or_whose_it_is_makes_another_one(stage: Stage, other: dict[str, Any]) -> None:
    stage.scheduler(response_cache=True)
    worker = stage.worker()
    await answered(stage)
    await stage.until(lambda: kept(stage))
    before = passes(worker)
    cache, tokens = await answered(stage, **other)
    assert cache == ("" if other.get("cache") else "miss")
    assert tokens == WHOLE[: other.get("tokens", 40)]
    assert passes(worker) > before


@pytest.mark.parametrize(
    ("sampling", "cache", "expected"),
    [({}, "off", ""), ({"temperature": 0.5}, None, ""), ({"temperature": 0.5}, "on", "hit"), ({}, None, "hit")],
)
async def test_deterministic_requests_alone_are_cached(
    stage: Stage, sampling: dict[str, Any], cache: Any, expected: str
) -> None:
    stage.scheduler(response_cache=True)
    stage.worker()
    await answered(stage, sampling=sampling, cache=cache)
    if expected:
        await stage.until(lambda: kept(stage))
    assert await answered(stage, sampling=sampling, cache=cache) == (expected, WHOLE)


async def test_without_the_option_nothing_is_kept(stage: Stage) -> None:
    stage.scheduler()
    stage.worker()
    assert [await answered(stage) for _ in range(2)] == [("", WHOLE), ("", WHOLE)]
    await stage.at_rest()
    assert not await kept(stage)


async def test_a_pushed_job_gets_its_result_from_the_cache(stage: Stage) -> None:
    stage.scheduler(response_cache=True)
    stage.worker()
    await answered(stage)
    await stage.until(lambda: kept(stage))
    job = Job(id="p1", prompt=PROMPT, sampling=SamplingParams(max_tokens=40, temperature=0.0), results="r")
    await stage.bus.push(encode(job))
    ((_, result),) = await stage.until(lambda: stage.bus.read_results("r"))
    assert (result.finish_reason, result.completion_tokens, result.cached_tokens) == ("length", 40, len(PROMPT))


async def test_answers_go_when_their_time_is_over(stage: Stage) -> None:
    stage.scheduler(response_cache=True, response_cache_ttl=0.2)
    stage.worker()
    await answered(stage)
    await stage.until(lambda: kept(stage))

    async def gone() -> bool:
        return not await stage.bus._link.command("KEYS", stage.bus.keys.answer("*"))

    await stage.until(gone)
    assert (await answered(stage))[0] == "miss"


async def test_answers_keep_to_their_share(stage: Stage, raw: redis.Redis) -> None:
    stage.scheduler(response_cache=True, response_cache_memory=16_000)
    stage.worker()
    for tokens in range(10, 40):
        await answered(stage, tokens=tokens)
    await stage.at_rest()
    sizes = f"headrace:{{{MODEL}}}:answers:sizes"

    async def settled() -> bool:
        return raw.hexists(sizes, "*") and int(raw.hget(sizes, "*") or 0) <= 16_000

    await stage.until(settled)
    keys = list(raw.scan_iter(match=f"headrace:{{{MODEL}}}:c:*"))
    assert 0 < len(keys) < 30
    assert raw.hlen(sizes) == len(keys) + 1 == raw.zcard(f"headrace:{{{MODEL}}}:answers") + 1


async def test_answers_go_before_a_request_is_refused(stage: Stage, raw: redis.Redis) -> None:
    stage.scheduler(response_cache=True)
    stage.worker()
    for tokens in (10, 20, 30):
        await answered(stage, tokens=tokens)
    await stage.until(lambda: kept(stage))
    raw.set(f"headrace:{{{MODEL}}}:c:{'0' * 64}", b"x" * 4_000_000, ex=600)  # one of theirs, and large
    raw.zadd(f"headrace:{{{MODEL}}}:answers", {"0" * 64: 1})
    raw.config_set("maxmemory", int(raw.info("memory")["used_memory"]) - 100_000)
    rid = await ask(stage, tokens=5)
    raw.config_set("maxmemory", 0)
    assert await stage.tokens(rid) == WHOLE[:5]
    assert not raw.exists(f"headrace:{{{MODEL}}}:c:{'0' * 64}")


# ------------------------------------------------------------------ requests that join one another


async def held(stage: Stage, count: int, at: int = 10) -> tuple[ScriptedWorker, list[str]]:
    """``count`` times the same question, the worker stopped after some tokens of the first."""
    worker = stage.worker(held_at=at)
    rids = [await ask(stage)]
    assert await said(stage, rids[0]) == "miss"
    for _ in range(count - 1):
        rids.append(await ask(stage))
        assert await said(stage, rids[-1]) == "joined"

    async def begun() -> bool:
        lengths = await stage.bus.journal_lengths([(rid, 0) for rid in rids])
        return len(set(lengths)) == 1 and lengths[0] > 0

    await stage.until(begun)
    return worker, rids


def go_on(worker: ScriptedWorker) -> None:
    worker.held_at = None
    worker.running.set()


async def test_requests_that_come_meanwhile_get_the_first_ones_rows(stage: Stage, raw: redis.Redis) -> None:
    stage.scheduler(response_cache=True)
    worker, rids = await held(stage, 4)
    go_on(worker)
    assert [await stage.tokens(rid) for rid in rids] == [WHOLE] * 4
    assert len({bytes(await stage.bus.read_journal(rid, 0)) for rid in rids}) == 1
    assert worker.registrations == 1
    await stage.at_rest()
    assert leaked_keys(raw) == []


@pytest.mark.parametrize("failover", [False, True])
async def test_if_the_first_is_cancelled_another_one_goes_on(stage: Stage, raw: redis.Redis, failover: bool) -> None:
    """From where its own journal ends, also if the leader is another one by then."""
    task, _ = stage.scheduler(response_cache=True, timing=HASTY)
    worker, rids = await held(stage, 3)
    if failover:
        stage.scheduler(response_cache=True, timing=HASTY)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    await stage.bus.cancel(rids[0], "default")
    go_on(worker)
    assert [await stage.tokens(rid) for rid in rids[1:]] == [WHOLE] * 2
    assert (await stage.frames(rids[0]))[-1].finish == "abort"
    assert (await record_of(stage, rids[1])).flight
    await stage.at_rest()
    assert leaked_keys(raw) == []
    assert not raw.exists(f"headrace:{{{MODEL}}}:flights")


async def test_one_that_joined_can_end_by_itself(stage: Stage) -> None:
    stage.scheduler(response_cache=True)
    worker, rids = await held(stage, 2)
    late = await ask(stage, timeout_s=0.5)
    assert await said(stage, late) == "joined"
    await stage.bus.cancel(rids[1], "default")
    assert (await stage.frames(rids[1]))[-1].finish == "abort"
    assert (await stage.frames(late))[-1].finish == "deadline"
    go_on(worker)
    assert await stage.tokens(rids[0]) == WHOLE


async def test_ends_that_are_not_the_models_are_not_kept(stage: Stage) -> None:
    stage.scheduler(response_cache=True)
    worker, rids = await held(stage, 1)
    await stage.bus.cancel(rids[0], "default")
    go_on(worker)
    await stage.frames(rids[0])
    await stage.at_rest()
    assert not await kept(stage)
    assert await answered(stage) == ("miss", WHOLE)


async def test_one_whose_maker_is_gone_goes_on(stage: Stage, raw: redis.Redis) -> None:
    """An older version's worker ended the first one, and handed nothing over."""
    stage.scheduler(response_cache=True)
    worker, rids = await held(stage, 2)
    raw.hdel(stage.bus.keys.request(rids[0]), "followers", "flight")
    go_on(worker)
    assert [await stage.tokens(rid) for rid in rids] == [WHOLE] * 2


# ------------------------------------------------------------------ over HTTP


@pytest.fixture
async def post(stage: Stage, redis_url: str) -> AsyncIterator[Any]:
    stage.scheduler(response_cache=True)
    stage.worker()
    async with Gateway(GatewayConfig(redis_url=redis_url, port=0)) as gateway, aiohttp.ClientSession() as session:

        async def send(headers: dict[str, str] | None = None, **fields: Any) -> tuple[Any, Any]:
            await stage.until(lambda: weights(stage))
            body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "seed": 7, **fields}
            url = f"http://127.0.0.1:{gateway.port}/v1/completions"
            while True:
                async with session.post(url, json=body, headers=headers) as reply:
                    if reply.status != 404:  # the model is not in the registry yet
                        return reply.headers, await (reply.read() if fields.get("stream") else reply.json())
                await asyncio.sleep(0.05)

        yield send


async def test_the_answer_says_what_the_cache_said(stage: Stage, post: Any) -> None:
    headers, first = await post()
    assert headers["X-Headrace-Cache"] == "miss"
    await stage.until(lambda: kept(stage))
    headers, second = await post()
    assert headers["X-Headrace-Cache"] == "hit"
    assert second["choices"] == first["choices"]
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == len(PROMPT)
    headers, stream = await post(stream=True)
    assert headers["X-Headrace-Cache"] == "hit"
    assert stream.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("headers", "fields", "expected"),
    [
        ({"Cache-Control": "no-store"}, {}, None),
        ({"Cache-Control": "max-age=0, No-Cache"}, {}, None),
        ({}, {"cache": False}, None),
        ({}, {"temperature": 0.5}, None),
        ({}, {"temperature": 0.5, "cache": True}, "miss"),
    ],
)
async def test_a_client_rules_what_the_cache_may_do(
    stage: Stage, post: Any, headers: dict[str, str], fields: dict[str, Any], expected: str | None
) -> None:
    await post()
    await stage.until(lambda: kept(stage))
    told, _ = await post(headers, **fields)
    assert told.get("X-Headrace-Cache") == expected


async def test_an_answer_of_other_weights_is_another_answer(stage: Stage) -> None:
    stage.scheduler(response_cache=True)
    old = stage.worker(fingerprint="old")
    assert await answered(stage) == ("miss", WHOLE)
    await stage.until(lambda: kept(stage))
    await old.drain()
    assert old.task is not None
    await old.task
    stage.worker(wid="worker-1", fingerprint="new")

    async def renewed() -> bool:
        return await weights(stage) == "new"

    await stage.until(renewed)
    assert (await answered(stage))[0] == "miss"
    assert (await answered(stage))[0] in ("hit", "joined")


def test_another_model_under_the_same_name_has_another_fingerprint(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(b"x" * 100_000)
    (tmp_path / "c" / "model.safetensors").write_bytes(b"x" * 99_999 + b"y")
    a, b, c = (model_fingerprint(str(tmp_path / name)) for name in ("a", "b", "c"))
    assert a == b != c


def test_a_cached_answers_result_tells_its_calls() -> None:
    text = 'Wait.\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    tools = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}]
    job = Job(messages=[], tools=tools, format=FormatSpec(name="hermes", tools=TOOLS["hermes"]), results="r")
    record = RequestRecord("a" * 32, job, "default", 1, [pack_ids([1, 2])], 0, 0, 0, None, 1, 0, [0], [None])
    raw = b"".join(encode(Frame(token, part)) for token, part in enumerate((text[:20], text[20:])))
    result = msgspec.msgpack.decode(_result(record, 0, raw, "stop") or b"", type=Terminal)
    assert (result.finish_reason, result.text, result.content) == ("tool_calls", text, "Wait.")
    assert [call["function"] for call in result.tool_calls or ()] == [{"name": "now", "arguments": "{}"}]
