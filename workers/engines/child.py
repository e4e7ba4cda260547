"""The program of an engine's process: `python -m workers.engines.child LINK SHARED PARENT LOG_LEVEL` (process.py).

It reads plans in one thread and waits for results in another, so the next step is queued on the device while this one
runs.
"""

from __future__ import annotations

import gc
import logging
import mmap
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from queue import SimpleQueue
from typing import Any

import msgspec

from protocol.errors import EngineFailed, HeadraceError
from protocol.messages import Plan, encode
from protocol.preloaded import RAISED, die_with
from workers.engines.base import Engine, Place, StepOutput
from workers.engines.link import PING_S, REFUSED, SHOWN, SILENCE_S, Channel, pack_result

log = logging.getLogger("headrace.engine")

BEAT_S = 0.02  # how often the child shows its beat
SEND_S = 0.2  # the same over a network

_decode_plan = msgspec.msgpack.Decoder(Plan).decode

Receive = Callable[[], list[Any] | None]


class Refused(Exception):
    """The worker does not want this rank; the message says why."""


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
            if steps.reported:
                channel.send(*pack_result(sampled))
    except BaseException as error:
        log.critical("a step failed", exc_info=True)
        _say(channel, error)
        logging.shutdown()
        os._exit(1)


def _say(channel: Channel, error: BaseException) -> None:
    name, text = type(error).__name__, str(error)
    if name not in RAISED:
        name, text = EngineFailed.__name__, f"{name}: {text}"
    try:
        channel.send("raised", name, text)
    except OSError:  # the parent is gone
        pass


def _show(engine: Engine, steps: Steps, shared: mmap.mmap) -> None:
    for alive in count(1):
        SHOWN.pack_into(shared, 0, engine.beat(), steps.done, alive)
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
        serve(Channel(socket.socket(fileno=link)), mmap.mmap(shared, SHOWN.size) if shared >= 0 else None)
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
