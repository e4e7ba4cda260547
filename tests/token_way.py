"""The way of a token from the sampler to the reader's socket: the files of ours that it passes, found by running.

    python -m tests.token_way

A real `headrace serve` on a CPU streams one answer while a profiler in its worker and gateway notes every function of
ours that is entered while one of the STAGES below is on the stack, that is: everything that happens to tokens between
the draw and the write. The Lua sources of the commit script belong to the way.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from protocol.scripts import INCLUDES
from tests.stack import Stack
from tests.structure import PACKAGES, ROOT

MOST_FILES = 14
# entered on the way, and no token goes there: metrics count, spoiled.py follows the plan's block tables
BESIDE = {"gateway/metrics.py", "workers/spoiled.py"}
# (file, function) in which a token's step on its way begins, process by process
STAGES = [
    ("workers/torch_engine/sampler.py", "sample"),
    ("workers/torch_engine/sampler.py", "wait"),
    ("workers/engine_thread.py", "_finish"),
    ("workers/session.py", "executed"),
    ("workers/session.py", "_commit_batch"),
    ("protocol/connection.py", "__aiter__"),
    ("gateway/streams.py", "_dispatch"),
]
# Put in front of every process of the stack: it profiles while the file `on` exists, and writes what it saw at its end.
SITE = """
import atexit, os, sys, threading, time
ROOT, FOLDER, STAGES, PACKAGES = {root!r}, {folder!r}, {stages!r}, {packages!r}
seen = {{}}

def profile(frame, event, arg):
    if event != "call" or not active[0]:
        return
    name = frame.f_code.co_filename
    if not name.startswith(ROOT):
        return
    own = name[len(ROOT) + 1:]
    if own.partition("/")[0] not in PACKAGES:
        return
    up, depth = frame, 0
    while up is not None and depth < 40:
        place = up.f_code.co_filename
        if place.startswith(ROOT) and (place[len(ROOT) + 1:], up.f_code.co_name) in STAGES:
            seen.setdefault(own, set()).add(frame.f_code.co_name)
            return
        up, depth = up.f_back, depth + 1

active = [False]

def watch():
    while True:
        wanted = os.path.exists(FOLDER + "/on")
        if active[0] and not wanted and seen:
            with open(FOLDER + f"/{{os.getpid()}}.json.part", "w") as out:
                import json
                json.dump({{k: sorted(v) for k, v in seen.items()}}, out)
            os.replace(FOLDER + f"/{{os.getpid()}}.json.part", FOLDER + f"/{{os.getpid()}}.json")
        active[0] = wanted
        time.sleep(0.05)

role = sys.orig_argv[3:4]
if role and role[0] in ("worker", "gateway"):
    threading.Thread(target=watch, daemon=True).start()
    threading.setprofile(profile)
    sys.setprofile(profile)
"""


def trace(folder: Path, model: str) -> dict[str, set[str]]:
    """File -> functions, for all files of ours that a token passes."""
    site, found = folder / "site", folder / "found"
    site.mkdir()
    found.mkdir()
    stages = {(file, function) for file, function in STAGES}
    (site / "sitecustomize.py").write_text(
        SITE.format(root=str(ROOT), folder=str(found), stages=stages, packages=PACKAGES)
    )
    path = os.pathsep.join([str(site), str(ROOT), os.environ.get("PYTHONPATH", "")])
    with Stack(folder / "stack", "--model", model, env={"PYTHONPATH": path}) as stack:
        _stream(stack.url, found)
        for _ in range(100):
            if len(list(found.glob("*.json"))) == 2:
                break
            time.sleep(0.1)
    way: dict[str, set[str]] = {}
    for part in found.glob("*.json"):
        for file, functions in json.loads(part.read_text()).items():
            if file not in BESIDE:
                way.setdefault(file, set()).update(functions)
    assert any(file.startswith("gateway/") for file in way), way
    for part in ("commit", *INCLUDES["commit"], "_prelude"):
        way[f"protocol/lua/{part}.lua"] = set()
    return way


def _stream(url: str, found: Path) -> None:
    """One answer of 60 tokens; the profiler looks while it is in full flow."""
    models = json.loads(urllib.request.urlopen(url + "/v1/models", timeout=30).read())
    body = {
        "model": models["data"][0]["id"], "prompt": "def add(a, b):", "max_tokens": 60, "stream": True,
        "ignore_eos": True, "temperature": 0,
    }  # fmt: skip
    request = urllib.request.Request(
        url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        for number, _ in enumerate(answer):
            if number == 30:
                (found / "on").touch()
            if number == 120:
                (found / "on").unlink()
    (found / "on").unlink(missing_ok=True)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="headrace-way-") as folder:
        way = trace(Path(folder), sys.argv[1] if len(sys.argv) > 1 else str(ROOT / "examples" / "demo-model"))
    for file, functions in sorted(way.items()):
        print(f"{file:44s} {', '.join(sorted(functions))}")
    print(f"{len(way)} files (at most {MOST_FILES})")


if __name__ == "__main__":
    main()
