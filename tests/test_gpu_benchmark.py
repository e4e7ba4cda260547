"""benchmarks/gpu.py without a GPU: all its parts run with tiny shapes, and its verdicts say what they mean."""

from __future__ import annotations

import ast
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from benchmarks import gpu, gpu_rows, gpu_wheels
from benchmarks.gpu_parity import tells_a_wait

NOT_HERE = {"fp8", "memcheck"}  # what the engine does not serve, and a program that CI does not have


@pytest.mark.timeout(600)
def test_all_parts_run_with_tiny_shapes(tmp_path: Path) -> None:
    parts = [
        *gpu.COMMANDS["must"],
        *gpu.COMMANDS["peers"],
        "tests",
        "machine",
        "open-8b",
        "long-8b",
        "starts-8b",
        "offload-8b",
    ]
    results = gpu.run("must", parts, tmp_path, minutes=10, tiny=True)
    whys = {
        (part, key): found["why"]
        for part, rows in results.items()
        for key, found in (("", rows), *rows.items())
        if isinstance(found, dict) and "why" in found and "too few to compare" not in found["why"]  # a step or two
    }
    assert {part for part, _ in whys} <= NOT_HERE, whys
    states = [gpu_rows.verdict(row, results)[0] for row in gpu_rows.ROWS]
    reached = [state != "not reached" for state in states]
    assert reached == [row.parts[0][0] != "fp8" for row in gpu_rows.ROWS], (tmp_path / "gpu.txt").read_text()
    assert gpu.compare(results), "ours over transformers'"


def test_what_must_hold_fits_into_its_minutes() -> None:
    assert sum(gpu.COMMANDS["must"].values()) + 20 <= 60 * gpu.MINUTES["must"]


def test_a_row_is_held_missed_or_not_reached() -> None:
    row = gpu_rows.ROWS[0]
    found = {"tokens_per_s": 8100.0, "ttft_p99_ms": 2700.0, "itl_p99_ms": 35.0}
    assert gpu_rows.verdict(row, {"stack-8b": {"burst": found}})[0] == "held"
    assert gpu_rows.verdict(row, {"stack-8b": {"burst": {**found, "itl_p99_ms": 41.0}}})[0] == "missed"
    del found["itl_p99_ms"]
    state, text = gpu_rows.verdict(row, {"stack-8b": {"burst": {**found, "why": "stopped after 22 s"}}})
    assert (state, "stopped after 22 s" in text) == ("not reached", True)
    assert gpu_rows.verdict(row, {"stack-8b": {"burst": {"tokens_per_s": 10.0}}})[0] == "missed"
    assert gpu_rows.verdict(row, {})[0] == "not reached"


def test_the_carried_wheels_are_all_that_the_code_imports() -> None:
    """Besides torch and transformers, which are there with all that they ask for."""
    carried = set(gpu_wheels.needed())
    there = gpu_wheels.closure([Requirement(name) for name in gpu_wheels.THERE])
    assert "valkey" in carried, "the embedded server's package imports it"
    assert not carried & {"torch", "transformers", "numpy"}
    of_module = metadata.packages_distributions()
    project = tomllib.loads((gpu_wheels.ROOT / "pyproject.toml").read_text())["project"]
    asked = [text for name, texts in project["optional-dependencies"].items() if name != "dev" for text in texts]
    extras = gpu_wheels.closure([Requirement(text) for text in asked]) | {"headrace"}  # imported only where asked for
    for folder in ("protocol", "gateway", "scheduler", "workers", "headrace"):
        for path in (gpu_wheels.ROOT / folder).rglob("*.py"):
            for module in _imports(path):
                if module in sys.stdlib_module_names or module not in of_module:
                    continue
                names = {name.lower().replace("_", "-") for name in of_module[module]}
                assert names & (carried | there | extras), f"{path} imports {module}"


def _imports(path: Path) -> set[str]:
    found, text = set(), path.read_text()
    try:
        tree = ast.parse(text)
    except SystemError:  # of Python before 3.11.8, where another thread parses at the same time
        tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def test_torchs_own_warning_is_no_wait() -> None:
    assert tells_a_wait("called a synchronizing CUDA operation")
    assert not tells_a_wait(
        "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations"
    )
