"""The unmodified openai client against a real gateway: shapes, streams, choices, usage, logprobs."""

from __future__ import annotations

import openai
import pytest

from tests.gateway.backend import MODEL, Backend, word
from tests.gateway.front import Front

TEXT = "".join(word(0, i) for i in range(5))
MESSAGES = [{"role": "user", "content": "hi there"}]


async def test_models(client: openai.AsyncOpenAI) -> None:
    assert [m.id async for m in client.models.list()] == [MODEL]
    model = await client.models.retrieve(MODEL)
    assert (model.id, model.object, model.created) == (MODEL, "model", 1700000000)
    with pytest.raises(openai.NotFoundError) as caught:
        await client.models.retrieve("test/other")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("model", [{}, {"model": None}])
async def test_a_body_without_a_model_goes_to_the_only_one(front: Front, path: str, model: dict[str, None]) -> None:
    asked = {"prompt": "hello"} if path == "/v1/completions" else {"messages": MESSAGES}
    status, answer, _ = await front.post(path, {**asked, **model})
    assert (status, answer["model"]) == (200, MODEL)


async def test_completion(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model=MODEL, prompt="hello")
    assert answer.id.startswith("cmpl-")
    assert (answer.object, answer.model) == ("text_completion", MODEL)
    (choice,) = answer.choices
    assert (choice.index, choice.text, choice.finish_reason, choice.logprobs) == (0, TEXT, "stop", None)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 5
    assert answer.usage.completion_tokens == 5
    assert answer.usage.total_tokens == 10
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 2


async def test_completion_stream(client: openai.AsyncOpenAI) -> None:
    stream = await client.completions.create(model=MODEL, prompt="hello", stream=True)
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].text for c in chunks) == TEXT
    assert [c.choices[0].finish_reason for c in chunks] == [None] * 4 + ["stop"]
    assert len({(c.id, c.created, c.object) for c in chunks}) == 1
    assert all(c.usage is None for c in chunks)


async def test_chat(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=3)
    (choice,) = answer.choices
    assert answer.id.startswith("chatcmpl-")
    assert (choice.message.role, choice.message.refusal) == ("assistant", None)
    assert choice.message.content == "".join(word(0, i) for i in range(3))
    assert choice.finish_reason == "length"


async def test_chat_stream_with_usage_and_choices(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model=MODEL, messages=MESSAGES, n=2, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    *body, last = chunks
    assert last.choices == []
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.total_tokens) == (8, 10, 18)
    assert all(c.usage is None for c in body)
    for index in range(2):
        mine = [c.choices[0] for c in body if c.choices[0].index == index]
        assert mine[0].delta.role == "assistant"
        assert mine[0].delta.content == ""
        assert [c.delta.content for c in mine[1:]] == [word(index, i) for i in range(5)]
        assert [c.finish_reason for c in mine] == [None] * 5 + ["stop"]


async def test_lists_of_prompts(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model=MODEL, prompt=["one", "three"], n=2, max_tokens=1)
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    assert [c.text for c in answer.choices] == [word(i, 0) for i in range(4)]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (8, 4)
    ids = await client.completions.create(model=MODEL, prompt=[[1, 2, 3], [4]], max_tokens=1)
    assert ids.usage is not None
    assert ids.usage.prompt_tokens == 4
    one = await client.completions.create(model=MODEL, prompt=[1, 2, 3], max_tokens=1)
    assert one.usage is not None
    assert one.usage.prompt_tokens == 3


async def test_echo(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model=MODEL, prompt=["ab", "çd"], echo=True, max_tokens=1)
    assert [c.text for c in answer.choices] == ["ab" + word(0, 0), "çd" + word(1, 0)]
    stream = await client.completions.create(model=MODEL, prompt="ab", echo=True, max_tokens=1, stream=True)
    assert [c.choices[0].text async for c in stream] == ["ab", word(0, 0)]
    alphabet = [64, 65]  # of the byte tokenizer
    answer = await client.completions.create(model=MODEL, prompt=alphabet, echo=True, max_tokens=1)
    decoded = answer.choices[0].text.removesuffix(word(0, 0))
    assert len(decoded) == 2


async def test_completion_logprobs(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model=MODEL, prompt="x", logprobs=2, max_tokens=2)
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.tokens == [word(0, 0), word(0, 1)]
    assert found.token_logprobs == [-0.5, -1.5]
    assert found.text_offset == [0, len(word(0, 0))]
    assert found.top_logprobs == [{"hi": -0.25, "bytes:\\xc3": -9999.0, word(0, i): -0.5 - i} for i in range(2)]
    stream = await client.completions.create(model=MODEL, prompt="x", logprobs=2, max_tokens=2, stream=True)
    pieces = [c.choices[0].logprobs async for c in stream]
    assert [p.text_offset for p in pieces if p] == [[0], [len(word(0, 0))]]
    assert [p.tokens for p in pieces if p] == [[word(0, 0)], [word(0, 1)]]


async def test_chat_logprobs(client: openai.AsyncOpenAI) -> None:
    ask = {"model": MODEL, "messages": MESSAGES, "logprobs": True, "top_logprobs": 2, "max_tokens": 2}
    whole = await client.chat.completions.create(**ask)
    assert whole.choices[0].logprobs is not None
    entries = whole.choices[0].logprobs.content or []
    assert [e.token for e in entries] == [word(0, 0), word(0, 1)]
    assert bytes(entries[0].bytes or []).decode() == word(0, 0)
    assert [(t.token, t.bytes, t.logprob) for t in entries[0].top_logprobs] == [
        ("hi", [104, 105], -0.25),
        ("\ufffd", [0xC3], -9999.0),
    ]
    stream = await client.chat.completions.create(**ask, stream=True)
    streamed = [e async for c in stream if c.choices[0].logprobs for e in c.choices[0].logprobs.content or []]
    assert streamed == entries


async def test_token_ids(client: openai.AsyncOpenAI) -> None:
    ask = {"model": MODEL, "prompt": "x", "max_tokens": 3, "extra_body": {"return_token_ids": True}}
    whole = await client.completions.create(**ask)
    assert whole.choices[0].token_ids == [10, 11, 12]
    stream = await client.completions.create(**ask, stream=True)
    assert [t async for c in stream for t in c.choices[0].token_ids] == [10, 11, 12]


async def test_prompt_token_ids(client: openai.AsyncOpenAI, backend: Backend) -> None:
    """In the choice of completions and at the top of chats, whole, streamed and shown later, as vLLM has them."""
    more = {"max_tokens": 2, "extra_body": {"return_token_ids": True}}
    whole = await client.completions.create(model=MODEL, prompt=["ab", "c"], n=2, **more)
    assert [c.prompt_token_ids for c in whole.choices] == [[97, 98], [97, 98], [99], [99]]
    stream = await client.completions.create(model=MODEL, prompt="ab", stream=True, **more)
    found = [getattr(c.choices[0], "prompt_token_ids", None) async for c in stream]
    assert found == [[97, 98], None, None]
    chat = await client.chat.completions.create(model=MODEL, messages=MESSAGES, **more)
    assert chat.prompt_token_ids == list(b"hi there")
    assert chat.choices[0].token_ids == [10, 11]
    parts = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True, **more)
    assert [getattr(c, "prompt_token_ids", None) async for c in parts] == [list(b"hi there"), None, None]


async def test_what_changes_nothing_of_the_prompt(client: openai.AsyncOpenAI, backend: Backend) -> None:
    await client.completions.create(model=MODEL, prompt="ab", extra_body={"add_special_tokens": True})
    chat = {"add_special_tokens": False, "continue_final_message": False, "add_generation_prompt": False}
    await client.chat.completions.create(model=MODEL, messages=MESSAGES, extra_body=chat)
    assert backend.running[-1].record.job.chat_template_kwargs == {"add_generation_prompt": False}


async def test_what_is_ignored_and_what_says_nothing(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "user", "content": "c", "name": "Ann"},
        ],
        user="u",
        metadata={"k": "v"},
        store=True,
        service_tier="auto",
        verbosity="low",
        safety_identifier="s",
        prompt_cache_key="k",
        prediction={"type": "content", "content": "c"},
        tool_choice="none",
        parallel_tool_calls=True,
        response_format={"type": "text"},
        modalities=["text"],
        reasoning_effort=None,
        tools=[],
        stop=None,
    )
    assert answer.choices[0].finish_reason == "stop"


async def test_messages_reach_the_scheduler_as_templates_know_them(
    client: openai.AsyncOpenAI, backend: Backend
) -> None:
    await client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "user", "content": "c", "name": "Ann"},
        ],
        seed=5,
        extra_body={"chat_template_kwargs": {"enable_thinking": False}, "priority": "batch", "cache_salt": "s"},
    )
    job = backend.running[-1].record.job
    assert job.messages == [{"role": "system", "content": "a\nb"}, {"role": "user", "content": "c", "name": "Ann"}]
    assert (job.sampling.seed, job.sampling.max_tokens, job.sampling.n) == (5, None, 1)
    assert (job.priority, job.cache_salt, job.chat_template_kwargs) == ("batch", "s", {"enable_thinking": False})


async def test_messages_as_clients_write_them(front: Front, backend: Backend) -> None:
    """What litellm adds, an assistant that said nothing, and the history of a call."""
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    status, _, _ = await front.post(
        "/v1/chat/completions",
        {
            "model": MODEL,
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}],
                    "annotations": [],
                },
                {"role": "assistant", "content": None},
                {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "why"},
                {"role": "tool", "tool_call_id": "c1", "content": "42"},
            ],
        },
    )
    assert status == 200
    normal_call = {**call, "function": {"name": "f", "arguments": {"a": 1}}}
    assert backend.running[-1].record.job.messages == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": ""},
        {"role": "assistant", "content": "", "reasoning_content": "why", "tool_calls": [normal_call]},
        {"role": "tool", "content": "42", "tool_call_id": "c1"},
    ]


async def test_generate_tokenize_detokenize(front: Front) -> None:
    status, body, _ = await front.post("/generate", {"prompt": "x", "max_tokens": 2, "temperature": 0})
    assert (status, body) == (200, {"response": word(0, 0) + word(0, 1)})
    status, body, _ = await front.post("/tokenize", {"prompt": "héllo"})
    assert status == 200
    assert (body["count"], body["max_model_len"], len(body["tokens"])) == (6, 256, 6)
    status, body, _ = await front.post("/detokenize", {"tokens": body["tokens"], "model": MODEL})
    assert (status, body) == (200, {"prompt": "héllo"})


async def test_request_ids(front: Front) -> None:
    status, body, headers = await front.post("/v1/completions", {"model": MODEL, "prompt": "x"})
    assert status == 200
    assert body["id"] == "cmpl-" + headers["X-Request-Id"]
