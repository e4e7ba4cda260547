"""Kernels that do not build or load are seen where they are required, and do without where they are not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from protocol.errors import StartError
from workers.native import library
from workers.native.library import KernelsUnavailable, load_kernels

ROOT = Path(__file__).parents[1]


def build(place: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The kernels of a copy of the sources in which one line is wrong."""
    shutil.copytree(ROOT / "workers" / "native", place / "workers" / "native", ignore=shutil.ignore_patterns("*.so"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place)
    with (place / "workers" / "native" / "vectors.inc").open("a") as source:
        source.write("int broken = ;\n")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    given = {**os.environ, "CXXFLAGS": "-fsyntax-only", **environment}
    return subprocess.run(command, cwd=place, env=given, capture_output=True, text=True, timeout=240)


def test_required_kernels_that_do_not_build_name_the_first_error(tmp_path: Path) -> None:
    done = build(tmp_path, HEADRACE_REQUIRE_KERNELS="1")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "the native kernels do not build: workers/native/vectors.inc:" in last
    assert "error: expected" in last


def test_without_a_compiler_the_install_goes_on_with_a_warning(tmp_path: Path) -> None:
    done = build(tmp_path, HEADRACE_REQUIRE_KERNELS="0", CXX="no-such-compiler")
    assert done.returncode == 0
    assert "the native kernels need a C++ compiler: no-such-compiler" in done.stderr + done.stdout


def test_a_required_compiler_that_is_missing_is_named(tmp_path: Path) -> None:
    done = build(tmp_path, HEADRACE_REQUIRE_KERNELS="1", CXX="no-such-compiler")
    assert done.returncode != 0
    assert "the native kernels need a C++ compiler: no-such-compiler" in done.stderr


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the library is looked for instead."""
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    load_kernels.cache_clear()
    return tmp_path


@pytest.mark.parametrize("what", ["missing", "not a library"])
def test_kernels_that_cannot_be_loaded(elsewhere: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    if what == "not a library":
        (elsewhere / "_kernels.abi3.so").write_bytes(b"text")
    monkeypatch.setenv("HEADRACE_REQUIRE_KERNELS", "0")
    with pytest.raises(KernelsUnavailable, match="not built" if what == "missing" else "cannot be loaded"):
        load_kernels()
    monkeypatch.setenv("HEADRACE_REQUIRE_KERNELS", "1")
    with pytest.raises(StartError, match="HEADRACE_REQUIRE_KERNELS is set, and there are no native CPU kernels"):
        load_kernels()
