"""Runs many seeds and says what they held: python -m tests.protocol.model --seeds 500."""

from __future__ import annotations

import argparse
import collections
import shutil
import sys
import tempfile
import time
from pathlib import Path

from headrace.serve.embedded import FAST, EmbeddedServer
from tests.protocol.model import MUTATIONS, run_seed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--mutation", choices=sorted(MUTATIONS))
    options = parser.parse_args()
    total: collections.Counter[str] = collections.Counter()
    bad, calls, started = 0, 0, time.monotonic()
    data_dir = Path(tempfile.mkdtemp(prefix="headrace-model-"))
    with EmbeddedServer(data_dir, settings=FAST) as server:
        for seed in range(options.first, options.first + options.seeds):
            outcome = run_seed(server.url, seed, options.mutation)
            calls += outcome.calls
            total.update(outcome.stats)
            if outcome.wrong:
                bad += 1
                print(f"seed {seed}: {outcome.wrong}", flush=True)
    shutil.rmtree(data_dir, ignore_errors=True)
    print(f"{options.seeds} seeds, {calls} calls, {time.monotonic() - started:.0f} s, {bad} seeds violated")
    print(", ".join(f"{name}: {count}" for name, count in sorted(total.items())))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
