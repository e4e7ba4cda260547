"""The native CPU kernels; everything else is in pyproject.toml.

Without a C++ compiler, or with one that cannot build them, the install goes on and the engine keeps to torch. With
HEADRACE_REQUIRE_KERNELS=1 (`make test`, CI, the image) that ends the install with the compiler's first error.
CXX and CXXFLAGS are heeded.
"""

import os
import runpy
import shlex
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

REQUIRED = os.environ.get("HEADRACE_REQUIRE_KERNELS", "0") not in ("", "0")
DIGEST = runpy.run_path("workers/native/sources.py")["digest"](Path("workers/native"))
FLAGS = "-O3 -std=c++17 -fPIC -pthread -fwrapv -DNDEBUG -Wall -Wno-psabi -Wno-ignored-attributes"


class BuildKernels(build_ext):
    """The library is plain C for ctypes, without Python's headers: it is compiled here, a process for each source, and
    what fails is told in the compiler's words."""

    def build_extension(self, extension: Extension) -> None:
        compiler = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")
        flags = [*shlex.split(FLAGS), f'-DHEADRACE_SOURCES="{DIGEST}"', *shlex.split(os.environ.get("CXXFLAGS", ""))]
        library = Path(self.get_ext_fullpath(extension.name))
        objects = [Path(self.build_temp) / Path(source).with_suffix(".o") for source in extension.sources]
        for path in (library, *objects):
            path.parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            pairs = zip(extension.sources, objects, strict=True)
            commands = [[*compiler, *flags, "-c", source, "-o", str(object_)] for source, object_ in pairs]
            list(pool.map(run_compiler, commands))
        run_compiler([*compiler, *flags, "-shared", *map(str, objects), "-o", str(library)])


def run_compiler(command: list[str]) -> None:
    try:
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
    except OSError as error:
        raise CompileError(f"the native kernels need a C++ compiler: {command[0]}: {error.strerror}") from error
    sys.stderr.write(done.stderr)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"{command[0]} ended with exit code {done.returncode}"]
        first = next((line for line in lines if "error" in line), lines[0])
        raise CompileError(f"the native kernels do not build: {first}")


setup(
    cmdclass={"build_ext": BuildKernels},
    ext_modules=[
        Extension(
            "workers.native._kernels",
            sources=[f"workers/native/kernels_{name}.cpp" for name in ("base", "avx2", "avx512")],
            depends=sorted(str(path) for path in Path("workers/native").glob("*.inc")),
            language="c++",
            optional=not REQUIRED,
        )
    ],
)
