"""Offline use: a model for one program, without a server to be looked after.

    with LLM("examples/demo-model") as llm:
        for result in llm.generate(["def add(a, b):", "import os"], max_tokens=32, temperature=0):
            print(result.text)

It is a whole `headrace serve` underneath, in a directory of its own that is gone afterwards: the same scheduling, the
same tokens, one code path. All prompts are in the queue at once, so they are batched as well as they can be.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headrace.clients.queue import Result, SyncClient
from headrace.option_table import options_of
from headrace.options import argv_of
from headrace.serve.embedded import server_url
from headrace.serve.service import choose_ports
from protocol.errors import StartError

OWN = {"run_dir", "data_dir", "port", "redis_url"}  # decided here
POLL_S = 0.1
STOP_S = 90.0


class LLM:
    """``options`` are those of ``headrace serve``, such as ``dtype="float32"`` or ``max_model_len=512``.

    StartError says why a start failed.
    """

    def __init__(self, model: str | Path | None = None, **options: Any) -> None:
        known = {option.dest for option in options_of("serve")} - OWN
        if unknown := options.keys() - known:
            raise TypeError(f"there is no option {', '.join(sorted(unknown))}")
        self._place = tempfile.TemporaryDirectory(prefix="headrace-llm-")
        place = Path(self._place.name)
        (self._port,) = choose_ports("127.0.0.1", 0, 1, "port")
        own = {"run_dir": place / "run", "data_dir": place / "data", "port": self._port}
        self._argv = argv_of(options_of("serve"), {"model": model, **options, **own})
        self._data_dir = place / "data"
        self._log = place / "serve.log"

    def __enter__(self) -> LLM:
        with self._log.open("wb") as log:
            command = [sys.executable, "-m", "headrace", "serve", *self._argv]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            self._wait_ready()
            self._client = SyncClient(server_url(self._data_dir))
            self._client.__enter__()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._client.__exit__()
        self._stop()

    def generate(self, prompts: Sequence[str | list[int]], **sampling: Any) -> list[Result]:
        """Continue each prompt; results in the order of the prompts. ``sampling``: fields of SamplingParams."""
        return self._results([self._client.submit(prompt, **sampling) for prompt in prompts])

    def chat(self, conversations: Sequence[list[dict[str, Any]]], **sampling: Any) -> list[Result]:
        """The next message of each conversation (a list of messages as OpenAI's)."""
        return self._results([self._client.submit(messages=messages, **sampling) for messages in conversations])

    def _results(self, requests: list[str]) -> list[Result]:
        return [self._client.result(request) for request in requests]

    def _wait_ready(self) -> None:
        while True:
            if self._process.poll() is not None:
                raise StartError(self._log.read_text(errors="replace").strip().rpartition("headrace serve: ")[2])
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/ready", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(POLL_S)

    def _stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()  # its children die with it
            self._process.wait()
        self._place.cleanup()
