"""litellm, as the SDK and by both of its ways to an OpenAI-like server."""

from __future__ import annotations

import json
import os
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # the prices of models would be fetched from elsewhere

import litellm
from checks import BASE, CITY, CITY_SCHEMA, FRANCE, MODEL, NAMED, SUM, TOKENS, TOOL, add, is_city, run

PROVIDERS = ("openai", "hosted_vllm")


def ask(provider: str, messages: list[Any], **more: Any) -> Any:
    return litellm.completion(
        model=f"{provider}/{MODEL}", api_base=BASE, api_key="none", messages=messages, temperature=0,
        max_tokens=TOKENS, num_retries=0, max_retries=0, **more,
    )  # fmt: skip


def user(content: Any) -> list[Any]:
    return [{"role": "user", "content": content}]


def chat() -> None:
    for provider in PROVIDERS:
        answer = ask(provider, user(FRANCE))
        assert "Paris" in answer.choices[0].message.content
        part = {"type": "text", "text": FRANCE, "cache_control": {"type": "ephemeral"}}
        assert ask(provider, user([part])).choices[0].message.content == answer.choices[0].message.content
        assert ask(provider, user(FRANCE), reasoning_effort="low").choices[0].message.content


def stream() -> None:
    for provider in PROVIDERS:
        chunks = list(ask(provider, user(FRANCE), stream=True, stream_options={"include_usage": True}))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == ask(provider, user(FRANCE)).choices[0].message.content
        whole = litellm.stream_chunk_builder(chunks)
        assert whole.choices[0].message.content == text
        assert whole.usage.completion_tokens > 0


def tools() -> None:
    for provider in PROVIDERS:
        message = ask(provider, user(SUM), tools=[TOOL], tool_choice=NAMED).choices[0].message
        (call,) = message.tool_calls
        result = add(**json.loads(call.function.arguments))
        told = {"role": "tool", "tool_call_id": call.id, "name": "add", "content": str(result)}
        last = ask(provider, [*user(SUM), message, told], tools=[TOOL], tool_choice="none")
        assert last.choices[0].message.content


def structured() -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "City", "schema": CITY_SCHEMA, "strict": True}}
    for provider in PROVIDERS:
        is_city(json.loads(ask(provider, user(CITY), response_format=schema).choices[0].message.content))


run(chat, stream, tools, structured)
