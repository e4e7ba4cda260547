"""Formats by family: what is chosen by name, and what is known of templates from which no format can be derived.

Sources: the families' chat templates and model cards; vLLM's tool and reasoning parsers (names are theirs where both
have one).
"""

from __future__ import annotations

import msgspec

from protocol.formats.spec import FormatSpec, Reasoning, Tools

_DSML_CALL = '<｜DSML｜invoke name="'

TOOLS: dict[str, Tools] = {
    "hermes": Tools(kind="json", call_open="<tool_call>\n", call_close="\n</tool_call>", between="\n"),
    "qwen3-coder": Tools(
        kind="tagged", call_open="<tool_call>\n<function=", name_close=">\n", key_open="<parameter=", key_close=">\n",
        value_close="\n</parameter>\n", lines=True, call_close="</function>\n</tool_call>", between="\n",
    ),
    "llama3": Tools(kind="json", bare=True, args_at=("parameters",), between=";"),
    "pythonic": Tools(kind="pythonic", bare=True),
    "lfm2": Tools(kind="pythonic", call_open="<|tool_call_start|>", call_close="<|tool_call_end|>"),
    "mistral": Tools(kind="json", listed=True, call_open="[TOOL_CALLS]", ids="nine"),
    "mistral-args": Tools(kind="args", call_open="[TOOL_CALLS]", args_open="[ARGS]", ids="nine"),
    "deepseek-r1": Tools(
        kind="args", section_open="<｜tool▁calls▁begin｜>", section_close="<｜tool▁calls▁end｜>",
        call_open="<｜tool▁call▁begin｜>function<｜tool▁sep｜>", name_close="\n```json\n",
        call_close="\n```<｜tool▁call▁end｜>", between="\n",
    ),
    "deepseek-v3.1": Tools(
        kind="args", section_open="<｜tool▁calls▁begin｜>", section_close="<｜tool▁calls▁end｜>",
        call_open="<｜tool▁call▁begin｜>", name_close="<｜tool▁sep｜>", call_close="<｜tool▁call▁end｜>",
    ),
    "deepseek-v3.2": Tools(
        kind="tagged", section_open="<｜DSML｜function_calls>\n", section_close="</｜DSML｜function_calls>",
        call_open=_DSML_CALL, name_close='">\n', key_open='<｜DSML｜parameter name="', key_close='" string="',
        value_open='">', value_close="</｜DSML｜parameter>\n", call_close="</｜DSML｜invoke>\n",
    ),
    "gpt-oss": Tools(kind="harmony"),
    "glm": Tools(
        kind="tagged", call_open="<tool_call>", name_close="\n", key_open="<arg_key>",
        key_close="</arg_key>\n<arg_value>", value_close="</arg_value>\n", call_close="</tool_call>", between="\n",
    ),
    "kimi-k2": Tools(
        kind="args", section_open="<|tool_calls_section_begin|>", section_close="<|tool_calls_section_end|>",
        call_open="<|tool_call_begin|>", name_close="<|tool_call_argument_begin|>", call_close="<|tool_call_end|>",
        ids="indexed",
    ),
    "granite3": Tools(kind="json", listed=True, call_open="<|tool_call|>"),
    "phi4": Tools(kind="json", listed=True, call_open="functools"),
    "gemma4": Tools(kind="gemma", call_open="<|tool_call>", call_close="<tool_call|>"),
    "minimax-m2": Tools(
        kind="tagged", section_open="<minimax:tool_call>\n", section_close="</minimax:tool_call>",
        call_open='<invoke name="', name_close='">\n', key_open='<parameter name="', key_close='">',
        value_close="</parameter>\n", call_close="</invoke>\n",
    ),
}  # fmt: skip

REASONING: dict[str, Reasoning] = {
    "think": Reasoning(open="<think>", close="</think>"),
    "mistral": Reasoning(open="[THINK]", close="[/THINK]"),
    "seed-oss": Reasoning(open="<seed:think>", close="</seed:think>"),
    "cohere": Reasoning(open="<|START_THINKING|>", close="<|END_THINKING|>"),
    "gemma4": Reasoning(open="<|channel>thought", close="<channel|>"),
    "minimax-m3": Reasoning(open="<mm:think>", close="</mm:think>"),
    "hunyuan": Reasoning(open="<think:opensource>", close="</think:opensource>"),
}

# What a template writes that marks its family. First match wins; "always" are those whose template tells less than
# the models do, so that nothing is derived from it.
_ALWAYS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("gpt-oss", ("<|channel|>", "<|message|>", "functions.")),
    ("gemma4", ("<|tool_call>call:",)),
    ("llama3", ('"parameters": ', "ipython", "<|eot_id|>")),
    ("granite3", ("<|tool_call|>",)),
    ("phi4", ("<|tool|>", "<|/tool|>")),
)
_ELSE: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("lfm2", ("<|tool_call_start|>",)),
    ("kimi-k2", ("<|tool_calls_section_begin|>",)),
    ("deepseek-r1", ("<｜tool▁calls▁begin｜>", "```json")),
    ("deepseek-v3.1", ("<｜tool▁calls▁begin｜>",)),
    ("deepseek-v3.2", ("｜DSML｜", "function_calls")),
    ("minimax-m2", ("<minimax:tool_call>",)),
    ("qwen3-coder", ("<tool_call>", "<function=", "<parameter=")),
    ("glm", ("<tool_call>", "<arg_key>")),
    ("mistral-args", ("[TOOL_CALLS]", "[ARGS]")),
    ("mistral", ("[TOOL_CALLS]",)),
)
NONE = "none"


def tool_family(template: str, *, derivable: bool) -> str | None:
    """The family of a chat template by what it writes; ``derivable``: only those whose templates tell too little."""
    table = _ALWAYS if derivable else _ALWAYS + _ELSE
    return next((name for name, signs in table if all(sign in template for sign in signs)), None)


def reasoning_family(template: str) -> str | None:
    """The marks of a thought that a chat template mentions."""
    return next((name for name, marks in REASONING.items() if marks.close in template), None)


def named(tools: str | None, reasoning: str | None) -> FormatSpec:
    """The format of two family names; None or "none": no such thing. ValueError names what is not known."""
    for kind, name, table in (("tool", tools, TOOLS), ("reasoning", reasoning, REASONING)):
        if name not in (None, NONE) and name not in table:
            raise ValueError(f"--{kind}-format {name} is not known; it may be {', '.join([*table, NONE])}")
    return FormatSpec(
        name="+".join(name for name in (tools, reasoning) if name and name != NONE) or NONE,
        tools=TOOLS.get(tools or NONE),
        reasoning=REASONING.get(reasoning or NONE),
    )


def with_tools(spec: FormatSpec, name: str, tools: Tools | None) -> FormatSpec:
    return msgspec.structs.replace(spec, name=name, tools=tools)
