"""Every Redis key and channel name, in one place.

One hash tag per model: all keys of a model share one cluster slot, so every script may touch any of
them. The one exception is the registry of models, which no script touches.
"""

from __future__ import annotations

import re

from protocol.errors import InvalidRequest

MODEL_NAME = re.compile(r"[A-Za-z0-9._:/-]{1,128}")
TAG = re.compile(MODEL_NAME.pattern + r"(#[1-9][0-9]{0,3}\.[0-9a-f]{1,8})?")  # of a model's slot, or of a shard's
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")

HOME = "headrace:{@home}:"  # prefix of what is not of one model: its tag is no model's name
REGISTRY = "headrace:models"  # hash: served model name -> ModelCard
ROUTING = "{headrace:models}:routing"  # string: the table of aliases, routes, ...; in the slot of the registry
SHARDS = "{headrace:models}:shards"  # hash: `<model>#<k>` -> state and tag of shard k; beside the registry
GROUP = "scheduler"  # the one consumer group of the inbox


def check_name(value: str, field: str) -> str:
    """Return ``value`` if it may stand inside a key; raise InvalidRequest naming ``field`` otherwise."""
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise InvalidRequest(f"{field} must match [A-Za-z0-9_-]{{1,64}}", param=field)
    return value


def claim_name(tenant: str, key: str, name: str) -> str:
    """Of the claim of an idempotency key: ``name`` is the model as the client wrote it. Below HOME."""
    check_name(tenant, "tenant")
    if not MODEL_NAME.fullmatch(name):
        raise InvalidRequest("model must match [A-Za-z0-9._:/-]{1,128}", param="model")
    return f"claim:{tenant}:{check_name(key, 'id')}:{name}"


class Keys:
    """Key names of one model, or of one of its shards: ``model`` is the tag (protocol/routing/shards.py). Strings,
    built once; the per-request ones are methods."""

    def __init__(self, model: str) -> None:
        if not TAG.fullmatch(model):
            raise InvalidRequest("model must match [A-Za-z0-9._:/-]{1,128}", param="model")
        self.model = model
        self.shard = int(model.rpartition("#")[2].partition(".")[0]) if "#" in model else 0
        self.prefix = prefix = f"headrace:{{{model}}}:"
        self.jobs = prefix + "jobs"  # stream, group `scheduler`: the inbox
        self.live = prefix + "live"  # hash: unfinished rid -> reply channel names, space separated
        self.depth = prefix + "depth"  # hash: waiting requests and tokens, written by the leader
        self.leader = prefix + "leader"  # hash: epoch, owner, beat, gen counter, wire
        self.workers = prefix + "workers"  # set: wids that have a `w:` key
        self.moving = prefix + "moving"  # stream: pushes that leave a shard that drains
        self.events = prefix + "events"  # stream: hints to the scheduler
        self.dead = prefix + "dead"  # stream: dead letters
        self.tenants = prefix + "tenants"  # set: tenants that have unfinished requests
        self.tokenizer = prefix + "tokenizer"  # string: tokenizer.json, for /tokenize
        self.tokenizer_info = prefix + "tokenizer_info"  # string: JSON, for /tokenizer_info

    def answer(self, key: str) -> str:
        """Hash: the journals of one cached answer."""
        return f"{self.prefix}c:{key}"

    def request(self, rid: str) -> str:
        return f"{self.prefix}r:{rid}"

    def journal(self, rid: str, choice: int) -> str:
        return f"{self.prefix}j:{rid}:{choice}"

    def idempotency(self, tenant: str, key: str) -> str:
        return f"{self.prefix}idem:{tenant}:{key}"

    def routed(self, tenant: str, id: str) -> str:
        """String: the model to which a push to this name, which is no model's, went."""
        return f"{self.prefix}routed:{tenant}:{id}"

    def running(self, tenant: str) -> str:
        """Set of the tenant's rids that have not ended."""
        return f"{self.prefix}run:{tenant}"

    def worker(self, wid: str) -> str:
        return f"{self.prefix}w:{wid}"

    def plans(self, wid: str) -> str:
        return f"{self.prefix}plans:{wid}"

    def out(self, name: str) -> str:
        return f"{self.prefix}out:{name}"

    def results(self, name: str) -> str:
        return f"{self.prefix}results:{name}"
