"""The check of a server's durability at the start: weaker settings give a warning, or a refusal."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from protocol.bus import GatewayBus
from protocol.durability import HIDDEN
from protocol.errors import StartError, StoreFailed, Unavailable

log = logging.getLogger("headrace")

PATIENCE_S = 5.0  # of a check that a user waits for


async def check_durability(
    url: str, strict: bool, tell: Callable[[str], object], *, patience: float | None = PATIENCE_S
) -> None:
    """Warn of each setting with which the server could lose what it acknowledged; StartError if ``strict``."""
    found = await GatewayBus.durability(url, patience=patience)
    if found and strict:
        raise StartError("--strict-durability: this server could lose what it acknowledged: " + "; ".join(found))
    for weakness in found:
        # where each role has a Redis user of its own, only the scheduler's may read the settings
        known = HIDDEN not in weakness
        tell("warning: this server could lose what it acknowledged: " * known + weakness)


async def with_check(url: str, strict: bool, service: Coroutine[Any, Any, int]) -> int:
    """Run ``service`` on a server that is checked: before it starts if ``strict``, else beside it, since a service
    starts even while its server is unreachable. Waits for the server without limit."""

    def tell(text: str) -> None:
        plain = text.removeprefix("warning: ")
        log.log(logging.INFO if plain == text else logging.WARNING, "%s", plain)

    if strict:
        try:
            await _check_patiently(url, strict, tell)
        except BaseException as error:
            service.close()
            if isinstance(error, StoreFailed):
                raise StartError(f"--strict-durability: {error}") from None
            raise
        return await service

    async def check() -> None:
        try:
            await _check_patiently(url, strict, tell)
        except StoreFailed as error:  # a gateway starts nevertheless, and answers 503
            log.error("%s", error)

    checking = asyncio.create_task(check())
    try:
        return await service
    finally:
        checking.cancel()
        await asyncio.gather(checking, return_exceptions=True)


async def _check_patiently(url: str, strict: bool, tell: Callable[[str], object]) -> None:
    """As check_durability, without limit; a server that cannot be reached at first is told, and when it can be."""
    try:
        await check_durability(url, strict, tell, patience=PATIENCE_S)
    except Unavailable as error:
        log.warning("%s; waiting for it", error)
        await check_durability(url, strict, tell, patience=None)
        log.info("Redis answers now")
