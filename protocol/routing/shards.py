"""The shards of a model: slots that its requests are spread over, each what a model of one slot is, with a leader and
workers of its own.

Shard 0 has the model's name for its tag, as every model has had; others have `MODEL#k.salt`, the salt chosen so that
the slot lies on the primary that holds the fewest of the model's shards. A rid tells its shard (`protocol.messages`).
Which shards there are is a hash in the registry's slot, `{headrace:models}:shards`: `MODEL#k` -> state and tag. Numbers
are never used again.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from protocol import cluster
from protocol.connection import Link, ask
from protocol.errors import InvalidRequest
from protocol.keys import MODEL_NAME, REGISTRY, SHARDS, Keys
from protocol.messages import Job
from protocol.records import fields_of

MOST_SHARDS = 1000
FIRST_BYTES = 1024  # of a prompt that is a text or ids; of a chat all up to the first message of the user
SLACK = 2.0  # waiting requests for each worker by which a shard may exceed the least loaded one and keep its own
STATES = ("open", "draining", "retired")

S = TypeVar("S")


@dataclass(frozen=True)
class Shard:
    """``state``: open; draining: what it has ends there, nothing new is sent to it; retired: its inbox is closed."""

    model: str
    number: int
    tag: str
    state: str = "open"

    @property
    def open(self) -> bool:
        return self.state == "open"

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.model}#{self.number}" if self.number else self.model


class ShardStore:
    """The shards of one server's models. Calls repeat for ``patience`` seconds, then raise Unavailable."""

    def __init__(self, url: str, patience: float | None = 5.0) -> None:
        self.url = url
        self._link = Link(url, patience, REGISTRY)

    async def close(self) -> None:
        await self._link.close()

    async def read_all(self) -> dict[str, list[Shard]]:
        """Of each model that has more than one, in the order of their numbers: 0 first."""
        found: dict[str, list[Shard]] = {}
        for field, value in fields_of(await self._link.command("HGETALL", SHARDS)).items():
            model, _, number = field.decode().rpartition("#")
            state, tag = value.decode().split(" ")
            found.setdefault(model, [Shard(model, 0, model)]).append(Shard(model, int(number), tag, state))
        for shards in found.values():
            shards.sort(key=lambda shard: shard.number)
        return found

    async def read(self, model: str) -> list[Shard]:
        """Of one model; at least shard 0."""
        return (await self.read_all()).get(model, [Shard(model, 0, model)])

    async def create(self, model: str, count: int) -> list[Shard]:
        """See to it that so many are open. InvalidRequest if there are more."""
        while True:
            shards = await self.read(model)
            missing = count - sum(shard.open for shard in shards)
            if missing < 0:
                raise InvalidRequest(f"{model} has {count - missing} open shards: drain some first (headrace shards)")
            if not missing:
                return shards
            number = shards[-1].number + 1
            tag = await self._tag(model, number, shards)
            await self._link.command("HSETNX", SHARDS, f"{model}#{number}", f"open {tag}")  # else somebody else did

    async def set_state(self, shard: Shard, state: str) -> None:
        await self._link.command("HSET", SHARDS, f"{shard.model}#{shard.number}", f"{state} {shard.tag}")

    async def _tag(self, model: str, number: int, shards: Sequence[Shard]) -> str:
        """A tag whose slot lies on the primary with the fewest of these shards."""
        node_of = await cluster.placement(self.url, ask)
        held = collections.Counter(dict.fromkeys(node_of.nodes, 0))
        held.update(node_of(Keys(shard.tag).leader) for shard in shards if shard.state != "retired")
        fewest = min(held.values())
        for salt in itertools.count():
            tag = f"{model}#{number}.{salt:x}"
            if held[node_of(Keys(tag).leader)] == fewest:
                return tag
        raise AssertionError("unreachable")


def served(shards: Iterable[Shard]) -> list[Shard]:
    """Those that need a leader."""
    return [shard for shard in shards if shard.state != "retired"]


def check_model(name: str) -> None:
    if not MODEL_NAME.fullmatch(name):
        raise InvalidRequest("model must match [A-Za-z0-9._:/-]{1,128}", param="model")


# ------------------------------------------------------------------ choosing


def first_bytes(job: Job) -> bytes:
    """What the turns of a conversation have in common, and most conversations have not: of a chat all up to the first
    message of the user, of another prompt its first bytes."""
    if job.messages is None:
        prompt = job.prompts()[0]
        whole = prompt.encode() if isinstance(prompt, str) else msgspec.msgpack.encode(prompt)
        return whole[:FIRST_BYTES]
    begin = list(itertools.takewhile(lambda message: message.get("role") != "user", job.messages))
    return msgspec.msgpack.encode(job.messages[: len(begin) + 1])


def choose(shards: Sequence[S], tags: Callable[[S], str], load: Callable[[S], float], tenant: str, first: bytes) -> S:
    """By rendezvous hash: each of ``shards`` draws a number from its tag, the tenant and ``first``, and the highest
    wins; but one on which clearly more waits than on the least loaded is passed over. ``load``: waiting requests for
    each worker. Every gateway chooses the same, as long as nothing waits; a shard that comes or goes changes only what
    it wins or had."""
    most = min(map(load, shards)) + SLACK
    salt = hashlib.blake2b(tenant.encode() + b"\0" + first, digest_size=16).digest()

    def drawn(shard: S) -> bytes:
        return hashlib.blake2b(tags(shard).encode(), key=salt, digest_size=8).digest()

    return max((shard for shard in shards if load(shard) <= most), key=drawn)
