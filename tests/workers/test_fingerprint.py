"""Fingerprints differ where sequences must not be continued, and agree for copies of one checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from protocol.errors import StartError
from tests.models import tiny_model
from workers.engines.simulated import SimulatedConfig, SimulatedEngine
from workers.fingerprint import fingerprint
from workers.torch_engine.config import EngineConfig
from workers.torch_engine.make import make_engine

HOW = {"engine": "torch", "dtype": "torch.float32"}


@pytest.fixture
def copy(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    source = Path(tiny_model(tmp_path_factory, "llama"))
    return source, Path(shutil.copytree(source, tmp_path / "copy"))


def test_a_copy_has_the_same_one_and_other_precision_another(copy: tuple[Path, Path]) -> None:
    source, twin = copy
    (twin / "README.md").write_text("where it came from")
    assert fingerprint(source, HOW) == fingerprint(twin, HOW)
    assert len(fingerprint(source, HOW)) == 64
    assert fingerprint(source, HOW) != fingerprint(source, {**HOW, "dtype": "torch.bfloat16"})


def test_every_tensor_counts_though_the_headers_are_equal(copy: tuple[Path, Path]) -> None:
    source, twin = copy
    weights = load_file(source / "model.safetensors")
    for name in weights:
        tuned = {k: v + torch.full_like(v, 1e-3) if k == name else v for k, v in weights.items()}
        save_file(tuned, twin / "model.safetensors", metadata={"format": "pt"})
        assert (twin / "model.safetensors").stat().st_size == (source / "model.safetensors").stat().st_size
        assert fingerprint(twin, HOW) != fingerprint(source, HOW), name


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "tokenizer_config.json"])
def test_small_files_count(copy: tuple[Path, Path], name: str) -> None:
    source, twin = copy
    changed = json.loads((twin / name).read_bytes()) | {"a_new_field": 1}
    (twin / name).write_text(json.dumps(changed))
    assert fingerprint(twin, HOW) != fingerprint(source, HOW)


@pytest.mark.parametrize("damage", [b"", b"\xff" * 16, b"\x02\0\0\0\0\0\0\0[]"])
def test_a_damaged_file_fails_the_start_by_name(copy: tuple[Path, Path], damage: bytes) -> None:
    (copy[1] / "model.safetensors").write_bytes(damage)
    with pytest.raises(StartError, match="fingerprint"):
        fingerprint(copy[1], HOW)


def test_engines_tell_it_with_their_capacity(copy: tuple[Path, Path]) -> None:
    found = set()
    for path, dtype in ((copy[0], "float32"), (copy[1], "float32"), (copy[0], "bfloat16")):
        engine = make_engine(EngineConfig(str(path), dtype=dtype, device="cpu", kv_cache_memory=1 << 22))
        found.add(engine.load(lambda *_: None).fingerprint)
    assert len(found) == 2
    other = SimulatedEngine(SimulatedConfig(token_range=(1, 5))).load(lambda *_: None).fingerprint
    assert other != SimulatedEngine(SimulatedConfig()).load(lambda *_: None).fingerprint
