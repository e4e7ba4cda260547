"""The team of threads under ThreadSanitizer (make tsan): docs/kernels.md says what it must keep.

Twice: as it is, pieces made again by other threads among them, with suppressions for those writes; and with every piece
made once, where no report at all may come. Results are compared bit by bit with one thread's in both.
"""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NATIVE = HERE.parents[2] / "workers" / "native"
ROUNDS = "6"
RACE = 66  # exit code where something was reported

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """ "twice" as the kernels are, "once" without work done twice."""
    made = {}
    for name, flags in {"twice": [], "once": ["-DTEAM_ONCE"]}.items():
        made[name] = tmp_path_factory.mktemp("tsan") / name
        command = [
            os.environ.get("CXX", "c++"), "-fsanitize=thread", "-O1", "-g", "-std=c++17", "-pthread", "-DVBYTES=16",
            "-Wno-psabi", "-Wno-ignored-attributes", *flags, f"-I{NATIVE}", HERE / "stress.cpp", "-o", made[name],
        ]  # fmt: skip
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
    return made


def stress(program: Path, *arguments: str, suppressions: Path | None = None) -> subprocess.CompletedProcess[str]:
    options = f"exitcode={RACE} print_suppressions=1" + (f" suppressions={suppressions}" if suppressions else "")
    # without address randomisation: older sanitizers do not know the mappings of newer kernels
    command = ["setarch", platform.machine(), "-R", str(program), ROUNDS, *arguments]
    return subprocess.run(
        command, env={**os.environ, "TSAN_OPTIONS": options}, capture_output=True, text=True, timeout=900
    )


def test_work_done_once_is_free_of_races(programs: dict[str, Path]) -> None:
    done = stress(programs["once"])
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[:6000]
    assert "0 wrong" in done.stdout


def test_work_done_twice_races_only_where_that_is_meant(programs: dict[str, Path]) -> None:
    done = stress(programs["twice"], suppressions=HERE / "team.supp")
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[:6000]
    assert "0 wrong" in done.stdout
    assert "Matched" in done.stderr, "no piece was made twice: the run shows nothing"


@pytest.mark.parametrize("name", ["once", "twice"])
def test_a_planted_race_is_reported(programs: dict[str, Path], name: str) -> None:
    done = stress(programs[name], "planted", suppressions=HERE / "team.supp")
    assert done.returncode == RACE
    assert "planted" in done.stderr
