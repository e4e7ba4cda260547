"""How other commands talk to a ``serve`` that runs: one JSON line there, one back, on a socket that its user opens.

A question is an object with ``do``; the answer is an object, with ``error`` where it could not be done.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from headrace.serve.embedded import own_socket
from protocol.errors import HeadraceError, InvalidRequest, StartError

log = logging.getLogger("headrace.serve")

MOST_BYTES = 1 << 20
ASK_S = 900.0  # an added model loads before its answer comes

Answer = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


def socket_of(run_dir: Path) -> Path:
    return own_socket(run_dir, "control.sock")


class Control:
    """Listens for one run directory. Use as an async context manager."""

    def __init__(self, run_dir: Path, answer: Answer) -> None:
        self.path = socket_of(run_dir)
        self._answer = answer
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Control:
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()  # of a serve that was killed; the run directory is ours alone
        before = os.umask(0o177)
        try:
            self._server = await asyncio.start_unix_server(self._serve, self.path, limit=MOST_BYTES)
        finally:
            os.umask(before)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.close()
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            answer = await self._answered(await reader.readline())
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()
        except ConnectionError:
            pass  # who asked has gone; what was begun goes on
        finally:
            writer.close()

    async def _answered(self, line: bytes) -> dict[str, Any]:
        try:
            question = json.loads(line)
            if not isinstance(question, dict):
                raise InvalidRequest("an object is expected")
            return await self._answer(question)
        except HeadraceError as error:
            return {"error": str(error)}
        except ValueError:
            return {"error": "not valid JSON"}
        except Exception as error:  # whoever asked is told; what serves goes on
            log.exception("a question could not be answered")
            return {"error": f"serve could not do it ({type(error).__name__}): its log says more"}


def ask(run_dir: Path, question: dict[str, Any], timeout_s: float = ASK_S) -> dict[str, Any]:
    """The answer of the ``serve`` of this run directory. StartError if none runs, or it could not do it."""
    path = socket_of(run_dir)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        link.settimeout(timeout_s)
        try:
            link.connect(str(path))
        except OSError:
            raise StartError(f"no headrace serve runs in {run_dir}; name its --run-dir, --port or --config") from None
        link.sendall(json.dumps(question).encode() + b"\n")
        with link.makefile("rb") as file:
            line = file.readline()
    if not line:
        raise StartError("headrace serve has ended meanwhile")
    answer: dict[str, Any] = json.loads(line)
    if "error" in answer:
        raise StartError(str(answer["error"]))
    return answer
