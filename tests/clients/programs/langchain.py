"""langchain-openai."""

from __future__ import annotations

from typing import Literal

import checks
from checks import BASE, CITY, FRANCE, MODEL, SUM, TOKENS, is_city, run
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field

model = ChatOpenAI(
    base_url=BASE, api_key="none", model=MODEL, temperature=0, max_retries=0, max_tokens=TOKENS, stream_usage=True
)


class City(BaseModel):
    """A city."""

    city: Literal["Paris", "Rome", "Berlin"]
    population: int = Field(ge=1, le=99_999_999)


@tool
def add(a: int, b: int) -> int:
    """The sum of two integers."""
    return checks.add(a, b)


def chat() -> None:
    answer = model.invoke([("system", "Be brief."), ("user", FRANCE)])
    assert "Paris" in answer.content
    assert answer.usage_metadata["output_tokens"] > 0


def stream() -> None:
    whole = None
    for chunk in model.stream(FRANCE):
        whole = chunk if whole is None else whole + chunk
    assert whole.content == model.invoke(FRANCE).content
    assert whole.usage_metadata["output_tokens"] > 0


def tools() -> None:
    bound = model.bind_tools([add], tool_choice="add", parallel_tool_calls=False)
    first = bound.invoke(SUM)
    (call,) = first.tool_calls
    result = add.invoke(call)
    assert int(result.content) == sum(checks.calls[-1])
    last = model.bind_tools([add], tool_choice="none").invoke([HumanMessage(SUM), first, result])
    assert last.content
    streamed = None
    for chunk in bound.stream(SUM):
        streamed = chunk if streamed is None else streamed + chunk
    assert [one["args"] for one in streamed.tool_calls] == [call["args"]]
    assert model.bind_tools([add], tool_choice="required").invoke(SUM).tool_calls


def structured() -> None:
    for method in ("json_schema", "function_calling"):
        is_city(model.with_structured_output(City, method=method).invoke(CITY))
        is_city(model.with_structured_output(City.model_json_schema(), method=method, strict=True).invoke(CITY))
    told = 'Answer in JSON, exactly: {"city": "Paris", "population": 1}'
    assert isinstance(model.with_structured_output(None, method="json_mode").invoke(told), dict)


run(chat, stream, tools, structured)
