"""What a chat asks of tools: which are told to the model, and whether calls are free, required or ruled.

The format of calls is the model's own (ModelCard.format); it is pinned in the job, so that every reader of the answer,
on whichever gateway, reads it alike. Gateways and clients apply this before they accept a job, the scheduler to one
that was pushed: from then on a job says all by its sampling, and has neither tool_choice nor parallel_tool_calls.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import msgspec

from protocol.errors import InvalidRequest, StructureNotSupported
from protocol.formats.call_grammar import call_grammar
from protocol.formats.rules import either
from protocol.formats.spec import FormatSpec
from protocol.jobs import MAX_TOOLS, check_tools
from protocol.messages import Job
from protocol.structures.structure import MAX_GRAMMAR_BYTES, Structure

NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
NO_TOOLS = "this model's chat template knows no tools: its server can be started with --tool-format hermes"


class Function(msgspec.Struct, omit_defaults=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct):
    function: Function | None = None
    type: str = "function"


@dataclass
class ToolUse:
    """``tools`` are told to the model; an answer may call ``functions`` (of them)."""

    tools: list[dict[str, Any]] | None = None
    functions: list[dict[str, Any]] = field(default_factory=list)
    structure: Structure | None = None  # what rules the answer
    ends: list[int] = field(default_factory=list)  # ids that end a turn with calls
    single: bool = False

    @property
    def view(self) -> dict[str, Any]:
        """The fields of the view."""
        if not self.functions:
            return {}
        return {"calls": "eager" if self.structure is not None else "whole", "single": self.single}


def tool_use(
    tools: list[Tool] | None, choice: Any, parallel: bool | None, spec: FormatSpec | None, structure: Structure | None
) -> ToolUse:
    """InvalidRequest names the field. ``spec``: how the model writes calls; ``structure``: what the request asks of an
    answer without calls."""
    listed = [_function(tool, f"tools[{i}]") for i, tool in enumerate(tools or ())]
    mode, names = _choice(choice, listed)
    if not listed or mode == "none":
        return ToolUse(structure=structure)
    if len(listed) > MAX_TOOLS:
        raise InvalidRequest(f"tools takes at most {MAX_TOOLS} tools", param="tools")
    if len({one["name"] for one in listed}) != len(listed):
        raise InvalidRequest("the functions of tools must have different names", param="tools")
    if spec is None or spec.tools is None:
        raise InvalidRequest(NO_TOOLS, param="tools", code="unsupported_parameter")
    functions = [one for one in listed if names is None or one["name"] in names]
    single = parallel is False or mode == "named"
    return ToolUse(
        tools=[{"type": "function", "function": one} for one in listed],
        functions=functions,
        structure=_ruled(spec, functions, mode in ("required", "named"), single, structure),
        ends=list(spec.ends),
        single=single,
    )


def with_tools(job: Job, spec: FormatSpec | None) -> Job:
    """``job`` as it is run: what its tools and its choice among them ask is in its sampling, and the format that its
    answer is read by is pinned. ``spec``: the model's own. InvalidRequest names the field."""
    check_tools(job)
    if job.messages is None or job.format is not None:
        return job
    try:
        tools = msgspec.convert(job.tools, list[Tool] | None)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"tools: {error}", param="tools") from None
    use = tool_use(tools, job.tool_choice, job.parallel_tool_calls, spec, job.sampling.structure)
    ends = [*job.sampling.stop_token_ids, *use.ends]
    sampling = msgspec.structs.replace(job.sampling, structure=use.structure, stop_token_ids=ends)
    pinned = spec if spec is not None and (use.functions or spec.always) else None
    return msgspec.structs.replace(
        job, tools=use.tools, tool_choice=None, parallel_tool_calls=None, sampling=sampling, format=pinned
    )


def _ruled(
    spec: FormatSpec, functions: list[dict[str, Any]], required: bool, single: bool, structure: Structure | None
) -> Structure | None:
    """The structure of an answer that may, or must, hold calls."""
    if required and structure is not None:
        raise InvalidRequest(f"{structure.field} cannot be kept where a call is required", param="tool_choice")
    if not spec.ruled:
        if required or any(one.get("strict") for one in functions):
            raise StructureNotSupported("this model's tokenizer cannot be kept to a grammar", param="tools")
        return structure
    try:
        if structure is not None:  # the answer is a call, or what was asked for
            calls = call_grammar(spec, functions, required=True, single=single)
            return either(calls, structure) if calls is not None else structure
        grammar = call_grammar(spec, functions, required=required, single=single)
    except StructureNotSupported as error:
        raise StructureNotSupported(error.message, param="tools") from None
    free = not required and not any(one.get("strict") for one in functions)
    if grammar is None or (free and len(grammar.encode()) > MAX_GRAMMAR_BYTES):
        return None  # nothing promises that the calls of a free answer are ruled
    return Structure(grammar=grammar, field="tools")


def _function(tool: Tool, at: str) -> dict[str, Any]:
    if tool.type != "function":
        raise InvalidRequest(f"{at}.type must be function", param=f"{at}.type", code="unsupported_parameter")
    if tool.function is None:
        raise InvalidRequest(f"{at}.function is required", param=f"{at}.function")
    if not NAME.fullmatch(tool.function.name):
        raise InvalidRequest(f"{at}.function.name must match {NAME.pattern}", param=f"{at}.function.name")
    return {
        "name": tool.function.name,
        "description": tool.function.description or "",
        "parameters": tool.function.parameters or {"type": "object", "properties": {}},
        **({"strict": True} if tool.function.strict else {}),
    }


def _choice(choice: Any, functions: list[dict[str, Any]]) -> tuple[str, set[str] | None]:
    """(none, auto, required or named; the names that may be called, None for all)."""
    at = "tool_choice"
    if choice is None:
        return "auto", None
    if choice in ("none", "auto"):
        return choice, None
    known = {one["name"] for one in functions}
    if choice == "required":
        names, mode = None, "required"
    elif not isinstance(choice, dict):
        raise InvalidRequest(f"{at} must be none, auto, required or a function", param=at)
    elif choice.get("type") == "allowed_tools":
        allowed = choice.get("allowed_tools", choice)
        if not isinstance(allowed, dict) or not isinstance(allowed.get("tools"), list):
            raise InvalidRequest(f"{at} must hold a list of tools", param=at)
        names, mode = set(map(_name, allowed["tools"])), allowed.get("mode", "auto")
    else:
        names, mode = {_name(choice)}, "named"
    if mode not in ("auto", "required", "named"):
        raise InvalidRequest(f"{at}.mode must be auto or required", param=at)
    if not functions:
        raise InvalidRequest(f"{at} needs tools", param=at)
    if names is not None and (not names or not names <= known):
        raise InvalidRequest(f"{at} names a function that is not in tools", param=at)
    return mode, names


def _name(choice: Any) -> str:
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise InvalidRequest("tool_choice must hold function.name", param="tool_choice")
    return name
