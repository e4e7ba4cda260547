"""Grammars of calls: they take what a family writes, and whatever they admit is read back as calls that validate."""

from __future__ import annotations

import contextlib
import random
from itertools import groupby
from typing import Any

import jsonschema
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from protocol.errors import InvalidRequest, StructureNotSupported
from protocol.formats.call_grammar import call_grammar
from protocol.formats.families import TOOLS
from protocol.formats.spec import FormatSpec, marker_texts
from protocol.structures.grammar import Grammars, MaskRow
from protocol.structures.structure import MAX_GRAMMAR_BYTES, Structure
from tests.protocol.test_formats import FUNCTIONS, TWO_CALLS, Reading, spec_of

END = "<|endofturn|>"
ASKED = [{"name": name, "parameters": parameters} for name, parameters in FUNCTIONS.items()]
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "unit": {"enum": ["C", "F"]},
        "days": {"type": "integer", "minimum": 0, "maximum": 20},
        "deep": {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"],
                 "additionalProperties": False},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}  # fmt: skip


def tokenizer_of(spec: FormatSpec) -> Tokenizer:
    """One token per byte, and the spec's controls with the ids that it names."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    filler = {f"<filler{i}>": i for i in range(len(alphabet), 1000)}
    tokenizer = Tokenizer(models.BPE({**{c: i for i, c in enumerate(alphabet)}, **filler}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    by_id = sorted(spec.controls.items(), key=lambda item: item[1])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text, _ in by_id])
    tokenizer.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    for text, id in by_id:
        assert tokenizer.token_to_id(text) == id
    return tokenizer


class Machine:
    """A tokenizer with its grammars."""

    def __init__(self, family: str, controls: bool, reasoning: str | None = None) -> None:
        self.spec = spec_of(family, controls=controls, reasoning=reasoning)
        self.tokenizer = tokenizer_of(self.spec)
        self.end = self.tokenizer.token_to_id(END)
        self.grammars = Grammars(self.tokenizer.to_str(), self.end + 1, [self.end])
        self.bytes = {id: self.tokenizer.decode([id], skip_special_tokens=False) for id in range(self.end + 1)}

    def takes(self, grammar: str, text: str) -> str | None:
        """Why the grammar does not take all of ``text``; None if it does and may end there."""
        structure = Structure(grammar=grammar, field="tools")
        structure.check()
        self.grammars.check(structure)
        matcher = self.grammars.matcher(structure)
        ids = self.tokenizer.encode(text).ids
        for at, token in enumerate([*ids, self.end]):
            if not self.allows(matcher, token):
                return f"stuck after {self.tokenizer.decode(ids[:at], skip_special_tokens=False)!r}"
            matcher.advance([token])
        return matcher.failed

    def sample(self, grammar: str, draw: random.Random, steps: int = 8000) -> list[int]:
        """A random output of the grammar, up to its end."""
        matcher = self.grammars.matcher(Structure(grammar=grammar, field="tools"))
        out: list[int] = []
        row = MaskRow(self.grammars.words)
        markers = [self.tokenizer.encode(text).ids for text in marker_texts(self.spec)]
        wanted: list[int] = []  # what is left of a marker, which no walk would come upon
        for _ in range(steps):
            assert matcher.fill(row), (matcher.failed, self.tokenizer.decode(out, skip_special_tokens=False))
            allowed = np.flatnonzero(np.unpackbits(row.bits.view(np.uint8), bitorder="little")).tolist()
            if self.end in allowed and (len(allowed) == 1 or draw.random() < 0.5):
                return out
            allowed = [a for a in allowed if a != self.end and (a >= 1000 or len(self.bytes[a]) == 1)]
            syntax = [a for a in allowed if a >= 1000 or self.bytes[a] in '"}],<>\n']
            ascii_ = [a for a in allowed if a < 1000 and self.bytes[a].isalnum()]
            if not wanted and draw.random() < 0.2:
                wanted = list(draw.choice(markers))
            if wanted and wanted[0] in allowed:
                token = wanted.pop(0)
            else:
                wanted = []
                token = draw.choice(syntax if syntax and draw.random() < 0.6 else ascii_ or allowed)
            out.append(token)
            matcher.advance([token])
        raise AssertionError(f"no end: {self.tokenizer.decode(out, skip_special_tokens=False)[-300:]!r}")

    def read(self, ids: list[int], functions: dict[str, Any]) -> Reading:
        pieces: list[tuple[int, str]] = []
        for control, run in groupby(ids, lambda id: id >= 1000):
            whole = list(run)
            if control:
                pieces += [(id, self.bytes[id]) for id in whole]
            else:
                pieces.append((0, self.tokenizer.decode(whole)))
        return Reading(self.spec, pieces, functions=functions, eager=True)

    def allows(self, matcher: Any, token: int) -> bool:
        row = MaskRow(self.grammars.words)
        return bool(matcher.fill(row) and (int(row.bits[token >> 5]) >> (token & 31)) & 1)


@pytest.mark.parametrize("controls", [False, True])
@pytest.mark.parametrize("family", sorted(TOOLS))
def test_a_grammar_takes_what_its_family_writes(family: str, controls: bool) -> None:
    machine = Machine(family, controls)
    text = TWO_CALLS[family]
    if family == "llama3":
        text = text.split("; ")[0]
    if family == "gpt-oss":  # a call ends the turn
        text = text.split("<|call|>")[0]
    if family == "mistral-args":
        text = text.replace("[CALL_ID]123456789", "")
    if family == "mistral":
        text = text.replace(', "id": "123456789"', "").replace(', "id": "123456780"', "")
    if family in ("glm", "qwen3-coder", "deepseek-v3.2", "minimax-m2", "gemma4"):
        functions = [{"name": "weather", "parameters": SCHEMA}, {"name": "sum.of"}]
    else:
        functions = ASKED
    grammar = call_grammar(machine.spec, functions, required=True, single=False)
    assert grammar is not None
    assert machine.takes(grammar, text) is None


@pytest.mark.parametrize("required", [False, True])
@pytest.mark.parametrize("controls", [False, True])
@pytest.mark.parametrize("family", sorted(TOOLS))
def test_what_a_grammar_admits_is_read_as_calls_that_validate(family: str, controls: bool, required: bool) -> None:
    if family == "gpt-oss" and not controls:
        return  # its messages end by tokens alone
    machine = Machine(family, controls)
    functions = [{"name": "weather", "parameters": SCHEMA, "strict": True},
                 {"name": "sum.of", "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
                  "strict": True}]  # fmt: skip
    grammar = call_grammar(machine.spec, functions, required=required, single=False)
    if grammar is None:
        assert family in ("llama3", "pythonic")
        assert not required
        return
    by_name = {one["name"]: one["parameters"] for one in functions}
    draw = random.Random(f"{family}{controls}{required}")
    seen = 0
    for _ in range(3):
        ids = machine.sample(grammar, draw)
        found = machine.read(ids, by_name)
        text = machine.tokenizer.decode(ids, skip_special_tokens=False)
        assert len(found.whole) == len(found.calls), text
        for name, arguments in found.parsed:
            jsonschema.validate(arguments, by_name[name])
        seen += len(found.calls)
        if required:
            assert found.calls, text
            assert not found.content.strip(), text
    assert seen or not required


def test_a_single_call_is_one() -> None:
    machine = Machine("hermes", controls=True)
    grammar = call_grammar(machine.spec, ASKED, required=True, single=True)
    assert grammar is not None
    assert machine.takes(grammar, TWO_CALLS["hermes"]) is not None
    assert machine.takes(grammar, TWO_CALLS["hermes"].split('\n<tool_call>\n{"name": "sum')[0]) is None


def test_a_free_answer_is_ruled_from_the_marker_on() -> None:
    """Whatever whitespace follows the marker's letters: what the parser takes for a call's beginning is one."""
    machine = Machine("hermes", controls=False)
    grammar = call_grammar(machine.spec, ASKED, required=False, single=False)
    assert grammar is not None
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "a"}}\n</tool_call>'
    assert machine.takes(grammar, "any < text, {and} <tool") is None
    assert machine.takes(grammar, f"text {call} more {call}") is None
    for wrong in ("<tool_call>{", "<tool_call>\n[", call.replace("weather", "other")):
        assert machine.takes(grammar, wrong) is not None


NUMBERS = {f"a{i}": {"type": "integer"} for i in range(20_000)}


@pytest.mark.parametrize("parameters", [
    {"properties": NUMBERS},
    {"$defs": {"text": {"description": "x" * 50_000}}, "properties": dict(list(NUMBERS.items())[:500])},
    {"properties": {"a": {"type": "array", "items": {"pattern": "[^" * 400_000}}}},
])  # fmt: skip
@pytest.mark.parametrize("family", TOOLS)
def test_a_grammar_is_no_longer_than_it_may_be(family: str, parameters: dict[str, Any]) -> None:
    """Some formats write every property once for each that may come before it, or with all definitions."""
    spec, asked = spec_of(family, controls=True), [{"name": "f", "parameters": {"type": "object", **parameters}}]
    for required in (True, False):
        made = ""
        with contextlib.suppress(StructureNotSupported):
            made = call_grammar(spec, asked, required=required, single=False) or ""
        assert len(made) < 4 * MAX_GRAMMAR_BYTES  # the rest is refused by Structure.check


@pytest.mark.parametrize("wrong", [{"properties": 5}, {"properties": ["a"]}, {"required": 5}, {"required": [{}]}])
@pytest.mark.parametrize("family", ["qwen3-coder", "pythonic", "gemma4"])
def test_members_of_another_type_are_refused(family: str, wrong: dict[str, Any]) -> None:
    asked = [{"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, **wrong}}]
    with pytest.raises(InvalidRequest, match="tools: "):
        call_grammar(spec_of(family, controls=True), asked, required=True, single=False)
