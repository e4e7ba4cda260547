"""What is found out of seventy real chat templates; transcripts of their own are read back however they are cut."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import InvalidRequest, StartError
from protocol.formats.families import named
from protocol.formats.spec import FormatSpec, with_controls
from scheduler.prompts.chat_format import ChatFormat, Tokens, find_format
from scheduler.prompts.template_format import KEY, KEY_B, NAME, OTHER, Turns, call, schema
from tests.chat_templates import names, read
from tests.protocol.test_formats import Reading, frames

TAG = re.compile(r"<[^<>\s='\"]{2,40}>|\[/?[A-Z_]{3,}\]")
CASES: tuple[tuple[dict[str, Any], list[tuple[str, dict[str, Any]]]], ...] = (
    ({}, [(NAME, {KEY: 'Zoë says "hi"', KEY_B: "b"})]),
    ({}, [(NAME, {KEY: "several\nlines {x} [1] <b>", KEY_B: ""})]),
    ({}, [(NAME, {KEY: "p"}), (OTHER, {KEY: "q", KEY_B: "r"})]),
    ({KEY: "integer", KEY_B: "boolean"}, [(NAME, {KEY: 5, KEY_B: True})]),
    ({KEY: "array", KEY_B: "object"}, [(NAME, {KEY: [1, "a"], KEY_B: {"k": "v"}})]),
)
# The format of each template: the family, or the kind that was derived from it. Templates that are not named here
# render no calls, or none that could be told from text; tools are then a 400.
BY_FORMAT = {
    "json": "Apertus-8B-Instruct Apriel-1.6-15b-Thinker-fixed Bielik-11B-v3.0-Instruct Cohere2MoE "
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use GigaChat3-10B-A1.8B GigaChat3.1-10B-A1.8B MiMo-VL "
    "MiniMax-M1 NVIDIA-Nemotron-Nano-v2 NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use "
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use Qwen-QwQ-32B Qwen-Qwen2.5-7B-Instruct Qwen-Qwen3-0.6B "
    "Reka-Edge ibm-granite-granite-4.0 ibm-granite-granite-4.1 mistralai-Mistral-Nemo-Instruct-2407 "
    "unsloth-Apriel-1.5",
    "tagged": "ByteDance-Seed-OSS GLM-4.6 GLM-4.7-Flash MiniMax-M2 NVIDIA-Nemotron-3-Nano-30B-A3B-BF16 Qwen3-Coder "
    "Qwen3.5-4B Spark2.5 StepFun3.5-Flash deepseek-ai-DeepSeek-V3.2 deepseek-ai-DeepSeek-V4 "
    "deepseek-ai-DeepSeek-V4-Flash-0731 inclusionai-ling-3.0-flash poolside-Laguna-S-2.1 "
    "poolside-Laguna-XS-2.1 poolside-Laguna-XS.2 tencent-Hy3",
    "hermes": "HuggingFaceTB-SmolLM3-3B",
    "kimi-k2": "Kimi-K2-Instruct Kimi-K2-Thinking",
    "lfm2": "LFM2.5-8B-A1B",
    "args": "Mistral-Small-3.2-24B-Instruct-2506 meetkai-functionary-medium-v3.1 "
    "mistralai-Ministral-3-14B-Reasoning-2512 moonshotai-Kimi-K2 unsloth-mistral-Devstral-Small-2507 "
    "upstage-Solar-Open-100B",
    "gemma4": "google-gemma-4-31B-it google-gemma-4-31B-it-interleaved",
    "granite3": "ibm-granite-granite-3.3-2B-Instruct",
    "llama3": "meta-llama-Llama-3.1-8B-Instruct meta-llama-Llama-3.2-3B-Instruct meta-llama-Llama-3.3-70B-Instruct",
    "gpt-oss": "openai-gpt-oss-120b",
}  # fmt: skip
EXPECTED = {name: made for made, templates in BY_FORMAT.items() for name in templates.split()}
# templates that render calls and yet tell no tools: their formats by family
TELLS_NO_TOOLS = {
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": "deepseek-r1", "deepseek-ai-DeepSeek-V3.1": "deepseek-v3.1",
}  # fmt: skip
ONE_CALL = {"GigaChat3-10B-A1.8B", "GigaChat3.1-10B-A1.8B", "openai-gpt-oss-120b"}  # a turn


@functools.cache
def renderer(name: str) -> Callable[..., str]:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    template = _compile_jinja_template(read(name))

    def render(messages: Any, tools: Any = None, add_generation_prompt: bool = True, **arguments: Any) -> str:
        return str(
            template.render(
                messages=json.loads(json.dumps(messages)),
                tools=tools,
                documents=None,
                bos_token="<s>",
                eos_token="</s>",
                add_generation_prompt=add_generation_prompt,
                strftime_now=lambda form: "today",
                **arguments,
            )
        )

    return render


def tokens_of(template: str) -> Tokens:
    """A tokenizer in which every tag of the template is a token, and every other character one."""
    added = {tag: 1_200_000 + i for i, tag in enumerate(sorted(set(TAG.findall(template))))}
    texts = {id: tag for tag, id in added.items()}
    pattern = re.compile("|".join([*map(re.escape, sorted(added, key=len, reverse=True)), "."]), re.DOTALL)
    return Tokens(
        added=added,
        special=frozenset(added.values()),
        end_ids=frozenset(),
        encode=lambda text: [added.get(piece) or ord(piece) for piece in pattern.findall(text)],
        decode=lambda ids: "".join(texts.get(id) or chr(id) for id in ids),
    )


@functools.cache
def found(name: str) -> tuple[ChatFormat, str]:
    return find_format(renderer(name), read(name), tokens_of(read(name)))


def label(name: str) -> str | None:
    spec = found(name)[0].spec
    if spec.tools is None:
        return None
    return spec.tools.kind if spec.name == "template" else spec.name


# their templates render no call of an assistant, or cannot be rendered at all: see test_formats.py for their formats
RENDERS_NO_CALLS = {"HuggingFaceTB-SmolLM3-3B", "Kimi-K2-Instruct", "Kimi-K2-Thinking",
                    "ibm-granite-granite-3.3-2B-Instruct"}  # fmt: skip
WITH_CALLS = sorted({*EXPECTED, *TELLS_NO_TOOLS} - RENDERS_NO_CALLS)


def test_the_format_of_each_template() -> None:
    assert {name: made for name in names() if (made := label(name)) is not None} == EXPECTED


@pytest.mark.parametrize("name", WITH_CALLS)
@given(data=st.data())
@settings(max_examples=4, deadline=None)
def test_transcripts_of_the_templates_own(name: str, data: st.DataObject) -> None:
    made, _ = found(name)
    if name in TELLS_NO_TOOLS:
        spec = named(TELLS_NO_TOOLS[name], "think")
        made = ChatFormat(with_controls(spec, tokens_of(read(name)).added))
    turns = Turns(renderer(name))
    turns.text_arguments = made.text_arguments
    types, calls = data.draw(st.sampled_from(CASES))
    if len(calls) > 1 and (name in ONE_CALL or (made.spec.tools is not None and made.spec.tools.bare)):
        calls = calls[:1]
    text = turns.turn(calls=[call(arguments, i, one) for i, (one, arguments) in enumerate(calls)])
    functions = {one: schema(KEY, KEY_B, types=types) for one in (NAME, OTHER)}
    cuts = data.draw(st.lists(st.integers(1, max(2, len(text))), max_size=60))
    controls = data.draw(st.booleans())
    spec = made.spec if controls else with_letters(made.spec)
    reading = Reading(
        spec, frames(spec, text, cuts, data.draw(st.booleans())), functions=functions,
        thinking=begins_in_thought(spec, text), eager=data.draw(st.booleans()),
    )  # fmt: skip
    assert reading.parsed == calls
    assert reading.whole == list(range(len(calls)))


def with_letters(spec: FormatSpec) -> FormatSpec:
    """The same format for a tokenizer without tokens for its markers."""
    import msgspec

    return msgspec.structs.replace(spec, controls={})


def begins_in_thought(spec: FormatSpec, text: str) -> bool:
    if spec.reasoning is None:
        return False
    opened, closed = text.find(spec.reasoning.open), text.find(spec.reasoning.close)
    return closed >= 0 and not 0 <= opened < closed


def test_prompts_that_open_a_thought() -> None:
    opened = {name for name in names() if found(name)[0].spec.opened}
    assert {"Qwen3.5-4B", "MiniMax-M2", "GLM-4.7-Flash"} <= opened
    assert "Qwen-Qwen3-0.6B" not in opened
    spec = found("Qwen3.5-4B")[0].spec
    encode = tokens_of(read("Qwen3.5-4B")).encode
    user = [{"role": "user", "content": "hi"}]
    assert spec.thinking(encode(renderer("Qwen3.5-4B")(user, enable_thinking=True)))
    quiet = encode(renderer("Qwen3.5-4B")(user, enable_thinking=False))
    assert not spec.thinking(quiet)
    assert spec.thoughtless(quiet)
    assert not spec.thoughtless(encode(renderer("Qwen3.5-4B")(user, enable_thinking=True)))
    assert spec.opening == [spec.controls["<think>"]]
    closed = {name for name in names() if found(name)[0].spec.closed}
    assert {"Qwen3.5-4B", "Qwen-Qwen3-0.6B"} <= closed


def test_ids_of_calls_as_the_template_asks_for_them() -> None:
    messages: Any = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": [call({KEY: "a"}) | {"id": "call_0123456789abcdef"}]},
        {"role": "tool", "content": "done", "tool_call_id": "call_0123456789abcdef"},
    ]
    for name in ("mistralai-Mistral-Nemo-Instruct-2407", "moonshotai-Kimi-K2"):
        made, _ = found(name)
        prepared, _ = made.prepare(messages, None)
        assert prepared[1]["tool_calls"][0]["id"] == prepared[2]["tool_call_id"]
        assert "done" in renderer(name)(prepared)
    assert found("moonshotai-Kimi-K2")[0].prepare(messages, None)[0][2]["tool_call_id"] == f"functions.{NAME}:0"


def test_what_a_template_would_drop_is_refused() -> None:
    made, told = found("google-gemma-2-2b-it")
    assert "none" in told
    tools = [{"type": "function", "function": {"name": "f"}}]
    user = {"role": "user", "content": "hi"}
    calling = {"role": "assistant", "content": "", "tool_calls": [call({})]}
    result = {"role": "tool", "content": "done"}
    for messages, given_tools, param in (
        ([user], tools, "tools"),
        ([user, calling], None, "messages[1].tool_calls"),
        ([user, result], None, "messages[1].role"),
    ):  # fmt: skip
        with pytest.raises(InvalidRequest) as caught:
            made.prepare(messages, given_tools)
        assert caught.value.param == param
        assert "hermes" in caught.value.message


def test_hermes_serves_templates_that_know_no_tools() -> None:
    name = "microsoft-Phi-3.5-mini-instruct"
    made, told = find_format(renderer(name), read(name), tokens_of(read(name)), "hermes")
    assert made.spec.prompted
    assert "as text" in told
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    messages: Any = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": [call({KEY: "a"})]},
        {"role": "tool", "content": "one"},
        {"role": "tool", "content": "two"},
    ]
    prepared, left = made.prepare(messages, tools)
    assert left is None
    text = renderer(name)(prepared)
    for part in (
        '"name": "f"',
        "<tool_call>",
        f'{{"{KEY}": "a"}}',
        "<tool_response>\none\n</tool_response>\n<tool_response>\ntwo",
    ):
        assert part in text


def test_formats_by_name() -> None:
    name = "Qwen-Qwen3-0.6B"
    load = functools.partial(find_format, renderer(name), read(name), tokens_of(read(name)))
    made, told = load("qwen3-coder", "none")
    assert made.spec.tools is not None
    assert made.spec.tools.kind == "tagged"
    assert made.spec.reasoning is None
    assert "--tool-format qwen3-coder" in told
    assert load("none")[0].spec.tools is None
    for tools, reasoning in (("perhaps", "auto"), ("auto", "perhaps")):
        with pytest.raises(StartError, match="is not known"):
            load(tools, reasoning)
