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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from queue import SimpleQueue
from typing import Any, NamedTuple

import msgspec
import numpy as np

from protocol.errors import EngineFailed, HeadraceError, ModelRefused, StartError
from protocol.messages import Capacity, Plan, encode
from protocol.preloaded import die_with
from workers.engines.base import ALONE, Engine, Place, Progress, Sampled, Scores, StepOutput

log = logging.getLogger("headrace.engine")

BEAT_S = 0.02  # how often the child shows its beat
SEND_S = 0.2  # the same over a network
PING_S = 1.0  # how often a remote child hears of its worker
SILENCE_S = 8.0  # who has not been heard of for so long is given up; a worker's silence counts the same
END_S = 5.0  # patience with a child that is to end
KINDS: dict[str, type[HeadraceError]] = {kind.__name__: kind for kind in (StartError, ModelRefused, EngineFailed)}

_decode = msgspec.msgpack.Decoder().decode
_decode_plan = msgspec.msgpack.Decoder(Plan).decode
_decode_capacity = msgspec.msgpack.Decoder(Capacity).decode


Receive = Callable[[], list[Any] | None]
REFUSED = 3  # exit code: the worker does not want this rank
_SHOWN = struct.Struct("<qqq")


class Refused(Exception):
    """The worker does not want this rank; the message says why."""


class Shown(NamedTuple):
    """The memory that parent and child share."""

    beat: int  # Engine.beat
    steps: int  # that are done
    alive: int  # grows as long as the child's threads run


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
        return Shown(*_SHOWN.unpack_from(self._shared))

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
            shared.truncate(_SHOWN.size)
            self._shared = mmap.mmap(shared.fileno(), _SHOWN.size)
            fds = (theirs.fileno(), shared.fileno())
            level = logging.getLogger().getEffectiveLevel()
            command = [sys.executable, "-m", "workers.engines.process", *map(str, (*fds, os.getpid(), level))]
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
            raise KINDS[message[1]](message[2])
        return message

    def _next_message(self) -> list[Any] | None:
        return self._channel.receive()

    def _death(self) -> HeadraceError:
        """Why the connection is closed: the error that the child sent last, or how its process ended."""
        try:
            while (message := self._next_message()) is not None:
                if message[0] == "raised":
                    return KINDS[message[1]](message[2])
        except OSError:
            pass
        if (child := self._child) is None:
            return EngineFailed("the engine was closed, or its link has gone")
        try:
            code = child.wait(END_S)
        except subprocess.TimeoutExpired:
            return EngineFailed("the engine's process closed its connection but did not end")
        return EngineFailed(f"the engine's process {how(code)}; its log is above")

    def _result(self) -> Sampled:
        _, seats, tokens, exec_us, rows, failed, dropped, mask_us, mask_wait_us, prompts = self._receive()
        logprobs = {
            seat: (drawn, np.frombuffer(ids, np.int32), np.frombuffer(top, np.float32))
            for seat, drawn, ids, top in rows
        }
        return Sampled(
            np.frombuffer(seats, np.int32), np.frombuffer(tokens, np.int32), logprobs, exec_us,
            {seat: (code, message) for seat, code, message in failed}, dropped, mask_us, mask_wait_us,
            {seat: _unpack_scores(*packed) for seat, *packed in prompts},
        )  # fmt: skip


def _pack_scores(scores: Scores) -> tuple[bytes, bytes, bytes, bytes]:
    return (
        np.asarray(scores.logprobs, np.float32).tobytes(), np.asarray(scores.ranks, np.int32).tobytes(),
        np.asarray(scores.top_ids, np.int32).tobytes(), np.asarray(scores.top, np.float32).tobytes(),
    )  # fmt: skip


def _unpack_scores(logprobs: bytes, ranks: bytes, top_ids: bytes, top: bytes) -> Scores:
    own = np.frombuffer(logprobs, np.float32)
    shape = len(own), len(top) // max(1, len(logprobs))
    return Scores(
        own, np.frombuffer(ranks, np.int32), np.frombuffer(top_ids, np.int32).reshape(shape),
        np.frombuffer(top, np.float32).reshape(shape),
    )  # fmt: skip


def how(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


@dataclass
class ProcessOutput:
    """Results come in the order of the plans, and are waited for in that order."""

    engine: ProcessEngine

    def wait(self) -> Sampled:
        return self.engine._result()


# ------------------------------------------------------------------ the child's side


def serve(channel: Channel, shared: mmap.mmap | None) -> None:
    """Load the engine that the first message names, then execute plans until the other side is gone. ``shared``: None
    if that is on another machine."""
    message = channel.receive()
    if message is None:
        return
    if message[0] == "refused":
        raise Refused(message[1])
    _, kind, fields, place = message
    try:
        engine = _make(kind, fields, Place(**place))
        steps = Steps(reported=Place(**place).samples)
        receive: Receive = channel.receive
        if shared is None:
            receive = _heard(channel)
            threading.Thread(target=_tell, args=(engine, steps, channel), daemon=True).start()
        else:
            threading.Thread(target=_show, args=(engine, steps, shared), daemon=True).start()
        capacity = engine.load(lambda stage, fraction: channel.send("progress", stage, fraction))
        gc.collect()
        gc.freeze()  # a collection over the modules of a whole model is a pause that every stream feels
        channel.send("loaded", encode(capacity), list(engine.eos_token_ids), engine.path)
        running: SimpleQueue[StepOutput] = SimpleQueue()
        sender = threading.Thread(target=_send_results, args=(channel, running, steps), daemon=True)
        sender.start()
        while (message := receive()) is not None:
            if message[0] == "reset":
                engine.reset()
            else:
                running.put(engine.execute(_decode_plan(message[1])))
    except BaseException as error:
        _say(channel, error)
        raise


def _make(kind: str, fields: dict[str, Any], place: Place) -> Engine:
    if kind == "simulated":
        from workers.engines.simulated import SimulatedConfig, SimulatedEngine

        return SimulatedEngine(SimulatedConfig(**fields))
    from workers.torch_engine.config import EngineConfig
    from workers.torch_engine.make import make_engine

    return make_engine(EngineConfig(**fields), place)


@dataclass
class Steps:
    """How many are done, and whether the parent is told what came out of them."""

    reported: bool
    done: int = 0


def _send_results(channel: Channel, running: SimpleQueue[StepOutput], steps: Steps) -> None:
    try:
        while True:
            sampled = running.get().wait()
            steps.done += 1
            if not steps.reported:
                continue
            rows = [
                (int(seat), float(drawn), np.asarray(ids, np.int32).tobytes(), np.asarray(top, np.float32).tobytes())
                for seat, (drawn, ids, top) in sampled.logprobs.items()
            ]
            seats, tokens = (np.asarray(a, np.int32).tobytes() for a in (sampled.seats, sampled.tokens))
            failed = [(seat, *why) for seat, why in sampled.failed.items()]
            masks = (sampled.mask_us, sampled.mask_wait_us)
            prompts = [(seat, *_pack_scores(scores)) for seat, scores in sampled.prompts.items()]
            channel.send("step", seats, tokens, sampled.exec_us, rows, failed, sampled.dropped, *masks, prompts)
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


def _show(engine: Engine, steps: Steps, shared: mmap.mmap) -> None:
    for alive in count(1):
        _SHOWN.pack_into(shared, 0, engine.beat(), steps.done, alive)
        time.sleep(BEAT_S)


def _tell(engine: Engine, steps: Steps, channel: Channel) -> None:
    for alive in count(1):
        try:
            channel.send("shown", engine.beat(), steps.done, alive)
        except OSError:
            return
        time.sleep(SEND_S)


def _heard(channel: Channel) -> Receive:
    """What receives the messages of a worker on another machine. Its end or its silence is this process's, at once:
    the thread that computes may wait for other ranks for ever."""
    messages: SimpleQueue[list[Any]] = SimpleQueue()
    heard = [time.monotonic()]

    def listen() -> None:
        while (message := channel.receive()) is not None:
            heard[0] = time.monotonic()
            if message[0] != "ping":
                messages.put(message)
        _end_at_once("the worker has closed the link")

    def watch() -> None:
        while time.monotonic() - heard[0] < SILENCE_S:
            time.sleep(PING_S)
        _end_at_once(f"nothing was heard of the worker for {SILENCE_S:.0f} s")

    for target in (listen, watch):
        threading.Thread(target=target, daemon=True).start()
    return messages.get


def _end_at_once(why: str) -> None:
    log.warning("%s: this rank ends", why)
    logging.shutdown()
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    link, shared, parent, level = map(int, sys.argv[1:5])
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal: the parent decides
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    code = 0
    try:
        serve(Channel(socket.socket(fileno=link)), mmap.mmap(shared, _SHOWN.size) if shared >= 0 else None)
    except Refused as refused:
        log.critical("refused: %s", refused)
        code = REFUSED
    except HeadraceError:  # sent to the parent, which reports it
        code = 1
    except BaseException:
        log.critical("the engine failed", exc_info=True)
        code = 1
    logging.shutdown()
    os._exit(code)  # taking an interpreter with torch apart lasts seconds


if __name__ == "__main__":
    main()
