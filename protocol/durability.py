"""Whether a server keeps what it acknowledges: its settings against those that the guarantees need."""

from __future__ import annotations

from typing import Any

from protocol.connection import Link
from protocol.errors import StoreFailed

# what each protects from is told with it: the warning is read by somebody who has to decide
WANTED = {
    "appendonly": ("yes", "nothing survives a restart of the server"),
    "appendfsync": ("always", "a power cut may take the last second or more"),
    "no-appendfsync-on-rewrite": ("no", "nothing is flushed while the file is rewritten"),
    "maxmemory-policy": ("noeviction", "the server may throw requests and journals away when memory runs short"),
}


async def weaknesses(link: Link) -> list[str]:
    """Settings of the server that are weaker than ours, one sentence each. A server that hides its settings is told
    by what is unknown. Waits for the server as long as the link's patience lasts, then raises Unavailable."""
    found = []
    for name, (wanted, loss) in WANTED.items():
        try:
            reply: list[Any] = await link.command("CONFIG", "GET", name)
        except StoreFailed:  # an ACL forbids it, or a hosting service has taken the command away
            names = ", ".join(WANTED)
            return [f"CONFIG GET is not allowed here, so these are unknown: {names}"]
        actual = reply[1].decode() if len(reply) > 1 else "unknown"
        if actual != wanted:
            found.append(f"{name} is {actual}, not {wanted}: {loss}")
    return found
