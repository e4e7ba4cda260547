"""A TCP proxy in front of Redis that can cut one process off, or swallow one reply.

Which process a connection belongs to is read from /proc: the peer's port leads to a socket inode, the
inode to the process that holds it. So the services need to know nothing of the proxy.
"""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path


def _inode_of_local_port(port: int) -> str | None:
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[1].rpartition(":")[2], 16) == port and fields[9] != "0":
            return fields[9]
    return None


def holds_port(pid: int, port: int) -> bool:
    """Whether process ``pid`` holds the TCP socket bound to local ``port``."""
    inode = _inode_of_local_port(port)
    if inode is None:
        return False
    try:
        return any(os.readlink(f) == f"socket:[{inode}]" for f in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:  # the process or the descriptor has just gone
        return False


@dataclass(eq=False)
class Link:
    port: int  # the client's
    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    swallow: bool = False

    def close(self) -> None:
        self.client.transport.abort()
        self.server.transport.abort()


@dataclass
class Proxy:
    target_port: int
    port: int = 0
    links: set[Link] = field(default_factory=set)
    cut_until: dict[int, float] = field(default_factory=dict)  # pid -> monotonic seconds
    swallowed: int = 0
    _server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for link in list(self.links):
            link.close()

    def cut(self, pid: int, seconds: float) -> int:
        """Drop the links of ``pid`` and refuse it new ones for a while. Returns how many were dropped."""
        self.cut_until[pid] = time.monotonic() + seconds
        return self._drop(pid)

    def lose_reply(self, pid: int) -> int:
        """The next bytes that the server sends on each link of ``pid`` vanish, and the link with them."""
        mine = [link for link in self.links if holds_port(pid, link.port)]
        for link in mine:
            link.swallow = True
        return len(mine)

    def _drop(self, pid: int) -> int:
        mine = [link for link in self.links if holds_port(pid, link.port)]
        for link in mine:
            link.close()
        return len(mine)

    def _is_cut(self, port: int) -> bool:
        now = time.monotonic()
        self.cut_until = {pid: until for pid, until in self.cut_until.items() if until > now}
        return any(holds_port(pid, port) for pid in self.cut_until)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        port = writer.get_extra_info("peername")[1]
        try:
            if self._is_cut(port):
                raise ConnectionRefusedError
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self.target_port)
        except OSError:
            writer.transport.abort()
            return
        link = Link(port, writer, server_writer)
        self.links.add(link)
        try:
            await asyncio.gather(self._requests(reader, link), self._replies(server_reader, link))
        finally:
            self.links.discard(link)
            link.close()

    async def _requests(self, reader: asyncio.StreamReader, link: Link) -> None:
        with suppress(OSError):
            while chunk := await reader.read(1 << 16):
                link.server.write(chunk)
                await link.server.drain()
        link.close()

    async def _replies(self, reader: asyncio.StreamReader, link: Link) -> None:
        with suppress(OSError):
            while chunk := await reader.read(1 << 16):
                if link.swallow:
                    self.swallowed += 1
                    break
                link.client.write(chunk)
                await link.client.drain()
        link.close()
