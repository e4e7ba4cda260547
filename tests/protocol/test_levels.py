"""Every field of a job and of sampling has the level of the release that brought it.

An older service refuses a field that it does not know. So a field that is added must raise LEVEL and be told here, or
requests with it fail for as long as an update lasts.
"""

from __future__ import annotations

from typing import Any

import pytest

from protocol.formats.spec import FormatSpec
from protocol.levels import LEVEL, job_level, sampling_level
from protocol.messages import Job
from protocol.sampling import Content, SamplingParams
from protocol.structures.structure import KINDS, Structure

SAMPLING_AT_FIRST = {
    *("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty"),
    *("repetition_penalty", "logit_bias", "seed", "n", "stop", "stop_token_ids", "ignore_eos"),
    *("include_stop_str_in_output", "skip_special_tokens", "logprobs"),
}
SAMPLING_SINCE: dict[str, tuple[int, Any]] = {  # level, a value
    "structure": (1, Structure(json_object=True)),
    "content": (1, Content(FormatSpec(name="f"), [], False)),
    "allowed_token_ids": (1, [1]),
    "bad_words": (4, ["a"]),
    "logprob_token_ids": (4, [1]),
    "prompt_logprobs": (4, 0),
}
STRUCTURE_AT_FIRST = {*KINDS, "after", "after_limit", "field"}  # with structure itself
STRUCTURE_SINCE: dict[str, tuple[int, Any]] = {"opened_by": (6, [2])}
JOB_AT_FIRST = {
    *("v", "id", "prompt", "messages", "chat_template_kwargs", "sampling", "tenant", "priority", "timeout_s"),
    *("reply_to", "results", "cache_salt", "view"),
}
JOB_SINCE: dict[str, tuple[int, Any]] = {
    "tools": (1, []),
    "format": (1, FormatSpec(name="f")),
    "default_max_tokens": (2, 16),
    "trace": (3, "00-0-0-00"),
    "cache": (3, "off"),
    "suffix": (3, ""),
    "tokenize": (3, True),
    "add_special_tokens": (4, False),
    "truncate_prompt_tokens": (4, 1),
    "continue_final_message": (4, True),
    "tool_choice": (5, "none"),
    "parallel_tool_calls": (5, False),
}


def test_every_field_has_a_level() -> None:
    assert set(SamplingParams.__struct_fields__) == SAMPLING_AT_FIRST | SAMPLING_SINCE.keys()
    assert set(Job.__struct_fields__) == JOB_AT_FIRST | JOB_SINCE.keys()
    assert set(Structure.__struct_fields__) == STRUCTURE_AT_FIRST | STRUCTURE_SINCE.keys()
    tables = (*SAMPLING_SINCE.values(), *STRUCTURE_SINCE.values(), *JOB_SINCE.values())
    assert max(level for level, _ in tables) == LEVEL


@pytest.mark.parametrize("field", SAMPLING_SINCE)
def test_a_newer_sampling_field_needs_its_level(field: str) -> None:
    level, value = SAMPLING_SINCE[field]
    params = SamplingParams(**{field: value})
    assert sampling_level(params) == job_level(Job(prompt="a", sampling=params)) == level
    assert sampling_level(SamplingParams()) == 0


@pytest.mark.parametrize("field", STRUCTURE_SINCE)
def test_a_newer_field_of_a_structure_needs_its_level_whatever_the_job_has(field: str) -> None:
    level, value = STRUCTURE_SINCE[field]
    params = SamplingParams(structure=Structure(after=[1], **{field: value}), bad_words=["a"])
    assert sampling_level(params) == level
    for other, (_, its) in JOB_SINCE.items():
        assert job_level(Job(prompt="a", sampling=params, **{other: its})) == level


@pytest.mark.parametrize("field", JOB_SINCE)
def test_a_newer_field_of_a_job_needs_its_level_whatever_else_it_has(field: str) -> None:
    level, value = JOB_SINCE[field]
    assert job_level(Job(prompt="a", **{field: value})) == level
    for other, (others, its) in JOB_SINCE.items():
        if other != field:
            assert job_level(Job(prompt="a", **{field: value, other: its})) == max(level, others), other
    for name, (others, its) in SAMPLING_SINCE.items():
        job = Job(prompt="a", sampling=SamplingParams(**{name: its}), **{field: value})
        assert job_level(job) == max(level, others), name
    assert job_level(Job(prompt="a")) == 0
