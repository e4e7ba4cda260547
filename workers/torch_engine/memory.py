"""How many bytes the KV pool may take, and how many threads the forward pass: measured where not given."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from workers.engines.base import Place

GPU_SHARE = 0.9  # of the device's memory, for weights, activations and pool together
CPU_SHARE = 0.4  # of the memory that is free once the model is loaded
CPU_MOST = 4 << 30  # beside other processes; more is the user's to grant


def kv_budget(wanted: int | None, device: torch.device, warm_up: Callable[[], None], place: Place) -> int:
    """Bytes for keys and values of the rank at ``place``: its part of what is ``wanted`` for all, else a share of what
    is free beside one largest step.

    ``warm_up`` runs such a step; it is called in any case, since first passes are slow.
    """
    if device.type == "cpu":
        warm_up()
        return (wanted if wanted is not None else min(CPU_MOST, int(free_memory() * CPU_SHARE))) // place.ranks
    torch.cuda.reset_peak_memory_stats(device)
    warm_up()
    torch.cuda.synchronize(device)
    if wanted is not None:
        return wanted // place.ranks
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    peak = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
    return int(free - peak - total * (1 - GPU_SHARE))


def free_memory() -> int:
    """Bytes that this machine, or the container that we are in, can still give."""
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else ():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
            break
    else:
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            available = min(available, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # no such controller, or "max"
            continue
    return max(available, 0)


def default_threads() -> int:
    """HEADRACE_THREADS, else one for each core that this process may use."""
    stated = os.environ.get("HEADRACE_THREADS")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(stated) if stated else cores
