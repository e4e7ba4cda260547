"""A ``headrace serve`` that belongs to this program: in a directory of its own, and ended with the program.

It ends in one of three ways: ``stop()``; the program's exit, where the interpreter calls ``stop()``; the program's
death, where the kernel kills ``serve``, and with it its children (Linux; see leash.py). The kernel ties that to the
*thread* that started a process, which may end long before the program. So the process is started by a thread that
does nothing else and waits for the process's end.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import weakref
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from headrace.option_table import options_of
from headrace.options import argv_of
from headrace.serve import leash
from headrace.serve.embedded import server_url
from headrace.serve.machine import choose_ports
from protocol.errors import StartError

DECIDED = {"run_dir", "data_dir", "port", "redis_url"}  # options that cannot be given
POLL_S = 0.1
STOP_S = 90.0


class OwnServe:
    """``values`` are options of ``headrace serve`` by name. Returns when a worker serves; StartError says why not."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.place = tempfile.TemporaryDirectory(prefix="headrace-llm-")
        root = Path(self.place.name)
        self.data_dir = root / "data"
        self.log = root / "serve.log"
        (self.port,) = choose_ports("127.0.0.1", 0, 1, "port")
        decided = {"run_dir": root / "run", "data_dir": self.data_dir, "port": self.port}
        argv = argv_of(options_of("serve"), {**values, **decided})
        self.process = _start([sys.executable, "-m", "headrace", "serve", *argv], self.log)
        # Called once: by `stop`, by the garbage collector, or by the interpreter at its exit.
        self._finalizer = weakref.finalize(self, _stop, self.process, self.place, os.getpid())
        try:
            self._wait_ready()
        except BaseException:
            self.stop()
            raise

    @property
    def redis_url(self) -> str:
        return server_url(self.data_dir)

    def stop(self) -> None:
        """End it and remove its directory. A second call does nothing."""
        self._finalizer()

    def _wait_ready(self) -> None:
        while True:
            if self.process.poll() is not None:
                raise StartError(self.log.read_text(errors="replace").strip().rpartition("headrace serve: ")[2])
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/ready", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(POLL_S)


def _start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start ``command`` so that it is killed if this program dies. A terminal's Ctrl-C does not reach it."""
    started: Future[subprocess.Popen[bytes]] = Future()

    def own() -> None:
        leashed = [sys.executable, "-I", "-S", leash.__file__, str(os.getpid()), *command]
        try:
            with log.open("wb") as output:
                process = subprocess.Popen(
                    leashed, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
                )
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result(process)
        process.wait()

    threading.Thread(target=own, name="headrace serve", daemon=True).start()
    return started.result()


def _stop(process: subprocess.Popen[bytes], place: tempfile.TemporaryDirectory[str], owner: int) -> None:
    if os.getpid() != owner:  # a fork of the program: not its process to end
        return
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()  # its children are killed by the kernel then
        process.wait()
    place.cleanup()
