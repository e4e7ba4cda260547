"""One whole stack with the simulated engine, shared by the tests of the face; it must outlive what they do to it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.serve.embedded import FAST, EmbeddedServer, server_url
from tests.headrace.services import Services
from tests.models import tiny_model
from tests.stack import Stack

CONTEXT = 30_000  # tokens: a request can run for longer than any test


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama, but said to be good for long texts: the simulated engine has no weights that would mind."""
    path = tmp_path_factory.mktemp("model") / "long"
    shutil.copytree(tiny_model(tmp_path_factory, "llama"), path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}))
    return path


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[Stack]:
    with Stack(
        tmp_path_factory.mktemp("stack"), "--model", str(model_dir), "--served-model-name", "org/tiny",
        "--engine", "simulated", "--max-model-len", str(CONTEXT),
    ) as running:  # fmt: skip
        yield running


@pytest.fixture
def services(tmp_path: Path, model_dir: Path) -> Iterator[Services]:
    """On a server of their own; what runs when the test ends is killed."""
    with EmbeddedServer(tmp_path / "data", settings=FAST) as server:
        made = Services(tmp_path, server.url, model_dir)
        try:
            yield made
        finally:
            made.close()


@pytest.fixture(scope="session")
def queue_url(stack: Stack) -> str:
    return server_url(stack.run_dir / "data")
