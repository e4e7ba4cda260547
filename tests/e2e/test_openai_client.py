"""The whole stack as a black box: real processes, a real server, a real model, the unmodified openai client."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.models import tiny_model
from tests.stack import Stack


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory, "llama")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[Stack]:
    with Stack(
        tmp_path_factory.mktemp("stack"), "--model", str(model_dir), "--served-model-name", "org/tiny",
        "--dtype", "float32", "--max-num-batched-tokens", "48", "--block-size", "8",
    ) as running:  # fmt: skip
        yield running


@pytest.fixture(scope="module")
def reference(model_dir: Path) -> tuple[object, object]:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(model_dir)


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["org/tiny"]
    assert client.models.retrieve("org/tiny").object == "model"


def test_streams_and_whole_answers_agree(client: openai.OpenAI) -> None:
    ask = {"model": "org/tiny", "prompt": "def add(a, b):", "max_tokens": 24, "temperature": 0}
    whole = client.completions.create(**ask)
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 24
    assert whole.choices[0].finish_reason == "length"
    pieces = list(client.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert "".join(p.choices[0].text for p in pieces if p.choices) == whole.choices[0].text
    usage = pieces[-1].usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, 24)
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 8  # the first block of the same prompt
    assert [p.choices[0].finish_reason for p in pieces if p.choices][-1] == "length"


def test_chat(client: openai.OpenAI) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "héllo 👋"}]
    whole = client.chat.completions.create(model="org/tiny", messages=messages, max_tokens=12, temperature=0)
    assert whole.choices[0].message.role == "assistant"
    stream = client.chat.completions.create(
        model="org/tiny", messages=messages, max_tokens=12, temperature=0, stream=True
    )
    assert "".join(c.choices[0].delta.content or "" for c in stream) == whole.choices[0].message.content


def test_n_choices_differ_and_repeat_by_seed(client: openai.OpenAI) -> None:
    ask = {"model": "org/tiny", "prompt": "import os", "max_tokens": 16, "temperature": 1.0, "n": 3, "seed": 7}
    first, again = (client.completions.create(**ask) for _ in range(2))
    texts = [c.text for c in first.choices]
    assert [c.index for c in first.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts == [c.text for c in again.choices]


async def test_concurrent_streams_equal_generate(stack: Stack, reference: tuple) -> None:
    """32 streams of mixed lengths that join at different times, each equal to transformers' own greedy output."""
    model, _ = reference
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(3, 120, (32,), generator=generator).tolist()
    prompts = [torch.randint(5, 250, (k,), generator=generator).tolist() for k in lengths]

    async with openai.AsyncOpenAI(base_url=stack.url + "/v1", api_key="none", max_retries=0) as client:

        async def one(index: int) -> list[int]:
            await asyncio.sleep(0.02 * index)
            stream = await client.completions.create(
                model="org/tiny", prompt=prompts[index], max_tokens=20, temperature=0, stream=True,
                extra_body={"ignore_eos": True, "return_token_ids": True},
            )  # fmt: skip
            return [t async for chunk in stream for c in chunk.choices for t in (c.model_extra.get("token_ids") or [])]

        outputs = await asyncio.gather(*(one(i) for i in range(32)))

    for prompt, output in zip(prompts, outputs, strict=True):
        _assert_greedy(model, prompt, output)


def _assert_greedy(model: torch.nn.Module, prompt: list[int], output: list[int]) -> None:
    """Every output token is the reference's best, or within 1e-4 of it (then the rest is judged on what was chosen)."""
    assert len(output) == 20
    with torch.no_grad():
        logits = model(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
    best = logits.max(dim=-1).values
    chosen = logits.gather(1, torch.tensor(output)[:, None])[:, 0]
    assert torch.all(best - chosen <= 1e-4)


def test_logprobs_are_those_of_transformers(client: openai.OpenAI, reference: tuple) -> None:
    model, tokenizer = reference
    answer = client.chat.completions.create(
        model="org/tiny", messages=[{"role": "user", "content": "why?"}], max_tokens=8, temperature=0.7, seed=3,
        logprobs=True, top_logprobs=5, extra_body={"return_token_ids": True},
    )  # fmt: skip
    choice = answer.choices[0]
    output = choice.model_extra["token_ids"]
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "why?"}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    prompt = list(rendered["input_ids"])
    with torch.no_grad():
        logits = model(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
    expected = torch.log_softmax(logits.float(), dim=-1)
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    for position, entry in enumerate(choice.logprobs.content):
        assert math.isclose(entry.logprob, expected[position, output[position]].item(), abs_tol=1e-3)
        top = expected[position].topk(5).values.tolist()
        assert [t.logprob for t in entry.top_logprobs] == pytest.approx(top, abs=1e-3)


def test_bad_requests_are_named(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="org/tiny", prompt="x", temperature=9)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="missing", prompt="x")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="org/tiny", prompt=[5] * 4000, max_tokens=4000)
    assert caught.value.code == "context_length_exceeded"


async def test_a_closed_client_frees_its_blocks(stack: Stack) -> None:
    async with aiohttp.ClientSession() as session:
        body = {"model": "org/tiny", "prompt": "x", "max_tokens": 500, "stream": True, "ignore_eos": True}
        async with session.post(stack.url + "/v1/completions", json=body) as reply:
            assert reply.status == 200
            rid = reply.headers["X-Request-Id"]
            await reply.content.readline()
            reply.close()  # the client goes away in the middle
        for _ in range(300):
            async with session.get(f"{stack.url}/v1/requests/{rid}") as state:
                record = await state.json()
            if record["status"] not in ("queued", "running"):
                break
            await asyncio.sleep(0.1)
        assert record["status"] == "cancelled", record


def test_generate_and_tokenize(stack: Stack) -> None:
    async def run() -> None:
        async with aiohttp.ClientSession() as session:
            ask = {"prompt": "hello", "max_tokens": 5, "temperature": 0}
            async with session.post(stack.url + "/generate", json=ask) as reply:
                assert reply.status == 200
                assert set(await reply.json()) == {"response"}
            async with session.post(stack.url + "/tokenize", json={"prompt": "hello"}) as reply:
                tokens = (await reply.json())["tokens"]
            async with session.post(stack.url + "/detokenize", json={"tokens": tokens}) as reply:
                assert (await reply.json())["prompt"] == "hello"
            async with session.get(stack.url + "/metrics") as reply:
                assert "llm_requests_total" in await reply.text()
            async with session.get(stack.url + "/version") as reply:
                assert json.loads(await reply.text())["version"]

    asyncio.run(run())
