"""CPU time of the scheduler's core per steady decode step: take in a hint, make and encode the next plan.

    python -m benchmarks.scheduler_core [--sequences 256] [--steps 2000]

Hints are encoded beforehand, as a worker would have, and decoded inside the measured time. Prints microseconds.
"""

from __future__ import annotations

import argparse
import gc
import time
from array import array

import msgspec

from protocol.messages import Capacity, Hint, HintRow, Plan, PoolCapacity, encode, pack_ids
from protocol.sampling import SamplingParams
from scheduler.core.events import Arrive, SendPlan, StepDone, WorkerServing
from scheduler.core.scheduler import Core, CoreConfig

BLOCK = 16


def filled_core(sequences: int, tokens: int, waiting: int) -> tuple[Core, list[Plan]]:
    """A core whose worker runs ``sequences``, each with ``tokens`` to generate; the first plans are out."""
    blocks = sequences * (tokens + 64) // BLOCK + 64
    capacity = Capacity("m", 1 << 20, sequences, 8192, [PoolCapacity("full", BLOCK, blocks)], 50000)
    core = Core(CoreConfig(max_num_batched_tokens=8192))
    core.apply(WorkerServing("w0", 1, capacity), 0.0)
    for k in range(sequences + waiting):
        prompt = array("i", range(k, k + 20 + k % 16))
        sampling = SamplingParams(max_tokens=tokens)
        core.apply(Arrive(f"{k:032x}", f"t{k % 4}", "standard", [prompt], sampling, k, 0.0), 0.0)
    return core, sent(core, 0.0)


def sent(core: Core, now: float) -> list[Plan]:
    return [effect.plan for effect in core.plan(now) if isinstance(effect, SendPlan)]


def hint_for(plan: Plan, sequences: int) -> bytes:
    seats = memoryview(plan.seats).cast("H").tolist()
    token = pack_ids([7])
    return encode(Hint("w0", 1, plan.step, [HintRow(seat, token, 12 * plan.step) for seat in seats], 20000, 0))


def measure(sequences: int, steps: int, waiting: int) -> tuple[float, float, int]:
    """(median, 99th percentile) in us per step, and the bytes of a median plan."""
    core, out = filled_core(sequences, steps + 64, waiting)
    decoder = msgspec.msgpack.Decoder(Hint)
    now, times, sizes = 0.0, [], []
    for _ in range(steps):
        plan = out.pop(0)
        raw = hint_for(plan, sequences)
        now += 0.02
        begun = time.thread_time()
        hint = decoder.decode(raw)
        core.apply(StepDone(hint.wid, hint.gen, hint.step, hint.rows, hint.exec_us, hint.idle_us), now)
        more = sent(core, now)
        encoded = [encode(plan) for plan in more]
        core.next_wake(now)
        times.append(time.thread_time() - begun)
        out += more
        sizes += map(len, encoded)
        assert out, "nothing planned"
    times.sort()
    sizes.sort()
    return times[len(times) // 2] * 1e6, times[len(times) * 99 // 100] * 1e6, sizes[len(sizes) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    gc.freeze()
    print(f"{'sequences':>9} {'waiting':>8} {'us/step':>8} {'p99':>8} {'plan bytes':>10}")
    for sequences in options.sequences:
        for waiting in (0, 10000):
            median, high, size = measure(sequences, options.steps, waiting)
            print(f"{sequences:9d} {waiting:8d} {median:8.0f} {high:8.0f} {size:10d}")


if __name__ == "__main__":
    main()
