"""The tests that a GPU makes worth running, and the kernels under compute-sanitizer."""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu_part import Part
from benchmarks.stack import Unavailable

ROOT = Path(__file__).resolve().parent.parent
FOLDER = "tests/workers/torch_engine/cuda"
KERNELS = [f"{FOLDER}/test_triton_{name}.py" for name in ("attention", "kernels", "sampling", "experts", "products")]


def pytest_command(*args: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "600", *args]


def run_tests(part: Part) -> None:
    """All tests of the GPU's files: kernels are compiled on it, not interpreted. Tiny: one file's are found."""
    with part.row("pytest") as row:
        row |= _run(pytest_command(*(["--collect-only", KERNELS[1]] if part.tiny else [FOLDER])), {})


def memcheck(part: Part) -> None:
    """The kernels' tests, whose shapes are small, with every access checked."""
    with part.row("memcheck") as row:
        program = sanitizer()
        files = [file for file in KERNELS if (ROOT / file).exists()]
        if part.tiny:
            row |= _run(pytest_command("--collect-only", *files), {})
        if program is None:
            raise Unavailable("there is no compute-sanitizer: carry the wheel nvidia-cuda-sanitizer-api, or set PATH")
        checked = [program, "--tool", "memcheck", "--error-exitcode", "9", "--target-processes", "all"]
        row |= _run([*checked, *pytest_command(*files)], {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


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


def _run(command: list[str], env: dict[str, str]) -> dict[str, str]:
    """The last lines, failures first."""
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        check=False,
    )  # fmt: skip
    print(done.stdout[-20000:], flush=True)
    lines = [line.strip() for line in done.stdout.strip().splitlines() if line.strip()]
    failed = [line for line in lines if re.match(r"FAILED|ERROR|=+ (Invalid|ERROR SUMMARY)", line)]
    found = {"outcome": lines[-1] if lines else "nothing was said"}
    if done.returncode:
        found["why"] = f"exit code {done.returncode}: " + " | ".join([*failed[:8], *lines[-1:]])[:600]
    return found
