"""aiperf: a profile of some streamed chats."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from checks import BASE, MODEL, run

REQUESTS = 6


def bench() -> None:
    ended = subprocess.run(
        [
            str(Path(sys.executable).parent / "aiperf"), "profile", "-m", MODEL, "--url", BASE.removesuffix("/v1"),
            "--endpoint-type", "chat", "--streaming", "--tokenizer", sys.argv[3], "--request-count", str(REQUESTS),
            "--concurrency", "2", "--isl", "24", "--osl", "8", "--artifact-dir", "artifacts", "--ui", "none",
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:] + ended.stdout[-3000:]
    report = json.loads(next(Path("artifacts").rglob("profile_export_aiperf.json")).read_text())
    assert report["request_count"]["avg"] == REQUESTS, report["request_count"]
    assert not report.get("error_summary"), report["error_summary"]


run(bench)
