"""``python -m workers.gguf FILE.gguf DIRECTORY``: convert a checkpoint, once, in a process of its own.

Its caller need not load torch for it. Progress goes to stderr, a line each; exit code 78 and one sentence if the file
cannot be used.
"""

from __future__ import annotations

import sys
from pathlib import Path

from protocol.errors import EX_CONFIG, StartError
from workers.gguf.once import convert_once


def main(source: str, directory: str) -> int:
    try:
        convert_once(Path(source), Path(directory), _report)
    except StartError as error:
        print(error, file=sys.stderr, flush=True)
        return EX_CONFIG
    return 0


def _report(stage: str, fraction: float) -> None:
    print(f"progress {stage} {fraction:.3f}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:3]))
