"""What rules the answer to one prompt, once it is known whether that prompt has opened a thought.

The structure that a request asks for begins after the thought. A thought that the prompt opened ends by an id of its
own (``after``); one that the model may open itself stands, optional, before the grammar, or where that cannot be
changed or the thought has a budget, begins by ids of its own too (``opened_by``).
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import msgspec

from protocol.errors import StructureNotSupported
from protocol.formats.call_grammar import JSON_SPACE, marker, quoted
from protocol.formats.message import functions_of
from protocol.formats.source import Alphabet
from protocol.formats.spec import FormatSpec
from protocol.messages import Job
from protocol.sampling import Content, SamplingParams
from protocol.structures.json_schema import library_options
from protocol.structures.structure import Structure

START = "start: answer\n"


def sampling_of(job: Job, prompt: Sequence[int]) -> SamplingParams:
    """The sampling parameters that ``prompt`` is continued with."""
    sampling, spec = job.sampling, job.format
    read = bool(sampling.stop) or job.results is not None
    if spec is None or (sampling.structure is None and not read):
        return sampling
    thinking, structure, content = job.thinking(prompt), sampling.structure, None
    if structure is not None and structure.after in ([], [spec.close_id()]):
        structure = after_thought(structure, spec, thinking, none=spec.thoughtless(prompt))
    if read:
        functions = functions_of(job.tools)
        schemas = list(functions.values()) if job.results is not None else []
        content = Content(spec, list(functions), thinking, schemas)
    return msgspec.structs.replace(sampling, structure=structure, content=content)


def after_thought(structure: Structure, spec: FormatSpec, thinking: bool, none: bool = False) -> Structure | None:
    """``structure`` for an answer that may begin with a thought, which may have a budget (``after_limit``), or for one
    that has ``none``."""
    harmony = spec.tools is not None and spec.tools.kind == "harmony"
    if spec.reasoning is None and not harmony:
        return structure
    if none:
        return _without_thought(structure)
    closes = spec.close_id()
    if thinking and closes is not None:
        return msgspec.structs.replace(structure, after=[closes])
    grammar = _as_grammar(structure)
    if closes is not None and spec.opening and (grammar is None or structure.after):
        return msgspec.structs.replace(structure, after=[closes], opened_by=spec.opening)
    if grammar is None:
        return _without_thought(structure)  # a grammar of the client's own rules all of the answer
    if harmony:
        if structure.field == "tools":
            return structure
        lead = _harmony_lead(spec)
    else:
        lead = _thought(spec, thinking)
        grammar += _close_rule(spec)
    fields = dict.fromkeys(("json", "regex", "choice"))
    ruled = grammar.replace(START, f"start: {lead} answer\n", 1)
    return msgspec.structs.replace(structure, **fields, json_object=False, grammar=ruled, after=[], after_limit=None)


def _without_thought(structure: Structure) -> Structure | None:
    if structure.kind is None:
        return None
    return msgspec.structs.replace(structure, after=[], after_limit=None)


def either(calls: str, structure: Structure) -> Structure:
    """An answer that is calls, or what ``structure`` says. StructureNotSupported for a grammar of the client's own."""
    final = _as_grammar(structure)
    if final is None:
        raise StructureNotSupported(f"{structure.field} cannot be kept beside tools", param=structure.field)
    answer, *_ = final.removeprefix(START).split("\n")
    joined = START + "answer: calls | final\n" + calls.removeprefix(START).replace("answer:", "calls:", 1)
    return Structure(grammar=joined + answer.replace("answer:", "final:", 1) + "\n", field="tools")


def _as_grammar(structure: Structure) -> str | None:
    kind = structure.kind
    if kind == "grammar":
        return structure.grammar if structure.grammar and structure.grammar.startswith(START) else None
    if kind in ("json", "json_object"):
        schema = msgspec.json.decode(structure.source())
        options = {"x-guidance": library_options(schema, JSON_SPACE)}
        rule = "%json " + json.dumps({**options, **(schema if isinstance(schema, dict) else {})})
    elif kind == "choice":
        rule = " | ".join(quoted(one) for one in structure.choice or ())
    elif kind == "regex" and structure.regex:
        rule = "/" + structure.regex.replace("/", r"\/") + "/"
    else:
        return None
    return f"{START}answer: {rule}\nTEXT: /(.|\\n)*/\n"


def _thought(spec: FormatSpec, thinking: bool) -> str:
    """A thought before the answer: its rest where the prompt has opened it, else one that may come or not."""
    assert spec.reasoning is not None
    opens, closes = (_marker(spec, text) for text in (spec.reasoning.open, spec.reasoning.close))
    text = f"TEXT {closes}" if closes.startswith("<[") else "thought"
    return text if thinking else rf"({opens} {text} /\n{{0,2}}/)?"


def _close_rule(spec: FormatSpec) -> str:
    """The rule of a thought whose end is letters: it ends with the first of them, as for who reads it."""
    assert spec.reasoning is not None
    closes = _marker(spec, spec.reasoning.close)
    return "" if closes.startswith("<[") else f"thought[lazy]: TEXT {closes}\n"


def _harmony_lead(spec: FormatSpec) -> str:
    mark = {text: _marker(spec, text) for text in ("<|channel|>", "<|message|>", "<|end|>", "<|start|>")}
    channel, message, end, start = mark.values()
    return f'({channel} "analysis" {message} TEXT {end} {start} "assistant")* {channel} "final" {message}'


def _marker(spec: FormatSpec, text: str) -> str:
    return marker(Alphabet(spec.controls), text)
