"""What a service manager is told: that we are ready, that we stop, and that we are not stuck (sd_notify(3))."""

from __future__ import annotations

import asyncio
import os
import socket


def notify(state: str) -> None:
    """Send ``state``, as READY=1, to the socket of NOTIFY_SOCKET; nothing without one, or where nobody listens."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):  # Linux's abstract names
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.setblocking(False)
        try:
            told.sendto(state.encode(), address)
        except OSError:
            pass


async def keep_watchdog() -> None:
    """Tell twice in each of its intervals that this event loop runs. Returns where no watchdog asks."""
    interval_us = os.environ.get("WATCHDOG_USEC", "")
    if not interval_us.isdecimal() or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return
    while True:
        notify("WATCHDOG=1")
        await asyncio.sleep(int(interval_us) / 2e6)
