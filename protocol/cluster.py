"""Redis Cluster: which node holds a key. All keys of a model share a slot, so a connection to that one node will do.

``redis+cluster://[user:password@]host:port[,host:port...]`` (over TLS ``rediss+cluster://``) names some of the nodes;
the others are found from any of them.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import SplitResult, urlsplit, urlunsplit

from redis.crc import key_slot
from redis.exceptions import ConnectionError as LostConnection

MARK = "+cluster"
DEFAULT_PORT = 6379

Ask = Callable[..., Awaitable[Any]]  # (node's URL, command...) -> its reply


def is_cluster(url: str) -> bool:
    return url.partition("://")[0].endswith(MARK)


def seeds(url: str) -> list[str]:
    """A URL for each node that ``url`` names; of a single server just itself."""
    if not is_cluster(url):
        return [url]
    parts = urlsplit(url)
    user, _, hosts = parts.netloc.rpartition("@")
    return [_node_url(parts, user, host) for host in hosts.split(",")]


async def node_of(url: str, key: str, ask: Ask) -> str:
    """URL of the primary that holds ``key``. LostConnection if no node answers, or none holds it now."""
    slot = key_slot(key.encode())
    for first, last, node in await _ranges(url, ask):
        if first <= slot <= last:
            return node
    raise LostConnection(f"no node of the cluster holds slot {slot} now")


async def primaries(url: str, ask: Ask) -> list[str]:
    """URLs of all nodes that hold slots; of a single server just its own."""
    if not is_cluster(url):
        return [url]
    return sorted({node for _, _, node in await _ranges(url, ask)})


class Placement:
    """Which node holds which key; of a single server always the same."""

    def __init__(self, ranges: list[tuple[int, int, str]]) -> None:
        self._ranges = ranges
        self.nodes = sorted({node for _, _, node in ranges})

    def __call__(self, key: str) -> str:
        slot = key_slot(key.encode())
        return next((node for first, last, node in self._ranges if first <= slot <= last), "")


async def placement(url: str, ask: Ask) -> Placement:
    """As it is now."""
    return Placement(await _ranges(url, ask) if is_cluster(url) else [(0, 16383, url)])


async def _ranges(url: str, ask: Ask) -> list[tuple[int, int, str]]:
    """(first slot, last slot, URL of their primary) from the first node that answers."""
    lost: Exception = LostConnection("the URL names no node")
    for seed in random.sample(named := seeds(url), len(named)):
        try:
            reply = await ask(seed, "CLUSTER", "SLOTS")
        except (LostConnection, TimeoutError, OSError) as error:
            lost = error
            continue
        parts, found = urlsplit(seed), []
        user = parts.netloc.rpartition("@")[0]
        for first, last, (host, port, *_), *_ in reply:
            # a node that does not know its own address has the one it was asked at
            name = host.decode() if host not in (None, b"", b"?") else parts.hostname or ""
            found.append((first, last, _node_url(parts, user, f"[{name}]:{port}" if ":" in name else f"{name}:{port}")))
        return found
    raise lost


def _node_url(parts: SplitResult, user: str, place: str) -> str:
    if ":" not in place.rpartition("]")[2]:
        place += f":{DEFAULT_PORT}"
    netloc = f"{user}@{place}" if user else place
    return urlunsplit((parts.scheme.removesuffix(MARK), netloc, "", parts.query, ""))
