"""A service that was started somehow: wait until it serves, and ask it something."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Callable
from typing import Any


def completion_of(port: int, running: Callable[[], bool], output: Callable[[], str], limit_s: float) -> Any:
    """What a completion of the demo model comes to, once the service on ``port`` is ready."""
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + limit_s
    while True:
        assert running(), output()[-4000:]
        assert time.monotonic() < deadline, output()[-4000:]
        try:
            with urllib.request.urlopen(f"{url}/ready", timeout=5):
                break
        except OSError:
            time.sleep(0.2)
    body = json.dumps({"model": "demo-model", "prompt": "def add(a, b):", "max_tokens": 4}).encode()
    call = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(call, timeout=120) as reply:
        return json.load(reply)
