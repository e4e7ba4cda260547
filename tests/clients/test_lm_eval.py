"""lm-eval, unmodified, scores a model over HTTP as its own transformers backend scores it: item by item.

Its tasks are made here: 200 multiple-choice items, texts for their perplexity, questions that a chat answers.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headrace import default_model
from tests.clients.environments import python_of
from tests.stack import Stack

pytestmark = [pytest.mark.clients, pytest.mark.timeout(3600)]

ITEMS = 200
TASKS = {
    "choices": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: " "
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true},
              {metric: acc_norm, aggregation: mean, higher_is_better: true}]
""",
    "texts": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "answers": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}]
""",
}
FACTS = [
    ("The capital of France is", "Paris"), ("The capital of Japan is", "Tokyo"), ("The opposite of hot is", "cold"),
    ("Water freezes into", "ice"), ("A baby dog is called a", "puppy"), ("The sun rises in the", "east"),
    ("In German, 'good morning' is", "guten Morgen"), ("¿Cómo se dice 'cat' en español?", "gato"),
    ("The emoji for a smiling face is", "😀"), ("The Greek letter for p is", "π"), ("Cat in Japanese is", "猫"),
    ("Bees make", "honey"), ("Two plus two is", "four"), ("def add(a, b): return", "a + b"),
]  # fmt: skip


def items() -> list[dict[str, Any]]:
    dice, made = random.Random(7), []
    for number in range(ITEMS):
        if number % 2:
            one, two = dice.randrange(2, 60), dice.randrange(2, 60)
            question, right = f"Question: What is {one} + {two}?\nAnswer:", str(one + two)
            wrong = [str(one + two + off) for off in dice.sample((-11, -10, -2, -1, 1, 2, 9, 10), 3)]
        else:
            fact, right = FACTS[number // 2 % len(FACTS)]
            question = f"{dice.choice(('', 'Fact. ', 'Fill in. '))}{fact}"
            wrong = dice.sample([other for _, other in FACTS if other != right], 3)
        choices = dice.sample([right, *wrong], 4)
        made.append({"question": question, "choices": choices, "answer": choices.index(right)})
    return made


def texts() -> list[dict[str, Any]]:
    """English, code and others, one longer than a context of the comparison."""
    root = Path(__file__).parents[2]
    code = (root / "protocol" / "sampling.py").read_text()
    prose = (root / "docs" / "architecture.md").read_text()
    other = "Der Mühlgraben führt das Wasser zum Rad. 水車は回る。 Вода течёт. 🙂 " * 12
    return [{"text": text} for text in (prose[:3000], code[:9000], other, "One line.")]


def answers() -> list[dict[str, Any]]:
    return [{"question": f"Complete in one word: {fact}", "answer": right} for fact, right in FACTS]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tasks")
    for name, rows in (("choices", items()), ("texts", texts()), ("answers", answers())):
        lines = place / f"{name}.jsonl"
        lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
        head = f"task: made_{name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: '{lines}'}}}}\n"
        (place / f"{name}.yaml").write_text(f"{head}test_split: test{TASKS[name]}metadata: {{version: 1.0}}\n")
    return place


@pytest.fixture(scope="module")
def lm_eval(tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``lm_eval(kind, arguments, [tasks], options)`` -> (results by task, samples by task)."""
    python = python_of("lm_eval", shares=True)  # the comparison is of serving, not of versions of torch

    def run(kind: str, arguments: dict[str, Any], names: list[str], *options: str) -> tuple[Any, Any]:
        out = tmp_path_factory.mktemp("out")
        told = ",".join(f"{name}={value}" for name, value in arguments.items())
        command = [
            str(python), "-m", "lm_eval", "--model", kind, "--model_args", told, "--tasks",
            ",".join(f"made_{name}" for name in names), "--include_path", str(tasks), "--output_path", str(out),
            "--log_samples", "--batch_size", "8" if kind != "local-chat-completions" else "1", *options,
        ]  # fmt: skip
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(out), "NO_PROXY": "127.0.0.1"}
        ended = subprocess.run(command, capture_output=True, text=True, cwd=out, env={**env, **offline}, timeout=1800)
        assert ended.returncode == 0, ended.stderr[-6000:]
        (results,) = out.rglob("results_*.json")
        samples = {}
        for path in out.rglob("samples_*.jsonl"):
            rows = sorted(map(json.loads, path.read_text().splitlines()), key=lambda row: row["doc_id"])
            samples[path.name.split("_")[2]] = rows
        found = json.loads(results.read_text())["results"]
        return {name.removeprefix("made_"): values for name, values in found.items()}, samples

    return run


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Iterator[Stack]:
    place = tmp_path_factory.mktemp("lm-eval")
    with Stack(
        place, "--model", str(small_model), "--served-model-name", default_model.NAME, "--max-model-len", "2048",
        "--kv-cache-memory", "512MiB", "--dtype", "float32",
    ) as running:  # fmt: skip
        yield running


@pytest.fixture(scope="module")
def own(lm_eval: Any, small_model: Path) -> Any:
    return lm_eval("hf", _own(small_model), ["choices", "texts"], "--device", "cpu")


def _own(model: Path) -> dict[str, Any]:
    return {"pretrained": model, "dtype": "float32", "max_length": 2046}  # windows of a long text are then the same


def _over_http(stack: Stack, model: Path, path: str) -> dict[str, Any]:
    return {
        "model": default_model.NAME, "base_url": f"{stack.url}/v1/{path}", "tokenizer": model, "max_length": 2048,
        "num_concurrent": 4, "max_retries": 1, "tokenizer_backend": "huggingface",
    }  # fmt: skip


@pytest.fixture(scope="module")
def served(lm_eval: Any, stack: Stack, small_model: Path) -> Any:
    return lm_eval("local-completions", _over_http(stack, small_model, "completions"), ["choices", "texts"])


def test_multiple_choice_scores_exactly_as_lm_evals_own_backend(own: Any, served: Any) -> None:
    for metric in ("acc,none", "acc_norm,none"):
        assert served[0]["choices"][metric] == own[0]["choices"][metric]
    assert 0.25 < own[0]["choices"]["acc,none"] < 1  # it says something
    pairs = list(zip(served[1]["choices"], own[1]["choices"], strict=True))
    assert len(pairs) == ITEMS
    for ours, theirs in pairs:
        assert (ours["acc"], ours["acc_norm"]) == (theirs["acc"], theirs["acc_norm"])
        for one, other in zip(ours["filtered_resps"], theirs["filtered_resps"], strict=True):
            assert float(one[0]) == pytest.approx(float(other[0]), abs=1e-3)
            assert str(one[1]) == str(other[1])  # whether greedy decoding would say it


def test_perplexity(own: Any, served: Any) -> None:
    for metric in ("word_perplexity,none", "byte_perplexity,none", "bits_per_byte,none"):
        assert served[0]["texts"][metric] == pytest.approx(own[0]["texts"][metric], rel=1e-4)


def test_a_generative_task_by_chat(lm_eval: Any, stack: Stack, small_model: Path) -> None:
    chat = "--apply_chat_template"
    own, theirs = lm_eval("hf", _own(small_model), ["answers"], chat, "--device", "cpu")
    found, ours = lm_eval(
        "local-chat-completions", _over_http(stack, small_model, "chat/completions"), ["answers"], chat
    )
    assert [row["filtered_resps"] for row in ours["answers"]] == [row["filtered_resps"] for row in theirs["answers"]]
    assert found["answers"]["exact_match,none"] == own["answers"]["exact_match,none"]
