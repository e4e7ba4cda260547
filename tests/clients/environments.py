"""Environments of client libraries: one for each, with nothing of this project, made when first asked for and kept
under the hash of what is in it.

HEADRACE_CLIENTS_DIR names the directory (default: `clients` in the cache of `headrace`).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import site
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from headrace.model import cache_dir

HERE = Path(__file__).parent
NODE = HERE / "node"  # package.json and its lock
PATIENCE_S = 1500


class NotInstalled(Exception):
    """Why an environment cannot be had."""


def python_of(client: str, *, shares: bool = False) -> Path:
    """The interpreter of the environment that ``requirements/CLIENT.txt`` describes, and CLIENT.alone.txt: what is
    installed without its dependencies, since the client needs few of them. ``shares``: what it needs and this one has
    (torch, transformers) is this one's, which is not fetched twice."""
    listed = HERE / "requirements" / f"{client}.txt"
    alone = HERE / "requirements" / f"{client}.alone.txt"

    def install(place: Path) -> None:
        _run([sys.executable, "-m", "venv", "--without-pip", str(place)])
        python = str(place / "bin" / "python")
        for packages in place.glob("lib/python*/site-packages") if shares else ():
            (packages / "shared.pth").write_text("".join(f"{path}\n" for path in site.getsitepackages()))
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-compile"]
        _run([*pip, "-r", str(listed)])
        if alone.exists():
            _run([*pip, "--no-deps", "-r", str(alone)])

    version = "{}.{}".format(*sys.version_info)
    content = listed.read_bytes() + (alone.read_bytes() if alone.exists() else b"") + version.encode()
    content += str(site.getsitepackages()).encode() if shares else b""
    return _kept(client, content, install) / "bin" / "python"


def node_programs() -> Path:
    """The directory that holds the Node programs beside what package.json names."""

    def install(place: Path) -> None:
        npm = shutil.which("npm")
        if npm is None:
            raise NotInstalled("there is no npm on the PATH: the Node clients need Node 20 or later")
        for name in ("package.json", "package-lock.json"):
            shutil.copy(NODE / name, place)
        _run([npm, "ci", "--no-audit", "--no-fund"], place)

    place = _kept("node", (NODE / "package-lock.json").read_bytes(), install)
    for program in NODE.glob("*.mjs"):  # they find modules beside themselves
        shutil.copy(program, place)
    return place


def _kept(name: str, content: bytes, install: Callable[[Path], None]) -> Path:
    """The directory of environment ``name``, made by ``install`` unless it is there. Others wait meanwhile."""
    cache = Path(os.environ.get("HEADRACE_CLIENTS_DIR") or cache_dir(None) / "clients")
    place = cache / f"{name}-{hashlib.sha256(content).hexdigest()[:12]}"
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / f".{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = place / ".installed"
        if not done.exists():
            for older in cache.glob(f"{name}-*"):
                shutil.rmtree(older)
            place.mkdir()
            install(place)
            done.touch()
    return place


def _run(command: list[str], place: Path | None = None) -> None:
    ended = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=PATIENCE_S)
    if ended.returncode:
        raise NotInstalled(f"{' '.join(command)} ended with {ended.returncode}:\n{ended.stderr[-2000:]}")
