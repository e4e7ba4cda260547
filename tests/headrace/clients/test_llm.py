"""Offline use: prompts in, results out, nothing left behind however the program ends."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace import LLM, SamplingParams
from headrace.clients.llm import run_all, serve_options
from protocol.errors import InvalidRequest, StartError
from protocol.messages import Job, shard_of

GONE_S = 60  # until every process has gone, on a loaded machine
NINE = SamplingParams(max_tokens=9, seed=1, ignore_eos=True)

PROGRAM = """
import sys, time
from headrace import LLM, SamplingParams

llm = LLM(sys.argv[1], engine="simulated")
(result,) = llm.generate("x", SamplingParams(max_tokens=3, ignore_eos=True))
assert len(result.outputs[0].token_ids) == 3
print(llm._serve.process.pid, llm._serve.place.name, flush=True)
if sys.argv[2] == "linger":
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def llm(model_dir: Path) -> Iterator[LLM]:
    running: list[LLM] = []
    starter = threading.Thread(
        target=lambda: running.append(LLM(model_dir, engine="simulated", max_model_len=900, max_num_seqs=2))
    )
    starter.start()
    starter.join()  # the thread that made it has ended: it must go on
    (made,) = running
    yield made
    made.close()
    assert made._serve.process.poll() == 0
    assert not Path(made._serve.place.name).exists()
    made.close()  # changes nothing


def test_logprobs_of_prompts_and_a_prompt_alone(llm: LLM) -> None:
    (result,) = llm.generate([5, 6, 7], max_tokens=0, prompt_logprobs=1)
    assert (result.outputs[0].finish_reason, result.text) == ("length", "")
    first, *others = result.prompt_logprobs or []
    assert first is None
    assert [{id: one.logprob for id, one in (told or {}).items()} for told in others] == [
        {6: -1.0, 0: -1.0}, {7: -2.0, 0: -1.0}
    ]  # fmt: skip
    (cut,) = llm.generate([5, 6, 7], max_tokens=2, logprobs=1, truncate_prompt_tokens=2)
    assert cut.prompt_token_ids == [6, 7]
    assert [len(told) in (1, 2) for told in cut.outputs[0].logprobs or ()] == [True, True]


@pytest.mark.nightly  # the queue's client is tried with two shards in tests/scheduler/test_shards.py
def test_prompts_are_spread_over_shards(model_dir: Path) -> None:
    with LLM(model_dir, engine="simulated", max_model_len=900, shards=2, workers=2) as llm:
        results = llm.generate([f"prompt {k}" for k in range(12)], NINE)
    assert [len(result.outputs[0].token_ids) for result in results] == [9] * 12
    assert {shard_of(result.request_id) for result in results} == {0, 1}


def test_generate_and_chat(llm: LLM) -> None:
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


def test_arguments_and_results_read_as_those_of_vllm(llm: LLM) -> None:
    (result,) = llm.generate("import os", NINE)
    output = result.outputs[0]
    assert (output.index, output.finish_reason, len(output.token_ids)) == (0, "length", 9)
    assert output.text == result.text
    assert result.prompt == "import os"
    assert result.prompt_token_ids
    again = llm.generate([{"prompt": "import os"}, {"prompt_token_ids": result.prompt_token_ids}], NINE)
    assert [r.prompt_token_ids for r in again] == [result.prompt_token_ids] * 2
    (ids,) = llm.generate([5, 6, 7], NINE)  # one prompt, of three tokens
    assert (ids.prompt, ids.prompt_token_ids) == (None, [5, 6, 7])
    (two,) = llm.generate("x", SamplingParams(n=2, max_tokens=4, ignore_eos=True))
    assert [o.index for o in two.outputs] == [0, 1]
    (answer,) = llm.chat([{"role": "user", "content": "hi"}], SamplingParams(max_tokens=4))
    assert answer.prompt_token_ids
    assert llm.generate([]) == []


def test_structure_and_calls(llm: LLM) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 99}},
              "required": ["n"], "additionalProperties": False}  # fmt: skip
    results = llm.generate(["a", "b", "c"], max_tokens=400, structure={"json": schema})
    assert all(json.loads(result.text)["n"] >= 1 for result in results)
    (refused,) = llm.generate("a", max_tokens=8, structure={"regex": "(unclosed"})
    assert refused.outputs[0].finish_reason == "error"
    tool = {"type": "function", "function": {"name": "count", "parameters": schema}}
    chat = [{"role": "user", "content": "hi"}]
    with pytest.raises(InvalidRequest, match="knows no tools"):  # of the tiny model
        llm.chat(chat, tools=[tool], tool_choice="required")
    (refused,) = llm.chat(chat, max_tokens=2, chat_template_kwargs={"tokenize": False})
    assert "chat_template_kwargs.tokenize" in str(refused.outputs[0].error)


def test_one_sampling_for_each_prompt_and_more_prompts_than_run_at_once(llm: LLM) -> None:
    lengths = [1 + k % 5 for k in range(30)]
    sampling = [SamplingParams(max_tokens=n, ignore_eos=True) for n in lengths]
    results = llm.generate(["x"] * len(lengths), sampling)
    assert [len(r.outputs[0].token_ids) for r in results] == lengths


def test_what_is_wrong_with_a_call_is_said(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="temperature"):
        llm.generate("x", SamplingParams(temperature=9.0))
    with pytest.raises(InvalidRequest, match="stop"):
        llm.generate("x", SamplingParams(stop="end"))  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="1 sampling_params for 2 prompts"):
        llm.generate(["x", "y"], [NINE])
    with pytest.raises(InvalidRequest, match="either sampling_params or seed"):
        llm.generate("x", NINE, seed=2)
    for prompt in ({"text": "x"}, {"prompt_token_ids": ["x"]}, 5.0):
        with pytest.raises(InvalidRequest, match="prompt"):
            llm.generate([prompt])  # type: ignore[list-item]


def test_requests_of_an_interrupted_call_are_cancelled(llm: LLM) -> None:
    async def interrupted() -> str | None:
        client = llm._client.on_loop
        job = Job(prompt="x", sampling=SamplingParams(max_tokens=880, ignore_eos=True))
        running = asyncio.create_task(run_all(client, [job], window=2))
        while not client._readers:  # noqa: ASYNC110 (there is nothing to wait on)
            await asyncio.sleep(0.001)
        (request,) = client._readers
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        return (await client.result(request)).outputs[0].finish_reason

    assert llm._client.run(interrupted()) == "abort"


def test_options_that_do_not_exist_name_what_to_use() -> None:
    assert serve_options({"tensor_parallel_size": 2, "trust_remote_code": False}) == {"tensor_parallel_size": 2}
    assert serve_options({"gpu_memory_utilization": 0.5}) == {"gpu_memory_utilization": 0.5}
    with pytest.raises(ValueError, match="never run"):
        serve_options({"trust_remote_code": True})
    with pytest.raises(TypeError, match="port"):
        serve_options({"port": 1})


def test_failures_are_said(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="max_len"):
        LLM("x/y", max_len=4)
    with pytest.raises(StartError, match=r"no config\.json"):
        LLM(tmp_path)


@pytest.mark.parametrize("end", ["exit", "kill"])
def test_no_process_outlives_the_program(model_dir: Path, end: str) -> None:
    argv = [sys.executable, "-c", PROGRAM, str(model_dir), "linger" if end == "kill" else "leave"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        pid, _, place = program.stdout.readline().strip().partition(" ")
        assert pid, "the program failed"
        if end == "kill":
            family = descendants(int(pid))
            assert len(family) >= 4  # server, scheduler, gateway, worker
            program.kill()
        assert program.wait(GONE_S * 2) == (0 if end == "exit" else -signal.SIGKILL)
    if end == "exit":
        assert not Path(place).exists()
        assert not alive(int(pid))
        return
    shutil.rmtree(place)  # the directory is left: nobody was there to remove it
    deadline = time.monotonic() + GONE_S
    while left := [p for p in [int(pid), *family] if alive(p)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def descendants(pid: int) -> list[int]:
    children = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return children + [d for c in children for d in descendants(c)]


def alive(pid: int) -> bool:
    """Whether it runs; one that has ended and waits for a parent to take note of it does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
