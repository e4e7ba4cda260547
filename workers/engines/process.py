"""An engine in a process of its own, so that the event loop's Python and the device loop's do not share an interpreter.

The parent holds a ProcessEngine, which keeps the Engine protocol; the child (`python -m workers.engines.process`)
holds the real engine. Plans go over a socket as the bytes that they are on the wire, one packed result comes back per
step. The child reads plans in one thread and waits for results in another, so the next step is queued on the device
while this one runs. The heartbeat is a number in memory that both map. Neither outlives the other: the child is
killed with the thread that started it, and the parent finds the socket closed.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import mmap
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import msgspec
import numpy as np

from protocol.errors import EngineFailed, HeadraceError, ModelRefused, StartError
from protocol.messages import Capacity, Plan, encode
from protocol.preloaded import die_with
from workers.engines.base import Engine, Progress, Sampled, StepOutput

log = logging.getLogger("headrace.engine")

BEAT_S = 0.02  # how often the child shows its beat
END_S = 5.0  # patience with a child that is to end
KINDS: dict[str, type[HeadraceError]] = {kind.__name__: kind for kind in (StartError, ModelRefused, EngineFailed)}

_decode = msgspec.msgpack.Decoder().decode
_decode_plan = msgspec.msgpack.Decoder(Plan).decode
_decode_capacity = msgspec.msgpack.Decoder(Capacity).decode


class Channel:
    """Messages over a stream socket: each a length and a MessagePack array. Any thread may send, one receives."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._sending = threading.Lock()
        self._pending = bytearray()

    def send(self, *message: Any) -> None:
        packed = encode(message)
        with self._sending:
            self._link.sendall(struct.pack("<I", len(packed)) + packed)

    def receive(self) -> list[Any] | None:
        """The next message, None once the other side is gone."""
        head = self._take(4)
        body = None if head is None else self._take(struct.unpack("<I", head)[0])
        return None if body is None else _decode(body)

    def _take(self, size: int) -> bytes | None:
        while len(self._pending) < size:
            try:
                got = self._link.recv(1 << 18)
            except ConnectionError:
                return None
            if not got:
                return None
            self._pending += got
        taken = bytes(self._pending[:size])
        del self._pending[:size]
        return taken

    def close(self) -> None:
        try:
            self._link.shutdown(socket.SHUT_RDWR)  # also wakes a thread that is waiting in receive
        except OSError:  # the other side is gone
            pass
        self._link.close()


# ------------------------------------------------------------------ the parent's side


class ProcessEngine:
    """The engine ``kind`` ("torch" or "simulated") with the fields of its configuration, in a child of this process."""

    overlaps = True  # the next plan is in the child before the last result is out of it

    def __init__(self, kind: str, config: Any) -> None:
        self.kind, self.config = kind, config
        self.eos_token_ids: Sequence[int] = ()
        self.path = ""
        self.tokenizer: Any = None
        self._child: subprocess.Popen[bytes] | None = None

    def load(self, progress: Progress) -> Capacity:
        self._start()
        self._channel.send("load", self.kind, dataclasses.asdict(self.config))
        if self.kind == "torch":
            self._load_tokenizer()
        while True:
            name, *told = self._receive()
            if name == "progress":
                progress(*told)
            elif name == "loaded":
                self.eos_token_ids, self.path = told[1], told[2]
                return _decode_capacity(told[0])

    def execute(self, plan: Plan) -> ProcessOutput:
        self._send("plan", encode(plan))
        return ProcessOutput(self)

    def reset(self) -> None:
        self._send("reset")

    def beat(self) -> int:
        """EngineFailed if the child has ended."""
        if self._child is not None and self._child.poll() is not None:
            raise EngineFailed(f"the engine's process {_how(self._child.returncode)}; its log is above")
        return int(struct.unpack_from("<q", self._beat)[0])

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
            shared.truncate(8)
            self._beat = mmap.mmap(shared.fileno(), 8)
            fds = (theirs.fileno(), shared.fileno())
            level = logging.getLogger().getEffectiveLevel()
            command = [sys.executable, "-m", "workers.engines.process", *map(str, (*fds, os.getpid(), level))]
            self._child = subprocess.Popen(command, pass_fds=fds, stdin=subprocess.DEVNULL)
        self._channel = Channel(ours)

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
        message = self._channel.receive()
        if message is None:
            raise self._death()
        if message[0] == "raised":
            raise KINDS[message[1]](message[2])
        return message

    def _death(self) -> HeadraceError:
        """Why the connection is closed: the error that the child sent last, or how its process ended."""
        try:
            while (message := self._channel.receive()) is not None:
                if message[0] == "raised":
                    return KINDS[message[1]](message[2])
        except OSError:
            pass
        if (child := self._child) is None:
            return EngineFailed("the engine was closed")
        try:
            code = child.wait(END_S)
        except subprocess.TimeoutExpired:
            return EngineFailed("the engine's process closed its connection but did not end")
        return EngineFailed(f"the engine's process {_how(code)}; its log is above")

    def _result(self) -> Sampled:
        _, seats, tokens, exec_us, rows, failed, dropped, mask_us, mask_wait_us = self._receive()
        logprobs = {
            seat: (drawn, np.frombuffer(ids, np.int32), np.frombuffer(top, np.float32))
            for seat, drawn, ids, top in rows
        }
        return Sampled(
            np.frombuffer(seats, np.int32), np.frombuffer(tokens, np.int32), logprobs, exec_us,
            {seat: (code, message) for seat, code, message in failed}, dropped, mask_us, mask_wait_us,
        )  # fmt: skip


def _how(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


@dataclass
class ProcessOutput:
    """Results come in the order of the plans, and are waited for in that order."""

    engine: ProcessEngine

    def wait(self) -> Sampled:
        return self.engine._result()


# ------------------------------------------------------------------ the child's side


def serve(channel: Channel, beat: mmap.mmap) -> None:
    """Load the engine that the first message names, then execute plans until the other side is gone."""
    message = channel.receive()
    if message is None:
        return
    _, kind, fields = message
    try:
        engine = _make(kind, fields)
        threading.Thread(target=_show_beat, args=(engine, beat), daemon=True).start()
        capacity = engine.load(lambda stage, fraction: channel.send("progress", stage, fraction))
        gc.collect()
        gc.freeze()  # a collection over the modules of a whole model is a pause that every stream feels
        channel.send("loaded", encode(capacity), list(engine.eos_token_ids), engine.path)
        running: SimpleQueue[StepOutput] = SimpleQueue()
        sender = threading.Thread(target=_send_results, args=(channel, running), daemon=True)
        sender.start()
        while (message := channel.receive()) is not None:
            if message[0] == "reset":
                engine.reset()
            else:
                running.put(engine.execute(_decode_plan(message[1])))
    except BaseException as error:
        _say(channel, error)
        raise


def _make(kind: str, fields: dict[str, Any]) -> Engine:
    if kind == "simulated":
        from workers.engines.simulated import SimulatedConfig, SimulatedEngine

        return SimulatedEngine(SimulatedConfig(**fields))
    from workers.torch_engine.config import EngineConfig
    from workers.torch_engine.make import make_engine

    return make_engine(EngineConfig(**fields))


def _send_results(channel: Channel, running: SimpleQueue[StepOutput]) -> None:
    try:
        while True:
            sampled = running.get().wait()
            rows = [
                (int(seat), float(drawn), np.asarray(ids, np.int32).tobytes(), np.asarray(top, np.float32).tobytes())
                for seat, (drawn, ids, top) in sampled.logprobs.items()
            ]
            seats, tokens = (np.asarray(a, np.int32).tobytes() for a in (sampled.seats, sampled.tokens))
            failed = [(seat, *why) for seat, why in sampled.failed.items()]
            masks = (sampled.mask_us, sampled.mask_wait_us)
            channel.send("step", seats, tokens, sampled.exec_us, rows, failed, sampled.dropped, *masks)
    except BaseException as error:
        log.critical("a step failed", exc_info=True)
        _say(channel, error)
        logging.shutdown()
        os._exit(1)


def _say(channel: Channel, error: BaseException) -> None:
    name, text = type(error).__name__, str(error)
    if name not in KINDS:
        name, text = EngineFailed.__name__, f"{name}: {text}"
    try:
        channel.send("raised", name, text)
    except OSError:  # the parent is gone
        pass


def _show_beat(engine: Engine, beat: mmap.mmap) -> None:
    while True:
        struct.pack_into("<q", beat, 0, engine.beat())
        time.sleep(BEAT_S)


def main() -> None:
    link, shared, parent, level = map(int, sys.argv[1:5])
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal: the parent decides
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    code = 0
    try:
        serve(Channel(socket.socket(fileno=link)), mmap.mmap(shared, 8))
    except HeadraceError:  # sent to the parent, which reports it
        code = 1
    except BaseException:
        log.critical("the engine failed", exc_info=True)
        code = 1
    logging.shutdown()
    os._exit(code)  # taking an interpreter with torch apart lasts seconds


if __name__ == "__main__":
    main()
