"""Jobs to ids in processes: what comes back, and that a bad job ends itself and nothing else. Real processes."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import shutil
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from protocol.errors import ContextLengthExceeded, EngineFailed, HeadraceError, InvalidRequest, StartError
from protocol.messages import Job, encode, unpack_ids
from protocol.preloaded import Preloaded
from protocol.sampling import SamplingParams
from scheduler.prompts.tokenizer_pool import LONG_BOUNDS, SHORT, SHORT_BOUNDS, TokenizerPool
from tests.models import VOCAB
from tests.scheduler.conftest import tokenizer_process

PATIENCE_S = 60.0
# what the first message says, the template does
TEMPLATE = """
{%- set text = messages[0].content -%}
{%- if text == 'loop' -%}
  {%- for a in range(99999) -%}{%- for b in range(99999) -%}{%- endfor -%}{%- endfor -%}
{%- elif text == 'allocate' -%}
  {%- set held = namespace(text='x' * 1024) -%}
  {%- for a in range(60) -%}{%- set held.text = held.text ~ held.text -%}{%- endfor -%}
{%- elif text == 'divide' -%}{{ 1 / 0 }}
{%- endif -%}
{{ text }}"""


@pytest.fixture(scope="module")
def odd_model(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("odd-template")
    shutil.copytree(model_dir, path, dirs_exist_ok=True)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture(scope="module")
def odd_home(odd_model: Path) -> Iterator[Preloaded]:
    with tokenizer_process(odd_model) as running:
        yield running


@pytest.fixture
async def pool(odd_model: Path, odd_home: Preloaded) -> AsyncIterator[TokenizerPool]:
    short = dataclasses.replace(SHORT_BOUNDS, processes=2, cpu_s=0.5, memory_mib=64)
    pool = TokenizerPool(str(odd_model), home=odd_home, short=short)
    await pool.load()
    yield pool
    pool.close()


def chat(text: str) -> bytes:
    return encode(Job(messages=[{"role": "user", "content": text}]))


async def ids(pool: TokenizerPool, **fields: Any) -> list[list[int]]:
    prepared = await pool.accepted(encode(Job(**fields)))
    return [list(unpack_ids(prompt)) for prompt in prepared.prompts]


async def test_jobs_become_ids_and_the_card_tells_of_the_model(pool: TokenizerPool) -> None:
    assert await ids(pool, prompt=["ab", "c"]) == [[97, 98], [99]]
    assert await ids(pool, prompt=[5, 6]) == [[5, 6]]
    card = pool.card("served")
    assert (card.model, card.max_model_len, card.vocab_size, card.chat) == ("served", 512, VOCAB, True)
    assert pool.tokenizer_json is not None
    assert pool.tokenizer_json.startswith(b"{")


async def test_a_push_comes_back_as_the_job_that_it_is(pool: TokenizerPool) -> None:
    prepared = await pool.push(b'{"v":1,"id":"mine","prompt":"ab","sampling":{"max_tokens":3},"results":"r"}')
    assert [list(unpack_ids(prompt)) for prompt in prepared.prompts] == [[97, 98]]
    assert prepared.job == Job(id="mine", prompt="ab", sampling=SamplingParams(max_tokens=3), results="r")
    with pytest.raises(InvalidRequest, match="MessagePack map or a JSON object"):
        await pool.push(b"garbage")


@pytest.mark.parametrize(
    ("fields", "error", "param", "code"),
    [
        ({"prompt": ""}, InvalidRequest, "prompt", "invalid_request"),
        ({"prompt": [VOCAB]}, InvalidRequest, "prompt", "invalid_request"),
        ({"prompt": [1] * 600}, ContextLengthExceeded, "prompt", "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "divide"}]}, EngineFailed, None, "engine_failed"),
    ],
)
async def test_errors_cross_as_what_they_are(
    pool: TokenizerPool, fields: dict[str, Any], error: type[HeadraceError], param: str | None, code: str
) -> None:
    with pytest.raises(error) as caught:
        await ids(pool, **fields)
    assert (caught.value.param, caught.value.wire_code) == (param, code)  # type: ignore[attr-defined]


async def test_the_context_is_what_the_workers_offer_now(pool: TokenizerPool) -> None:
    assert len((await ids(pool, prompt="x" * 400))[0]) == 400
    pool.max_model_len = 100
    with pytest.raises(ContextLengthExceeded, match="holds 100 tokens"):
        await ids(pool, prompt="x" * 400)


async def test_text_that_by_its_length_cannot_fit_is_refused_unread(pool: TokenizerPool) -> None:
    with pytest.raises(ContextLengthExceeded, match="at least"):
        await ids(pool, prompt="x" * 100_000)


async def test_a_template_that_loops_for_ever_ends_that_request_alone(pool: TokenizerPool) -> None:
    looping = asyncio.ensure_future(pool.accepted(chat("loop")))
    for k in range(50):
        assert await ids(pool, prompt=[k]) == [[k]]
    with pytest.raises(InvalidRequest, match=r"takes more than 0\.\d s"):
        await looping
    assert await ids(pool, prompt="ab") == [[97, 98]]


async def test_a_template_that_allocates_without_end_ends_that_request_alone(pool: TokenizerPool) -> None:
    for _ in range(3):
        with pytest.raises(InvalidRequest, match="more memory") as caught:
            await pool.accepted(chat("allocate"))
        assert caught.value.param == "messages"
        assert await ids(pool, prompt="ab") == [[97, 98]]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def test_a_killed_process_ends_the_job_that_it_had_and_is_replaced(odd_model: Path) -> None:
    pool = TokenizerPool(str(odd_model))
    await pool.load()
    home = pool._home._process
    assert home is not None
    try:
        looping = asyncio.ensure_future(pool.accepted(chat("loop")))
        async with asyncio.timeout(PATIENCE_S):
            while not (working := children(home.pid)):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        os.kill(working[0], signal.SIGKILL)
        with pytest.raises(EngineFailed, match="SIGKILL"):
            await looping
        assert await ids(pool, prompt="ab") == [[97, 98]]
        # and also where the process is killed that they are forked from: it is loaded again
        os.kill(home.pid, signal.SIGKILL)
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    assert await ids(pool, prompt="ab") == [[97, 98]]
                    break
                except EngineFailed:  # its workers may be found dead by the jobs that they had
                    await asyncio.sleep(0.01)
    finally:
        pool.close()


async def test_short_jobs_do_not_wait_for_long_ones(pool: TokenizerPool) -> None:
    pool.max_model_len = 1 << 20
    long = [asyncio.ensure_future(ids(pool, prompt="long " * 50_000)) for _ in range(4)]
    assert SHORT < 5 * 50_000
    assert LONG_BOUNDS.processes < 4
    for k in range(20):
        assert await ids(pool, prompt=[k]) == [[k]]
    assert not all(task.done() for task in long)
    assert all(len(prompts[0]) == 250_000 for prompts in await asyncio.gather(*long))


async def test_a_model_that_cannot_be_loaded_is_a_start_error(tmp_path: Path) -> None:
    pool = TokenizerPool(str(tmp_path))
    with pytest.raises(StartError, match=str(tmp_path)):
        await pool.load()
    pool.close()


async def test_a_warmed_pool_forks_nothing_for_a_burst_of_short_jobs(
    pool: TokenizerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    forked = []
    fork = pool.fork

    async def counted(bounds: Any) -> Any:
        forked.append(bounds)
        return await fork(bounds)

    monkeypatch.setattr(pool, "fork", counted)
    await pool.warm_up()
    assert len(forked) == 2
    await asyncio.gather(*(pool.accepted(chat("one more")) for _ in range(16)))
    assert len(forked) == 2
