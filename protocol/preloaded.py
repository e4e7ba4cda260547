"""Bounded worker processes: what is heavy is loaded once, by a process that forks a worker in milliseconds.

Work that a stranger can make slow or large (templates, tokenizers) shares no interpreter with an event loop. A parent
starts ``python -m MODULE`` (a clean exec), which loads and stays a single thread; from then on it only forks. A worker
shares the loaded memory, has a bound of memory of its own and a bound of CPU time for each question, which the kernel
holds: whatever loops or allocates without end ends that worker alone, and the next one is a fork away.

    parent ──control──► preloaded process ──fork──► worker
       └───────────── channel of the worker ──────────┘

Messages are a length and a MessagePack array over socket pairs; nothing is pickled. The preloaded process dies with
its parent, a worker with the preloaded process, however each of them ends. How a worker ended is told on its own
channel by the preloaded process, which holds that socket too.

Over 400 lines: the three sides of one protocol (parent, preloaded process, worker), which are read together.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from protocol.errors import EngineFailed, HeadraceError, ModelRefused, StartError
from protocol.messages import encode

log = logging.getLogger("headrace.preloaded")

Message = Sequence[Any]
Tell = Callable[..., None]  # tells the parent what was loaded
Answer = Callable[[Message], Message]  # what a worker does with one question; runs in the worker

PR_SET_PDEATHSIG = 1
END_S = 5.0  # patience with a process that is to end
MAX_MESSAGE = 1 << 28  # bytes
LAST = "last"  # first word of an answer after which the worker ends by itself
DIED = "died"  # first word of what the preloaded process says of a worker: signal number, or 0
M_MMAP_THRESHOLD, LARGE_BLOCK = -3, 128 << 10  # of <malloc.h>; bytes
FORK, END = 1, 2  # requests on the control socket
REQUEST = struct.Struct("<BBHII")  # kind, nice, unused, memory in MiB, number of the worker
LENGTH = struct.Struct("<I")
RAISED: dict[str, type[HeadraceError]] = {kind.__name__: kind for kind in (StartError, ModelRefused, EngineFailed)}

decode = msgspec.msgpack.Decoder().decode


class WorkerDied(Exception):
    """A worker ended while it was asked. ``signal``: the one that ended it, 0 where that is not known."""

    def __init__(self, number: int) -> None:
        name = signal.Signals(number).name if number else "an exit"
        super().__init__(f"the process was ended by {name}")
        self.signal = number

    @property
    def out_of_time(self) -> bool:
        return self.signal == signal.SIGPROF


# ------------------------------------------------------------------ the parent's side


class Preloaded:
    """The parent's hold on a preloaded process. ``start`` must run in a thread that lives as long as the process is
    wanted (the main one): the kernel takes that thread's end for the parent's."""

    def __init__(self, module: str) -> None:
        self.module = module
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._forked = 0
        self.told: list[Any] | None = None  # what `load` returned

    def start(self) -> None:
        ours, theirs = socket.socketpair()
        level = logging.getLogger().getEffectiveLevel()
        command = [sys.executable, "-m", self.module, str(theirs.fileno()), str(os.getpid()), str(level)]
        # threads of libraries would not survive a fork
        alone = {"TOKENIZERS_PARALLELISM": "false", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        with theirs:
            self._process = subprocess.Popen(
                command, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, env={**os.environ, **alone}
            )
        self._control = ours

    def load(self, *arguments: Any) -> list[Any]:
        """Blocks until the process has loaded; returns what it tells of it. What it raised is raised here."""
        assert self._control is not None
        try:
            send(self._control, arguments)
            told = receive(self._control)
        except OSError:
            told = None
        if told is None:
            raise EngineFailed(f"the process of {self.module} ended while it loaded; its log is above")
        if told[0] == "raised":
            raise RAISED[told[1]](told[2])
        self.told = told[1:]
        return self.told

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    async def fork(self, memory_mib: int, nice: int = 0) -> Worker:
        """A worker that may take ``memory_mib`` beyond what was loaded. EngineFailed if the process is gone."""
        ours, theirs = socket.socketpair()
        number = self._forked = self._forked + 1
        try:
            with theirs:
                self._request(FORK, number, memory_mib, nice, [theirs.fileno()])
            reader, writer = await asyncio.open_connection(sock=ours)
        except BaseException:
            ours.close()
            raise
        return Worker(self, number, reader, writer)

    def end(self, number: int) -> None:
        """Kill a worker. Only its parent may: to others its pid might name another process by now."""
        try:
            self._request(END, number, 0, 0, [])
        except EngineFailed:  # then the worker is gone as well
            pass

    def _request(self, kind: int, number: int, memory_mib: int, nice: int, fds: list[int]) -> None:
        if self._control is None or not self.alive:
            raise EngineFailed(f"the process of {self.module} has ended")
        try:
            socket.send_fds(self._control, [REQUEST.pack(kind, nice, 0, memory_mib, number)], fds)
        except OSError as error:
            raise EngineFailed(f"the process of {self.module} cannot be reached ({error})") from None

    def close(self) -> None:
        """End the process and all workers. May be called from any thread, also while another one waits in load."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(END_S)
        if self._control is not None:
            self._control.close()
        self._process = self._control = self.told = None


class Worker:
    """One worker process; asked one thing at a time."""

    def __init__(
        self, home: Preloaded, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._home = home
        self._number = number
        self._reader = reader
        self._writer = writer
        self._incoming = asyncio.create_task(self._receive())

    @property
    def closed(self) -> bool:
        """Whether it can be asked no more: it was closed here, or has ended by itself."""
        return self._incoming.done()

    async def ask(self, question: Message, cpu_s: float, wall_s: float) -> list[Any]:
        """The answer. WorkerDied if there is none: it used more than ``cpu_s`` of CPU time or ``wall_s`` of anybody's,
        or died otherwise. A worker that died, or whose question was cancelled, is closed."""
        packed = encode((cpu_s, *question))
        self._writer.write(LENGTH.pack(len(packed)) + packed)
        try:
            async with asyncio.timeout(wall_s):
                answer = await asyncio.shield(self._incoming)
        except TimeoutError:
            self.close()
            raise WorkerDied(signal.SIGPROF) from None
        except asyncio.CancelledError:
            self.close()
            if not _cancelled():  # the worker was closed by another task
                raise WorkerDied(0) from None
            raise
        if answer is None or answer[0] == DIED:
            self.close()
            raise WorkerDied(answer[1] if answer else 0)
        if answer[0] == LAST:
            self.close()
            return answer[1:]
        self._incoming = asyncio.create_task(self._receive())
        return answer

    async def _receive(self) -> list[Any] | None:
        """The next message; None if the worker and who forked it are gone."""
        try:
            (size,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
            message: list[Any] = decode(await self._reader.readexactly(size))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        return message

    def close(self) -> None:
        self._incoming.cancel()
        self._home.end(self._number)
        self._writer.close()


def _cancelled() -> bool:
    """Whether it is the running task that is to end, whatever else has happened by now: an answer that came at the
    same moment must not turn its end into the death of a worker."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


# ------------------------------------------------------------------ messages over a blocking socket


def send(link: socket.socket, message: Message) -> None:
    packed = encode(message)
    link.sendall(LENGTH.pack(len(packed)) + packed)


def receive(link: socket.socket) -> list[Any] | None:
    """The next message, None once the other side is gone."""
    head = _take(link, LENGTH.size)
    if head is None:
        return None
    (size,) = LENGTH.unpack(head)
    if size > MAX_MESSAGE:
        raise ConnectionError(f"a message of {size} bytes")
    body = _take(link, size)
    return None if body is None else decode(body)


def _take(link: socket.socket, size: int) -> bytearray | None:
    taken = bytearray(size)
    view, filled = memoryview(taken), 0
    while filled < size:
        got = link.recv_into(view[filled:])
        if not got:
            return None
        filled += got
    return taken


# ------------------------------------------------------------------ the preloaded process


def run(load: Callable[[Message, Tell], Answer]) -> None:
    """The main function of a preloaded process. ``load`` gets the arguments of `Preloaded.load`, tells of what it has
    loaded, may then go on preparing, and returns what a worker does with a question."""
    link, parent, level = map(int, sys.argv[1:4])
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal: the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    control = socket.socket(fileno=link)
    arguments = receive(control)
    if arguments is None:
        return
    try:
        answer = load(arguments, lambda *told: send(control, ("loaded", *told)))
    except BaseException as error:
        kind, text = type(error).__name__, str(error)
        if kind not in RAISED:
            log.critical("loading failed", exc_info=True)
            kind, text = EngineFailed.__name__, f"{kind}: {text}"
        send(control, ("raised", kind, text))
        raise SystemExit(1) from None
    del arguments
    gc.collect()
    gc.freeze()  # a collection in a worker would write to every page that it shares
    give_back()
    _Nursery(control, answer).run()


class _Nursery:
    """Forks workers and buries them, until the parent is gone."""

    def __init__(self, control: socket.socket, answer: Answer) -> None:
        self._control = control
        self._answer = answer
        self._pids: dict[int, int] = {}  # number of a worker -> pid
        self._links: dict[int, socket.socket] = {}  # pid -> the worker's end of its channel

    def run(self) -> None:
        woken, wakes = os.pipe()
        os.set_blocking(wakes, False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(wakes)
        while True:
            ready, _, _ = select.select([self._control.fileno(), woken], [], [])
            if woken in ready:
                os.read(woken, 512)
                self._bury()
            if self._control.fileno() in ready and not self._serve():
                return

    def _serve(self) -> bool:
        """One request of the parent's; False if it is gone."""
        raw, fds, _, _ = socket.recv_fds(self._control, REQUEST.size, 1)
        if len(raw) < REQUEST.size:
            return False
        kind, nice, _, memory_mib, number = REQUEST.unpack(raw)
        if kind == FORK:
            self._fork(number, socket.socket(fileno=fds[0]), memory_mib, nice)
        elif (pid := self._pids.get(number)) is not None:
            os.kill(pid, signal.SIGKILL)
        return True

    def _fork(self, number: int, link: socket.socket, memory_mib: int, nice: int) -> None:
        me, pid = os.getpid(), os.fork()
        if pid:
            self._pids[number], self._links[pid] = pid, link
            return
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._control.close()
            for other in self._links.values():
                other.close()
            die_with(me)
            if nice:
                be_nice(nice)
            limit_memory(memory_mib << 20)
            _work(link, self._answer)
            code = 0
        except BaseException:
            log.critical("a worker failed", exc_info=True)
        finally:
            logging.shutdown()
            os._exit(code)

    def _bury(self) -> None:
        while self._links:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            self._pids = {number: other for number, other in self._pids.items() if other != pid}
            with self._links.pop(pid) as link:
                link.setblocking(False)
                try:
                    send(link, (DIED, os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0))
                except OSError:  # the parent has closed it, or does not read
                    pass


# ------------------------------------------------------------------ a worker


def _work(link: socket.socket, answer: Answer) -> None:
    """Answer until the parent has closed its end. Reading and writing cost the question no time."""
    while (question := receive(link)) is not None:
        cpu_s, *asked = question
        signal.setitimer(signal.ITIMER_PROF, cpu_s)  # SIGPROF ends the process, whatever it is in the middle of
        told = answer(asked)
        signal.setitimer(signal.ITIMER_PROF, 0)
        send(link, told)
        if told[0] == LAST:
            return
        del question, asked, told


def die_with(parent: int) -> None:
    """Be killed when ``parent`` ends. Elsewhere than on Linux, its closed socket has to do."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it ended before the wish was made
            raise SystemExit(1)


def be_nice(nice: int) -> None:
    """Let everything else run first. A process of low priority must leave its parent's session too: where Linux shares
    the processor out between sessions first (sched_autogroup), niceness counts only within one."""
    os.setsid()
    os.nice(nice)
    try:
        Path("/proc/self/autogroup").write_text(str(nice))
    except OSError:  # not Linux, or without such groups
        pass


def give_back() -> None:
    """Return to the system what the C library keeps of freed memory, where it can."""
    _call_libc("malloc_trim", 0)


def give_back_large_blocks() -> None:
    """Let bodies leave memory when they are freed. glibc maps large blocks apart, from a size that it raises with each
    that is freed: larger ones then lie in the heap, where anything lasting above keeps them. A size that is set
    stays."""
    _call_libc("mallopt", M_MMAP_THRESHOLD, LARGE_BLOCK)


def _call_libc(name: str, *args: int) -> None:
    function = getattr(ctypes.CDLL(None), name, None)
    if function is not None:
        function(*args)


def limit_memory(more: int) -> None:
    """Let this process take ``more`` bytes of private memory beyond what it has; then allocations fail."""
    if sys.platform == "linux":  # elsewhere the limit does not count mapped memory
        has = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData:"))
        bound = int(has.split()[1]) * 1024 + more
        resource.setrlimit(resource.RLIMIT_DATA, (bound, bound))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # what is in its memory is somebody's prompt
