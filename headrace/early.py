"""What a service does with SIGTERM until it has handlers of its own: it ends with 0.

Imported before anything else, since the imports of a service take seconds.
"""

import os
import signal
import sys

SERVICES = ("serve", "gateway", "scheduler", "worker")


def end_cleanly() -> None:
    """For the commands that are services. What ``serve`` fetches meanwhile is cleared away; the others hold nothing."""
    if sys.argv[1:2] and sys.argv[1] in SERVICES:
        signal.signal(signal.SIGTERM, _end)


def _end(number: int, frame: object) -> None:
    if sys.argv[1] == "serve":
        raise SystemExit(0)
    os._exit(0)
