"""Broken model directories: each is refused in one sentence that names what is wrong, and nothing is tried again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from headrace import cli, hub
from headrace.model import check
from headrace.model_check import check_model
from protocol.errors import EX_CONFIG, StartError
from scheduler.prompts.tokenization import Prompts
from tests.headrace.broken_models import CASES
from tests.models import tiny_model
from tests.stack import START_S
from workers.torch_engine.config import EngineConfig
from workers.torch_engine.make import make_engine

ROWS: dict[str, str] = {}  # the table, printed at the end
OF_SERVE = ("weights with NaN", "chat template unusable")  # refused by the worker, by the scheduler


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory, "llama")


@pytest.fixture(scope="module", autouse=True)
def table() -> object:
    """Print the table once its cases have run (`pytest -s` shows it)."""
    yield
    print("\n| case | code | seconds | sentence |\n|---|---|---|---|")
    for name, row in ROWS.items():
        print(f"| {name} | {row} |")


def broken(good: Path, where: Path, name: str) -> Path:
    directory = where / "model"
    shutil.copytree(good, directory)
    return CASES[name](directory) or directory


def note(name: str, code: int, began: float, sentence: str, where: Path) -> None:
    shown = sentence.replace(str(where), "").strip()
    ROWS[name] = f"{code} | {time.monotonic() - began:.2f} | {shown}"
    assert code == EX_CONFIG, sentence
    assert "\n" not in shown, sentence
    assert "Traceback" not in sentence
    assert len(shown) < 330, sentence


def load_all(path: Path) -> None:
    """What a scheduler and a worker do with a model before they serve it."""
    check_model(str(path))
    Prompts.load(str(path))
    make_engine(EngineConfig(model=str(path), device="cpu", threads=1)).load(lambda stage, fraction: None)


def test_the_good_one_is_served(good: Path) -> None:
    load_all(good)
    assert len(CASES) >= 30


@pytest.mark.parametrize("name", CASES)
def test_a_broken_one_is_refused_in_one_sentence(good: Path, tmp_path: Path, name: str) -> None:
    path, began = broken(good, tmp_path, name), time.monotonic()
    with pytest.raises(StartError) as refused:
        load_all(path)
    sentence = str(refused.value)
    note(name, EX_CONFIG, began, sentence, tmp_path)
    assert str(tmp_path) in sentence, "it names the directory or a file in it"


@pytest.mark.parametrize("name", ["weights cut off", "ten million layers", "tokenizer missing", "a truncated gguf"])
def test_most_are_refused_by_serve_before_anything_starts(
    good: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = broken(good, tmp_path, name)
    argv = ["serve", "--model", str(path), "--port", "0", "--data-dir", str(tmp_path / "data")]
    assert cli.main([*argv, "--run-dir", str(tmp_path / "run")]) == EX_CONFIG
    said = capsys.readouterr().err
    assert said.startswith(f"headrace serve: {tmp_path}"), said
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("name", OF_SERVE)
def test_the_others_end_serve_without_another_try(good: Path, tmp_path: Path, name: str) -> None:
    path, began = broken(good, tmp_path, name), time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-m", "headrace", "serve", "--model", str(path), "--port", "0", "--device", "cpu",
         "--run-dir", str(tmp_path / "run"), "--data-dir", str(tmp_path / "data")],
        capture_output=True, text=True, timeout=START_S, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    note(f"serve: {name}", ended.returncode, began, ended.stderr, tmp_path)
    assert "started again" not in ended.stdout
    assert "Traceback" not in ended.stdout


def test_files_that_may_not_be_read(good: Path, tmp_path: Path) -> None:
    """As a user who is not root: root may read everything."""
    began, directory = time.monotonic(), tmp_path / "model"
    shutil.copytree(good, directory)
    (directory / "model.safetensors").chmod(0)
    for parent in (directory, *directory.parents):
        if parent.owner() == directory.owner() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o055)
    code = (
        "import os, sys\n"
        "from headrace.model_check import check_model\n"
        "from protocol.errors import StartError\n"
        "if os.geteuid() == 0: os.setgid(65534); os.setuid(65534)\n"
        "try: check_model(sys.argv[1])\n"
        "except StartError as error: print(error, file=sys.stderr); sys.exit(78)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, str(directory)], capture_output=True, text=True, timeout=START_S
    )
    note("no permission", ended.returncode, began, ended.stderr, tmp_path)
    assert "model.safetensors" in ended.stderr


# ------------------------------------------------------------------ options, and the hub


def test_a_context_beyond_the_model_is_refused_before_it_is_loaded(good: Path) -> None:
    with pytest.raises(StartError, match=r"--max-model-len 513: the model knows no more than 512 positions"):
        check(str(good), {"engine": "torch", "max_model_len": 513})
    check(str(good), {"engine": "torch", "max_model_len": 512})
    check(str(good), {"engine": "simulated", "max_model_len": 10_000})


def test_a_hub_id_without_a_network_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in hub.PROXIES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv(hub.OFFLINE, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(StartError, match=r"--model nobody/nothing: no such directory.*the hub cannot be asked"):
        check("nobody/nothing", {"engine": "torch", "max_model_len": None})
    assert hub.OFFLINE not in os.environ
