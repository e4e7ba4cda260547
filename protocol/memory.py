"""What the C library keeps of freed memory, and how it is made to return it."""

from __future__ import annotations

import ctypes

M_MMAP_THRESHOLD, LARGE_BLOCK = -3, 128 << 10  # of <malloc.h>; bytes


def give_back() -> None:
    """Return to the system what the C library keeps of freed memory, where it can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def give_back_large_blocks() -> None:
    """Let bodies leave memory when they are freed. glibc maps large blocks apart at first; with each that is freed it
    raises the size from which it does, so bodies of a megabyte move into the heap, where anything small and lasting
    that comes to lie above them keeps all of them. A size that is set stays. (mallopt(3), M_MMAP_THRESHOLD)"""
    try:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)
    except (OSError, AttributeError):  # another C library
        pass
