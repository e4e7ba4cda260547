"""The served models: read from the registry, each with its bus and its outlet, opened at first use.

A model is ready while a worker serves and the leader's beat changes. Both are read about once a second; a leader or a
worker whose beat has not been seen to change does not count: after all was killed, their records still say "serving".
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from gateway.metrics import gone, seen
from gateway.streams import Outlet
from gateway.tokenizer import TokenizerProcess
from protocol.bus import GatewayBus
from protocol.errors import HeadraceError, InvalidRequest, NotFound, ServiceError, StartError, Unavailable
from protocol.messages import Job, ModelCard
from protocol.records import RequestRecord
from protocol.routing.store import RoutingStore, decode
from protocol.routing.table import Routing

log = logging.getLogger("headrace.gateway")

REFRESH_S = 3.0  # how often the registry is read
MISS_S = 0.5  # the same for a name that is not in it
LOOK_S = 0.5  # how often workers and leaders are read
STILL_S = 6.0  # a leader whose beat has not changed for so long counts as dead
PATIENCE_S = 3.0  # how long a request waits for Redis to come back
MOST_MOVES = 64  # of one request
ACCEPTS_AT_ONCE = 64  # each takes a connection


class Model:
    """One served model as this process sees it."""

    def __init__(self, url: str, card: ModelCard, name: str) -> None:
        self.card = card
        self.bus = GatewayBus(url, card.model, patience=PATIENCE_S)
        self.outlet = Outlet(self.bus, name)
        self.accepting = asyncio.Semaphore(ACCEPTS_AT_ONCE)
        self.workers = 0  # serving now
        self.waiting_requests, self.waiting_tokens, self.rate = 0, 0, 0.0  # as the leader told it last
        self._beat: tuple[int, int] | None = None
        self._first_beats: dict[str, tuple[int, int]] = {}  # of each worker, when it was first seen: (gen, beat)
        self._moved: float | None = None  # when the leader's beat was last seen to change
        self._tokenizer: TokenizerProcess | None = None
        self._tokenizer_of = 0  # the card's time of creation
        self._making_tokenizer = asyncio.Lock()

    @property
    def name(self) -> str:
        return self.card.model

    async def open(self) -> None:
        """Connect and subscribe. Unavailable if the server cannot be used now."""
        try:
            await self.bus.connect()
        except StartError as error:
            raise Unavailable(str(error)) from None
        await self.outlet.start()

    async def close(self) -> None:
        if self._tokenizer is not None:
            self._tokenizer.close()
        await self.outlet.close()
        await self.bus.close()

    # -------------------------------------------------------------- readiness

    @property
    def led(self) -> bool:
        return self._moved is not None and time.monotonic() - self._moved < STILL_S

    @property
    def ready(self) -> bool:
        return self.workers > 0 and self.led

    @property
    def load(self) -> float:
        """Waiting requests for each worker."""
        return self.waiting_requests / max(1, self.workers)

    async def look(self, depth: bool = False) -> None:
        """Read which workers serve and whether the leader's beat changes; with ``depth`` also what waits."""
        try:
            leader = await self.bus.read_leader()
            workers = await self.bus.list_workers()
            if depth:
                self.waiting_requests, self.waiting_tokens, self.rate = await self.bus.read_depth()
        except HeadraceError:
            self.workers = 0
            seen(self.name, 0)
            return
        before = self._first_beats
        self._first_beats = {w.wid: before.get(w.wid, (w.gen, w.beat)) for w in workers}
        self.workers = sum(w.state == "serving" and self._first_beats[w.wid] != (w.gen, w.beat) for w in workers)
        seen(self.name, self.workers)
        beat = (leader.epoch, leader.beat)
        if self._beat is not None and beat != self._beat:
            self._moved = time.monotonic()
        self._beat = beat

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

    def __init__(self, url: str, name: str) -> None:
        self.url = url
        self.name = name
        self.cards: dict[str, ModelCard] = {}
        self.routing = Routing()
        self.reachable = False
        self._open: dict[str, Model] = {}
        self._opening: dict[str, asyncio.Lock] = {}
        self._refreshing = asyncio.Lock()
        self._read_at = float("-inf")
        self._tasks: list[asyncio.Task[None]] = []
        self._store = RoutingStore(url, PATIENCE_S)
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
        for model in await self.opened():
            record = await model.bus.read_request(rid)
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
            found = await model.bus.read_request(rid)
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
            self._read_at = time.monotonic()

    async def _read_routing(self) -> None:
        """The table of routes. One that cannot be read leaves the last one in force."""
        try:
            raw = await self._store.read()
            if raw != self._routing_raw:
                self._routing_raw = raw
                self.routing = decode(raw)
        except (ServiceError, StartError) as error:
            log.error("the table of routes cannot be read, the last one stays: %s", error)

    def up(self, model: Model) -> bool:
        """Whether a request is answered: by a worker that serves, or by one that is started for it."""
        terms = self.routing.models.get(model.name)
        return model.ready or (model.led and terms is not None and terms.sleeps)

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
                    await (await self.get(name)).look(depth=bool(self.routing.routes))
                except HeadraceError:
                    continue
                except Exception:
                    log.exception("looking at a model failed")
            await asyncio.sleep(LOOK_S)
