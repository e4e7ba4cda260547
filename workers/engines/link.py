"""What an engine's process and the process that started it say to each other: messages, results packed, and the beat.

Little-endian, as on the wire: the two may be on different machines (remote.py).
"""

from __future__ import annotations

import socket
import struct
import threading
from typing import Any, NamedTuple

import msgspec
import numpy as np

from protocol.messages import encode
from workers.engines.base import Sampled, Scores

PING_S = 1.0  # how often a remote child hears of its worker
SILENCE_S = 8.0  # who has not been heard of for so long is given up; a worker's silence counts the same
REFUSED = 3  # exit code: the worker does not want this rank
SHOWN = struct.Struct("<qqq")  # Shown

_decode = msgspec.msgpack.Decoder().decode


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


# ------------------------------------------------------------------ results


def pack_result(sampled: Sampled) -> tuple[Any, ...]:
    """The message of one step's result."""
    rows = [(int(seat), float(drawn), _ints(ids), _floats(top)) for seat, (drawn, ids, top) in sampled.logprobs.items()]
    failed = [(seat, *why) for seat, why in sampled.failed.items()]
    prompts = [
        (seat, _floats(scores.logprobs), _ints(scores.ranks), _ints(scores.top_ids), _floats(scores.top))
        for seat, scores in sampled.prompts.items()
    ]
    return (
        "step", _ints(sampled.seats), _ints(sampled.tokens), sampled.exec_us, rows, failed, sampled.dropped,
        sampled.late, sampled.mask_us, sampled.mask_wait_us, prompts,
    )  # fmt: skip


def unpack_result(message: list[Any]) -> Sampled:
    _, seats, tokens, exec_us, rows, failed, dropped, late, mask_us, mask_wait_us, prompts = message
    logprobs = {seat: (drawn, np.frombuffer(ids, "<i4"), np.frombuffer(top, "<f4")) for seat, drawn, ids, top in rows}
    return Sampled(
        np.frombuffer(seats, "<i4"), np.frombuffer(tokens, "<i4"), logprobs, exec_us,
        {seat: (code, text) for seat, code, text in failed}, dropped, late, mask_us, mask_wait_us,
        {seat: _scores(*packed) for seat, *packed in prompts},
    )  # fmt: skip


def _scores(logprobs: bytes, ranks: bytes, top_ids: bytes, top: bytes) -> Scores:
    own = np.frombuffer(logprobs, "<f4")
    shape = len(own), len(top) // max(1, len(logprobs))
    return Scores(
        own, np.frombuffer(ranks, "<i4"), np.frombuffer(top_ids, "<i4").reshape(shape),
        np.frombuffer(top, "<f4").reshape(shape),
    )  # fmt: skip


def _ints(values: Any) -> bytes:
    return np.asarray(values, "<i4").tobytes()


def _floats(values: Any) -> bytes:
    return np.asarray(values, "<f4").tobytes()
