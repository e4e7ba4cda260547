"""pydantic-ai: agents, by every way that it has to ask for structure."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import checks
from checks import BASE, CITY, FRANCE, MODEL, REPEAT, SUM, TOKENS, is_city, run
from pydantic import BaseModel, ConfigDict, Field
from pydantic_ai import Agent, NativeOutput, PromptedOutput, RunContext, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=BASE, api_key="none"))
SETTINGS: dict[str, Any] = {"temperature": 0, "max_tokens": TOKENS, "parallel_tool_calls": False}


class City(BaseModel):
    """A city."""

    city: Literal["Paris", "Rome", "Berlin"]
    population: int = Field(ge=1, le=99_999_999)


class AnyObject(BaseModel):
    """What a small model makes of a schema that it is only told: JSON, but any."""

    model_config = ConfigDict(extra="allow")


def chat() -> None:
    answer = Agent(model, instructions="Be brief.", model_settings=SETTINGS).run_sync(FRANCE)
    assert "Paris" in answer.output
    assert answer.usage.output_tokens > 0


def stream() -> None:
    async def read() -> str:
        async with Agent(model, model_settings=SETTINGS).run_stream(FRANCE) as answer:
            return "".join([piece async for piece in answer.stream_text(delta=True)])

    assert "Paris" in asyncio.run(read())


def tools() -> None:
    def settings(context: RunContext[None]) -> dict[str, Any]:
        return {**SETTINGS, "tool_choice": ["add"] if context.run_step <= 1 else "none"}

    agent = Agent(model, tools=[checks.add], model_settings=settings)
    answer = agent.run_sync(SUM)
    assert answer.output
    (called,) = checks.calls
    told = [part for message in answer.all_messages() for part in message.parts if part.part_kind == "tool-return"]
    assert [part.content for part in told] == [sum(called)]


def structured() -> None:
    for output in (ToolOutput(City), NativeOutput(City), City):
        is_city(Agent(model, output_type=output, model_settings=SETTINGS, retries=0).run_sync(CITY).output)
    prompted = Agent(model, output_type=PromptedOutput(AnyObject), model_settings=SETTINGS, retries=0)
    assert isinstance(prompted.run_sync(REPEAT).output, AnyObject)


run(chat, stream, tools, structured)
