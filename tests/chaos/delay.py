"""A slow link: hands bytes through, each some time after it came. The kernel's netem is not everywhere.

python -m tests.chaos.delay LISTEN_HOST:PORT TO_HOST:PORT SECONDS
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress


async def _hand_through(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seconds: float) -> None:
    """The order stays; what comes meanwhile is on its way too, so the link is slow and not narrow."""
    loop = asyncio.get_running_loop()
    on_the_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

    async def arrive() -> None:
        while True:
            at, piece = await on_the_way.get()
            await asyncio.sleep(max(0.0, at - loop.time()))
            if not piece:
                writer.close()
                return
            writer.write(piece)
            await writer.drain()

    async def leave() -> None:
        piece = b"-"
        while piece:
            try:
                piece = await reader.read(1 << 16)
            except OSError:
                piece = b""
            on_the_way.put_nowait((loop.time() + seconds, piece))

    with suppress(OSError):
        await asyncio.gather(arrive(), leave())


async def run(listen: tuple[str, int], to: tuple[str, int], seconds: float) -> None:
    async def met(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(*to)
        except OSError:
            writer.close()
            return
        await asyncio.gather(
            _hand_through(reader, far_writer, seconds), _hand_through(far_reader, writer, seconds)
        )  # fmt: skip

    async with await asyncio.start_server(met, *listen) as server:
        await server.serve_forever()


def address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host, int(port)


if __name__ == "__main__":
    asyncio.run(run(address(sys.argv[1]), address(sys.argv[2]), float(sys.argv[3])))
