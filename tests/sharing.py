"""Which test files run in one process where tests run in several (pytest-xdist): those that share a costly fixture.

A session's fixture is made once in each process, so files that use the same stack run where it runs already. All other
files go their own way, in the order in which they are found: what waits longest stands in front (tests/chaos).
"""

from __future__ import annotations

import pytest
from xdist.scheduler import LoadFileScheduling

TOGETHER = {
    "the stack of tests/headrace": (
        "tests/headrace/clients/test_http.py", "tests/headrace/clients/test_queue.py",
        "tests/headrace/clients/test_submit.py", "tests/headrace/clients/test_sync.py",
        "tests/headrace/test_examples.py", "tests/headrace/test_out_of_memory.py",
        "tests/headrace/test_server_faults.py", "tests/headrace/test_tools.py",
    ),
    "the stack with the small model": ("tests/clients/test_clients.py", "tests/e2e/test_small_model.py"),
    "the stack of tests/e2e": (
        "tests/e2e/test_scoring.py", "tests/e2e/test_structure.py", "tests/e2e/test_tools.py",
    ),
}  # fmt: skip
GROUPS = {file: name for name, files in TOGETHER.items() for file in files}


class BySharing(LoadFileScheduling):
    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return GROUPS.get(file, file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> BySharing | None:
    if config.getvalue("dist") != "loadfile":
        return None
    config.option.loadscopereorder = False  # files with many tests are not those that take long
    return BySharing(config, log)
