"""What a gateway, or a client that works as one, may do: accept, follow, attach and cancel requests."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import ClassVar

import msgspec

from protocol import records
from protocol.bus.base import RequestReads, job_fingerprint
from protocol.bus.producer import ProducerBus
from protocol.connection import Argument, Link, OutOfMemory
from protocol.errors import Conflict, NotFound, Overloaded, Unavailable, Voided
from protocol.keys import REGISTRY, check_name
from protocol.levels import job_level, plainer
from protocol.messages import Job, ModelCard, encode
from protocol.records import Accepted, Limits, Reply, RequestRecord

SHED_AT_ONCE = 32  # cached answers
POINTER_STAYS_MS = 7 * 86_400_000  # longer than a request that was moved runs

_card_decoder = msgspec.msgpack.Decoder(ModelCard)


class GatewayBus(RequestReads, ProducerBus):
    """The calls of a gateway."""

    SCRIPTS: ClassVar[tuple[str, ...]] = ("accept", "attach", "cancel", "move", "shed", "void")

    async def _accept(self, *args: Argument) -> Reply:
        """Cached answers go before any request is refused for want of memory."""
        while True:
            try:
                return await self._run("accept", *args, key=self.keys.live)
            except OutOfMemory:
                if not await self.shed(SHED_AT_ONCE):
                    raise

    async def accept(
        self,
        job: Job,
        *,
        rid: str,
        idempotency: str | None = None,
        reply_to: str | None = None,
        limits: Limits = Limits(),  # noqa: B008 (immutable)
        prompt_tokens: int = 0,
        reserved: int | None = None,
        fingerprint: str | None = None,
        claimed: bool = False,
    ) -> Accepted:
        """Make ``job`` durable. Raises Overloaded (with retry_after), Conflict (same key, other body), Unavailable.
        ``reserved``: tokens of its reservation in the home slot (`HomeBus.accept` makes one and calls this); None:
        there is none.

        Safe to repeat with the same ``rid``. ``fingerprint`` tells whether two bodies under one idempotency key are
        the same; by default it is the hash of the job without its view and reply channel. ``claimed``: ``rid`` is that
        of a claim which another call made (HomeBus), so the request may be there already. Voided: the claim was freed.
        """
        channel = reply_to or job.reply_to or ""
        idem = self._idempotency(job.tenant, idempotency) if idempotency else ""
        bounds = (limits.requests, limits.tokens, limits.tenant_requests, limits.tenant_tokens)
        while True:
            reply = await self._accept(
                *(rid, job.choices, job.tenant, encode(job), fingerprint or job_fingerprint(job)),
                *(int((job.timeout_s or 0) * 1000), channel, job.results or "", job.id or "", idem, prompt_tokens),
                *("" if bound is None else bound for bound in (*bounds, reserved)),
                job_level(job),
                int(claimed),
            )
            if reply != [b"older"] or job_level(plainer(job)) == job_level(job):
                break
            job = plainer(job)
        match reply:
            case [b"ok", _]:
                return Accepted(rid, joined=False, attached=int(claimed))
            case [b"joined", owner, attached]:
                return Accepted(owner.decode(), joined=True, attached=attached)
            case [b"void"]:
                raise Voided("this request waited too long to be accepted; send it again", retry_after=1.0)
            case [b"conflict"]:
                raise Conflict("this idempotency key was used with another body", param="Idempotency-Key")
            case [b"full"]:
                raise Overloaded("this request has as many readers as it may", retry_after=1.0)
            case [b"busy", waiting, rate]:
                again = _retry_after(float(waiting), float(rate))
                raise Overloaded("too much work is waiting", retry_after=again)
            case [b"older"]:
                raise Unavailable("the scheduler is being updated and cannot read this request yet", retry_after=5.0)
        raise AssertionError(f"accept replied {reply!r}")

    async def cancel(self, rid: str, tenant: str, *, reason: str = "abort", attached: int | None = None) -> bool:
        """Mark for ending + hint. With ``attached``: void if the attach count has grown. False: nothing to cancel.
        NotFound if there is no such request of this tenant."""
        seen = "" if attached is None else attached
        marked = await self._run("cancel", rid, tenant, reason, seen, key=self.keys.live)
        if marked < 0:
            raise NotFound("no such request", param="id")
        return bool(marked)

    async def move(self, rid: str, tenant: str, model: str, rid_there: str) -> bool:
        """End a request here, since ``model`` has accepted it too as ``rid_there``: if nothing of it was said yet. Its
        record points there from now on. False: it stays."""
        to = f"{model} {rid_there}"
        return bool(await self._run("move", rid, tenant, to, POINTER_STAYS_MS, key=self.keys.live) == b"moved")

    async def forget_pointer(self, rid: str, tenant: str, idempotency: str | None) -> None:
        """Free what `move` has left of a request, once the one that took its place is gone."""
        keys = [self.keys.request(rid), *([self.keys.idempotency(tenant, idempotency)] if idempotency else [])]
        await self._link.pipeline([("PEXPIRE", key, 1) for key in keys])

    async def attach(self, rid: str, tenant: str, name: str) -> RequestRecord:
        """Add reply channel ``name`` (an ended request needs none). NotFound, or Overloaded at the fifth channel with
        a subscriber."""
        reply = await self._run("attach", rid, tenant, check_name(name, "reply_to"), key=self.keys.live)
        if reply == b"full":
            raise Overloaded("this request has as many readers as it may", retry_after=1.0)
        record = records.request_record(rid, reply) if isinstance(reply, list) else None
        if record is None:
            raise NotFound("no such request", param="id")
        return record

    async def journal_lengths(self, journals: Sequence[tuple[str, int]]) -> list[int]:
        return await self._link.pipeline([("STRLEN", self.keys.journal(*j)) for j in journals])

    @staticmethod
    async def models(url: str, *, patience: float | None = 5.0) -> dict[str, ModelCard]:
        """The registry."""
        link = Link(url, patience, REGISTRY)
        try:
            found = records.fields_of(await link.command("HGETALL", REGISTRY))
        finally:
            await link.close()
        return {name.decode(): _card_decoder.decode(card) for name, card in found.items()}

    async def read_depth(self) -> tuple[int, int, float]:
        """What waits, as the leader told it last: requests, prompt tokens, and the tokens per second that come."""
        requests, tokens, rate = await self._link.command("HMGET", self.keys.depth, "requests", "tokens", "rate")
        return int(requests or 0), int(tokens or 0), float(rate or 0.0)

    async def read_depth_fields(self) -> dict[str, float]:
        """What waits and runs, as the leader wrote it last (see `write_depth`)."""
        found = records.fields_of(await self._link.command("HGETALL", self.keys.depth))
        return {name.decode(): float(value) for name, value in found.items()}

    async def read_tokenizer(self) -> bytes | None:
        raw: bytes | None = await self._link.command("GET", self.keys.tokenizer)
        return raw

    async def read_tokenizer_info(self) -> bytes | None:
        raw: bytes | None = await self._link.command("GET", self.keys.tokenizer_info)
        return raw


def _retry_after(waiting_tokens: float, rate: float) -> float:
    """Seconds until a busy service may have room: waiting tokens over measured rate, 1 to 60, jittered by a tenth."""
    seconds = waiting_tokens / rate if rate > 0 else 1.0
    return min(60.0, max(1.0, seconds * random.uniform(0.9, 1.1)))
