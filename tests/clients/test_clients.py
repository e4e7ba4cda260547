"""Client libraries as their users run them: unmodified, in environments of their own, against `headrace serve` and a
real model. Each program of `programs/` (and `node/`) makes its checks; what it cannot do is a failure, never a skip.

Those of IN_CI are part of `make test`; the rest takes minutes to install: `make clients`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from headrace import default_model
from tests.clients.environments import HERE, node_programs, python_of
from tests.stack import Stack

BASIC = ("chat", "stream", "tools", "structured")
IN_CI = {"openai_python": BASIC, "langchain": BASIC, "pydantic_agent": BASIC, "litellm_sdk": BASIC}
OTHERS: dict[str, tuple[str, ...]] = {
    "llama_index_like": BASIC,
    "llm_cli": BASIC,
    "guidellm_cli": ("bench",),
    "aiperf_cli": ("bench",),
    "vllm_bench": ("completions", "chats"),
    "instructor_modes": ("structured",),
}
NODE: dict[str, tuple[str, ...]] = {"openai_node": BASIC, "ai_sdk": BASIC}
PATIENCE_S = 600
ROOT = HERE.parent.parent

pytestmark = pytest.mark.timeout(1800)  # the first test of a client installs it


@pytest.fixture(scope="module")
def stack(small_stack: Stack) -> Stack:
    return small_stack


def report_of(client: str, url: str, model: str, tokenizer: Path, home: Path) -> dict[str, str | None]:
    """Check -> error or None, of one run of the client's program. ``home``: some keep logs and settings there."""
    if client in NODE:
        place = node_programs()
        command = [str(shutil.which("node")), str(place / f"{client}.mjs")]
    else:
        command = [str(python_of(client)), str(HERE / "programs" / f"{client}.py")]
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "OPENAI_API_KEY")}
    ended = subprocess.run(
        [*command, url + "/v1", model, str(tokenizer)], capture_output=True, text=True, timeout=PATIENCE_S, cwd=home,
        env={**env, "HOME": str(home), "NO_PROXY": "127.0.0.1"},
    )  # fmt: skip
    lines = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith('{"check"')]
    assert lines, f"{client} ended with {ended.returncode} before its first check:\n{ended.stderr[-4000:]}"
    return {line["check"]: line["error"] for line in lines}


@pytest.fixture(scope="module")
def reports(stack: Stack, small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``reports(CLIENT)``, each run once."""

    def report(client: str) -> dict[str, str | None]:
        return report_of(client, stack.url, default_model.NAME, small_model, tmp_path_factory.mktemp(client))

    return cache(report)


def cases(clients: dict[str, tuple[str, ...]]) -> list[tuple[str, str]]:
    return [(client, check) for client, checks in clients.items() for check in checks]


@pytest.mark.parametrize(("client", "check"), cases(IN_CI))
def test_a_client_of_ci(reports: Any, client: str, check: str) -> None:
    assert reports(client)[check] is None, reports(client)[check]


@pytest.mark.clients
@pytest.mark.parametrize(("client", "check"), cases({**OTHERS, **NODE}))
def test_a_client(reports: Any, client: str, check: str) -> None:
    assert reports(client)[check] is None, reports(client)[check]


@pytest.mark.clients
def test_schemathesis_finds_nothing(tmp_path: Path) -> None:
    """Some thousand requests that no client means: the engine only keeps time, everything else is real."""
    demo = ROOT / "examples" / "demo-model"
    with Stack(tmp_path / "serve", "--model", str(demo), "--engine", "simulated", "--max-model-len", "256") as running:
        (model,) = running.models()
        report = report_of("schemathesis_cli", running.url, model, demo, tmp_path)
        assert report == {"finds_nothing": None}, report["finds_nothing"]


def test_every_program_is_run() -> None:
    programs = {path.stem for path in (HERE / "programs").glob("*.py")} - {"checks", "schemathesis_cli"}
    assert programs == {*IN_CI, *OTHERS}
    assert {path.stem for path in (HERE / "node").glob("*.mjs")} - {"checks"} == {*NODE}
