"""Notices that this machine will be taken away soon, as spot instances get them.

An http(s) address is polled in the shape of AWS instance metadata: 404 until there is a notice, 200 from then on, and
where the service asks for a session token (401, IMDSv2) one is fetched first. Anything else is a file: the notice
is that it exists.
https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from urllib.parse import urljoin

import aiohttp

log = logging.getLogger("headrace.worker")

POLL_S = 5.0  # what AWS recommends
TOKEN_TTL_S = 21600


async def wait_for_notice(source: str, poll_s: float = POLL_S) -> None:
    """Return once ``source`` tells of an interruption. A source that does not answer is asked again, for ever."""
    if source.startswith(("http://", "https://")):
        await _poll(source, poll_s)
        return
    path = Path(source.removeprefix("file://"))
    while True:
        if await asyncio.to_thread(path.exists):
            return
        await asyncio.sleep(poll_s)


async def _poll(url: str, poll_s: float) -> None:
    headers: dict[str, str] = {}
    failing = False
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2.0)) as session:
        while True:
            try:
                async with session.get(url, headers=headers) as reply:
                    status = reply.status
                if status == 200:
                    return
                if status == 401:
                    headers = {"X-aws-ec2-metadata-token": await _token(session, url)}
                failing = False
            except (aiohttp.ClientError, TimeoutError) as error:
                if not failing:
                    log.warning("the interruption notice cannot be read: %s", type(error).__name__)
                failing = True
            await asyncio.sleep(poll_s)


async def _token(session: aiohttp.ClientSession, url: str) -> str:
    headers = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_TTL_S)}
    async with session.put(urljoin(url, "/latest/api/token"), headers=headers) as reply:
        reply.raise_for_status()
        return await reply.text()
