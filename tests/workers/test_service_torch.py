"""The worker service with the torch engine: what is journaled is what `generate` gives, moves and fences included."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.bus import Bus
from tests.conftest import MODEL
from tests.models import tiny_model
from tests.workers.scripted import ScriptedScheduler
from workers.service import WorkerConfig, run_worker

PROMPT = b"def add(a, b):"
NEW = 24


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory, "llama")


@cache
def reference(model_dir: Path) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    ids = model.generate(torch.tensor([[*PROMPT]]), max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    return ids[0, len(PROMPT) :].tolist()


@pytest.fixture
async def worker(redis_url: str, bus: Bus, model_dir: Path) -> AsyncIterator[asyncio.Task[int]]:
    config = WorkerConfig(
        redis_url=redis_url, served_model_name=MODEL, model=str(model_dir), name="w0", dtype="float32", device="cpu",
        max_num_seqs=8, max_num_batched_tokens=64, kv_cache_memory=8 << 20, max_model_len=256, block_size=16, threads=1,
    )  # fmt: skip
    task = asyncio.ensure_future(run_worker(config, signals=False))
    yield task
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def blocks(new: Any, first: int) -> Any:
    """The pool of these tests is small: block ids from ``first`` on, four of them."""
    import msgspec

    from protocol.messages import pack_ids

    return msgspec.structs.replace(new, block_table=pack_ids(range(first, first + 4)))


async def test_greedy_outputs_equal_generate_alone_in_a_batch_and_after_a_change_of_leaders(
    worker: asyncio.Task[int], bus: Bus, model_dir: Path
) -> None:
    expected = reference(model_dir)
    assert len(set(expected)) >= 10
    scheduler = ScriptedScheduler(bus)
    await scheduler.lead()
    served = await scheduler.adopt("w0")
    assert served.capacity is not None
    assert (served.capacity.model, served.capacity.engine) == (MODEL, "torch")
    fields = {"max_tokens": NEW, "temperature": 0.0, "ignore_eos": True}
    whole, moved = await scheduler.admit(PROMPT, **fields), await scheduler.admit(PROMPT, **fields)

    await scheduler.plan({0: 6}, new=[blocks(await scheduler.seat(0, whole), 0)], samples=b"\0")
    news = [blocks(await scheduler.seat(1, moved), 4)]
    await scheduler.plan({0: len(PROMPT) - 6, 1: len(PROMPT)}, new=news)
    await scheduler.decode(0, 1, steps=8)
    await scheduler.decode(0, steps=NEW)  # past its end
    await scheduler.done()
    assert [f.token for f in await scheduler.frames(whole)] == expected
    assert [f.token for f in await scheduler.frames(moved)] == expected[:9]

    heir = ScriptedScheduler(bus, "heir")
    await heir.lead()
    heir.wid, heir.gen = "w0", scheduler.gen
    await heir.plan(new=[blocks(await heir.seat(3, moved, placement=2), 8)])
    await heir.decode(3, steps=NEW)
    await heir.done()
    assert await bus.read_journal(moved, 0) == await bus.read_journal(whole, 0)
    text = "".join(f.text for f in await heir.frames(whole))
    assert text == AutoTokenizer.from_pretrained(model_dir).decode(expected, skip_special_tokens=True)
    assert not worker.done()
