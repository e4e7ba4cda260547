"""The life of a request through the real scheduler, a real server, and a worker made of bus calls.

Over 400 lines: one request's life in its order, on one fixture.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import aiohttp
import msgpack
import msgspec
import pytest
import redis

from protocol.bus import HomeBus
from protocol.messages import Frame, Job, Row, decode_frames, encode, new_rid
from protocol.preloaded import Preloaded
from protocol.records import TenantLimits
from protocol.sampling import SamplingParams
from scheduler.prompts.tokenizer_pool import SHORT
from tests.bus import Bus
from tests.conftest import leaked_keys
from tests.models import BOS, byte_tokenizer
from tests.scheduler.conftest import HASTY, Stage
from tests.scheduler.scripted_worker import expected_tokens


def error_of(frames: list[Frame]) -> tuple[str | None, str, str | None]:
    """Finish reason, error code and param of the last frame."""
    extra = frames[-1].extra or {}
    return frames[-1].finish, extra.get("code", ""), extra.get("param")


# ------------------------------------------------------------------ what runs


async def test_a_text_is_admitted_planned_and_ends(stage: Stage, raw: redis.Redis) -> None:
    stage.scheduler()
    stage.worker()
    rid = await stage.accept("hello", max_tokens=5)
    frames = await stage.frames(rid)
    assert [f.token for f in frames] == expected_tokens(list(b"hello"), 7, 0, 5)
    assert frames[-1].finish == "length"
    await stage.at_rest()
    assert leaked_keys(raw) == []


async def test_every_choice_of_every_prompt(stage: Stage) -> None:
    stage.scheduler()
    stage.worker()
    rid = await stage.accept(["ab", "cd", "ef"], max_tokens=4, n=2)
    for choice in range(6):
        prompt = [b"ab", b"cd", b"ef"][choice // 2]
        assert await stage.tokens(rid, choice) == expected_tokens(list(prompt), 7, choice, 4)
    await stage.at_rest()


async def test_a_chat_and_ids(stage: Stage) -> None:
    stage.scheduler()
    stage.worker()
    messages = [{"role": "user", "content": "hi"}]
    chat = await stage.accept(job={"messages": messages}, max_tokens=3)
    ids = await stage.accept([BOS, 1, 2], max_tokens=3)
    rendered = byte_tokenizer().apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert await stage.tokens(chat) == expected_tokens(rendered, 7, 0, 3)
    assert await stage.tokens(ids) == expected_tokens([BOS, 1, 2], 7, 0, 3)


async def test_many_requests_in_a_small_pool(stage: Stage) -> None:
    """More than fits at once: chunked prefills, preemptions and queueing change nothing of what comes out."""
    stage.scheduler()
    stage.worker(blocks=12, block_size=8, token_budget=24, max_num_seqs=6)
    prompts = [bytes([97 + k]) * (5 + 3 * k) for k in range(12)]
    rids = [await stage.accept(p.decode(), max_tokens=20, seed=k) for k, p in enumerate(prompts)]
    for k, (prompt, rid) in enumerate(zip(prompts, rids, strict=True)):
        assert await stage.tokens(rid) == expected_tokens(list(prompt), k, 0, 20)
    await stage.at_rest()


async def test_without_a_seed_one_is_drawn_and_kept(stage: Stage) -> None:
    stage.scheduler()
    stage.worker()
    rids = [await stage.accept("x", max_tokens=3, seed=None) for _ in range(2)]
    seeds = []
    for rid in rids:
        tokens = await stage.tokens(rid)
        record = await stage.bus.read_request(rid)
        assert record is not None
        assert record.seed is not None
        seeds.append(record.seed)
        assert tokens == expected_tokens([ord("x")], record.seed, 0, 3)
    assert seeds[0] != seeds[1]


async def test_requests_wait_for_a_worker(stage: Stage) -> None:
    stage.scheduler()
    rid = await stage.accept("early", max_tokens=2)

    async def admitted() -> bool:
        record = await stage.bus.read_request(rid)
        return record is not None and bool(record.prompts)

    await stage.until(admitted)
    stage.worker()
    assert await stage.tokens(rid) == expected_tokens(list(b"early"), 7, 0, 2)


async def test_the_registry_and_the_tokenizer_are_published(stage: Stage, redis_url: str) -> None:
    stage.scheduler()
    stage.worker(max_model_len=100)

    async def card() -> Any:
        return (await Bus.models(redis_url)).get("test/model")

    first = await stage.until(card)
    assert first.chat
    assert first.vocab_size == 264

    async def follows_the_worker() -> bool:
        return (await card()).max_model_len == 100

    await stage.until(follows_the_worker)
    raw = await stage.bus.read_tokenizer()
    assert raw is not None
    assert json.loads(raw)["model"]["type"] == "BPE"
    rid = await stage.accept("x" * 99, max_tokens=2)
    assert error_of(await stage.frames(rid)) == ("error", "context_length_exceeded", "max_tokens")


# ------------------------------------------------------------------ producers


async def test_a_producers_push_live_and_as_a_result(stage: Stage) -> None:
    subscription = stage.bus.subscribe("me")
    await subscription.start()
    stage.scheduler()
    stage.worker()
    job = {
        "v": 1, "id": "job-1", "prompt": "hey", "reply_to": "me", "results": "mine",
        "sampling": {"max_tokens": 3, "seed": 5},
    }  # fmt: skip
    await stage.bus.push(msgpack.packb(job))
    await stage.bus.push(json.dumps(job).encode())  # the same id again: one run, one result
    rows: list[Row] = []
    async for batch in subscription:
        rows += batch
        if rows and rows[-1].choice == 0 and decode_frames(rows[-1].frames)[-1].finish:
            break
    await subscription.close()
    assert all(row.id == "job-1" for row in rows)
    assert rows[0].choice == -1
    assert rows[0].frames == encode((3,))  # as Admitted, whose second field is left out where it says nothing
    await stage.at_rest()
    ((_, result),) = await stage.bus.read_results("mine")
    assert (result.id, result.finish_reason, result.prompt_tokens, result.completion_tokens) == (
        "job-1",
        "length",
        3,
        3,
    )
    expected = expected_tokens(list(b"hey"), 5, 0, 3)
    assert result.text == "".join(f"<{t}>" for t in expected)
    assert await stage.bus.find_request("default", "job-1") == result.rid


BAD_PUSHES: list[tuple[str, bytes, str, str | None]] = [
    # what, payload, error code, the id under which one error result is expected
    ("nothing", b"", "invalid_request", None),
    ("pickle", b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94.", "invalid_request", None),
    ("no map", msgpack.packb([1, 2]), "invalid_request", None),
    ("torn", msgpack.packb({"v": 1, "prompt": "x" * 50})[:20], "invalid_request", None),
    ("a version to come", msgpack.packb({"v": 2, "id": "v2", "prompt": "x", "results": "r"}), "invalid_request", "v2"),
    ("an unknown field", b'{"id": "uf", "prompt": "x", "results": "r", "colour": 1}', "invalid_request", "uf"),
    ("no prompt", b'{"id": "np", "results": "r"}', "invalid_request", "np"),
    ("a bad channel", b'{"id": "bc", "prompt": "x", "results": "r", "reply_to": "a b"}', "invalid_request", "bc"),
    ("a bad id", b'{"id": "\\u0000", "prompt": "x", "results": "r"}', "invalid_request", "*"),
    ("too many tokens", b'{"id": "tm", "prompt": "x", "results": "r", "sampling": {"max_tokens": 9999}}',
     "context_length_exceeded", "tm"),
    ("oversized", json.dumps({"id": "os", "results": "r", "prompt": "x" * 1100000}).encode(), "too_large", "os"),
    ("an id past the vocabulary", b'{"id": "pv", "prompt": [5, 9999], "results": "r"}', "invalid_request", "pv"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("payload", "code", "producer_id"), [b[1:] for b in BAD_PUSHES], ids=[b[0] for b in BAD_PUSHES]
)
async def test_a_bad_push_is_one_dead_letter_and_one_result_where_an_id_exists(
    stage: Stage, raw: redis.Redis, payload: bytes, code: str, producer_id: str | None
) -> None:
    stage.scheduler()
    stage.worker()
    entry = await stage.bus.push(payload)
    rid = await stage.accept("after", max_tokens=1)
    assert len(await stage.tokens(rid)) == 1  # the scheduler goes on
    await stage.at_rest()
    ((_, letter),) = raw.xrange(stage.bus.keys.dead)
    assert letter[b"code"].decode() == code
    results = await stage.bus.read_results("r")
    if producer_id is None:
        assert results == []
    else:
        ((_, result),) = results
        assert result.id == (entry if producer_id == "*" else producer_id)
        assert result.finish_reason == "error"
        assert (result.error or {})["code"] == code


async def test_a_push_of_a_tenant_at_its_limit_waits_until_there_is_room(stage: Stage, raw: redis.Redis) -> None:
    """It is not refused, and nobody else waits with it."""
    stage.scheduler()
    stage.worker(step_s=0.01)
    one = TenantLimits(concurrent=1)
    rid = new_rid()
    running = Job(prompt="ab", tenant="few", sampling=SamplingParams(max_tokens=40, temperature=0))
    home = HomeBus(stage.bus.url, patience=5.0)
    await home.accept(stage.bus, running, rid=rid, tenant_limits=one)
    await home.close()
    for number, tenant in ((1, "few"), (2, "few"), (3, "many")):
        job = {"v": 1, "id": f"p{number}", "tenant": tenant, "prompt": "cd", "results": "r"}
        await stage.bus.push(msgspec.json.encode({**job, "sampling": {"max_tokens": 2}}))
    ended: list[str] = []
    after = "0-0"
    while len(ended) < 3:
        for entry, result in await stage.bus.read_results("r", after, 5000):
            after = entry
            ended.append(result.id)
            record = await stage.bus.read_request(rid)
            assert record is not None
            assert result.id == "p3" or not record.open, "the running one came first"
    assert sorted(ended) == ["p1", "p2", "p3"]
    await stage.at_rest()
    assert leaked_keys(raw) == []


async def test_a_push_that_lay_past_its_deadline(stage: Stage, raw: redis.Redis) -> None:
    job = {"id": "late", "prompt": "x", "results": "r", "timeout_s": 0.001}
    await stage.bus.push(json.dumps(job).encode())
    await asyncio.sleep(0.01)
    stage.scheduler()
    await stage.at_rest()
    ((_, result),) = await stage.bus.read_results("r")
    assert (result.error or {})["code"] == "deadline_exceeded"
    assert raw.xlen(stage.bus.keys.dead) == 1


async def test_a_second_push_under_an_id_is_the_same_request_or_a_conflict(stage: Stage, raw: redis.Redis) -> None:
    """As HTTP answers 409. The first one's own end carries its rid, the conflict has none."""
    stage.scheduler()
    stage.worker()

    async def push(prompt: str) -> None:
        job = {"id": "a1", "prompt": prompt, "results": "r", "reply_to": "me", "sampling": {"max_tokens": 1}}
        await stage.bus.push(json.dumps(job).encode())

    for prompt in ("x", "x", "other", "x"):
        await push(prompt)
        await stage.at_rest()
    results = {result.rid: result for _, result in await stage.bus.read_results("r")}
    assert len(await stage.bus.read_results("r")) == len(results) == 2
    conflict = results.pop("")
    assert (conflict.id, conflict.finish_reason) == ("a1", "error")
    assert (conflict.error or {})["code"] == "idempotency_conflict"
    ((rid, first),) = results.items()
    assert (first.id, first.finish_reason) == ("a1", "length")
    assert await stage.bus.find_request("default", "a1") == rid
    ((_, letter),) = raw.xrange(stage.bus.keys.dead)
    assert (letter[b"code"], letter[b"id"]) == (b"idempotency_conflict", b"a1")


@pytest.mark.parametrize(
    "fields",
    [
        {"rid": "0" * 32, "job": '{"id": "both", "prompt": "x", "results": "r"}'},
        {"rid": "0" * 32},
        {"rid": b"\xff\x00"},
        {"rid": ""},
        {"other": "x"},
        {"job": ""},
        {"job": "x", "rid": ""},
    ],
    ids=str,
)
async def test_an_entry_that_cannot_be_understood_leaves_a_dead_letter(
    stage: Stage, raw: redis.Redis, fields: dict[Any, Any]
) -> None:
    stage.scheduler()
    stage.worker()
    raw.xadd(stage.bus.keys.jobs, fields)
    rid = await stage.accept("after", max_tokens=1)
    assert len(await stage.tokens(rid)) == 1
    await stage.at_rest()
    assert raw.xlen(stage.bus.keys.jobs) == 0
    assert raw.xlen(stage.bus.keys.dead) == 1
    told = [("both", "")] if "both" in str(fields) else []
    assert [(result.id, result.rid) for _, result in await stage.bus.read_results("r")] == told


# ------------------------------------------------------------------ what is refused, cancelled, late


async def test_an_accepted_request_that_cannot_run_gets_one_error_per_choice(stage: Stage) -> None:
    stage.scheduler()
    stage.worker()
    subscription = stage.bus.subscribe("gateway")
    await subscription.start()
    job = {"reply_to": "gateway", "results": "r", "id": "bad"}
    rid = await stage.accept([1] * 600, job=job, max_tokens=3, n=2)
    for choice in range(2):
        frames = await stage.frames(rid, choice)
        assert len(frames) == 1
        assert error_of(frames) == ("error", "context_length_exceeded", "prompt")
    rows: list[Row] = []
    async for batch in subscription:
        rows += batch
        if len(rows) == 2:
            break
    await subscription.close()
    assert [row.choice for row in rows] == [0, 1]  # and no notice of admission
    results = await stage.bus.read_results("r")
    assert [(r.id, r.choice, r.finish_reason) for _, r in results] == [("bad", 0, "error"), ("bad", 1, "error")]
    await stage.at_rest()


async def test_what_nobody_foresaw_ends_that_job_alone(
    stage: Stage, model_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model_dir, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}{{ 1 / messages[0].content|length }}")
    stage.scheduler(model=str(tmp_path))
    stage.worker()
    bad = await stage.accept(job={"messages": [{"role": "user", "content": ""}]})
    good = await stage.accept(job={"messages": [{"role": "user", "content": "fine"}]}, max_tokens=2)
    assert error_of(await stage.frames(bad)) == ("error", "engine_failed", None)
    assert len(await stage.tokens(good)) == 2
    assert "ZeroDivisionError" in capfd.readouterr().err


async def test_stuck_long_texts_cost_neither_the_lead_nor_other_requests(stage: Stage, home: Preloaded) -> None:
    """The process for long texts is stopped, as if each took for ever: no other request waits for it."""
    stage.scheduler(timing=HASTY)
    stage.worker()
    long = await stop_long_process(stage, home)
    subscription = stage.bus.subscribe("me")
    await subscription.start()
    stage.scheduler(timing=HASTY)  # stands by
    flood = [await flooded(stage, "flooder", "me") for _ in range(30)]
    mine = await flooded(stage, "other", "me")
    epoch, beat = (await stage.bus.read_leader()).epoch, (await stage.bus.read_leader()).beat
    for k in range(20):
        rid = await stage.accept([k + 1], job={"tenant": "other" if k % 2 else "flooder"}, max_tokens=2)
        assert len(await stage.tokens(rid)) == 2
    leader = await stage.bus.read_leader()
    assert (leader.epoch, leader.beat > beat) == (epoch, True)
    os.kill(long, signal.SIGCONT)
    ended: list[str] = []
    async for rows in subscription:
        ended += [row.rid for row in rows]
        if len(ended) == len(flood) + 1:
            break
    await subscription.close()
    assert set(ended) == {*flood, mine}
    assert ended.index(mine) <= 4  # behind those that were in preparation already, before the rest
    assert error_of(await stage.frames(mine)) == ("error", "context_length_exceeded", "prompt")


async def flooded(stage: Stage, tenant: str, reply_to: str) -> str:
    rid = new_rid()
    await stage.bus.accept(Job(prompt="x" * 2 * SHORT, tenant=tenant), rid=rid, reply_to=reply_to)
    return rid


async def stop_long_process(stage: Stage, home: Preloaded) -> int:
    """Stop the process for long texts, the only one that has made itself nicer, once it has had one. Its pid."""
    before = nicest_children(home)  # of schedulers that have just ended
    await stage.frames(await flooded(stage, "first", "nobody"))

    async def there() -> int | None:
        return next(iter(nicest_children(home) - before), None)

    long: int = await stage.until(there)
    os.kill(long, signal.SIGSTOP)
    return long


def nicest_children(home: Preloaded) -> set[int]:
    assert home._process is not None
    pid = home._process.pid
    children = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    usual, nicer = os.getpriority(os.PRIO_PROCESS, pid), set()
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            if os.getpriority(os.PRIO_PROCESS, child) > usual:
                nicer.add(child)
    return nicer


async def test_a_cancelled_request_does_not_wait_for_the_long_texts_before_it(stage: Stage, home: Preloaded) -> None:
    stage.scheduler()
    long = await stop_long_process(stage, home)
    rids = [await flooded(stage, "flooder", "me") for _ in range(10)]
    late = await stage.accept("x" * 2 * SHORT, job={"timeout_s": 0.2})
    await stage.bus.cancel(rids[-1], "flooder")
    assert (await stage.frames(rids[-1]))[-1].finish == "abort"
    assert (await stage.frames(late))[-1].finish == "deadline"
    os.kill(long, signal.SIGCONT)
    await stage.at_rest()


async def test_a_foreign_type_under_our_key_stops_nothing(stage: Stage, raw: redis.Redis) -> None:
    rid = await stage.accept("x")
    raw.delete(stage.bus.keys.request(rid))
    raw.set(stage.bus.keys.request(rid), "not a hash")
    other = await stage.accept("fine", max_tokens=2)
    stage.scheduler()
    stage.worker()
    assert len(await stage.tokens(other)) == 2

    async def buried() -> bool:
        return await stage.bus.inbox_length() == 0

    await stage.until(buried)
    assert raw.xlen(stage.bus.keys.dead) == 1
    raw.delete(stage.bus.keys.request(rid))


async def test_cancel_before_admission(stage: Stage, unused_tcp_port: int) -> None:
    rid = await stage.accept("never", max_tokens=5, n=2)
    assert await stage.bus.cancel(rid, "default")
    stage.scheduler(metrics_port=unused_tcp_port)
    stage.worker()
    for choice in range(2):
        assert [(f.token, f.finish) for f in await stage.frames(rid, choice)] == [(None, "abort")]
    await stage.at_rest()
    async with aiohttp.ClientSession() as session:

        async def counted() -> bool:
            async with session.get(f"http://127.0.0.1:{unused_tcp_port}/metrics") as reply:
                text = await reply.text()
            return 'headrace_request_success_total{finish_reason="abort",model="test/model"} 2.0' in text

        await stage.until(counted)


async def test_cancel_while_it_waits(stage: Stage) -> None:
    stage.scheduler()
    rid = await stage.accept("waits", max_tokens=5)

    async def admitted() -> bool:
        record = await stage.bus.read_request(rid)
        return record is not None and bool(record.prompts)

    await stage.until(admitted)
    assert await stage.bus.cancel(rid, "default")
    assert [(f.token, f.finish) for f in await stage.frames(rid)] == [(None, "abort")]
    await stage.at_rest()


async def test_cancel_while_it_runs(stage: Stage) -> None:
    stage.scheduler()
    worker = stage.worker()
    rid = await stage.accept("runs", max_tokens=400)

    async def running() -> bool:
        return bool(await stage.bus.read_journal(rid, 0))

    await stage.until(running)
    assert await stage.bus.cancel(rid, "default")
    frames = await stage.frames(rid)
    assert frames[-1].finish == "abort"
    tokens = [f.token for f in frames if f.token is not None]
    assert tokens == expected_tokens(list(b"runs"), 7, 0, 400)[: len(tokens)]

    async def seat_empty() -> bool:
        return not worker.seats

    await stage.until(seat_empty)
    await stage.at_rest()


async def test_deadline_while_it_waits_and_before_it_is_admitted(stage: Stage) -> None:
    early = await stage.accept("early", job={"timeout_s": 0.001})
    await asyncio.sleep(0.01)
    stage.scheduler()
    late = await stage.accept("late", job={"timeout_s": 1.0})
    for rid in (early, late):
        assert [(f.token, f.finish) for f in await stage.frames(rid)] == [(None, "deadline")]
    await stage.at_rest()


async def test_deadline_while_it_runs_keeps_what_was_generated(stage: Stage) -> None:
    stage.scheduler()
    worker = stage.worker()
    worker.step_s = 0.05
    rid = await stage.accept("slow", job={"timeout_s": 2.0}, max_tokens=400)
    frames = await stage.frames(rid)
    assert frames[-1].finish == "deadline"
    tokens = [f.token for f in frames if f.token is not None]
    assert tokens == expected_tokens(list(b"slow"), 7, 0, 400)[: len(tokens)]


async def test_held_text_comes_out_with_the_end(stage: Stage) -> None:
    """A choice whose worker is gone is ended by the scheduler: what its last frame held back is emitted first."""
    rid = await stage.accept("x", job={"results": "r"}, max_tokens=9)
    task, stop = stage.scheduler()
    worker = stage.worker()
    worker.held_at = 3
    worker.hold_text = True

    async def held() -> bool:
        return len(decode_frames(await stage.bus.read_journal(rid, 0))) >= 3

    await stage.until(held)
    worker.task.cancel()  # type: ignore[union-attr]
    stop.set()
    assert await task == 0
    assert await stage.bus.cancel(rid, "default")
    stage.scheduler()
    frames = await stage.frames(rid)
    assert [(f.text, f.finish) for f in frames[2:]] == [("", None), ("held", "abort")]
    ((_, result),) = await stage.bus.read_results("r")
    assert result.text == "".join(f.text for f in frames)
    assert (result.finish_reason, result.completion_tokens, result.prompt_tokens) == ("abort", 3, 1)
    await stage.at_rest()


# ------------------------------------------------------------------ what it tells


async def test_the_request_line_has_figures_and_no_prompt(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    stage.scheduler()
    stage.worker()
    rid = await stage.accept("sesame", max_tokens=4)
    refused = await stage.accept("sesame", max_tokens=9999)
    await stage.frames(rid)
    await stage.frames(refused)

    def lines() -> dict[str, Any]:
        found = [json.loads(r.message) for r in caplog.records if r.name == "headrace.requests"]
        return {line["id"]: line for line in found}

    async def both() -> bool:
        return {rid, refused} <= set(lines())

    await stage.until(both)
    line = lines()[rid]
    assert (line["model"], line["tenant"]) == ("test/model", "default")
    assert (line["prompt_tokens"], line["output_tokens"], line["finish_reasons"]) == (6, 4, ["length"])
    assert min(line["queue_s"], line["prefill_s"], line["decode_s"]) >= 0
    assert lines()[refused]["error"] == "context_length_exceeded"
    assert "sesame" not in caplog.text


async def test_metrics_and_health(stage: Stage, unused_tcp_port: int) -> None:
    stage.scheduler(metrics_port=unused_tcp_port)
    stage.worker()
    await stage.frames(await stage.accept("hello", max_tokens=5))
    url = f"http://127.0.0.1:{unused_tcp_port}"
    async with aiohttp.ClientSession() as session:

        async def counted() -> str:
            async with session.get(url + "/metrics") as reply:
                text = await reply.text()
            return text if 'headrace_generation_tokens_total{model="test/model"} 5.0' in text else ""

        text = await stage.until(counted)
        async with session.get(url + "/health") as reply:
            assert reply.status == 200
            assert (await reply.json())["state"] == "leading"
    for line in (
        'headrace_request_success_total{finish_reason="length",model="test/model"} 1.0',
        'headrace_prompt_tokens_total{model="test/model"} 5.0',
        'headrace_is_leader{model="test/model"} 1.0',
        'headrace_epoch{model="test/model"} 1.0',
        'headrace_kv_cache_usage_perc{model="test/model",worker="worker-0"}',
        'headrace_request_queue_time_seconds_count{model="test/model"} 1.0',
        'headrace_inbox_length{model="test/model"} 0.0',
    ):
        assert line in text


async def test_depth_is_written_and_cleared(stage: Stage, raw: redis.Redis) -> None:
    stage.scheduler()
    rids = [await stage.accept("abcd", job={"tenant": "t"}, max_tokens=1) for _ in range(3)]

    def depth() -> dict[bytes, bytes]:
        return raw.hgetall(stage.bus.keys.depth)

    async def waiting() -> bool:
        found = depth()
        return found.get(b"requests") == b"3" and found.get(b"requests:t") == b"3"

    await stage.until(waiting)
    assert float(depth()[b"tokens"]) >= 12
    stage.worker()
    for rid in rids:
        await stage.frames(rid)

    async def empty() -> bool:
        found = depth()
        return found.get(b"requests") == b"0" and found.get(b"tokens") == b"0" and float(found[b"rate"]) > 0

    await stage.until(empty)


async def test_mangled_jobs_in_numbers_stop_nothing(stage: Stage) -> None:
    """Valid jobs with a few bytes changed, cut or doubled: most are refused, some run; the scheduler goes on."""
    draw = random.Random(5)
    whole = [
        msgpack.packb({"v": 1, "prompt": "abc", "sampling": {"max_tokens": 2, "stop": ["x"]}, "results": "r"}),
        json.dumps({"v": 1, "messages": [{"role": "user", "content": "é"}], "sampling": {"max_tokens": 2}}).encode(),
        msgpack.packb({"v": 1, "prompt": [[1, 2], [3]], "sampling": {"n": 2, "max_tokens": 1}, "timeout_s": 60.0}),
    ]
    scheduler, _ = stage.scheduler()
    stage.worker()
    for _ in range(300):
        job = bytearray(draw.choice(whole))
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(job))
            cut = draw.choice([b"", job[at : at + 9] * 2, bytes([draw.randrange(256)])])
            job[at : at + draw.randint(0, 2)] = cut
        await stage.bus.push(bytes(job))
    rid = await stage.accept("fine", max_tokens=3)
    assert len(await stage.tokens(rid)) == 3
    await stage.at_rest()
    assert not scheduler.done()


async def test_an_accepted_job_that_nobody_checked(stage: Stage) -> None:
    stage.scheduler()
    for fields in ({}, {"messages": [{"role": "user"}]}, {"messages": [{"content": 3}]}, {"prompt": [True]}):
        rid = new_rid()
        await stage.bus.accept(Job(**fields), rid=rid)
        assert error_of(await stage.frames(rid))[:2] == ("error", "invalid_request")
