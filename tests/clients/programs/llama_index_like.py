"""llama-index with its OpenAILike."""

from __future__ import annotations

from typing import Any, Literal

import checks
from checks import BASE, CITY, FRANCE, MODEL, SUM, TOKENS, is_city, run
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, Field

settings: dict[str, Any] = {
    "model": MODEL, "api_base": BASE, "api_key": "none", "is_chat_model": True, "is_function_calling_model": True,
    "temperature": 0, "max_tokens": TOKENS, "max_retries": 0, "context_window": 2048,
}  # fmt: skip
model = OpenAILike(**settings)


class City(BaseModel):
    """A city."""

    city: Literal["Paris", "Rome", "Berlin"]
    population: int = Field(ge=1, le=99_999_999)


def chat() -> None:
    assert "Paris" in (model.chat([ChatMessage(role="user", content=FRANCE)]).message.content or "")
    assert model.complete(FRANCE).text
    assert OpenAILike(**{**settings, "is_chat_model": False}).complete("Paris is the").text


def stream() -> None:
    pieces = [piece.delta or "" for piece in model.stream_chat([ChatMessage(role="user", content=FRANCE)])]
    assert "Paris" in "".join(pieces)


def tools() -> None:
    tool = FunctionTool.from_defaults(fn=checks.add)
    asked: dict[str, Any] = {"user_msg": SUM, "tool_required": True, "allow_parallel_tool_calls": False}
    first = model.chat_with_tools([tool], **asked)
    (call,) = model.get_tool_calls_from_response(first)
    result = tool.call(**call.tool_kwargs)
    assert result.raw_output == sum(checks.calls[-1])
    told = ChatMessage(role="tool", content=str(result.content), additional_kwargs={"tool_call_id": call.tool_id})
    history = [ChatMessage(role="user", content=SUM), first.message, told]
    last = model.chat_with_tools([tool], chat_history=history, tool_choice="none")
    assert last.message.content
    *_, streamed = model.stream_chat_with_tools([tool], **asked)
    (again,) = model.get_tool_calls_from_response(streamed)
    assert again.tool_kwargs == call.tool_kwargs


def structured() -> None:
    is_city(model.structured_predict(City, PromptTemplate(CITY)))
    is_city(model.as_structured_llm(City).chat([ChatMessage(role="user", content=CITY)]).raw)
    by_schema = OpenAILike(**settings, should_use_structured_outputs=True)
    is_city(by_schema.structured_predict(City, PromptTemplate(CITY)))


run(chat, stream, tools, structured)
