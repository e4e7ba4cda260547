"""The public API in Python: its names, that asking for one loads no more than it needs, and the names of before."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import headrace
from headrace import client

ROOT = Path(__file__).parents[2]


def test_the_names_are_these() -> None:
    assert headrace.__all__ == ["LLM", "AsyncClient", "Client", "HttpClient", "SamplingParams"]
    for name in headrace.__all__:
        assert getattr(headrace, name).__name__ == name
        assert name in dir(headrace)
    with pytest.raises(AttributeError, match="Engine"):
        headrace.Engine  # noqa: B018


def test_sampling_params_are_those_of_the_wire() -> None:
    from protocol.sampling import SamplingParams

    assert headrace.SamplingParams is SamplingParams


@pytest.mark.parametrize(
    ("program", "absent"),
    [
        ("import headrace", ["aiohttp", "asyncio", "msgspec", "redis", "rich", "torch", "transformers"]),
        ("from headrace import SamplingParams", ["aiohttp", "redis", "torch", "transformers"]),
        ("from headrace import LLM, AsyncClient, Client, HttpClient", ["torch", "transformers"]),
    ],
)
def test_what_a_name_does_not_load(program: str, absent: list[str]) -> None:
    loaded = f"print(*sorted((set(sys.modules) - before) & set({absent!r})))"
    check = f"import sys; before = set(sys.modules); {program}; {loaded}"
    ran = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout.strip() == ""


def test_names_of_release_0_1_still_work_and_say_the_new_ones() -> None:
    with pytest.warns(DeprecationWarning, match=r"headrace\.Client"):
        assert client.SyncClient is headrace.Client
    with pytest.warns(DeprecationWarning, match=r"headrace\.AsyncClient"):
        assert client.Client is headrace.AsyncClient
    with pytest.raises(AttributeError, match="Nothing"):
        client.Nothing  # noqa: B018


def test_every_package_says_that_it_is_typed() -> None:
    import gateway
    import protocol
    import scheduler
    import workers

    for package in (gateway, headrace, protocol, scheduler, workers):
        assert (Path(str(package.__file__)).parent / "py.typed").is_file()


def test_examples_of_the_documentation_use_names_that_exist() -> None:
    page = (ROOT / "docs" / "python.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(blocks) >= len(headrace.__all__) - 1
    named = set()
    for block in blocks:
        compile(block, "docs/python.md", "exec", flags=0x2000)  # PyCF_ALLOW_TOP_LEVEL_AWAIT
        for names in re.findall(r"^from headrace import (.+)$", block, re.M):
            named |= {name.strip() for name in names.split(",")}
    assert named == set(headrace.__all__)
