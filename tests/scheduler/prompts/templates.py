"""Seventy chat templates of real models, from the source distribution of llama-cpp-python, which ships llama.cpp's own.

Fetched once by pip, which checks the hash, and kept in the cache as text; read at test time, never part of this tree.
Where they cannot be had, the tests that ask for them fail.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

REQUIREMENT = (
    "llama-cpp-python==0.3.36 --hash=sha256:832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
)
FOLDER = "vendor/llama.cpp/models/templates/"
DIGEST = "8e8e1063fad8ce51a282c9cadbee0addd715d25ac9e2e528ca778a80684ba34f"


def cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headrace" / f"templates-{DIGEST[:16]}"


def real_templates() -> dict[str, str]:
    """Name -> template. RuntimeError if they are not the ones that the tests were written for."""
    found = _read(cache_dir())
    if _digest(found) != DIGEST:
        found = _fetch()
    if _digest(found) != DIGEST:
        raise RuntimeError(f"the templates in {REQUIREMENT.split()[0]} have digest {_digest(found)}, not {DIGEST}")
    return found


def _read(folder: Path) -> dict[str, str]:
    return {path.stem: path.read_text("utf-8") for path in sorted(folder.glob("*.jinja"))}


def _digest(templates: dict[str, str]) -> str:
    return hashlib.sha256("\0".join(f"{k}\0{v}" for k, v in sorted(templates.items())).encode()).hexdigest()


def _fetch() -> dict[str, str]:
    """By several test processes at once, one after the other."""
    folder = cache_dir()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / "templates.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _digest(found := _read(folder)) == DIGEST:
            return found
        shutil.rmtree(folder, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            _download(Path(scratch))
            _unpack(Path(scratch), Path(scratch) / "templates")
            (Path(scratch) / "templates").rename(folder)
        return _read(folder)


def _download(into: Path) -> None:
    wanted = into / "wanted.txt"
    wanted.write_text(REQUIREMENT + "\n")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [*pip, "--no-binary", ":all:", "--require-hashes", "--dest", str(into), "--requirement", str(wanted)],
        capture_output=True, text=True, check=False, timeout=250,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the chat templates cannot be fetched: {done.stderr.strip()[-500:]}")


def _unpack(archive_dir: Path, into: Path) -> None:
    (archive,) = archive_dir.glob("*.tar.gz")
    into.mkdir()
    with tarfile.open(archive) as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            if member.isfile() and path.suffix == ".jinja" and FOLDER in member.name:
                content = tar.extractfile(member)
                assert content is not None
                (into / path.name).write_bytes(content.read())
