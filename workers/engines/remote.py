"""Ranks on other machines: they come to the worker over TCP and are then ranks like those that it starts itself.

The worker listens at the rendezvous; `headrace worker --rank K --rendezvous HOST:PORT` connects there, says which rank
it is, and hands the connection to an engine process (process.py). What a local rank shows in shared memory, a remote
one sends; the worker sends pings. Silence on either side is the end: the worker gives up all ranks, and a remote engine
process kills itself, since it may be in the middle of a step for ever. The program that started it then comes again.

Whoever reaches the rendezvous can be a rank and see prompts: it is for a network of its own.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from queue import SimpleQueue
from typing import Any

from protocol.errors import StartError
from protocol.levels import release
from workers.engines.base import Place
from workers.engines.link import PING_S, REFUSED, Channel, Shown
from workers.engines.process import ProcessEngine

log = logging.getLogger("headrace.engine")

AGAIN_S = 1.0  # between attempts to reach the worker
HELLO_S = 10.0  # patience with who connects and says nothing


def address_of(text: str) -> tuple[str, int]:
    """(host, port) of HOST:PORT. StartError for anything else."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise StartError(f"--rendezvous {text}: it has the form HOST:PORT")
    return host.strip("[]"), int(port)


# ------------------------------------------------------------------ the worker's side


class Door:
    """Where remote ranks come in. Loopback only, unless the address is another's."""

    def __init__(self, address: tuple[str, int]) -> None:
        try:
            self._listening = socket.create_server(address, family=_family(address[0]))
        except OSError as error:
            raise StartError(f"--rendezvous {address[0]}:{address[1]}: cannot listen ({error.strerror})") from None
        self.host, self.port = address[0], self._listening.getsockname()[1]

    def admit(self, wanted: set[int]) -> tuple[int, socket.socket]:
        """The next rank of ``wanted`` that comes, and its connection. Others are told why not."""
        while True:
            link, peer = self._listening.accept()
            channel = Channel(link)
            link.settimeout(HELLO_S)
            try:
                hello = channel.receive()
            except OSError:
                hello = None
            refusal = _refusal(hello, wanted)
            if refusal is None:
                assert hello is not None
                link.settimeout(None)
                log.info("rank %d is %s", hello[1], peer[0])
                return hello[1], link
            log.warning("%s is refused as a rank: %s", peer[0], refusal)
            try:
                channel.send("refused", refusal)
            except OSError:
                pass
            channel.close()

    def close(self) -> None:
        self._listening.close()


def _refusal(hello: list[Any] | None, wanted: set[int]) -> str | None:
    if not hello or len(hello) != 3 or hello[0] != "rank" or type(hello[1]) is not int:
        return "it does not speak as one"
    if hello[2] != release():
        return f"it is release {hello[2]}, the worker {release()}"
    if hello[1] not in wanted:
        return f"ranks {', '.join(map(str, sorted(wanted)))} are awaited, not {hello[1]}"
    return None


class RemoteRank(ProcessEngine):
    """A rank that came in by a Door: what ProcessEngine is to a child."""

    def __init__(self, kind: str, config: Any, place: Place) -> None:
        super().__init__(kind, config, place)
        self._last = Shown(0, 0, 0)
        self._messages: SimpleQueue[list[Any] | None] = SimpleQueue()
        self._gone = threading.Event()
        self._link: socket.socket | None = None
        self._from = ""

    def came(self, link: socket.socket) -> None:
        self._link, self._from = link, str(link.getpeername()[0])
        self._channel = Channel(link)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _start(self) -> None:
        threading.Thread(target=self._listen, daemon=True).start()
        threading.Thread(target=self._ping, daemon=True).start()

    def _listen(self) -> None:
        while (message := self._channel.receive()) is not None:
            if message[0] == "shown":
                self._last = Shown(*message[1:])
            else:
                self._messages.put(message)
        self._gone.set()
        self._messages.put(None)

    def _ping(self) -> None:
        while not self._gone.wait(PING_S):
            try:
                self._channel.send("ping")
            except OSError:
                return

    def _next_message(self) -> list[Any] | None:
        message = self._messages.get()
        if message is None:
            self._messages.put(None)  # for whoever asks next
        return message

    @property
    def code(self) -> int | None:
        """Its link's end counts as a SIGKILL: that is what it does to itself then."""
        return -signal.SIGKILL if self._gone.is_set() else None

    @property
    def where(self) -> str:
        return self._from

    def shown(self) -> Shown:
        return self._last

    def kill(self) -> None:
        if self._link is not None:
            self._channel.close()

    def close(self) -> None:
        self.kill()


# ------------------------------------------------------------------ the rank's side


def join(address: tuple[str, int], rank: int, level: int) -> None:
    """Be rank ``rank`` of the worker at ``address``, again and again until a signal ends this process. StartError if
    the worker refuses it."""
    child: subprocess.Popen[bytes] | None = None

    def end(number: int, frame: object) -> None:
        if child is not None:
            child.kill()
        raise SystemExit(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    while True:
        link = _connected(address)
        log.info("rank %d of the worker at %s:%d", rank, *address)
        with link:
            Channel(link).send("rank", rank, release())
            command = [sys.executable, "-m", "workers.engines.child"]
            command += map(str, (link.fileno(), -1, os.getpid(), level))
            child = subprocess.Popen(command, pass_fds=(link.fileno(),), stdin=subprocess.DEVNULL)
        code = child.wait()
        if code == REFUSED:
            raise StartError("the worker refuses this rank; the reason is above")
        log.warning("the worker is gone: waiting for it")
        time.sleep(AGAIN_S)


def _connected(address: tuple[str, int]) -> socket.socket:
    said = False
    while True:
        try:
            link = socket.create_connection(address, timeout=HELLO_S)
            link.settimeout(None)
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return link
        except OSError as error:
            if not said:
                log.info("no worker at %s:%d yet (%s)", *address, error.strerror or error)
            said = True
            time.sleep(AGAIN_S)


def free_port(host: str) -> int:
    with socket.socket(_family(host)) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
