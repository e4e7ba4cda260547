"""An engine in a process of its own, so that the event loop's Python and the device loop's do not share an interpreter.

The parent holds a ProcessEngine, which keeps the Engine protocol; the child (child.py) holds the real engine. Plans go
over a socket as the bytes that they are on the wire, one packed result comes back per step (link.py). The heartbeat is
a number in memory that both map. Neither outlives the other: the child is killed with the thread that started it, and
the parent finds the socket closed.
"""

from __future__ import annotations

import dataclasses
import logging
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from protocol.errors import EngineFailed, HeadraceError
from protocol.messages import Capacity, Plan, encode
from protocol.preloaded import RAISED
from workers.engines.base import ALONE, Place, Progress, Sampled
from workers.engines.link import SHOWN, Channel, Shown, unpack_result

END_S = 5.0  # patience with a child that is to end

_decode_capacity = msgspec.msgpack.Decoder(Capacity).decode


class ProcessEngine:
    """The engine ``kind`` ("torch" or "simulated") with the fields of its configuration, in a child of this process."""

    overlaps = True  # the next plan is in the child before the last result is out of it
    stages = 1

    def __init__(self, kind: str, config: Any, place: Place = ALONE) -> None:
        self.kind, self.config, self.place = kind, config, place
        self.eos_token_ids: Sequence[int] = ()
        self.path = ""
        self.tokenizer: Any = None
        self._child: subprocess.Popen[bytes] | None = None

    def load(self, progress: Progress) -> Capacity:
        self.start()
        return self.loaded(progress)

    def start(self) -> None:
        """Start the child, which ends with the thread that calls this, and have it load."""
        self._start()
        self._send("load", self.kind, dataclasses.asdict(self.config), dataclasses.asdict(self.place))

    def loaded(self, progress: Progress) -> Capacity:
        """Wait until the child has loaded."""
        if self.kind == "torch" and self.place.samples:
            self._load_tokenizer()
        while True:
            name, *told = self._receive()
            if name == "progress":
                progress(*told)
            elif name == "loaded":
                self.eos_token_ids, self.path = told[1], told[2]
                return _decode_capacity(told[0])

    def execute(self, plan: Plan) -> ProcessOutput:
        self.hand(encode(plan))
        return ProcessOutput(self)

    def hand(self, packed: bytes) -> None:
        """Have the child execute a packed plan. Of several ranks only the one that samples tells what came out."""
        self._send("plan", packed)

    def reset(self) -> None:
        self._send("reset")

    def beat(self) -> int:
        """EngineFailed if the child has ended."""
        if (code := self.code) is not None:
            raise EngineFailed(f"the engine's process {how(code)}; its log is above")
        return self.shown().beat

    @property
    def code(self) -> int | None:
        """The child's exit code (minus the number of a signal), once it has ended."""
        return None if self._child is None else self._child.poll()

    @property
    def pid(self) -> int:
        assert self._child is not None
        return self._child.pid

    @property
    def where(self) -> str:
        return f"process {self.pid}"

    def shown(self) -> Shown:
        """What the child shows, whatever it is doing."""
        return Shown(*SHOWN.unpack_from(self._shared))

    def again(self) -> ProcessEngine:
        """Another one in the place of this, which has ended."""
        return ProcessEngine(self.kind, self.config, self.place)

    def close(self) -> None:
        """End the child. Results that are still to come are lost."""
        if self._child is None:
            return
        self._channel.close()
        try:
            self._child.wait(END_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._child = None

    def kill(self) -> None:
        """End the child at once, whatever it is doing; a thread that waits for a result gets EngineFailed. EngineFailed
        if the child cannot be ended."""
        if self._child is None:
            return
        self._child.kill()
        self._channel.close()
        try:
            self._child.wait(END_S)
        except subprocess.TimeoutExpired:
            raise EngineFailed("the engine's process does not end, not even by SIGKILL") from None

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs, tempfile.TemporaryFile() as shared:
            shared.truncate(SHOWN.size)
            self._shared = mmap.mmap(shared.fileno(), SHOWN.size)
            fds = (theirs.fileno(), shared.fileno())
            level = logging.getLogger().getEffectiveLevel()
            command = [sys.executable, "-m", "workers.engines.child", *map(str, (*fds, os.getpid(), level))]
            self._child = subprocess.Popen(command, pass_fds=fds, stdin=subprocess.DEVNULL, env=self._environment())
        self._channel = Channel(ours)

    def _environment(self) -> dict[str, str]:
        """Ranks on one machine speak over the loopback interface, unless the user names another."""
        alone = self.place.ranks > 1 and not self.place.rendezvous.startswith("tcp://")
        loopback = {"GLOO_SOCKET_IFNAME": "lo"} if alone and sys.platform == "linux" else {}
        return loopback | os.environ

    def _load_tokenizer(self) -> None:
        """Load the tokenizer here, in the process that makes text, while the child loads the model."""
        from transformers import AutoTokenizer  # takes seconds to import

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(self.config.model, trust_remote_code=False)
        except (OSError, ValueError, KeyError):
            self.tokenizer = None  # the child reports the error

    def _send(self, *message: Any) -> None:
        try:
            self._channel.send(*message)
        except OSError:
            raise self._death() from None

    def _receive(self) -> list[Any]:
        """The child's next message. What it raised is raised here."""
        message = self._next_message()
        if message is None:
            raise self._death()
        if message[0] == "raised":
            raise RAISED[message[1]](message[2])
        return message

    def _next_message(self) -> list[Any] | None:
        return self._channel.receive()

    def _death(self) -> HeadraceError:
        """Why the connection is closed: the error that the child sent last, or how its process ended."""
        try:
            while (message := self._next_message()) is not None:
                if message[0] == "raised":
                    return RAISED[message[1]](message[2])
        except OSError:
            pass
        if (child := self._child) is None:
            return EngineFailed("the engine was closed, or its link has gone")
        try:
            code = child.wait(END_S)
        except subprocess.TimeoutExpired:
            return EngineFailed("the engine's process closed its connection but did not end")
        return EngineFailed(f"the engine's process {how(code)}; its log is above")


def how(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


@dataclass
class ProcessOutput:
    """Results come in the order of the plans, and are waited for in that order."""

    engine: ProcessEngine

    def wait(self) -> Sampled:
        return unpack_result(self.engine._receive())
