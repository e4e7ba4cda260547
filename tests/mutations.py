"""Faults put in on purpose, one at a time, on a copy of the tree: each must turn its tests red (make mutations).

    python -m tests.mutations [--only PART]

Two for each native source, one that does not compile and one that changes a result; the Dockerfile's COPY; a name that
the fast paths know. The unchanged copy must be green first. Prints a table; exits 1 if a fault was not seen.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from workers.native.library import instruction_sets

ROOT = Path(__file__).parents[1]
NATIVE = "workers/native"
KERNEL_TESTS = "tests/workers/native/test_library.py"
LAYER_TESTS = "tests/workers/torch_engine/cpu/test_layers.py"
LIMIT_S = 900


@dataclass(frozen=True)
class Mutation:
    """``old`` becomes ``new`` in ``file``; ``tests``: pytest's ids, none where the build itself must fail."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...] = ()
    needs: str = "base"  # an instruction set

    @property
    def native(self) -> bool:
        return self.file.startswith(NATIVE)

    @property
    def kind(self) -> str:
        return "does not compile" if not self.tests else "wrong result" if self.native else "left out"


def kernels(test: str) -> tuple[str, ...]:
    return (f"{KERNEL_TESTS}::test_{test}",)


def native(name: str, old: str, new: str, tests: tuple[str, ...], needs: str = "base") -> Mutation:
    return Mutation(f"{NATIVE}/{name}", old, new, tests, needs)


WRONG_RESULTS = [
    native("vectors.inc", "splat(5.0000001201e-1f)", "splat(5.2e-1f)", kernels("gate_up")),
    native("memory.inc", "if (size < floats)", "if (size == 0)", kernels("attention")),
    native("linear.inc", "c[r * ldc + i] += linear.bias", "c[r * ldc + i] -= linear.bias", kernels("linear")),
    native("elementwise.inc", "a * load(cosine + i) - b *", "a * load(cosine + i) + b *", kernels("rotary")),
    native("attention.inc", "seen - rule.window - at", "seen - rule.window + 1 - at", kernels("attention")),
    native(
        "layer.inc",
        "added(layer.down, AFTER_MLP, hidden, middle, y)",
        "added(layer.down, AFTER_MLP, hidden, x, y)",
        (f"{LAYER_TESTS}::test_layers_of_the_usual_build_become_one_call[llama]",),
    ),
    native(
        "sampling.inc", "if (sum > target) break;", "if (2 * sum > target) break;",
        ("tests/workers/torch_engine/test_sampler.py::test_draws_follow_the_distribution",),
    ),
    native("layout.inc", "FIELD(Rule, scale)", '{"Rule.scale", 4, 4}', ("tests/workers/native/test_structs.py",)),
    native("team.inc", "for (int64_t i = 0; i < count; ++i) f(i);", "for (int64_t i = 1; i < count; ++i) f(i);",
           kernels("the_team_changes_its_size_and_serves_several_callers")),
    native("standard.inc", "#include <vector>\n", "#include <vector>\n#define sqrt cbrt\n", kernels("rms_norm")),
    native("kernels.inc", "(int)act, x, ldx, hidden", "1 - (int)act, x, ldx, hidden", kernels("gate_up")),
    native("kernels_base.cpp", "return HEADRACE_SOURCES;", 'return "";', ("tests/workers/native/test_structs.py",)),
    native("kernels_avx2.cpp", "##_avx2", "##_avx3", kernels("rms_norm"), "avx2"),
    native("kernels_avx512.cpp", "##_avx512", "##_avx513", kernels("rms_norm"), "avx512"),
]  # fmt: skip
NOT_COMPILING = [
    native(name, "", "\nint broken = ;\n", ())
    for name in sorted(path.name for pattern in ("*.inc", "*.cpp") for path in (ROOT / NATIVE).glob(pattern))
]
OTHERS = [
    Mutation("deploy/Dockerfile", "pyproject.toml setup.py MANIFEST.in", "pyproject.toml MANIFEST.in",
             ("tests/deploy/test_image.py::test_the_image_serves_on_its_native_kernels[light]",)),
    Mutation("workers/torch_engine/cpu/layers.py", '        "q_proj",\n', '        "q_projection",\n',
             (f"{LAYER_TESTS}::test_layers_of_the_usual_build_become_one_call[llama]",)),
]  # fmt: skip


class Copy:
    """The tracked files of the tree, elsewhere."""

    def __init__(self, place: Path) -> None:
        self.place = place
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
        for name in filter(None, listed.decode().split("\0")):
            if (ROOT / name).is_file():
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, place / name)

    @contextmanager
    def with_fault(self, mutation: Mutation) -> Iterator[None]:
        path = self.place / mutation.file
        before = path.read_text()
        if mutation.old:
            assert before.count(mutation.old) >= 1, f"{mutation.file} has no {mutation.old!r} any more"
            path.write_text(before.replace(mutation.old, mutation.new, 1))
        else:
            path.write_text(before + mutation.new)
        try:
            yield
        finally:
            path.write_text(before)

    def build(self, flags: str) -> str | None:
        """What the build of the kernels ends with, None if it succeeds."""
        return self._run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], CXXFLAGS=flags)

    def test(self, arguments: tuple[str, ...]) -> str | None:
        """The first failure's line, None if all is green."""
        options = ("-q", "-x", "-p", "no:cacheprovider", "--timeout", str(LIMIT_S))
        return self._run([sys.executable, "-m", "pytest", *options, *arguments])

    def _run(self, command: list[str], **environment: str) -> str | None:
        given = {**os.environ, "PYTHONPATH": str(self.place), "HEADRACE_REQUIRE_KERNELS": "1",
                 "HEADRACE_FORBID_SKIPS": "1", **environment}  # fmt: skip
        done = subprocess.run(command, cwd=self.place, env=given, capture_output=True, text=True, timeout=LIMIT_S)
        if done.returncode == 0:
            return None
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        told = [line for line in lines if line.startswith(("FAILED", "ERROR", "error:", "Fatal", "E   "))]
        return (told or lines or [f"exit code {done.returncode}"])[-1 if not told else 0]


def outcome(copy: Copy, mutation: Mutation) -> str | None:
    """What was red, None if nothing was."""
    with copy.with_fault(mutation):
        if not mutation.tests:
            return copy.build("-fsyntax-only")
        if mutation.native and (failed := copy.build("-O0")):
            return f"not built, where only a result should differ: {failed}"
        return copy.test(mutation.tests)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="files whose name contains this")
    parser.add_argument("--kind", default="", help="those that: does not compile, wrong result, left out")
    given = parser.parse_args()
    every = (*NOT_COMPILING, *OTHERS, *WRONG_RESULTS)
    chosen = [m for m in every if given.only in m.file and given.kind in m.kind]
    unseen = 0
    with tempfile.TemporaryDirectory(prefix="mutations-") as place:
        copy = Copy(Path(place))
        assert (failed := copy.build("-O0")) is None, f"the unchanged copy does not build: {failed}"
        print(f"{'file':38} {'fault':16} {'seconds':>7}  first red", flush=True)
        began = time.monotonic()
        tests = tuple(dict.fromkeys(test for m in chosen if m.needs in instruction_sets() for test in m.tests))
        assert not tests or (failed := copy.test(tests)) is None, f"the unchanged copy is red: {failed}"
        print(
            f"{'(the unchanged copy)':38} {'none':16} {time.monotonic() - began:7.1f}  {len(tests)} tests green",
            flush=True,
        )
        for mutation in chosen:
            began = time.monotonic()
            if mutation.needs not in instruction_sets():
                said = f"skipped: this processor has no {mutation.needs}"
            else:
                seen = outcome(copy, mutation)
                unseen += seen is None
                said = "NOT SEEN" if seen is None else f"red: {seen[:110]}"
            print(f"{mutation.file:38} {mutation.kind:16} {time.monotonic() - began:7.1f}  {said}", flush=True)
    print(f"{unseen} of {len(chosen)} faults not seen")
    return 1 if unseen else 0


if __name__ == "__main__":
    raise SystemExit(main())
