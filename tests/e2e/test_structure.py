"""Structured output over the whole stack: every way to ask for it, every refusal before admission."""

from __future__ import annotations

import json
import re
from typing import Any

import openai
import pytest
from jsonschema import Draft202012Validator

from headrace import AsyncClient
from headrace.serve.embedded import server_url
from protocol.structures.structure import Structure
from tests.stack import Stack

MODEL = "demo"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["function", "class"]},
        "lines": {"type": "integer", "minimum": 1, "maximum": 999},
    },
    "required": ["name", "kind", "lines"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
TAG = {"begin": "<f=a>", "schema": {"type": "integer", "maximum": 99, "minimum": 0}, "end": "</f>"}


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "What does json.dumps do?"}],
        **{"max_tokens": 200, "seed": 3, **fields},
    )  # fmt: skip


def test_json_schema_whole_streamed_and_several_choices(client: openai.OpenAI) -> None:
    whole = ask(client, response_format=FORMAT, n=3, logprobs=True, top_logprobs=2, stop=["function", '"'])
    assert len({choice.message.content for choice in whole.choices}) > 1
    for choice in whole.choices:
        assert choice.finish_reason == "stop"
        Draft202012Validator(SCHEMA).validate(json.loads(choice.message.content))
    pieces = list(ask(client, response_format=FORMAT, stream=True, temperature=0))
    streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert streamed == ask(client, response_format=FORMAT, temperature=0).choices[0].message.content
    Draft202012Validator(SCHEMA).validate(json.loads(streamed))


def test_json_object(client: openai.OpenAI) -> None:
    answer = ask(
        client, response_format={"type": "json_object"}, temperature=0, extra_body={"min_tokens": 150}
    ).choices[0]
    if answer.finish_reason == "stop":
        assert isinstance(json.loads(answer.message.content), dict)
    else:
        assert answer.finish_reason == "length"
        assert answer.message.content.startswith("{")


@pytest.mark.parametrize(
    ("extra", "pattern"),
    [
        ({"structured_outputs": {"regex": "[0-9]{3}-[a-f]{2}"}}, "[0-9]{3}-[a-f]{2}"),
        ({"structured_outputs": {"choice": ["yes", "no", "né\n"]}}, "yes|no|né\n"),
        ({"structured_outputs": {"grammar": 'start: "a" /[0-9]/ "b"'}}, "a[0-9]b"),
        ({"structured_outputs": {"grammar": 'root ::= "x" [p-q] [p-q] "y"'}}, "x[pq]{2}y"),
        ({"structured_outputs": {"json": {"enum": [17, "x"]}}}, '17|"x"'),
        ({"guided_json": json.dumps({"type": "boolean"})}, "true|false"),
        ({"guided_regex": "[xyz]{4}"}, "[xyz]{4}"),
        ({"guided_choice": ["only"]}, "only"),
        ({"guided_grammar": 'start: "g"'}, "g"),
        ({"response_format": {"type": "structural_tag", "structures": [TAG], "triggers": ["<f="]}, "max_tokens": 40},
         r"(?s)((?!<f=).)*(<f=a>[0-9]{1,2}(</f>.*)?)?"),
    ],
)  # fmt: skip
def test_every_kind_by_every_name(client: openai.OpenAI, extra: dict[str, Any], pattern: str) -> None:
    more = {"ignore_eos": True, **extra}  # the grammar wins
    limit = {"max_tokens": more.pop("max_tokens")} if "max_tokens" in more else {}
    answer = ask(client, extra_body=more, **limit).choices[0]
    assert re.fullmatch(pattern, answer.message.content), answer
    assert limit or answer.finish_reason == "stop"


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {
            "properties": {"a": {"type": "array", "uniqueItems": True}}}}}},
         "response_format.json_schema.schema", "the keyword uniqueItems at /properties/a"),
        ({"guided_json": {"items": {"oneOf": [{"type": "number"}, {"type": "integer"}]}}}, "guided_json",
         "the keyword oneOf at /items"),
        ({"structured_outputs": {"regex": "(unclosed"}}, "structured_outputs.regex", "unclosed group"),
        ({"structured_outputs": {"grammar": "start: nothing"}}, "structured_outputs.grammar", "at 1(8)"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_served_is_a_400_that_says_why(
    client: openai.OpenAI, fields: dict[str, Any], param: str, said: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, extra_body=fields, stream=stream)
    assert caught.value.param == param
    assert said in caught.value.message
    assert caught.value.code == "structure_not_supported"


async def test_by_the_queue(stack: Stack) -> None:
    async with AsyncClient(server_url(stack.run_dir / "data")) as queue:
        structure = {"json": SCHEMA}
        request = await queue.submit("import", structure=structure, max_tokens=200, seed=5)
        result = await queue.result(request)
        assert result.choices[0].finish_reason == "stop"
        Draft202012Validator(SCHEMA).validate(json.loads(result.text))
        refused = await queue.submit("import", structure=Structure(regex="(unclosed"), max_tokens=20)
        error = (await queue.result(refused)).choices[0].error
        assert error is not None
        assert "unclosed group" in str(error)
