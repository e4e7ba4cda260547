"""Jobs that producers pushed to an alias or a route: handed on to the model that the same table chooses for HTTP.

Every gateway reads the inboxes of all such names, as one consumer group. The model gets the job as it came, under the
producer's id (or the entry's, where there is none), so a push that is handed on twice runs once. Rows and results are
the model's: a producer learns its name from the key `routed:<tenant>:<id>`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

import msgspec

from gateway.auth import Caller
from gateway.models import Models
from gateway.routing.router import Router
from gateway.routing.rules import asked_by
from gateway.routing.slot import PATIENCE_S
from protocol.bus import ProducerBus, VirtualBus
from protocol.errors import HeadraceError, InvalidRequest, NotFound, RequestError, ServiceError, StoreFailed
from protocol.jobs import decode_job
from protocol.messages import Job, body_hash, encode
from protocol.records import InboxEntry

log = logging.getLogger("headrace.gateway")

LOOK_S = 1.0  # how often the table is compared with the inboxes that are read
BLOCK_MS = 5000
AT_ONCE = 64
AGAIN_S = 1.0
REFUSED_S = 30.0  # the server does not let us: its users are older than this release
UNKNOWN_S = 60.0  # how long a push waits for the models that its name means to be there at all
ACCEPTED = InvalidRequest("this name is no model's: push to it, or name a model")


class Pushes:
    def __init__(self, models: Models, router: Router, name: str) -> None:
        self.models = models
        self.router = router
        self.name = name
        self._watch: asyncio.Task[None] | None = None
        self._readers: dict[str, asyncio.Task[None]] = {}
        self._inboxes: dict[str, ProducerBus] = {}

    def start(self) -> None:
        self._watch = asyncio.create_task(self._follow_table())

    async def close(self) -> None:
        tasks = [task for task in (self._watch, *self._readers.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for inbox in self._inboxes.values():
            await inbox.close()

    async def _follow_table(self) -> None:
        while True:
            table = self.models.routing
            names = (table.aliases.keys() | table.routes.keys()) - self.models.cards.keys()
            for name in names - self._readers.keys():
                self._readers[name] = asyncio.create_task(self._read(name))
            for name in self._readers.keys() - names:
                self._readers.pop(name).cancel()
            await asyncio.sleep(LOOK_S)

    async def _read(self, name: str) -> None:
        bus = VirtualBus(self.models.url, name)
        try:
            await bus.open()
            while True:
                try:
                    entries = await bus.read(self.name, AT_ONCE, BLOCK_MS)
                except ServiceError as error:
                    log.warning("pushes to %s cannot be read: %s", name, error)
                    await asyncio.sleep(REFUSED_S if isinstance(error, StoreFailed) else AGAIN_S)
                    continue
                await asyncio.gather(*(self._see_through(bus, name, entry) for entry in entries))
        finally:
            await bus.close()

    async def _see_through(self, bus: VirtualBus, name: str, entry: InboxEntry) -> None:
        """Hand one entry on, however long that takes: it was accepted when it was pushed."""
        since = time.monotonic()
        while True:
            try:
                await self._hand_on(bus, name, entry, patient=time.monotonic() - since < UNKNOWN_S)
                return
            except HeadraceError as error:
                log.warning("a push to %s waits: %s", name, error)
            except Exception:
                log.exception("a push to %s waits", name)
            await asyncio.sleep(AGAIN_S)

    async def _hand_on(self, bus: VirtualBus, name: str, entry: InboxEntry, patient: bool) -> None:
        """``patient``: a name that leads to no model is an error only later, since models may be starting."""
        payload = entry.payload or b""
        try:
            if entry.payload is None:
                raise ACCEPTED
            job = decode_job(payload)
            job.id = job.id or entry.entry_id
            model = await self._where(bus, name, job)
        except RequestError as error:
            if patient and isinstance(error, NotFound):
                raise
            await self._reject(bus, entry, payload, error)
            return
        if model not in self._inboxes:
            self._inboxes[model] = ProducerBus(self.models.url, model, patience=PATIENCE_S)
        await self._inboxes[model].push(_under(job.id, payload))
        await bus.taken(entry.entry_id)

    async def _where(self, bus: VirtualBus, name: str, job: Job) -> str:
        """The model that this push goes to; where it went before, if it came before."""
        assert job.id is not None
        if (before := await bus.decided(job.tenant, job.id)) is not None:
            return before
        steps = await self.router.steps(name, lambda: asked_by(job), Caller(job.tenant), job.id)
        return await bus.decide(job.tenant, job.id, steps[0].name)

    async def _reject(self, bus: VirtualBus, entry: InboxEntry, payload: bytes, error: RequestError) -> None:
        told = {"code": error.wire_code, "message": error.message, "param": error.param}
        to: dict[str, str | None] = {}
        with contextlib.suppress(HeadraceError):
            job = decode_job(payload)
            to = {"tenant": job.tenant, "id": job.id, "reply_to": job.reply_to, "results": job.results}
        await bus.reject(entry.entry_id, payload_hash=body_hash(payload), error=told, **to)


def _under(id: str, payload: bytes) -> bytes:
    """The payload as it came, under the id that makes it run once."""
    said = msgspec.json.decode(payload) if payload[:64].lstrip()[:1] == b"{" else msgspec.msgpack.decode(payload)
    return encode({**said, "id": id})
