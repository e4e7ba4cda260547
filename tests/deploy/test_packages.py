"""The sdist and the wheel: built, installed into a clean environment, served.

The wheel that is served was made from the sdist, as users do who find no wheel for their machine; the one made from
the tree must hold the same files.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.deploy.ready import completion_of
from tests.stack import START_S, free_port

ROOT = Path(__file__).parents[2]
TREE = ("protocol", "gateway", "scheduler", "workers", "headrace")
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "constraints.txt")
SDIST = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"


def run(*command: object, cwd: Path, **environment: str) -> str:
    # an environment of its own: not the checkout that the tests import
    given = {**os.environ, "PYTHONPATH": "", "HEADRACE_REQUIRE_KERNELS": "1", "CXXFLAGS": "-O1", **environment}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=given, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def wheel_of(source: Path, place: Path, **environment: str) -> Path:
    place.mkdir()
    options = ("--no-deps", "--no-build-isolation", "--no-index", "-q")
    run(sys.executable, "-m", "pip", "wheel", *options, "-w", place, source, cwd=place, **environment)
    (wheel,) = place.glob("headrace-*.whl")
    return wheel


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """ "sdist", "wheel" made from it, and "tree", the wheel made from the tree, without a compiler."""
    place = tmp_path_factory.mktemp("packages")
    tree = place / "tree"
    for name in TREE:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", ".built"))
    for name in FILES:
        shutil.copy(ROOT / name, tree)
    run(sys.executable, "-c", SDIST, place, cwd=tree)
    (sdist,) = place.glob("headrace-*.tar.gz")
    return {
        "sdist": sdist,
        "wheel": wheel_of(sdist, place / "from-sdist"),
        "tree": wheel_of(tree, place / "from-tree", CC="false", CXX="false", HEADRACE_REQUIRE_KERNELS="0"),
    }


@pytest.mark.timeout(1200)
def test_the_sdist_holds_all_that_the_tree_gives_to_a_wheel(packages: dict[str, Path]) -> None:
    wheel, tree = (set(zipfile.ZipFile(packages[kind]).namelist()) for kind in ("wheel", "tree"))
    (kernels,) = wheel - tree
    assert kernels.startswith("workers/native/_kernels")
    assert tree - wheel == set()
    assert {"headrace/cli.py", "protocol/lua/commit.lua", "workers/native/library.py"} <= tree


@pytest.mark.timeout(1200)
def test_the_wheel_serves_from_a_clean_environment(packages: dict[str, Path], tmp_path: Path) -> None:
    """Its dependencies are those that the tests run with; itself it comes from the wheel alone."""
    clean = tmp_path / "venv"
    venv.create(clean)
    (site,) = clean.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python, port = clean / "bin" / "python", free_port()
    options = ("--no-deps", "--no-index", "--ignore-installed", "-q")
    run(python, "-m", "pip", "install", *options, packages["wheel"], cwd=tmp_path)
    found = run(
        python, "-c",
        "import workers.native.library as native; print(native.__file__); print(native.load_kernels().instruction_set)",
        cwd=tmp_path,
    ).split()  # fmt: skip
    assert found[0].startswith(str(site)), found
    log = tmp_path / "serve.log"
    command = [
        clean / "bin" / "headrace", "serve", "--port", port, "--model", ROOT / "examples" / "demo-model",
        "--run-dir", tmp_path / "run", "--data-dir", tmp_path / "data",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": "", "HEADRACE_REQUIRE_KERNELS": "1"}
    with log.open("wb") as out:
        service = subprocess.Popen(
            list(map(str, command)), cwd=tmp_path, env=environment, stdout=out, stderr=subprocess.STDOUT
        )
    try:
        answer = completion_of(port, lambda: service.poll() is None, log.read_text, START_S)
    finally:
        service.terminate()
        service.wait(timeout=120)
    assert answer["usage"]["completion_tokens"] >= 1
    worker = next((tmp_path / "run" / "logs").glob("worker*.log")).read_text()
    assert "native CPU kernels (" in worker
