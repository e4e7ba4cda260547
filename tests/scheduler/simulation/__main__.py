"""Run the scheduler's core through simulated histories."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from tests.scheduler.simulation import simulate


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the scheduler's core through simulated histories.")
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, help="replay this one alone")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    if options.seed is not None:
        print(dict(simulate(options.seed, options.verbose).count))
        return 0
    total: Counter[str] = Counter()
    failed: list[int] = []
    begun = time.perf_counter()
    for seed in range(options.first, options.first + options.seeds):
        try:
            world = simulate(seed)
            total.update(world.count)
            total["turns"] += world.turns
        except Exception as error:
            failed.append(seed)
            print(f"seed {seed}: {type(error).__name__}: {error}", file=sys.stderr)
    print(f"{options.seeds} histories in {time.perf_counter() - begun:.1f} s, {len(failed)} failed: {failed[:20]}")
    print(dict(total))
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
