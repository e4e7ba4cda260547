"""guidellm: a run of some requests, which it streams with usage in every chunk."""

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
            str(Path(sys.executable).parent / "guidellm"), "run",
            "--backend", f"kind=openai_http,target={BASE.removesuffix('/v1')},model={MODEL}",
            "--profile", "kind=concurrent,streams=2", "--constraint", f"kind=max_requests,count={REQUESTS}",
            "--tokenizer", f"kind=huggingface_auto,model={sys.argv[3]}",
            "--data", "kind=synthetic_text,prompt_tokens=24,output_tokens=8",
            "--output", "kind=json,path=report.json", "--disable-console",
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:] + ended.stdout[-1000:]
    (benchmark,) = json.loads(Path("report.json").read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (REQUESTS, 0), totals


run(bench)
