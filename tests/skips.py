"""No test is skipped unseen: with HEADRACE_FORBID_SKIPS=1 (CI) a skip that is not in ALLOWED is a failure.

Hooks of tests/conftest.py. They change the report where it is made, so that they hold under pytest-xdist too.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from fnmatch import fnmatch

import pytest

CUDA = "tests/workers/torch_engine/cuda"
# (pattern of the test's id or file, part of the reason): only what needs hardware that CI does not have
ALLOWED = (
    (f"{CUDA}/test_gpu.py*", "torch sees no CUDA device"),
    (f"{CUDA}/test_triton_*.py::*", "the interpreter has no products of bfloat16"),
    # an architecture of transformers that no tiny config can be made for; `make sweep` prints them all
    ("tests/workers/torch_engine/test_sweep.py::*", ""),
)
if os.name == "posix" and os.geteuid() != 0:
    ALLOWED += (
        ("tests/deploy/test_image.py::*", "mounts need root"),
        ("tests/headrace/test_out_of_disk.py::*", "mounting a file system is not permitted"),
        ("tests/chaos/test_namespaces.py::*", "network namespaces need"),
    )


def forbidden() -> bool:
    return os.environ.get("HEADRACE_FORBID_SKIPS", "0") not in ("", "0")


def allowed(name: str, reason: str) -> bool:
    return any(fnmatch(name, pattern) and part in reason for pattern, part in ALLOWED)


def fail_if_skipped(report: pytest.TestReport | pytest.CollectReport) -> None:
    if not report.skipped or hasattr(report, "wasxfail") or not forbidden():
        return
    where = report.longrepr
    reason = where[2] if isinstance(where, tuple) else str(where)
    if not allowed(report.nodeid, reason):
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid}: an unexpected skip (tests/skips.py lists those expected): {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    fail_if_skipped(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    fail_if_skipped(report)
    return report
