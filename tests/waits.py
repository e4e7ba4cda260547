"""Waiting for what must come: by asking for it, as long as a loaded machine may need."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

PATIENCE_S = 120.0


async def eventually(condition: Callable[[], Any], what: str = "the condition") -> Any:
    """Wait until ``condition()`` (may be async) is true, and return it."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                value = condition()
                if isinstance(value, Awaitable):
                    value = await value
                if value:
                    return value
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"never happened: {what}") from None
