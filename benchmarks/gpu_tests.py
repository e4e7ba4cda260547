"""The tests that a GPU makes worth running, and the kernels under compute-sanitizer."""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu_part import Part
from benchmarks.stack import Unavailable

ROOT = Path(__file__).resolve().parent.parent
FOLDER = "tests/workers/torch_engine/cuda"
KERNELS = [f"{FOLDER}/test_triton_{name}.py" for name in ("attention", "kernels", "sampling", "experts", "products")]


def pytest_command(*args: str) -> list[str]:
    return [sys.executable, "-u", "-m", "pytest", "-v", "-p", "no:cacheprovider", "--timeout", "600", *args]


def run_tests(part: Part) -> None:
    """All tests of the GPU's files: kernels are compiled on it, not interpreted. Tiny: one file's are found."""
    with part.row("pytest") as row:
        _run(pytest_command(*(["--collect-only", KERNELS[1]] if part.tiny else [FOLDER])), {}, row)


def memcheck(part: Part) -> None:
    """The kernels' tests, whose shapes are small, with every access checked."""
    with part.row("memcheck") as row:
        program = sanitizer()
        files = [file for file in KERNELS if (ROOT / file).exists()]
        if part.tiny:
            _run(pytest_command("--collect-only", *files), {}, row)
        if program is None:
            raise Unavailable("there is no compute-sanitizer: carry the wheel nvidia-cuda-sanitizer-api, or set PATH")
        checked = [program, "--tool", "memcheck", "--error-exitcode", "9", "--target-processes", "all"]
        _run([*checked, *pytest_command(*files)], {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, row)


def sanitizer() -> str | None:
    """compute-sanitizer of the toolkit, or of the carried wheel, which pip leaves without its executable bit."""
    if found := shutil.which("compute-sanitizer"):
        return found
    for folder in (*os.environ.get("PYTHONPATH", "").split(os.pathsep), *site.getsitepackages()):
        for path in Path(folder or ".").glob("nvidia/**/compute-sanitizer"):
            if path.is_file():
                path.chmod(path.stat().st_mode | 0o100)
                return str(path)
    return None


def _run(command: list[str], env: dict[str, str], found: dict[str, Any]) -> None:
    """Fill ``found`` while they go, so that a row whose time is over says which have failed and which one it was at."""
    text, told = "", ""
    with subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:  # fmt: skip
        assert process.stdout is not None
        try:
            while piece := os.read(process.stdout.fileno(), 1 << 16):
                told = piece.decode(errors="replace")
                print(told, end="", flush=True)
                text += told
                _note(text, found)
        finally:
            process.kill()  # if it has not ended
    found.pop("at", None)
    if process.returncode:
        found["why"] = f"exit code {process.returncode}: {found['outcome']}"


def _note(text: str, found: dict[str, Any]) -> None:
    """From what pytest -v has said so far; its own reports of errors, and the sanitizer's, are told as they are."""
    found["passed"] = len(re.findall(r"::\S+ PASSED", text))
    failed = re.findall(r"(\S+::\S+) (?:FAILED|ERROR)", text)
    failed += re.findall(r"^=+ ((?:Invalid|ERROR SUMMARY).*)", text, re.M)
    if failed:
        found["failed"] = list(dict.fromkeys(failed))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    found["outcome"] = lines[-1] if lines else "nothing was said"
    if at := re.search(r"(\S+::\S+) $", text):
        found["at"] = at[1]
