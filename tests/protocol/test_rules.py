"""Structure begins after the thought, wherever that begins: opened by the prompt, by the model, or not at all."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from protocol.errors import StructureNotSupported
from protocol.formats.call_grammar import call_grammar
from protocol.formats.rules import either, sampling_of
from protocol.messages import Job
from protocol.sampling import SamplingParams
from protocol.structures.structure import Structure
from tests.protocol.test_call_grammar import Machine
from tests.protocol.test_formats import TWO_CALLS

PROMPT, OPENED, CLOSED = [1, 2, 3], [1, 2, 77], [1, 2, 78]
WEATHER = [{"name": "weather"}, {"name": "sum.of"}]
SHAPES: dict[str, tuple[dict[str, Any], str]] = {
    "json": ({"json": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}}, '{"a": 5}'),
    "json_object": ({"json_object": True}, '{"b": []}'),
    "regex": ({"regex": "[ab]/c"}, "a/c"),
    "choice": ({"choice": ["yes", 'n"o']}, 'n"o'),
}


@pytest.fixture(scope="module", params=["think", "gemma4"])
def machine(request: pytest.FixtureRequest) -> Machine:
    made = Machine("hermes" if request.param == "think" else "gemma4", controls=True, reasoning=request.param)
    assert made.spec.reasoning is not None
    opening = made.tokenizer.encode(made.spec.reasoning.open).ids
    made.spec = msgspec.structs.replace(made.spec, opened=[[77]], closed=[[78]], opening=opening)
    return made


def ruled(machine: Machine, structure: Structure, prompt: list[int]) -> Structure:
    job = Job(messages=[{"role": "user", "content": "hi"}], format=machine.spec,
              sampling=SamplingParams(structure=structure))  # fmt: skip
    found = sampling_of(job, prompt).structure
    assert found is not None
    found.check()
    machine.grammars.check(found)
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_a_thought_may_come_before_what_was_asked_for(machine: Machine, shape: str) -> None:
    asked, answer = SHAPES[shape]
    reasoning = machine.spec.reasoning
    assert reasoning is not None
    thought = f"{reasoning.open}\nhm, {{ 7\n{reasoning.close}\n\n"
    structure = ruled(machine, Structure(**asked), PROMPT)
    assert takes(machine, structure, answer)
    assert takes(machine, structure, thought + answer)
    assert not takes(machine, structure, "no" + answer)
    assert not takes(machine, structure, thought + "no" + answer)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_thought_that_the_prompt_opened_ends_by_its_id(machine: Machine, shape: str) -> None:
    asked, answer = SHAPES[shape]
    reasoning = machine.spec.reasoning
    assert reasoning is not None
    structure = ruled(machine, Structure(**asked), OPENED)
    assert structure.after == [machine.spec.controls[reasoning.close]]
    assert takes(machine, structure, f"anything, {{ 7{reasoning.close}{answer}")
    assert not takes(machine, structure, f"anything{reasoning.close}no{answer}")
    assert not takes(machine, structure, "anything, and no end")


OWN = Structure(grammar="start: /[ab]c/", field="guided_grammar")


def test_a_grammar_of_the_clients_own_begins_after_the_thought_as_well(machine: Machine) -> None:
    reasoning = machine.spec.reasoning
    assert reasoning is not None
    structure = ruled(machine, OWN, PROMPT)
    assert structure.opened_by == machine.spec.opening
    for text, taken in (("ac", True), ("x", False), (f"{reasoning.open}x{reasoning.close}bc", True),
                        (f"{reasoning.open}x{reasoning.close}x", False), (f"{reasoning.open}ac", False)):  # fmt: skip
        assert takes(machine, structure, text) is taken, text
    assert takes(machine, ruled(machine, OWN, OPENED), f"x{reasoning.close}bc")


def test_a_budget_rules_thoughts_alone(machine: Machine) -> None:
    """A prompt that has opened none leaves it to the model; one that has closed it wants none."""
    close = machine.spec.close_id()
    assert close is not None
    budget = Structure(choice=["yes"], after=[close], after_limit=3)
    assert ruled(machine, budget, OPENED) == budget
    assert ruled(machine, budget, PROMPT) == msgspec.structs.replace(budget, opened_by=machine.spec.opening)
    assert ruled(machine, budget, CLOSED) == Structure(choice=["yes"])
    alone = Job(messages=[{"role": "user", "content": "hi"}], format=machine.spec,
                sampling=SamplingParams(structure=Structure(after=[close], after_limit=3)))  # fmt: skip
    assert sampling_of(alone, CLOSED).structure is None
    pushed = Structure(choice=["yes"], after=[5, 6], after_limit=3)  # ids of the client's own
    assert ruled(machine, pushed, PROMPT) is pushed


def test_a_prompt_that_has_closed_the_thought_wants_none(machine: Machine) -> None:
    asked = Structure(choice=["yes"])
    assert ruled(machine, asked, CLOSED) == asked


@pytest.mark.parametrize("prompt", [PROMPT, OPENED])
def test_a_thought_whose_marks_are_letters_ends_with_the_first_of_them(prompt: list[int]) -> None:
    letters = Machine("hermes", controls=False, reasoning="think")
    letters.spec = msgspec.structs.replace(letters.spec, opened=[[77]])
    structure = ruled(letters, Structure(choice=["yes"]), prompt)
    lead = "" if prompt is OPENED else "<think>"
    assert takes(letters, structure, f"{lead}a</thin</think>yes")
    assert not takes(letters, structure, f"{lead}a</think>b</think>yes")
    budget = Structure(choice=["yes"], after=[5], after_limit=3)
    assert ruled(letters, budget, prompt) == budget  # not this model's mark


def takes(machine: Machine, structure: Structure, text: str) -> bool:
    matcher = machine.grammars.matcher(structure)
    for token in [*machine.tokenizer.encode(text).ids, machine.end]:
        if not machine.allows(matcher, token):
            return False
        matcher.advance([token])
    return matcher.failed is None


def test_calls_after_a_thought(machine: Machine) -> None:
    grammar = call_grammar(machine.spec, WEATHER, required=True, single=True)
    structure = Structure(grammar=grammar, field="tools")
    reasoning = machine.spec.reasoning
    assert reasoning is not None
    call = "<tool_call>\n" + '{"name": "weather", "arguments": {}}' + "\n</tool_call>"
    if machine.spec.name == "gemma4":
        call = "<|tool_call>call:weather{}<tool_call|>"
    for prompt, thought in (
        (PROMPT, f"{reasoning.open}a{reasoning.close}\n"),
        (PROMPT, ""),
        (OPENED, f"a{reasoning.close}"),
    ):
        assert takes(machine, ruled(machine, structure, prompt), thought + call), (prompt, thought)


def test_a_call_or_what_was_asked_for(machine: Machine) -> None:
    calls = call_grammar(machine.spec, WEATHER, required=True, single=True)
    assert calls is not None
    joined = either(calls, Structure(json={"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}))
    structure = ruled(machine, joined, PROMPT)
    call = TWO_CALLS["hermes"].split('\n<tool_call>\n{"name": "sum')[0] if machine.spec.name == "hermes" else ""
    assert takes(machine, structure, '{"a": 1}')
    assert not takes(machine, structure, '{"a": 2}')
    if call:
        assert not takes(machine, structure, call + '{"a": 1}')
    with pytest.raises(StructureNotSupported):
        either(calls, Structure(grammar="start: /x/", field="structured_outputs.grammar"))


def test_harmony_answers_on_its_final_channel() -> None:
    machine = Machine("gpt-oss", controls=True)
    structure = ruled(machine, Structure(choice=["yes"]), PROMPT)
    final = "<|channel|>final<|message|>yes"
    assert takes(machine, structure, final)
    assert takes(machine, structure, "<|channel|>analysis<|message|>hm<|end|><|start|>assistant" + final)
    assert not takes(machine, structure, "yes")


def test_without_thoughts_nothing_changes() -> None:
    machine = Machine("hermes", controls=True)
    asked = Structure(choice=["yes"])
    assert ruled(machine, asked, PROMPT) is asked
