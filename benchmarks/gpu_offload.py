"""A conversation of 8k tokens that returns after others have taken its KV blocks: copied from the host, or computed.

One engine under the scheduler's core in this process, so that what is measured is the engine: time to the first token
of the next turn, alone and beside eight decoding streams, against that of a prompt as long that nobody has seen.
"""

from __future__ import annotations

import random
import time
from array import array
from collections import deque
from typing import Any

from benchmarks.gpu_part import Part, load_engine
from benchmarks.stack import Unavailable
from protocol.messages import Capacity, HintRow, Plan, pack_ids
from protocol.sampling import SamplingParams
from scheduler.core.events import Arrive, Cancel, SendPlan, StepDone, WorkerServing
from scheduler.core.scheduler import Core

TURN = 8192
STREAMS = 8


class Turns:
    """One engine, one core, and who asks."""

    def __init__(self, engine: Any, capacity: Capacity) -> None:
        self.engine, self.core = engine, Core()
        self.core.apply(WorkerServing("w0", 1, capacity), time.perf_counter())
        self._seats: dict[int, str] = {}
        self._made: dict[str, list[int]] = {}
        self._wanted: dict[str, int] = {}
        self._plans: deque[Plan] = deque()
        self._running: deque[tuple[Plan, Any]] = deque()
        self.step_ms: list[float] = []

    def arrive(self, prompt: list[int], tokens: int) -> str:
        rid, now = f"{len(self._made):032x}", time.perf_counter()
        self._made[rid], self._wanted[rid] = [], tokens
        sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        self.core.apply(Arrive(rid, "t", "standard", [array("i", prompt)], sampling, 0, now), now)
        return rid

    def cancel(self, rid: str) -> None:
        self.core.apply(Cancel(rid), time.perf_counter())

    def until(self, rid: str, tokens: int) -> float:
        """Seconds until ``rid`` has so many."""
        began = time.perf_counter()
        while len(self._made[rid]) < tokens:
            self._turn()
        return time.perf_counter() - began

    def _turn(self) -> None:
        plans = self.core.plan(time.perf_counter())
        self._plans += (effect.plan for effect in plans if isinstance(effect, SendPlan))
        while self._plans and len(self._running) < 2:
            plan = self._plans.popleft()
            self._running.append((plan, self.engine.execute(plan)))
        if not self._running:
            raise Unavailable("nothing is planned")
        plan, output = self._running.popleft()
        sampled = output.wait()
        for new in plan.new:
            self._seats[new.seat] = new.rid
        rows = []
        for seat, token in zip(sampled.seats.tolist(), sampled.tokens.tolist(), strict=True):
            made = self._made[rid := self._seats[seat]]
            if len(made) < self._wanted[rid]:
                made.append(token)
                finish = "length" if len(made) == self._wanted[rid] else None
                rows.append(HintRow(seat, pack_ids([token]), 12 * len(made), finish))
        rows += [HintRow(seat, b"", 12, reason) for seat, reason in plan.ends]
        self.step_ms.append(sampled.exec_us / 1e3)
        self.core.apply(StepDone("w0", 1, plan.step, rows, sampled.exec_us, 0), time.perf_counter())


def offload(part: Part, shape: str) -> None:
    """Rows `alone` and `beside`: first token of a turn that returns (`back_ms`) and of one that is new (`fresh_ms`)."""
    turn = 96 if part.tiny else TURN
    sizes = {"max_model_len": 128, "kv_cache_memory": 144 << 10, "kv_offload": 4 << 20}
    if not part.tiny:
        sizes = {"max_model_len": turn + 1024, "kv_cache_memory": 3 << 30, "kv_offload": 8 << 30}
    engine, capacity = load_engine(part, shape, **sizes)
    host = capacity.pools[1]
    part.note(host_blocks=host.units, copy_us=round(host.copy_us, 1))
    turns, draw = Turns(engine, capacity), random.Random(1)

    def text() -> list[int]:
        return draw.choices(range(100, capacity.vocab_size), k=turn)

    with part.row("alone") as row:
        row |= _returns(turns, text, turn, host.copy_us / capacity.pools[0].unit_tokens)
    with part.row("beside") as row:
        streams = [turns.arrive(text()[:8], turn // 2) for _ in range(2 if part.tiny else STREAMS)]
        turns.until(streams[-1], 4)
        row |= _returns(turns, text, turn, host.copy_us / capacity.pools[0].unit_tokens)
    engine.reset()


def _returns(turns: Turns, text: Any, turn: int, copy_us: float) -> dict[str, Any]:
    first = text()
    turns.until(turns.arrive(first, 2), 2)
    fresh = 0.0
    for _ in range(3):  # they take its blocks
        fresh = turns.until(turns.arrive(text(), 1), 1)
    hits = turns.core.stats().counters.host_hits
    turns.step_ms.clear()
    back = turns.until(turns.arrive([*first, *text()[:16]], 1), 1)
    copied = turns.core.stats().counters.host_hits - hits
    found = {"tokens": turn, "copied": copied, "fresh_ms": 1e3 * fresh, "back_ms": 1e3 * back}
    found |= {"copy_ms": copied * copy_us / 1e3, "longest_step_ms": max(turns.step_ms), "share": back / fresh}
    return {name: round(value, 3) for name, value in found.items()}
