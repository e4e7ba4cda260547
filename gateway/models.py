"""The served models: read from the registry, each with its bus and its outlet, opened at first use.

A model is ready while a worker serves and the leader's beat changes. Both are read about once a second; a leader or a
worker whose beat has not been seen to change does not count: after all was killed, their records still say "serving".
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from gateway.metrics import gone, seen
from gateway.routing.slot import PATIENCE_S, Slot
from gateway.streams import Outlet
from gateway.tokenizer import TokenizerProcess
from protocol.bus import GatewayBus, HomeBus
from protocol.errors import HeadraceError, InvalidRequest, NotFound, ServiceError, StartError, Unavailable
from protocol.messages import Job, ModelCard, shard_of
from protocol.records import RequestRecord
from protocol.routing.shards import Shard, ShardStore, choose, first_bytes, served
from protocol.routing.store import RoutingStore, decode
from protocol.routing.table import Routing

log = logging.getLogger("headrace.gateway")

REFRESH_S = 3.0  # how often the registry is read
MISS_S = 0.5  # the same for a name that is not in it
LOOK_S = 0.5  # how often workers and leaders are read
LEAST_LOOKS = 5  # in which a worker that serves is seen to
MOST_MOVES = 64  # of one request


class Model:
    """One served model as this process sees it, with all its shards."""

    def __init__(self, url: str, card: ModelCard, name: str) -> None:
        self.card = card
        self._url, self._channel = url, name
        self.first = Slot(url, Shard(card.model, 0, card.model), name)
        self.slots: dict[int, Slot] = {0: self.first}
        self.served_since: float | None = None  # monotonic, without a pause; None: no worker was seen to serve
        self._looks = 0
        self._tokenizer: TokenizerProcess | None = None
        self._tokenizer_of = 0  # the card's time of creation
        self._making_tokenizer = asyncio.Lock()

    @property
    def name(self) -> str:
        return self.card.model

    @property
    def bus(self) -> GatewayBus:
        """Of the shard that every model has: what is told of the model lies there."""
        return self.first.bus

    @property
    def outlet(self) -> Outlet:
        """Of the same."""
        return self.first.outlet

    async def open(self) -> None:
        """Connect and subscribe. Unavailable if the server cannot be used now."""
        await self.first.open()

    async def close(self) -> None:
        if self._tokenizer is not None:
            self._tokenizer.close()
        for slot in self.slots.values():
            await slot.close()

    # -------------------------------------------------------------- shards

    async def follow(self, shards: Sequence[Shard]) -> None:
        """Take note of the shards that there are now. One that cannot be reached is tried again at the next look."""
        for shard in served(shards):
            slot = self.slots.get(shard.number)
            if slot is None:
                slot = Slot(self._url, shard, self._channel)
                try:
                    await slot.open()
                except HeadraceError as error:
                    log.warning("shard %d of %s cannot be reached: %s", shard.number, self.name, error)
                    await slot.close()
                    continue
            slot.shard = shard
            self.slots[shard.number] = slot

    def slot_of(self, rid: str) -> Slot | None:
        """Where the request of this id lies, if it is one of this model; None: a shard that is not known here."""
        return self.slots.get(shard_of(rid))

    def choose(self, tenant: str, job: Job) -> Slot:
        """Where a new request goes."""
        if len(self.slots) == 1:
            return self.first
        open_slots = [slot for slot in self.slots.values() if slot.shard.open]
        reachable = [slot for slot in open_slots if slot.ready] or open_slots
        least = min(reachable, key=lambda slot: slot.load)
        if least.load == math.inf:
            reachable = [least]
        slot = choose(reachable, lambda s: s.shard.tag, lambda s: s.load, tenant, first_bytes(job))
        slot.sent += 1
        return slot

    # -------------------------------------------------------------- readiness

    @property
    def led(self) -> bool:
        return any(slot.led for slot in self.slots.values())

    @property
    def ready(self) -> bool:
        return any(slot.ready for slot in self.slots.values())

    @property
    def workers(self) -> int:
        """That serve now."""
        return sum(slot.workers for slot in self.slots.values())

    @property
    def waiting_requests(self) -> int:
        return sum(slot.waiting_requests for slot in self.slots.values())

    @property
    def waiting_tokens(self) -> int:
        return sum(slot.waiting_tokens for slot in self.slots.values())

    @property
    def rate(self) -> float:
        """Tokens per second that come."""
        return sum(slot.rate for slot in self.slots.values())

    @property
    def load(self) -> float:
        """Waiting requests for each worker."""
        return self.waiting_requests / max(1, self.workers)

    @property
    def without_workers(self) -> bool:
        """Whether none serves, as far as was looked long enough to see one's heart beat."""
        return self.served_since is None and self._looks >= LEAST_LOOKS

    async def look(self, depth: bool = False) -> None:
        """Read which workers serve and which leaders live; with ``depth``, or of several shards, also what waits."""
        slots = list(self.slots.values())
        await asyncio.gather(*(slot.look(depth or len(slots) > 1) for slot in slots))
        self._looks += 1
        if self.workers and self.served_since is None:
            self.served_since = time.monotonic()
        elif not self.workers:
            self.served_since = None
        seen(self.name, self.workers)

    # -------------------------------------------------------------- tokens and text

    async def tokenizer(self) -> TokenizerProcess:
        async with self._making_tokenizer:
            made = self._tokenizer
            if made is None or made.closed or self._tokenizer_of != self.card.created:
                raw = await self.bus.read_tokenizer()
                if raw is None:
                    raise Unavailable("the tokenizer of this model is not known here (it has no tokenizer.json)")
                if made is not None:
                    made.close()
                made = self._tokenizer = TokenizerProcess(raw)
                self._tokenizer_of = self.card.created
            return made

    async def tokenize(self, text: str, special: bool) -> tuple[int, msgspec.Raw]:
        """How many ids, and the ids as a JSON array."""
        return await (await self.tokenizer()).encode(text, special)

    async def token_strings(self, ids: Sequence[int]) -> msgspec.Raw:
        """A JSON array: each token as the vocabulary has it."""
        return await (await self.tokenizer()).strings(ids)

    async def detokenize(self, ids: list[int], skip_special: bool = False) -> str:
        return await (await self.tokenizer()).decode(ids, skip_special)

    async def prompt_texts(self, job: Job) -> list[str]:
        """The prompts of a job as texts, for echo."""
        texts = []
        for prompt in job.prompts():
            texts.append(prompt if isinstance(prompt, str) else await self.detokenize(prompt))
        return texts


class Models:
    """All models of the registry. ``name`` is this process's reply channel."""

    def __init__(self, url: str, name: str, home: HomeBus) -> None:
        self.url = url
        self.name = name
        self._home = home
        self.cards: dict[str, ModelCard] = {}
        self.routing = Routing()
        self.reachable = False
        self._open: dict[str, Model] = {}
        self._opening: dict[str, asyncio.Lock] = {}
        self._refreshing = asyncio.Lock()
        self._read_at = float("-inf")
        self._tasks: list[asyncio.Task[None]] = []
        self._store = RoutingStore(url, PATIENCE_S)
        self._shard_store = ShardStore(url, PATIENCE_S)
        self._shards: dict[str, list[Shard]] = {}  # of models that have several
        self._routing_raw: bytes | None = None

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._refresh_often()), asyncio.create_task(self._look_often())]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for model in self._open.values():
            await model.close()
        await self._store.close()
        await self._shard_store.close()

    async def get(self, name: str) -> Model:
        """The model, opened. NotFound (model_not_found), or Unavailable."""
        if name not in self.cards:
            await self.refresh(MISS_S)
        card = self.cards.get(name)
        if card is None:
            if not self.reachable:
                raise Unavailable("the queue cannot be reached")
            raise NotFound("this model is not served here", param="model", code="model_not_found")
        model = self._open.get(name)
        if model is None:
            model = await self._opened(card)
        model.card = card
        return model

    async def the_one(self, name: str | None) -> Model:
        """The model of this name, or the only one there is."""
        if name is None:
            await self.refresh(REFRESH_S)
            if len(self.cards) > 1:
                raise InvalidRequest("model is required where several are served", param="model")
            name = next(iter(self.cards), None)
            if name is None:
                raise Unavailable("no model is served yet")
        return await self.get(name)

    async def listed(self) -> list[ModelCard]:
        await self.refresh(MISS_S)
        return sorted(self.cards.values(), key=lambda card: card.model)

    async def find_request(self, rid: str) -> tuple[Model, RequestRecord] | None:
        """The request of this id, of whichever model."""
        models = await self.opened()
        if any(model.slot_of(rid) is None for model in models):  # another gateway may know a shard that is new
            await self.refresh(MISS_S)
        for model in models:
            slot = model.slot_of(rid)
            record = await slot.bus.read_request(rid) if slot is not None else None
            if record is not None:
                return await self.where_it_runs(model, record)
        if not self.reachable:  # a gateway that has just started may not know any model yet
            raise Unavailable("the queue cannot be reached")
        return None

    async def where_it_runs(self, model: Model, record: RequestRecord) -> tuple[Model, RequestRecord] | None:
        """The model and record that answer, where the request was moved (`move`); None if that one is gone."""
        for _ in range(MOST_MOVES):
            if record.moved is None:
                return model, record
            name, rid = record.moved
            try:
                model = self._open.get(name) or await self.get(name)
            except NotFound:
                return None
            slot = model.slot_of(rid)
            found = await slot.bus.read_request(rid) if slot is not None else None
            if found is None:
                return None
            record = found
        return None

    async def opened(self) -> list[Model]:
        """All models, those that have just left the registry too: they see their requests through."""
        await self.refresh(REFRESH_S)
        return [await self.get(name) for name in list(self.cards)] + [
            model for name, model in self._open.items() if name not in self.cards
        ]

    async def refresh(self, older_than_s: float = 0.0) -> None:
        """Read the registry unless it was read within ``older_than_s``. While Redis is unreachable the last cards
        stay."""
        async with self._refreshing:
            if time.monotonic() - self._read_at < older_than_s:
                return
            try:
                self.cards = await GatewayBus.models(self.url, patience=PATIENCE_S)
                self.reachable = True
            except ServiceError:
                self.reachable = False
            else:
                await self._read_routing()
                await self._read_shards()
            self._read_at = time.monotonic()

    async def _read_routing(self) -> None:
        """The table of routes. One that cannot be read leaves the last one in force."""
        try:
            raw = await self._store.read()
            if raw != self._routing_raw:
                self._routing_raw = raw
                self.routing = decode(raw)
            await self._home.tell_terms(self.routing.money())
        except (ServiceError, StartError) as error:
            log.error("the table of routes cannot be read, the last one stays: %s", error)

    async def _read_shards(self) -> None:
        """Which shards the models have; where that cannot be read, those that were known."""
        with contextlib.suppress(ServiceError):
            self._shards = await self._shard_store.read_all()
        for model in self._open.values():
            await model.follow(self._shards.get(model.name, ()))

    def up(self, model: Model) -> bool:
        """Whether a request is answered: by a worker that serves, or by one that is started for it."""
        return model.ready or (model.led and self.sleeps(model))

    def sleeps(self, model: Model) -> bool:
        """Whether it has no worker since nobody has asked for it: the next request has one started."""
        terms = self.routing.models.get(model.name)
        return terms is not None and terms.sleeps and not model.workers

    def readiness(self) -> dict[str, dict[str, Any]]:
        return {
            name: {"ready": self.up(model), "workers": model.workers, "scheduler": model.led}
            for name, model in sorted(self._open.items())
            if name in self.cards
        }

    async def _opened(self, card: ModelCard) -> Model:
        async with self._opening.setdefault(card.model, asyncio.Lock()):
            model = self._open.get(card.model)
            if model is None:
                model = Model(self.url, card, self.name)
                try:
                    await model.open()
                    await model.follow(self._shards.get(card.model, ()))
                except BaseException:
                    await model.close()
                    raise
                self._open[card.model] = model
            return model

    async def _refresh_often(self) -> None:
        while True:
            await self.refresh()
            await asyncio.sleep(REFRESH_S if self.cards else MISS_S)

    async def _look_often(self) -> None:
        while True:
            for name in self._open.keys() - self.cards.keys():
                gone(name)
            for name in list(self.cards):
                try:
                    model = await self.get(name)
                    await model.look(depth=bool(self.routing.routes))
                    if self.sleeps(model):
                        gone(name)
                except HeadraceError:
                    continue
                except Exception:
                    log.exception("looking at a model failed")
            await asyncio.sleep(LOOK_S)
