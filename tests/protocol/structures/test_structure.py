"""What asks for structure, checked without a tokenizer: limits, refusals with keyword and path, the wire."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from protocol.errors import InvalidRequest, StructureNotSupported, http_status
from protocol.jobs import decode_job
from protocol.messages import Job, encode
from protocol.sampling import SamplingParams
from protocol.structures.json_schema import REFUSED, check_schema, served_schema
from protocol.structures.structure import MAX_GRAMMAR_BYTES, Structure

TAG = {"begin": "<f=a>", "schema": {"type": "integer"}, "end": "</f>"}

GOOD = [
    {"json": {"type": "object"}},
    {"json": True},
    {"json": '{"type": "object"}'},
    {"json_object": True},
    {"regex": "a+"},
    {"choice": ["a", "b"]},
    {"grammar": 'start: "a"'},
    {"structural_tag": {"type": "structural_tag", "structures": [TAG], "triggers": ["<f="]}},
    {"structural_tag": {"format": {"type": "json_schema", "json_schema": {}}}},
    {"after": [1, 2]},
    {"json_object": True, "after": [1], "after_limit": 0},
]
BAD: list[dict[str, Any]] = [
    {},
    {"json": False},
    {"json": 3},
    {"json": [1]},
    {"json": "{"},
    {"json": '"text"'},
    {"json": {"type": "object"}, "regex": "a"},
    {"json": {"title": "x" * MAX_GRAMMAR_BYTES}},
    {"json": {"title": "x" * 20}, "after_limit": 3},
    {"json": '{"items":' * 80 + "{}" + "}" * 80},
    {"json": '{"const":' * 3000 + "{}" + "}" * 3000},
    {"regex": ""},
    {"regex": "x" * (MAX_GRAMMAR_BYTES + 1)},
    {"grammar": ""},
    {"choice": []},
    {"choice": ["a", ""]},
    {"choice": ["a"] * 1025},
    {"structural_tag": {}},
    {"structural_tag": {"type": "other"}},
    {"structural_tag": {"structures": [TAG], "triggers": ["<g="]}},
    {"structural_tag": {"structures": [{**TAG, "schema": {"not": {}}}], "triggers": ["<f="]}},
    {"structural_tag": {"format": {"type": "any"}}},
    {"structural_tag": {"format": {"type": "sequence", "elements": []}}},
    {"after": [-1]},
    {"after": [1000]},
    {"after": list(range(17))},
]


@pytest.mark.parametrize("fields", GOOD)
def test_is_taken(fields: dict[str, Any]) -> None:
    Structure(**fields).check(vocab_size=1000)


@pytest.mark.parametrize("fields", BAD, ids=lambda fields: str(fields)[:60])
def test_is_refused_under_the_name_that_its_sender_knows(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Structure(**fields, field="guided").check(vocab_size=1000)
    assert str(caught.value.param).startswith("guided")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("keyword", sorted(REFUSED))
def test_every_keyword_of_the_list_is_named_with_its_path(keyword: str) -> None:
    schema = {"type": "object", "properties": {"a/b": {"items": {keyword: ["something"]}}}}
    with pytest.raises(
        StructureNotSupported,
        match=rf"the keyword \{keyword} at /properties/a~1b/items cannot"
        if keyword.startswith("$")
        else rf"the keyword {keyword} at /properties/a~1b/items cannot",
    ):
        check_schema(schema, "structure")


def test_names_and_values_are_no_keywords() -> None:
    check_schema(
        {
            "properties": {"not": {}, "if": {"type": "string"}},
            "enum": [{"not": {}}],
            "const": {"contains": 1},
            "default": {"uniqueItems": True},
            "examples": [{"format": "iban"}],
        },
        "structure",
    )


def test_a_keyword_that_says_nothing_is_left_out() -> None:
    given = {
        "x-guidance": {"lenient": True},
        "properties": {"a": {"type": "string", "format": "password", "uniqueItems": False}},
        "anyOf": [{"not": False}, True],
        "unevaluatedProperties": True,
        "const": {"not": 1},
    }
    check_schema(given, "structure")
    assert served_schema(given) == {
        "properties": {"a": {"type": "string"}}, "anyOf": [{}, {}], "const": {"not": 1},
    }  # fmt: skip


def test_the_order_of_properties_survives_the_wire() -> None:
    names = ["zeta", "alpha", "mid"]
    structure = Structure(json={"properties": {name: {} for name in names}})
    job = Job(prompt="a", sampling=SamplingParams(structure=structure))
    received = decode_job(encode(job)).sampling.structure
    assert received is not None
    assert list(received.json["properties"]) == names
    assert received.source() == structure.source()


def test_a_request_without_structure_is_the_same_on_the_wire_as_before() -> None:
    assert msgspec.msgpack.decode(encode(SamplingParams())) == {}


def test_an_object_and_its_text_are_one_grammar() -> None:
    assert Structure(json={"a": 1}).source() == Structure(json='{ "a" : 1 }').source()


@pytest.mark.parametrize(
    ("structure", "param"),
    [
        ({"json": {"a": {"b": "\ud800"}}}, "structure"),
        ({"json": {"a": float("nan")}}, "structure"),
        ({"json": {"a": {1: 2}}}, "structure"),
        ({"regexp": "a"}, "structure.regexp"),
        ({"regex": 3}, "structure.regex"),
    ],
)
def test_a_pushed_job_is_refused_for_what_json_cannot_say(structure: dict[str, Any], param: str) -> None:
    import msgpack

    payload = msgpack.packb({"prompt": "a", "sampling": {"structure": structure}}, unicode_errors="surrogatepass")
    with pytest.raises(InvalidRequest) as caught:
        decode_job(payload)
    assert caught.value.param in (param, None)


def test_codes_have_their_status() -> None:
    assert http_status("structure_not_supported") == 400
    assert http_status("no_token_left") == 400
    assert http_status("grammar_failed") == 500
