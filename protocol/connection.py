"""Access to one server across failures: connections, repeats with backoff, script loading, subscriptions.

Every operation that goes through here is safe to repeat, so after a lost connection it is repeated. redis-py's
own retries and timeouts are switched off: they are decided here alone.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlsplit

import hiredis
import msgspec
from redis.asyncio import ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthenticationWrongNumberOfArgsError,
    AuthorizationError,
    NoPermissionError,
    NoScriptError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as LostConnection
from redis.exceptions import TimeoutError as TimedOut

from protocol import cluster
from protocol.errors import Fenced, ServiceError, StartError, StoreFailed, Unavailable
from protocol.messages import Row, decode_rows
from protocol.scripts import Script

T = TypeVar("T")
Argument = str | bytes | int | float

REPLY_TIMEOUT_S = 15.0  # long enough for a stalled server; after it the connection counts as dead
CONNECT_TIMEOUT_S = 5.0
MOST_BACKOFF_S = 2.0
PING_EVERY_S = 5.0  # a silent subscription is checked with a PING
# replies of a server that runs and will be able to answer later
PASSING = {
    "LOADING", "READONLY", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "BUSY", "MISCONF", "NOREPLICAS", "UNBLOCKED",
    "MOVED", "ASK",
}  # fmt: skip
REFUSED = (AuthenticationError, AuthenticationWrongNumberOfArgsError, AuthorizationError, NoPermissionError)


_pack: Callable[[tuple[Argument, ...]], bytes] = hiredis.pack_command  # type: ignore[assignment]


class OutOfMemory(Unavailable):
    """The server refused a write because it is out of memory."""


class Link:
    """Connections to one server: in a cluster, to the node that holds ``key``, also after the key has moved.

    Each call takes a connection that is idle or makes one; none is shared by two calls at once.
    """

    lost_errors = (LostConnection, TimedOut, TimeoutError, OSError, EOFError)

    def __init__(self, url: str, patience: float | None, key: str = "") -> None:
        self.url = url
        self.patience = patience
        self.key = key
        self.in_cluster = cluster.is_cluster(url)
        check_url(url)
        self._maker = None if self.in_cluster else _maker(url)
        self._idle: list[Any] = []
        self._busy: set[Any] = set()
        self._closed = False
        self.losses = 0  # attempts whose reply was lost

    async def close(self) -> None:
        self._closed = True
        await self.drop_idle()
        for connection in list(self._busy):
            await connection.disconnect(nowait=True)

    async def drop_idle(self) -> None:
        idle, self._idle = self._idle, []
        for connection in idle:
            await connection.disconnect(nowait=True)

    async def open_connection(self) -> Any:
        """A new connection, outside the pool of idle ones (subscriptions keep theirs)."""
        if self._maker is None:
            self._maker = _maker(await cluster.node_of(self.url, self.key, ask))
        return await _connect(self._maker)

    async def lose_node(self) -> None:
        """In a cluster: find the node that holds the key again."""
        if self.in_cluster:
            self._maker = None
            await self.drop_idle()

    async def once(self, packed: bytes, replies: int, timeout: float) -> list[Any]:
        """Send packed commands and read their replies; errors that the server replies are returned, not raised."""
        if self._closed:
            raise Unavailable("the bus is closed")
        connection = self._idle.pop() if self._idle else await self.open_connection()
        self._busy.add(connection)
        try:
            async with asyncio.timeout(timeout):
                await connection.send_packed_command(packed, check_health=False)
                out = []
                for _ in range(replies):
                    out.append(await read_reply(connection))
        except BaseException as error:
            self._busy.discard(connection)
            await connection.disconnect(nowait=True)
            if isinstance(error, self.lost_errors):
                await self.drop_idle()  # the same failure has probably ended them too
            raise
        self._busy.discard(connection)
        self._idle.append(connection)
        return out

    async def repeat(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Await ``attempt()`` until it succeeds, with jittered backoff, for at most ``patience`` seconds."""
        started, tries = time.monotonic(), 0
        while True:
            try:
                return await attempt()
            except REFUSED as error:
                raise StoreFailed(f"the Redis server refused us: {error}") from None
            except (*self.lost_errors, _Passing) as error:
                self.losses += 1
                cause = f"{type(error).__name__}: {error}"
            await self.lose_node()
            pause = min(MOST_BACKOFF_S, 0.05 * 2**tries) * random.uniform(0.5, 1.0)
            tries = min(tries + 1, 16)
            if self._closed:
                raise Unavailable("the bus is closed")
            if self.patience is not None and time.monotonic() + pause - started > self.patience:
                raise Unavailable(f"Redis does not answer ({cause})")
            await asyncio.sleep(pause)

    async def command(self, *args: Argument, block_s: float = 0.0) -> Any:
        """One command; ``block_s`` is how long the server may block on purpose."""
        packed = _pack(args)

        async def attempt() -> Any:
            (reply,) = await self.once(packed, 1, REPLY_TIMEOUT_S + block_s)
            return checked(reply)

        return await self.repeat(attempt)

    async def pipeline(self, commands: Sequence[tuple[Argument, ...]], *, tolerant: bool = False) -> list[Any]:
        """Several commands in one round trip, not atomically. ``tolerant``: the reply of one that the server refuses
        for good (a key of a wrong type) is None, and the others are returned."""
        if not commands:
            return []
        packed = b"".join([_pack(c) for c in commands])

        async def attempt() -> list[Any]:
            replies = await self.once(packed, len(commands), REPLY_TIMEOUT_S)
            return [_or_none(reply) if tolerant else checked(reply) for reply in replies]

        return await self.repeat(attempt)

    async def script(self, script: Script, key: str, args: Sequence[Argument]) -> Any:
        """Run a script by its digest; a server that does not have it (after a restart) gets the source."""
        (reply,) = await self.script_each(script, key, [args])
        return reply

    async def script_each(self, script: Script, key: str, calls: Sequence[Sequence[Argument]]) -> list[Any]:
        """Run a script several times, in order and in one round trip (the server syncs its log once for all)."""
        packed = b"".join([_pack(("EVALSHA", script.sha, 1, key, *args)) for args in calls])

        async def attempt() -> list[Any]:
            replies = await self.once(packed, len(calls), REPLY_TIMEOUT_S)
            if any(isinstance(reply, NoScriptError) for reply in replies):
                whole = _pack(("SCRIPT", "LOAD", script.source)) + packed
                replies = (await self.once(whole, 1 + len(calls), REPLY_TIMEOUT_S))[1:]
            return [checked(reply) for reply in replies]

        return await self.repeat(attempt)


# What a URL may set: who we are, and how to reach the server. All else (RESP version, timeouts of replies, retries,
# decoding) is decided here, and an option in the URL would silently win over it.
USERS_OPTIONS = {"username", "password", "db", "client_name", "socket_connect_timeout", "path"}
USERS_PREFIX = "ssl_"


def check_url(url: str) -> None:
    """StartError for an invalid URL, or for an option in it that is not the user's to set."""
    for seed in cluster.seeds(url):
        _maker(seed)
    for name in parse_qs(urlsplit(url).query, keep_blank_values=True):
        if name not in USERS_OPTIONS and not name.startswith(USERS_PREFIX):
            raise StartError(
                f"--redis-url: the option {name[:40]!r} is Headrace's own to decide; leave it out (yours are "
                f"{', '.join(sorted(USERS_OPTIONS))} and {USERS_PREFIX}*)"
            )


def _maker(url: str) -> ConnectionPool:
    """What makes connections to one server; it only reads the URL, nothing is pooled in it. StartError for a URL that
    makes no sense; the message does not quote it, since part of a password may have been read as a port."""
    try:
        return ConnectionPool.from_url(
            url,
            protocol=2,
            socket_timeout=None,
            socket_connect_timeout=CONNECT_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
            client_name="headrace",
            driver_info=None,
        )
    except ValueError:
        raise StartError(
            "this is no Redis URL; write redis://[user:password@]host:port/db, rediss://..., unix:///path or "
            "redis+cluster://host:port,host:port (special characters in a password as %XX)"
        ) from None


async def _connect(maker: ConnectionPool) -> Any:
    connection: Any = maker.make_connection()  # type: ignore[no-untyped-call]
    try:
        # includes the handshake: a stalled server accepts connections and does not answer
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            await connection.connect()
    except BaseException as error:
        await connection.disconnect(nowait=True)
        if isinstance(error.__cause__, REFUSED):  # the library reports it as a lost connection
            raise error.__cause__ from None
        raise
    return connection


async def ask(url: str, *args: Argument) -> Any:
    """One command to one server, over a connection of its own; not repeated."""
    connection = await _connect(_maker(url))
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            await connection.send_packed_command(_pack(args), check_health=False)
            return checked(await read_reply(connection))
    finally:
        await connection.disconnect(nowait=True)


async def read_reply(connection: Any) -> Any:
    """The next reply; an error that the server replies is returned, not raised."""
    try:
        return await connection.read_response(disable_decoding=True)
    except ResponseError as error:
        return error


class _Passing(Exception):
    """The server runs and will be able to answer later."""


def _or_none(reply: Any) -> Any:
    try:
        return checked(reply)
    except StoreFailed:
        return None


def checked(reply: Any) -> Any:
    """The reply, or the error that it reports, as one of protocol.errors."""
    if not isinstance(reply, RedisError):
        return reply
    text = str(reply).partition(", with args")[0]  # which may be a prompt
    code = getattr(reply, "status_code", None) or text.partition(" ")[0]
    if text.startswith("FENCED "):
        raise Fenced(text.removeprefix("FENCED ").split()[0])
    if code == "OOM" or "'maxmemory'" in text:
        raise OutOfMemory("Redis is out of memory: no new work is taken")
    if isinstance(reply, REFUSED):
        raise reply
    if code in PASSING:
        raise _Passing(f"{code} {text}")
    raise StoreFailed(f"Redis refused an operation: {text}")


class Subscription:
    """``async for rows in subscription`` yields list[Row] per message; [] tells that the subscription was lost and is
    up again (publications may be missing: resync from the journals). ``start`` returns once SUBSCRIBE is acknowledged.
    """

    def __init__(self, link: Link, channel: str) -> None:
        self._link = link
        self._channel = channel
        self._connection: Any = None
        self._closed = False

    async def start(self) -> None:
        async def attempt() -> Any:
            connection = await self._link.open_connection()
            try:
                async with asyncio.timeout(PING_EVERY_S):
                    subscribe = "SSUBSCRIBE" if self._link.in_cluster else "SUBSCRIBE"
                    await connection.send_command(subscribe, self._channel, check_health=False)
                    checked(await read_reply(connection))
            except BaseException:
                await connection.disconnect(nowait=True)
                raise
            return connection

        self._connection = await self._link.repeat(attempt)

    async def close(self) -> None:
        self._closed = True
        if self._connection is not None:
            await self._connection.disconnect(nowait=True)

    async def __aiter__(self) -> AsyncIterator[list[Row]]:
        if self._connection is None:
            await self.start()
        asked = False
        while not self._closed:
            try:
                message = await self._connection.read_response(
                    disable_decoding=True, timeout=PING_EVERY_S, disconnect_on_error=False
                )
                if message is None:  # silence: send a PING; its answer must arrive before the next timeout
                    if asked:
                        raise ConnectionResetError("the subscription does not answer")
                    await self._connection.send_command("PING", check_health=False)
                elif message[0] == b"sunsubscribe":
                    raise ConnectionResetError("the channel has moved to another node")
                asked = message is None
            except self._link.lost_errors:
                if self._closed:
                    return
                await self._connection.disconnect(nowait=True)
                await self._link.lose_node()
                await self._start_again()
                asked = False
                yield []
                continue
            if message is not None and message[0] in (b"message", b"smessage"):
                try:
                    rows = decode_rows(message[2])
                except msgspec.DecodeError:  # not a publication of ours; if one was lost, the journals have its rows
                    rows = []
                yield rows

    async def _start_again(self) -> None:
        """As `start`, repeated for ever: no caller waits here to be told of an outage."""
        while not self._closed:
            try:
                await self.start()
            except ServiceError:
                await asyncio.sleep(random.uniform(0.1, 0.5))
            else:
                return
