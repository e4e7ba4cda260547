"""The model that `headrace serve` takes by itself: a real one, fetched and converted by the code that users run.

It has to be there: a machine that can fetch nothing fails these tests rather than skip them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from headrace import Client, default_model
from headrace.serve.embedded import server_url
from tests.stack import Stack

ROOT = Path(__file__).parents[2]
TOKENS = 32
CHATS = [
    [{"role": "user", "content": question}]
    for question in (
        "What is the capital of France?",
        "Name three colours.",
        "Write a haiku about the sea.",
        "What is 2 + 2?",
        "Who wrote Hamlet?",
        "Explain gravity in one sentence.",
        "Translate 'good morning' to Spanish.",
        "What year did World War II end?",
        "def fibonacci(n):\n    # continue this function",
        "List the days of the week.",
        "Is  a   tomato a fruit?  12  34",
        "¿Qué es la fotosíntesis?",
        "Write the word 'hello' five times.",
        "What does HTTP stand for?",
        "Give me a recipe for pancakes.",
    )
] + [
    [{"role": "system", "content": "You answer in one word."}, {"role": "user", "content": "The opposite of hot?"}],
    [{"role": "system", "content": ""}, {"role": "user", "content": "Hi!"}],
    [
        {"role": "user", "content": "My name is Ada."},
        {"role": "assistant", "content": "Nice to meet you, Ada."},
        {"role": "user", "content": "What is my name?"},
    ],
    [{"role": "user", "content": "Summarize: " + "The quick brown fox jumps over the lazy dog. " * 5}],
    [{"role": "user", "content": "🎉🎉 naïve café — ok?"}],
]


@pytest.fixture(scope="module")
def stack(small_stack: Stack) -> Stack:
    return small_stack


def test_the_start_and_the_list_of_models_say_which_it_is(stack: Stack) -> None:
    assert stack.log.read_text().splitlines()[0] == f"model: {default_model.NAME}  ({default_model.ORIGIN})"
    with openai.OpenAI(base_url=stack.url + "/v1", api_key="none") as client:
        assert [model.id for model in client.models.list()] == [default_model.NAME]


def test_it_knows_the_capital_of_france(stack: Stack) -> None:
    with openai.OpenAI(base_url=stack.url + "/v1", api_key="none") as client:
        answer = client.chat.completions.create(
            model=default_model.NAME, messages=CHATS[0], max_tokens=TOKENS, temperature=0
        )
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"


def readme_blocks() -> list[tuple[str, str]]:
    """(language, text) of the code blocks of the README's part "Ask it"."""
    part = (ROOT / "README.md").read_text().partition("## Ask it")[2].partition("\n## ")[0]
    return re.findall(r"```(\w+)\n(.*?)```", part, re.S)


def test_the_readmes_examples_answer_what_it_shows(stack: Stack) -> None:
    (_, curl), (_, answer), (_, program), (_, text) = readme_blocks()
    commands = (["bash", "-c", curl], [sys.executable, "-c", program])
    told = []
    for command in commands:
        here = [part.replace("http://127.0.0.1:8000", stack.url) for part in command]
        told.append(subprocess.run(here, capture_output=True, text=True, timeout=240, check=True).stdout)
    shown = json.loads(answer.replace("TIME", "0"))
    given = json.loads(told[0])
    for one in (given, shown):  # another test may have asked the same before
        one["usage"].pop("prompt_tokens_details")
    assert given.keys() == shown.keys()
    assert all(given[part] == shown[part] for part in ("object", "model", "choices", "usage"))
    assert told[1] == text.strip()


@pytest.mark.timeout(900)  # transformers takes a while where others compute too
def test_twenty_chats_equal_generate(stack: Stack, small_model: Path, one_thread: None) -> None:
    """Greedy, token for token, all twenty at once through the queue, against transformers' own batch of twenty."""
    assert len(CHATS) == 20
    with Client(server_url(stack.run_dir / "data"), default_model.NAME) as client:
        requests = [client.submit(messages=chat, max_tokens=TOKENS, temperature=0) for chat in CHATS]
        served = [list(client.result(request).choices[0].token_ids) for request in requests]
    tokenizer = AutoTokenizer.from_pretrained(small_model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32).eval()
    texts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in CHATS]
    prompts = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
    rows = model.generate(**prompts, max_new_tokens=TOKENS, do_sample=False)[:, prompts["input_ids"].shape[1] :]
    expected = [until_end(row, tokenizer.eos_token_id) for row in rows.tolist()]
    wrong = [
        (chat[-1]["content"][:40], tokenizer.decode(ours), tokenizer.decode(theirs))
        for chat, ours, theirs in zip(CHATS, served, expected, strict=True)
        if ours != theirs
    ]
    assert not wrong
    assert sum(len(ids) for ids in served) > 10 * len(CHATS)


def until_end(row: list[int], end: int) -> list[int]:
    """A row of a batch up to the token that ended it."""
    return row[: row.index(end) + 1] if end in row else row
