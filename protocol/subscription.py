"""The live tail of one channel: it tells when it may have missed something, and never ends by itself."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from protocol.connection import Link, checked, read_reply
from protocol.errors import ServiceError
from protocol.messages import Row, decode_rows

PING_EVERY_S = 5.0  # a silent subscription is asked whether it still lives


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
                if message is None:  # silence: ask, and hear at least the answer before the next silence
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
                except msgspec.DecodeError:  # not ours; if it took the place of ours, the journals know
                    rows = []
                yield rows

    async def _start_again(self) -> None:
        """As `start`, for as long as it takes: nobody waits here who could be told of an outage."""
        while not self._closed:
            try:
                await self.start()
            except ServiceError:
                await asyncio.sleep(random.uniform(0.1, 0.5))
            else:
                return
