"""openai, the reference client."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
from checks import BASE, CITY, FRANCE, MODEL, NAMED, SUM, TOKENS, TOOL, add, is_city, run
from pydantic import BaseModel, Field

client = openai.OpenAI(base_url=BASE, api_key="none", max_retries=0)


class City(BaseModel):
    city: Literal["Paris", "Rome", "Berlin"]
    population: int = Field(ge=1, le=99_999_999)


def ask(content: str, **more: Any) -> Any:
    return client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": content}], temperature=0, **{"max_tokens": TOKENS, **more}
    )


def chat() -> None:
    answer = ask(FRANCE)
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer._request_id
    assert [model.id for model in client.models.list()] == [MODEL]
    refused = None
    try:
        ask(FRANCE, top_logprobs=3)
    except openai.BadRequestError as error:
        refused = error
    assert refused is not None
    assert refused.param == "top_logprobs"
    assert refused.request_id


def stream() -> None:
    chunks = list(ask(FRANCE, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == ask(FRANCE).choices[0].message.content
    assert chunks[-1].usage.completion_tokens > 0


def tools() -> None:
    first = ask(SUM, tools=[TOOL], tool_choice=NAMED)
    message = first.choices[0].message
    assert first.choices[0].finish_reason == "tool_calls"
    (call,) = message.tool_calls
    result = add(**json.loads(call.function.arguments))
    history = [
        {"role": "user", "content": SUM}, message,
        {"role": "tool", "tool_call_id": call.id, "content": str(result)},
    ]  # fmt: skip
    last = client.chat.completions.create(
        model=MODEL, messages=history, tools=[TOOL], tool_choice="none", max_tokens=32, temperature=0
    )
    assert last.choices[0].message.content
    asked: Any = {"model": MODEL, "messages": [{"role": "user", "content": SUM}], "tools": [TOOL], "temperature": 0}
    with client.chat.completions.stream(**asked, tool_choice=NAMED, max_tokens=TOKENS) as events:
        kinds = {event.type for event in events}
        (streamed,) = events.get_final_completion().choices[0].message.tool_calls
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    assert (streamed.function.name, streamed.function.arguments) == ("add", call.function.arguments)


def structured() -> None:
    asked: Any = {"model": MODEL, "messages": [{"role": "user", "content": CITY}], "temperature": 0}
    answer = client.chat.completions.parse(**asked, response_format=City)
    is_city(answer.choices[0].message.parsed)
    with client.chat.completions.stream(**asked, response_format=City) as events:
        list(events)
        is_city(events.get_final_completion().choices[0].message.parsed)


run(chat, stream, tools, structured)
