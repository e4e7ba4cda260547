"""What large blocks took is returned to the system."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

BODIES = """
import re, sys
from pathlib import Path
from protocol.memory import give_back_large_blocks
if sys.argv[1] == "set":
    give_back_large_blocks()
held = lambda: int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10
before, lasting = held(), []
for size in (1_000_000, 900_000):  # blocks as large as the largest one before are mapped apart once more
    bodies = []
    for _ in range(100):
        bodies.append(bytearray(b"x") * size)
        lasting.append(bytearray(b"x") * 60_000)
    del bodies
print(held() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is about glibc's allocator")
def test_what_large_bodies_took_is_given_back() -> None:
    def kept(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", BODIES, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert kept("set") < 30
    assert kept("as it is") > 60, "else there is nothing to be set"
