"""What CI asks of a run: no skip but those that are listed."""

from __future__ import annotations

import pytest

from tests import skips

pytest_plugins = ["pytester"]

ONE_TEST = """
import pytest

def test_one():
    pytest.skip("no such thing here")
"""
WHOLE_FILE = """
import pytest

pytest.skip("nothing of it here", allow_module_level=True)
"""
EXPECTED = """
import pytest

@pytest.mark.xfail(reason="known")
def test_known():
    assert False

def test_passes():
    pass
"""


def given(pytester: pytest.Pytester, program: str) -> None:
    pytester.makeini("[pytest]\nasyncio_default_fixture_loop_scope = function")
    pytester.makeconftest("from tests.skips import pytest_make_collect_report, pytest_runtest_makereport")
    pytester.makepyfile(test_given=program)


@pytest.mark.parametrize("program", [ONE_TEST, WHOLE_FILE], ids=["one test", "a whole file"])
def test_an_unexpected_skip_is_a_failure(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    monkeypatch.setenv("HEADRACE_FORBID_SKIPS", "1")
    given(pytester, program)
    result = pytester.inline_run("-p", "no:xdist")
    assert result.ret != 0
    monkeypatch.setenv("HEADRACE_FORBID_SKIPS", "0")
    assert pytester.inline_run("-p", "no:xdist").ret in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)


def test_expected_failures_are_no_skips(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_FORBID_SKIPS", "1")
    given(pytester, EXPECTED)
    assert pytester.inline_run("-p", "no:xdist").ret == 0


def test_only_listed_reasons_of_listed_tests_are_expected() -> None:
    cuda = "tests/workers/torch_engine/cuda"
    assert skips.allowed(f"{cuda}/test_gpu.py::test_x[bf16]", "Skipped: torch sees no CUDA device")
    assert not skips.allowed(f"{cuda}/test_gpu.py::test_x", "Skipped: out of memory")
    assert not skips.allowed("tests/workers/native/test_library.py", "Skipped: native kernels: not built")
