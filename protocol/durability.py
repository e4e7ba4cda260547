"""Whether a server keeps what it acknowledges: its settings against those that the guarantees need."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from protocol.cluster import is_cluster, primaries
from protocol.connection import Link, ask
from protocol.errors import StoreFailed

# each text says what can be lost, since the reader of the warning has to decide
WANTED = {
    "appendonly": ("yes", "nothing survives a restart of the server"),
    "appendfsync": ("always", "a power cut may take the last second or more"),
    "no-appendfsync-on-rewrite": ("no", "nothing is flushed while the file is rewritten"),
    "maxmemory-policy": ("noeviction", "the server may throw requests and journals away when memory runs short"),
}
HIDDEN = "CONFIG GET is not allowed to us"


async def weaknesses(url: str, patience: float | None) -> list[str]:
    """Settings of the server (in a cluster, of each primary) that are weaker than ours, one sentence each. A server
    that hides its settings is reported as unknown. Unavailable if it does not answer for ``patience`` seconds,
    StoreFailed if it refuses the user."""
    first = Link(url, patience)
    try:
        nodes = await first.repeat(lambda: primaries(url, ask))
        await first.command("PING")
    finally:
        await first.close()
    found = []
    for node in nodes:
        where = f"{urlsplit(node).netloc.rpartition('@')[2]}: " if is_cluster(url) else ""
        link = Link(node, patience)
        try:
            found += [where + weakness for weakness in await _of_one(link)]
        finally:
            await link.close()
    return found


async def _of_one(link: Link) -> list[str]:
    found = []
    for name, (wanted, loss) in WANTED.items():
        try:
            reply: list[Any] = await link.command("CONFIG", "GET", name)
        except StoreFailed:  # an ACL forbids it, or a hosting service has removed the command
            return [f"{HIDDEN}, so these are unknown: {', '.join(WANTED)}"]
        actual = reply[1].decode() if len(reply) > 1 else "unknown"
        if actual != wanted:
            found.append(f"{name} is {actual}, not {wanted}: {loss}")
    return found
