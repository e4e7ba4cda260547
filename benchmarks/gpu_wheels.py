"""The packages that a bare machine needs besides torch and transformers, as wheels to carry there.

What is needed is read from pyproject.toml and from what the packages installed here ask for themselves, so that nothing
is forgotten when a dependency gains one of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
THERE = ("torch", "transformers", "triton")  # with all that they ask for
TESTS = ("pytest", "pytest-asyncio", "pytest-timeout", "hypothesis")
SANITIZER = "nvidia-cuda-sanitizer-api"  # compute-sanitizer, for memcheck; fetched without a pin
# pip takes a tag as it is written: a wheel for glibc 2.24 is not found under 2.28's
PLATFORMS = (*(f"manylinux_2_{minor}_x86_64" for minor in range(34, 16, -1)), "manylinux2014_x86_64")


def needed() -> list[str]:
    """Names of the distributions to carry, sorted."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        asked = [Requirement(text) for text in tomllib.load(file)["project"]["dependencies"]]
    tests = [Requirement(name) for name in TESTS]
    return sorted(closure([*asked, *tests]) - closure([Requirement(name) for name in THERE]))


def closure(requirements: list[Requirement]) -> set[str]:
    """All that ``requirements`` come to, as far as it is installed here; extras and markers as pip reads them."""
    found: set[str] = set()
    seen: set[tuple[str, frozenset[str]]] = set()
    todo = list(requirements)
    while todo:
        requirement = todo.pop()
        name, extras = _plain(requirement.name), frozenset(requirement.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            own = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # torch's CUDA libraries, where torch is the CPU's
            continue
        found.add(name)
        for text in own:
            further = Requirement(text)
            marked = further.marker is None or any(
                further.marker.evaluate({"extra": extra}) for extra in ("", *requirement.extras)
            )
            if marked:
                todo.append(further)
    return found


def download(target: Path, python: str) -> None:
    """The wheels for Linux and ``python`` ("3.12") into ``target``, in the versions that are installed here."""
    pinned = [f"{name}=={metadata.version(name)}" for name in needed()]
    platforms = [argument for platform in PLATFORMS for argument in ("--platform", platform)]
    command = [
        sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--python-version", python,
        *platforms, "-d", str(target),
    ]  # fmt: skip
    subprocess.run([*command, *pinned, SANITIZER], check=True)


def install(wheels: Path) -> None:
    """The carried packages, for this process's children, beside what is there."""
    site = Path(tempfile.mkdtemp(prefix="headrace-site-"))
    found = sorted(map(str, wheels.glob("*.whl")))
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--upgrade"]
    subprocess.run([*command, "--no-cache-dir", "--target", str(site), *found], check=True)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
