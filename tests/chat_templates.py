"""About seventy real chat templates, taken at test time from a pinned source distribution: llama-cpp-python's.

Its archive carries llama.cpp's own collection (models/templates; MIT, copied there from the models' pages). pip checks
the archive's hash; the templates are kept in the user's cache directory, so that only the first run downloads.
"""

from __future__ import annotations

import fcntl
import functools
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE, VERSION = "llama-cpp-python", "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
INSIDE = "/vendor/llama.cpp/models/templates/"


@functools.cache
def template_dir() -> Path:
    """The directory of ``*.jinja`` files. Fails, never skips, where neither the cache nor pip has them."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headrace-tests"
    kept = cache / f"chat-templates-{VERSION}-{SHA256[:12]}"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "chat-templates.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes that run side by side download once
        if not kept.is_dir():
            with tempfile.TemporaryDirectory(dir=cache) as fresh:
                _download(Path(fresh))
                (Path(fresh) / "templates").rename(kept)
    return kept


def names() -> list[str]:
    """File names without their ending, sorted."""
    return sorted(path.stem for path in template_dir().glob("*.jinja"))


def read(name: str) -> str:
    """The template of that name."""
    return (template_dir() / f"{name}.jinja").read_text()


def _download(into: Path) -> None:
    requirement = into / "requirement.txt"
    requirement.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    done = subprocess.run(
        [*command, "--require-hashes", "--dest", str(into), "-r", str(requirement)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"pip cannot download {PACKAGE} {VERSION}:\n{done.stderr[-2000:]}"
    (into / "templates").mkdir()
    with tarfile.open(next(into.glob("*.tar.gz"))) as archive:
        for member in archive:
            if INSIDE in member.name and member.name.endswith(".jinja") and (file := archive.extractfile(member)):
                (into / "templates" / Path(member.name).name).write_bytes(file.read())
