"""Offline use: prompts in, results out, nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.clients.llm import LLM
from protocol.errors import StartError


def test_generate_and_chat(model_dir: Path) -> None:
    with LLM(model_dir, engine="simulated", max_model_len=900) as llm:
        place = Path(llm._place.name)
        prompts = ["def add(a, b):", [1, 2, 3], "import os"]
        results = llm.generate(prompts, max_tokens=9, seed=1, ignore_eos=True)
        assert [len(r.choices[0].token_ids) for r in results] == [9, 9, 9]
        assert llm.generate(prompts, max_tokens=9, seed=1, ignore_eos=True) != results  # other requests,
        again = llm.generate(prompts, max_tokens=9, seed=1, ignore_eos=True)
        assert [r.text for r in again] == [r.text for r in results]  # the same answers
        (told,) = llm.chat([[{"role": "user", "content": "hi"}]], max_tokens=4)
        assert told.choices[0].finish_reason in ("length", "stop")
        (refused,) = llm.generate(["x"], max_tokens=1000)  # over the option's bound
        assert refused.choices[0].finish_reason == "error"
    assert not place.exists()
    assert llm._process.poll() == 0


def test_failures_are_said(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="max_len"):
        LLM("x/y", max_len=4)
    with pytest.raises(StartError, match=r"no config\.json"), LLM(tmp_path):
        pass
