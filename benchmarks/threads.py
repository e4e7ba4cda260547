"""How many threads a step should take, and how they should wait, while the other processes run beside them.

    python -m benchmarks.threads --seconds 60

Every setting is a process of its own with the model loaded; they take turns, a few decode steps each, so that all meet
the same noise. Meanwhile a whole stack with a simulated engine streams to 64 clients on the same cores: a gateway, a
scheduler, a server and a load generator, which is what a real worker has for company.

A thread that spins at a barrier for one that has lost its core costs a scheduler's time slice; one that sleeps at once
costs a wake-up (some 50 us on a virtual machine) at each of the few hundred barriers of a step. GOMP_SPINCOUNT is the
middle way; OMP_WAIT_POLICY=PASSIVE is GOMP_SPINCOUNT=0.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from array import array
from pathlib import Path
from typing import Any

from benchmarks import load, models
from benchmarks.report import Section, circumstances, text
from benchmarks.stack import Stack, end_on_sigterm
from benchmarks.workloads import BODY
from headrace.bench import Target, quantile
from headrace.options import demo_model
from headrace.workload import Vocabulary, Workload

STEPS = 8  # of each setting in turn
ROWS = (1, 8, 64)
CONTEXT = 160  # tokens that a sequence begins with
LONGEST = 2048


def settings() -> dict[str, tuple[int, dict[str, str]]]:
    cores = len(os.sched_getaffinity(0))
    found: dict[str, tuple[int, dict[str, str]]] = {"1 thread": (1, {})}
    for name, env in {
        "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
        "spin 1000": {"GOMP_SPINCOUNT": "1000"},
        "spin 10000": {"GOMP_SPINCOUNT": "10000"},
        "spin 100000": {"GOMP_SPINCOUNT": "100000"},
        "default": {},
    }.items():
        found[f"{cores} threads, {name}"] = (cores, env)
    return found


class Setting:
    def __init__(self, model: Path, threads: int, env: dict[str, str]) -> None:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.threads", "--serve", str(model), str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**clean, **env},
        )  # fmt: skip

    def ask(self, rows: int | None = None) -> list[float]:
        """Milliseconds of a few steps of ``rows``; None waits until the process is ready."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if rows is not None:
            self.process.stdin.write(f"{rows}\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a setting ended with {self.process.wait()}")
        answer: list[float] = json.loads(line)
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def serve(model: str, threads: int) -> None:
    """The process of one setting: numbers of rows in, milliseconds of STEPS decode steps out."""
    from protocol.messages import NewSequence, Plan, pack_ids
    from protocol.sampling import SamplingParams
    from workers.torch_engine.config import EngineConfig
    from workers.torch_engine.engine import TorchEngine

    most, width = max(ROWS), LONGEST // 16
    engine = TorchEngine(
        EngineConfig(model=model, max_model_len=LONGEST, max_num_seqs=most, threads=threads, kv_cache_memory=2 << 30)
    )
    engine.load(lambda stage, fraction: None)
    params = SamplingParams(temperature=0.0, max_tokens=1 << 20)
    step = 0

    def begin() -> None:
        """All sequences anew, their prompts computed."""
        nonlocal step
        engine.reset()
        for seat in range(most):
            step += 1
            blocks = pack_ids(range(seat % 16 * width, (seat % 16 + 1) * width))  # neighbours share: only time counts
            new = NewSequence(seat, "", seat, 1, pack_ids([5] * CONTEXT), CONTEXT, params, 0, 0, blocks, 0)
            seats = array("H", [seat]).tobytes()
            engine.execute(Plan(0, 0, step, seats, pack_ids([CONTEXT]), bytes([1]), [new])).wait()

    begin()
    print("[]", flush=True)
    done = 0
    for line in sys.stdin:
        if done + STEPS > LONGEST - CONTEXT - STEPS:
            begin()
            done = 0
        seats = array("H", range(int(line))).tobytes()
        times = []
        for _ in range(STEPS):
            step += 1
            done += 1
            began = time.perf_counter()
            engine.execute(Plan(0, 0, step, seats)).wait()
            times.append(1e3 * (time.perf_counter() - began))
        print(json.dumps(times), flush=True)


def measure(seconds: float, shape: str) -> dict[str, dict[int, list[float]]]:
    model = models.checkpoint(shape)
    engine = {"step_us": 20000, "max_model_len": 4096, "num_blocks": 64 * 257}
    company = [
        "--model", str(demo_model()), "--served-model-name", "company", "--engine", "simulated",
        "--engine-options", json.dumps(engine), "--max-model-len", "4096", "--threads", "1", "--drain-timeout", "0s",
    ]  # fmt: skip
    found: dict[str, dict[int, list[float]]] = {}
    with Stack(*company) as stack:
        running = {name: Setting(model, threads, env) for name, (threads, env) in settings().items()}
        try:
            for setting in running.values():
                setting.ask()
            stop = threading.Event()
            streaming = threading.Thread(target=keep_streaming, args=(stack.url, stop))
            streaming.start()
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                for rows in ROWS:
                    for name, setting in running.items():
                        found.setdefault(name, {}).setdefault(rows, []).extend(setting.ask(rows))
            stop.set()
        finally:
            for setting in running.values():
                setting.close()
    streaming.join()
    return found


def keep_streaming(url: str, stop: threading.Event) -> None:
    target, vocabulary = Target(url, "company", body=BODY), Vocabulary(size=200)
    while not stop.is_set():
        load.run(target, Workload(64, (32, 64), (400, 400)), vocabulary)


def section(rows: int, found: dict[str, dict[int, list[float]]]) -> Section:
    table = Section(f"Milliseconds of a decode step, batch {rows}")
    for name, times in found.items():
        row: dict[str, Any] = {"setting": name, "least": min(times[rows])}
        row |= {f"p{percent}": quantile(times[rows], percent) for percent in (25, 50, 90, 99)}
        table.rows.append({**row, "mean": sum(times[rows]) / len(times[rows]), "steps": len(times[rows])})
    return table


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], int(sys.argv[3]))
        return
    end_on_sigterm()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--shape", choices=models.SHAPES, default="135m")
    args = parser.parse_args()
    where = circumstances()
    found = measure(args.seconds, args.shape)
    print(text(where, [section(rows, found) for rows in ROWS]))


if __name__ == "__main__":
    main()
