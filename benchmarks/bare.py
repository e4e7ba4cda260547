"""The bare engine loop: scheduler core and torch engine in one process, no Redis, no HTTP, no text.

What the whole stack is measured against: the same batches, assembled by the same core and computed by the same engine
with the same threads. Runs as a process of its own, so that both sides stay loaded and take turns:

    python -m benchmarks.bare --model PATH      reads lines {"workload": "w2", "round": 0}, answers each with figures
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from array import array
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.stack import Unavailable
from benchmarks.workloads import workload
from headrace.clients.workload import Request, Vocabulary
from headrace.serve.machine import worker_threads
from protocol.messages import Capacity, HintRow, Plan, pack_ids
from protocol.sampling import SamplingParams
from scheduler.core.events import Arrive, SendPlan, StepDone, WorkerServing
from scheduler.core.scheduler import Core
from workers.engines.base import Engine, Sampled

FRAME_BYTES = 12  # the journal that is not written here: its length is all that the core knows of it


class BareLoop:
    """Requests all at once through a core of their own; the engine is emptied after each run."""

    def __init__(self, engine: Engine, capacity: Capacity) -> None:
        self.engine, self.capacity = engine, capacity

    def run(self, requests: list[Request]) -> dict[str, Any]:
        """Seconds until the last token, tokens, and the part of the time that the engine computed."""
        began = time.perf_counter()
        core = Core()
        core.apply(WorkerServing("w0", 1, self.capacity), began)
        for request in requests:
            assert isinstance(request.prompt, list)
            sampling = SamplingParams(temperature=0.0, max_tokens=request.max_tokens, ignore_eos=True)
            prompt = [array("i", request.prompt)]
            core.apply(Arrive(f"{request.index:032x}", "t", "standard", prompt, sampling, 0, began), began)
        left: dict[int, int] = {}  # seat -> tokens still to come
        tokens = [0] * (2 * self.capacity.max_num_seqs)  # seat -> tokens made
        made, steps, exec_us, first_at = 0, 0, 0, 0.0
        plans: deque[Plan] = deque()
        running: deque[tuple[Plan, Any]] = deque()
        ahead = 2 if self.engine.overlaps else 1
        while True:
            plans += (e.plan for e in core.plan(time.perf_counter()) if isinstance(e, SendPlan))
            while plans and len(running) < ahead:
                plan = plans.popleft()
                running.append((plan, self.engine.execute(plan)))
            if not running:
                break
            plan, output = running.popleft()
            sampled: Sampled = output.wait()
            for seat in plan.frees:
                left.pop(seat, None)
            for new in plan.new:
                left[new.seat], tokens[new.seat] = new.sampling.max_tokens or 1, 0
            rows = []
            for seat, token in zip(sampled.seats.tolist(), sampled.tokens.tolist(), strict=True):
                if not left.get(seat):
                    continue  # past its end
                left[seat] -= 1
                tokens[seat] += 1
                finish = None if left[seat] else "length"
                rows.append(HintRow(seat, pack_ids([token]), FRAME_BYTES * tokens[seat], finish))
            now = time.perf_counter()
            first_at = first_at or (now if rows else 0.0)
            made, steps, exec_us = made + len(rows), steps + 1, exec_us + sampled.exec_us
            core.apply(StepDone("w0", 1, plan.step, rows, sampled.exec_us, 0), now)
        took = time.perf_counter() - began
        self.engine.reset()
        asked = sum(request.max_tokens for request in requests)
        if made != asked:
            raise RuntimeError(f"the bare loop made {made} of {asked} tokens")
        return {
            "tokens_per_s": round(made / took, 2),
            "ttft_ms": round(1e3 * (first_at - began), 1),
            "output_tokens": made,
            "steps": steps,
            "engine_share": round(exec_us / 1e6 / took, 3),
        }


class BareProcess:
    """The loop in its own process, loaded once. Unavailable if it does not load."""

    def __init__(self, model: Path, env: dict[str, str], *args: str) -> None:
        self.command = [sys.executable, "-m", "benchmarks.bare", "--model", str(model), *args]
        self.env = env

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=self.env
        )
        self._read()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def run(self, name: str, round_: int = 0, quick: bool = False) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"workload": name, "round": round_, "quick": quick}).encode() + b"\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise Unavailable(f"the bare engine loop ended with {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, default=worker_threads(1))
    parser.add_argument("--max-model-len", type=int, default=2048)
    args = parser.parse_args()
    from workers.torch_engine.config import EngineConfig
    from workers.torch_engine.make import make_engine

    engine = make_engine(EngineConfig(model=args.model, max_model_len=args.max_model_len, threads=args.threads))
    capacity = engine.load(lambda stage, fraction: None)
    vocabulary = Vocabulary(size=capacity.vocab_size)
    loop = BareLoop(engine, capacity)
    loop.run(workload("w1", quick=True).build(vocabulary))  # warm
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        requests = workload(asked["workload"], asked["round"], asked["quick"]).build(vocabulary)
        print(json.dumps(loop.run(requests)), flush=True)


if __name__ == "__main__":
    main()
