"""Grammars over a vocabulary of bytes: what they admit, where they end, and that a state is a function of the ids."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest

from protocol.errors import StructureNotSupported
from protocol.structures.grammar import MAX_COMPILED, Grammars, MaskRow, Matcher, TokenVocabulary
from protocol.structures.structure import Structure

END, OTHER_END, THINK, VOCAB, PADDED = 256, 257, 258, 259, 264
TOKENS = [bytes([i]) for i in range(256)] + [b"<|end|>", b"<|stop|>", b"</think>"]


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(TokenVocabulary(TOKENS, [END]), PADDED, [END, OTHER_END])


def allowed(matcher: Matcher) -> set[int]:
    row = MaskRow(-(-PADDED // 32))
    matcher.fill(row)
    return set(np.flatnonzero(np.unpackbits(row.bits.view(np.uint8), bitorder="little")).tolist())


def admits(grammars: Grammars, text: str, **structure: Any) -> bool:
    """Whether ``text`` can be drawn id by id and may end there."""
    matcher = grammars.matcher(Structure(**structure))
    for byte in text.encode():
        if byte not in allowed(matcher):
            return False
        matcher.advance([byte])
    return END in allowed(matcher)


OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


@pytest.mark.parametrize(
    ("text", "structure"),
    [
        ('{"a": 1}', {"json": OBJECT}),
        ('{\n  "a": 12\n}', {"json": OBJECT}),
        ('{"x": [null, "é"]}', {"json_object": True}),
        ("aab", {"regex": "a+b"}),
        ("say \"hi\"\n", {"choice": ["say \"hi\"\n", "é"]}),
        ("é", {"choice": ["say \"hi\"\n", "é"]}),
        ("ab1", {"grammar": 'start: "ab" /[0-9]/'}),
        ("xyz", {"grammar": 'root ::= "x" [a-z]+'}),
        ("so <f=a>12</f>.", {"structural_tag": {"structures": [
            {"begin": "<f=a>", "schema": {"type": "integer"}, "end": "</f>"}], "triggers": ["<f="]}}),
        ("[1]", {"structural_tag": {"format": {"type": "tag", "begin": "[", "end": "]", "content": {
            "type": "json_schema", "json_schema": {"type": "integer"}}}}}),
        ("a/b-2", {"structural_tag": {"format": {"type": "sequence", "elements": [
            {"type": "const_string", "value": "a/b-"}, {"type": "or", "elements": [
                {"type": "regex", "pattern": "[0-9]"}, {"type": "const_string", "value": "x"}]}]}}}),
    ],
)  # fmt: skip
def test_admits(grammars: Grammars, text: str, structure: dict[str, Any]) -> None:
    Structure(**structure).check()
    grammars.check(Structure(**structure))
    assert admits(grammars, text, **structure)


@pytest.mark.parametrize(
    ("text", "structure"),
    [
        ('{"a": "1"}', {"json": OBJECT}),
        ('{"a": 1', {"json": OBJECT}),
        ('{"a": 1, "b": 2}', {"json": OBJECT}),
        ("{" + "\n" * 3 + "}", {"json_object": True}),
        ("[]", {"json_object": True}),
        ("aa", {"regex": "a+b"}),
        ("so <f=a>x</f>", {"structural_tag": {"structures": [
            {"begin": "<f=a>", "schema": {"type": "integer"}, "end": "</f>"}], "triggers": ["<f="]}}),
    ],
)  # fmt: skip
def test_does_not_admit(grammars: Grammars, text: str, structure: dict[str, Any]) -> None:
    assert not admits(grammars, text, **structure)


def test_all_ends_are_one_and_padding_is_never_allowed(grammars: Grammars) -> None:
    matcher = grammars.matcher(Structure(regex="(.|\n)*"))
    assert {END, OTHER_END} <= allowed(matcher)
    assert not allowed(matcher) & set(range(VOCAB, PADDED))
    other = grammars.matcher(Structure(choice=["ab"]))
    assert allowed(other) == {ord("a")}
    other.advance(b"ab")
    assert allowed(other) == {END, OTHER_END}
    other.advance([OTHER_END, 7, 7])  # rows past an end are nobody's
    assert other.failed is None


def test_the_requests_own_stop_ids_are_allowed_exactly_where_an_end_is(grammars: Grammars) -> None:
    matcher = grammars.matcher(Structure(json=OBJECT), stop_ids=[ord("1"), ord("9")])
    matcher.advance(b'{"a": ')
    assert ord("2") in allowed(matcher)
    assert ord("1") not in allowed(matcher)
    matcher.advance(b"2}")
    assert allowed(matcher) == {END, OTHER_END, ord("1"), ord("9")}


def test_the_grammar_begins_after_the_end_of_the_thought(grammars: Grammars) -> None:
    matcher = grammars.matcher(Structure(json=OBJECT, after=[THINK]))
    free = allowed(matcher)
    assert not free & {END, OTHER_END}
    assert free == {*range(VOCAB)} - {END, OTHER_END}
    matcher.advance([*b"</think>{", THINK])  # letters do not end a thought, the token does
    assert allowed(matcher) == {ord("{")}


def test_a_limit_closes_the_thought(grammars: Grammars) -> None:
    close = [ord("\n"), THINK]
    matcher = grammars.matcher(Structure(json=OBJECT, after=close, after_limit=3))
    matcher.advance(b"ab")
    assert len(allowed(matcher)) > 200
    matcher.advance(b"c")
    assert allowed(matcher) == {ord("\n")}
    matcher.advance([ord("\n")])
    assert allowed(matcher) == {THINK}
    matcher.advance([THINK])
    assert allowed(matcher) == {ord("{")}
    alone = grammars.matcher(Structure(after=[THINK], after_limit=0))
    assert allowed(alone) == {THINK}
    alone.advance([THINK])
    assert END in allowed(alone)


def test_where_the_output_must_open_the_thought_others_are_ruled_at_once(grammars: Grammars) -> None:
    opens = ord("<")
    structure = Structure(json=OBJECT, after=[THINK], after_limit=2, opened_by=[opens, ord("t")])
    structure.check(VOCAB)
    plain = grammars.matcher(structure)
    assert allowed(plain) == {ord("{"), opens}
    plain.advance_one(ord("{"))
    assert allowed(plain) == {ord('"')} | {ord(space) for space in "\t\n "}
    thinking = grammars.matcher(structure)
    thinking.advance([opens])
    assert allowed(thinking) == {ord("t")}
    thinking.advance([ord("t"), opens])  # a second one opens nothing
    assert len(allowed(thinking)) > 200
    thinking.advance_one(7)
    assert allowed(thinking) == {THINK}
    thinking.advance_one(THINK)
    assert allowed(thinking) == {ord("{")}
    free = grammars.matcher(Structure(after=[THINK], after_limit=0, opened_by=[opens]))
    assert {END, opens, ord("x")} <= allowed(free)
    free.advance([ord("x")])
    assert {END, ord("x")} <= allowed(free)


def test_no_end_comes_within_the_thought_the_requests_own_neither(grammars: Grammars) -> None:
    matcher = grammars.matcher(Structure(json=OBJECT, after=[THINK]), stop_ids=[ord("a"), THINK])
    assert not allowed(matcher) & {END, OTHER_END, ord("a")}
    assert THINK in allowed(matcher)


def test_a_token_that_does_not_fit_fails_the_matcher_for_good(grammars: Grammars) -> None:
    matcher = grammars.matcher(Structure(json=OBJECT))
    matcher.advance(b'{"secret')
    assert matcher.failed
    assert "secret" not in matcher.failed
    assert not matcher.fill(MaskRow(9))


@pytest.mark.parametrize("seed", range(5))
def test_replay_in_any_cut_gives_the_same_masks(grammars: Grammars, seed: int) -> None:
    """What a worker that takes a sequence over knows is its ids: the masks that follow must be the same."""
    rng = random.Random(seed)
    schema = {"type": "array", "items": {"enum": ["one", 2, None, {"x": [1]}]}, "maxItems": 4}
    structure = Structure(json=schema, after=[THINK])
    first = grammars.matcher(structure)
    ids = [*rng.choices(range(VOCAB - 4), k=3), THINK]
    first.advance(ids)
    while (mask := allowed(first)) and not mask & {END}:
        ids.append(rng.choice(sorted(mask)))
        first.advance(ids[-1:])
        again = grammars.matcher(structure)
        cut = rng.randrange(len(ids) + 1)
        again.advance(ids[:cut])
        again.advance(ids[cut:])
        assert allowed(again) == allowed(first)
    assert json.loads(bytes(ids[4:])) is not None


@pytest.mark.parametrize(
    ("schema", "keyword", "path"),
    [
        ({"properties": {"a": {"oneOf": [{"type": "number"}, {"type": "integer"}]}}}, "oneOf", "/properties/a"),
        ({"items": {"type": "string", "pattern": "(?=a)"}}, "pattern", "/items"),
        ({"properties": {"a": {"$ref": "#/$defs/b"}}}, "$ref", "/properties/a"),
        ({"$ref": "https://example.org/a.json"}, "$ref", "/"),
        ({"$defs": {"b": {"type": "strin"}}, "$ref": "#/$defs/b"}, "type", "/$defs/b"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "minimum", "/"),
    ],
)
def test_what_the_library_refuses_is_named(grammars: Grammars, schema: Any, keyword: str, path: str) -> None:
    with pytest.raises(StructureNotSupported) as caught:
        grammars.check(Structure(json=schema))
    assert f"the keyword {keyword} at {path} cannot be served: " in str(caught.value)


@pytest.mark.parametrize("structure", [
    {"regex": "a("}, {"grammar": "start: nothing"}, {"grammar": "root ::= [a"}, {"grammar": "root ::= " + "(" * 5000},
    {"grammar": "start: " + "(" * 5000},
])  # fmt: skip
def test_a_bad_grammar_is_refused(grammars: Grammars, structure: dict[str, Any]) -> None:
    with pytest.raises(StructureNotSupported, match="cannot be served"):
        grammars.check(Structure(**structure))


def test_compiled_grammars_are_kept_within_bounds() -> None:
    grammars = Grammars(TokenVocabulary(TOKENS, [END]), VOCAB, [END])
    for number in range(MAX_COMPILED + 20):
        grammars.matcher(Structure(choice=[str(number)]))
    assert len(grammars._compiled) == MAX_COMPILED
    big = "x" * 60_000
    for number in range(100):
        grammars.matcher(Structure(choice=[f"{number}{big}"]))
    assert grammars._bytes <= 4 << 20
    assert grammars._bytes == sum(size for _, size in grammars._compiled.values())


def test_a_model_without_an_end_and_a_broken_tokenizer_are_refused_by_name() -> None:
    with pytest.raises(StructureNotSupported, match="end token"):
        Grammars(TokenVocabulary(TOKENS, []), VOCAB, [])
    with pytest.raises(StructureNotSupported, match="tokenizer"):
        Grammars("{}", VOCAB, [END])


def test_a_grammar_whose_first_steps_exceed_the_limits_is_refused(grammars: Grammars) -> None:
    schema = {"type": "object", "properties": {f"p{number}": {"type": "integer"} for number in range(800)}}
    with pytest.raises(StructureNotSupported, match="items"):
        grammars.check(Structure(json=schema))
    schema["required"] = [*schema["properties"]]
    grammars.check(Structure(json=schema))
