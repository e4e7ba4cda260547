"""instructor, in every mode that it has for OpenAI's API."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import instructor
import openai
from checks import BASE, CITY, MODEL, REPEAT, TOKENS, is_city, run
from instructor import Mode
from pydantic import BaseModel, ConfigDict, Field

client = openai.OpenAI(base_url=BASE, api_key="none", max_retries=0)


class City(BaseModel):
    """A city."""

    city: Literal["Paris", "Rome", "Berlin"]
    population: int = Field(ge=1, le=99_999_999)


class AnyObject(BaseModel):
    """What a small model makes of a schema that it is only told: JSON, but any."""

    model_config = ConfigDict(extra="allow")


def ask(mode: Mode, kind: Any, content: str = CITY, **more: Any) -> Any:
    return instructor.from_openai(client, mode=mode).chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": content}], response_model=kind, max_retries=0, temperature=0,
        max_tokens=TOKENS, **more,
    )  # fmt: skip


def structured() -> None:
    for mode in (Mode.TOOLS, Mode.TOOLS_STRICT, Mode.JSON_SCHEMA):
        is_city(ask(mode, City))
    for mode in (Mode.JSON, Mode.MD_JSON):
        assert isinstance(ask(mode, AnyObject, REPEAT), AnyObject), mode
    required = {"tool_choice": "required", "parallel_tool_calls": False}  # the mode's own choice is auto
    (city,) = ask(Mode.PARALLEL_TOOLS, Iterable[City], extra_body=required)
    is_city(city)


run(structured)
