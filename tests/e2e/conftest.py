"""One whole stack with the demo model, shared by the tests that need no other; it must outlive what they do to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.stack import Stack

DEMO = Path(__file__).parents[2] / "examples" / "demo-model"


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with Stack(
        tmp_path_factory.mktemp("demo"), "--model", str(DEMO), "--served-model-name", "demo", "--dtype", "float32",
        "--max-num-seqs", "8",
    ) as running:  # fmt: skip
        yield running


@pytest.fixture
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=stack.url + "/v1", api_key="none", max_retries=0) as made:
        yield made
