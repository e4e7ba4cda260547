"""The atomic operations: Lua sources from protocol/lua, completed with what they share, and their digests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files

NAMES = (
    "accept", "admit", "attach", "cancel", "claim", "collect", "commit", "depth", "divert", "finish", "heartbeat",
    "join", "keep_answer", "lead", "move", "plan", "receive", "recount", "register", "reject", "release", "renew_lead",
    "requeue", "reserve", "retire", "retire_shard", "settle", "shed", "trim", "unclaim", "unreserve", "void",
)  # fmt: skip
INCLUDES: dict[str, tuple[str, ...]] = {
    "accept": ("_channels", "_tenants"),
    "admit": ("_tenants",),
    "attach": ("_channels",),
    "commit": ("_rows",),
    "finish": ("_rows",),
    "keep_answer": ("_answers",),
    "move": ("_rows",),
    "reserve": ("_limits",),
    "settle": ("_limits",),
    "shed": ("_answers",),
    "unreserve": ("_limits",),
}


@dataclass(frozen=True)
class Script:
    name: str
    source: bytes
    sha: bytes


def read_source(name: str) -> str:
    return files("protocol").joinpath("lua", f"{name}.lua").read_text()


def complete(name: str, text: str, *, sharded: bool = False) -> Script:
    """A script from the text of its own part: with the shared parts in front, publishing sharded in a cluster."""
    publish, numsub = ("SPUBLISH", "SHARDNUMSUB") if sharded else ("PUBLISH", "NUMSUB")
    parts = [f"local PUBLISH, NUMSUB = '{publish}', '{numsub}'\n", read_source("_prelude")]
    parts += [read_source(shared) for shared in INCLUDES.get(name, ())]
    return from_source(name, "".join([*parts, text]))


def from_source(name: str, text: str) -> Script:
    source = text.encode()
    return Script(name, source, hashlib.sha1(source, usedforsecurity=False).hexdigest().encode())


def load(names: Iterable[str] = NAMES, *, sharded: bool = False) -> dict[str, Script]:
    """The scripts of these names."""
    return {name: complete(name, read_source(name), sharded=sharded) for name in names}
