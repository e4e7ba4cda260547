"""Sampling defaults of a model: what its generation_config.json states, at both doors, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import pytest

from gateway.openai import bodies
from protocol.errors import InvalidRequest
from protocol.jobs import decode_job, given_sampling
from protocol.levels import job_level, plainer
from protocol.messages import Job
from scheduler.prompts.generation_config import read
from scheduler.prompts.tokenization import Prompts

STATED = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}
DEFAULTS = {name: STATED[name] for name in ("temperature", "top_k", "top_p", "repetition_penalty")}


@pytest.fixture
def model(model_dir: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    (folder / "generation_config.json").write_text(json.dumps({**STATED, "max_new_tokens": 40}))
    return folder


def completion(model: Path, **fields: object) -> Job:
    card = Prompts.load(str(model)).card("m", 0)
    body = msgspec.json.decode(msgspec.json.encode({"model": "m", "prompt": "x", **fields}), type=bodies.CompletionBody)
    return bodies.completion_job(body, card, "default", 0)


def chat(model: Path, *, defaults: bool = True, **fields: object) -> Job:
    card = Prompts.load(str(model)).card("m", 0)
    if not defaults:
        card.sampling.pop("max_tokens")
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], **fields}
    return bodies.chat_job(msgspec.json.decode(msgspec.json.encode(body), type=bodies.ChatBody), card, "default", 0)


def pushed(model: Path, **sampling: object) -> Job:
    prompts = Prompts.load(str(model))
    payload = msgspec.json.encode({"v": 1, "prompt": "x", "sampling": sampling})
    job = decode_job(payload)
    return prompts.with_defaults(job, given_sampling(payload), prompts.ids(job))


def test_only_what_the_file_states_counts(model: Path):
    assert read(str(model)) == {**DEFAULTS, "max_tokens": 40}
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    assert read(str(model)) == {}, "not the library's own top_k of 50"
    (model / "generation_config.json").write_text(json.dumps({"temperature": -1, "top_p": "x", "top_k": 5}))
    assert read(str(model)) == {"top_k": 5}
    (model / "generation_config.json").write_text("{")
    assert read(str(model)) == {}
    (model / "generation_config.json").unlink()
    assert read(str(model)) == {}


def test_both_doors_use_them_and_a_requests_own_value_wins(model: Path):
    for job in (completion(model), pushed(model)):
        assert {name: getattr(job.sampling, name) for name in DEFAULTS} == DEFAULTS
    for job in (completion(model, temperature=1.0, top_k=0), pushed(model, temperature=1.0, top_k=0)):
        assert (job.sampling.temperature, job.sampling.top_k) == (1.0, 0), "an explicit default of OpenAI's, too"
        assert job.sampling.top_p == 0.8


def test_completions_keep_their_sixteen_tokens_and_a_default_length_gives_way(model: Path):
    assert completion(model).sampling.max_tokens == 16
    assert pushed(model).sampling.max_tokens == 40
    (model / "generation_config.json").write_text(json.dumps({"max_new_tokens": 10**6}))
    prompts = Prompts.load(str(model))
    assert pushed(model).sampling.max_tokens == prompts.max_model_len - 1
    assert chat(model).default_max_tokens == 10**6


def test_a_default_length_goes_beside_the_sampling_of_a_chat(model: Path):
    """Only the scheduler knows how long the prompt is, and what of the default the context has room for."""
    job = chat(model)
    assert (job.sampling.max_tokens, job.default_max_tokens, job_level(job)) == (None, 40, 2)
    assert plainer(job) == chat(model, defaults=False)
    asked = chat(model, max_tokens=7)
    assert (asked.sampling.max_tokens, asked.default_max_tokens) == (7, None)
    assert (chat(model, min_tokens=50).default_max_tokens, pushed(model, min_tokens=50).sampling.max_tokens) == (40, 50)
    with pytest.raises(InvalidRequest, match="default_max_tokens"):
        decode_job(msgspec.json.encode({"v": 1, "prompt": "x", "default_max_tokens": 5}))


def test_they_can_be_turned_off(model: Path):
    prompts = Prompts.load(str(model), generation_config="off")
    assert prompts.card("m", 0).sampling == {}
