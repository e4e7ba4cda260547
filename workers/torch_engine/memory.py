"""How many bytes the KV pool may take, and how many threads the forward pass: measured where not given."""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from protocol.errors import StartError
from workers.engines.base import Place

log = logging.getLogger(__name__)

SPARE = 256 << 20  # bytes of a GPU that are left to others even where a share would reach them
POLL_S = 0.2
CPU_SHARE = 0.4  # of the memory that is free once the model is loaded
CPU_MOST = 4 << 30  # beside other processes; more is the user's to grant


@dataclass(frozen=True)
class Card:
    """A GPU's memory when this process began to use it, and the share of all of it that this worker may take."""

    total: int
    free: int
    share: float

    @property
    def granted(self) -> int:
        """Bytes for weights, activations and pool together."""
        return int(self.total * self.share)

    def left(self, free: int, peak: int) -> int:
        """Bytes for keys and values, now that ``free`` are left and a step needs ``peak`` for a moment."""
        return max(0, min(self.granted - (self.free - free), free - SPARE) - peak)


def card_of(device: torch.device, share: float) -> Card | None:
    """None: not a GPU."""
    if device.type == "cpu":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return Card(total, free, share)


@contextmanager
def alone_on(device: torch.device, place: Place, waiting: Callable[[], None]) -> Iterator[None]:
    """One start at a time on each GPU, whoever the processes belong to: what is free is measured, and then taken.

    Ranks of one worker wait for each other while they load, so they do not wait for a card: two such workers could hold
    one card each of what both need.
    """
    if device.type == "cpu" or place.ranks > 1:
        yield
        return
    card = getattr(torch.cuda.get_device_properties(device), "uuid", device.index)
    with one_at_a_time(Path(tempfile.gettempdir()) / f"headrace-{card}.lock", waiting):
        yield


@contextmanager
def one_at_a_time(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Wait until no other process is within this for the same ``path``. One that ends is out of it. ``waiting`` is
    called now and then meanwhile."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    try:
        lock = os.open(path, flags, 0o666)
    except OSError as error:  # of another user, in a folder that protects such files
        log.warning("%s cannot be locked (%s): starts on one card do not wait for each other", path, error)
        yield
        return
    try:
        told = False
        while not _locked(lock):
            if not told:
                log.info("another worker is starting on this card: waiting for it")
                told = True
            waiting()
            time.sleep(POLL_S)
        yield
    finally:
        os.close(lock)


def _locked(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def check_room(card: Card, weights: int, token: int, length: int | None, wanted: int | None) -> None:
    """StartError where ``weights`` bytes, and keys and values of ``wanted`` bytes or of one sequence of ``length``
    tokens at ``token`` bytes each, cannot fit ``card``: said before anything is loaded."""
    pool, named = (wanted, "--kv-cache-memory") if wanted is not None else (token * (length or 1), "--max-model-len")
    asked = f"the weights take about {_gib(weights)} and {named} asks for {_gib(pool)} of keys and values"
    if weights + pool > card.granted:
        raise StartError(
            f"--gpu-memory-utilization {card.share:g} of {_gib(card.total)} grants {_gib(card.granted)}, but {asked}: "
            f"raise it, lower {named}, or take a smaller model"
        )
    if weights + pool > card.free:
        raise StartError(
            f"{_gib(card.free)} of the GPU's {_gib(card.total)} are free, but {asked}: other processes hold the rest"
        )


def weight_bytes(model: str, dtype: torch.dtype, stored: torch.dtype) -> int:
    """About what the weights in the folder ``model`` take as ``dtype``; 0 where there is no such folder."""
    files = Path(model).glob("*.safetensors") if Path(model).is_dir() else ()
    return sum(file.stat().st_size for file in files) * dtype.itemsize // stored.itemsize


def token_bytes(config: Any, dtype: torch.dtype) -> int:
    """Keys and values of one token, as far as the config tells; 0 where it does not."""
    heads = getattr(config, "num_attention_heads", 0) or 0
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    return 2 * int(config.num_hidden_layers) * int(kv_heads) * int(size) * dtype.itemsize


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.2f} GiB"


def kv_budget(
    wanted: int | None, device: torch.device, warm_up: Callable[[], None], place: Place, card: Card | None
) -> int:
    """Bytes for keys and values of the rank at ``place``: its part of what is ``wanted`` for all, else what its share
    of the card, or of what is free, leaves beside one largest step.

    ``warm_up`` runs such a step; it is called in any case, since first passes are slow.
    """
    if card is None:
        warm_up()
        return (wanted if wanted is not None else min(CPU_MOST, int(free_memory() * CPU_SHARE))) // place.ranks
    torch.cuda.reset_peak_memory_stats(device)
    warm_up()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    if wanted is None:
        return card.left(free, peak)
    if wanted // place.ranks > free - peak:
        raise StartError(
            f"--kv-cache-memory {_gib(wanted)}: {_gib(max(0, free - peak))} of the GPU's memory are left beside the "
            "weights and one largest step"
        )
    return wanted // place.ranks


def host_blocks(wanted: int | None, per_block: int, ranks: int) -> int:
    """Host blocks of this rank's part of ``wanted`` bytes; 0: none are asked for. StartError."""
    if not wanted:
        return 0
    own = wanted // ranks
    if own > (free := free_memory()):
        raise StartError(f"--kv-offload asks for {_gib(own)} of host memory, and {_gib(free)} are free: lower it")
    if own < per_block:
        raise StartError(f"--kv-offload {own} bytes hold no block: one takes {per_block} bytes of each rank")
    return own // per_block


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
