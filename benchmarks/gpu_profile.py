"""Where a step's time goes on the device, kernel by kernel, and on the host, function by function."""

from __future__ import annotations

import cProfile
import pstats
from collections import Counter
from typing import Any

import torch

from benchmarks import gpu_parts
from benchmarks.gpu_part import Part, load_engine

STEPS = 8
KERNELS, FUNCTIONS = 16, 24  # that are told, the largest first


def profile(part: Part, shape: str) -> None:
    """Decode steps of a few sizes, then the host's side of one that is queued over and over."""
    engine, _ = load_engine(part, shape)
    for rows in (1, 32, 256):
        with part.row(f"kernels_{rows}") as row:
            row |= kernels(part, engine, min(rows, 4) if part.tiny else rows)
    with part.row("host") as row:
        row |= host(part, engine, 4 if part.tiny else 256)


def kernels(part: Part, engine: Any, rows: int) -> dict[str, str]:
    """Microseconds and launches a step, by kernel."""
    asked = [torch.profiler.ProfilerActivity.CUDA if part.cuda else torch.profiler.ProfilerActivity.CPU]
    context = 32 if part.tiny else gpu_parts.CONTEXT
    with torch.profiler.profile(activities=asked) as seen:
        steps = gpu_parts.decode(part, engine, rows, context, [gpu_parts.GREEDY], STEPS)["steps"]
    took: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for event in seen.events():
        took[event.name] += event.device_time if part.cuda else event.cpu_time
        count[event.name] += 1
    told = {name[:70]: f"{us / steps:.1f} us in {count[name] / steps:.1f}" for name, us in took.most_common(KERNELS)}
    return {"all": f"{sum(took.values()) / steps:.0f} us in {sum(count.values()) / steps:.0f}", **told}


def host(part: Part, engine: Any, rows: int) -> dict[str, str]:
    """Microseconds a step within each function and what it calls, under a profiler that slows all of them."""
    profiler = cProfile.Profile()
    context = 32 if part.tiny else gpu_parts.CONTEXT
    steps = gpu_parts.decode(part, engine, rows, context, [gpu_parts.GREEDY], STEPS, profiler)["steps"]
    found = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    ordered = sorted(found.items(), key=lambda item: -item[1][3])[:FUNCTIONS]
    return {
        f"{file.rpartition('/')[2]}:{line} {name}": f"{1e6 * whole / steps:.0f} us in {calls / steps:.1f}, itself "
        f"{1e6 * own / steps:.0f}"
        for (file, line, name), (_, calls, own, whole, _) in ordered
    }
