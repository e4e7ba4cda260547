"""The home slot: which request stands behind an idempotency key, and what a tenant may still use, whatever slot a
request runs in.

The request itself lies in its model's slot, and no script reaches over two slots. So a key is *claimed* first, with the
rid that the request will have, and accepted under that rid afterwards. Whoever finds a claim without a request (its
maker died in between) completes it with the same rid; that is safe since a rid is accepted once. A claim stays as long
as its request: the sweep of the model's leader frees it once the request is gone, and only after the rid was made void
in the model's slot, so that an accept which is still on its way cannot come after the key was given to another.

Limits of a tenant are *reserved* here, under the rid, before the request is accepted. A reservation ends with its
request: its slot notes that, and the tokens that land, in the same script; the leader collects them in numbered batches
and settles them here, each once. What no request stands behind (its maker died in between) the sweep gives back. Money
is one sum for each tenant and day, over all slots: settled tokens times the price of their model, and the prompts that
are reserved. What a tenant has under way beyond its prompts can exceed its budget.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from protocol.bus.base import RequestReads
from protocol.bus.gateway import GatewayBus
from protocol.connection import Argument, Link
from protocol.errors import BudgetSpent, HeadraceError, InvalidRequest, Overloaded, RatesLeft, Unavailable
from protocol.keys import HOME, check_name, claim_name
from protocol.messages import Job
from protocol.records import Accepted, Claim, Hold, Limits, Reservation, TenantLimits, fields_of
from protocol.scripts import load

FIRST_LOOK_MS = 60_000  # a claim or reservation without a request is no older than this when it is freed
MOST_HOLDS = 256  # requests of a tenant that are looked at when it is at its limit
LOOK_S = 0.0002  # for each of them until the next look
MOST_TENANTS = 10_000  # without limits, that are remembered
SERVED_STAY_MS = 3_600_000  # how long the sums of what shards have served stay
FREE_S = 1.0  # how long it is believed that a tenant has no limits
NO_LIMITS = TenantLimits()
BILLION = 1_000_000_000
DAY_S = 86_400
SPENT_STAYS_MS = 3 * DAY_S * 1000
LIMIT_MET = {
    "concurrent": "as many requests are running with this key as may at once",
    "requests": "the requests per minute of this key are used up",
    "tokens": "the tokens per minute of this key are used up",
}


class SlotReads(RequestReads):
    """What is looked up in the slots that claims and reservations name."""

    SCRIPTS = ("void",)


class HomeBus:
    """Claims and reservations. Calls are repeated as those of Base, with the same errors; every one is safe to
    repeat."""

    SCRIPTS = ("claim", "reserve", "settle", "unclaim", "unreserve")

    def __init__(self, url: str, *, patience: float | None = None) -> None:
        self._url, self._patience = url, patience
        self._link = Link(url, patience, HOME)
        self._slots: dict[str, SlotReads] = {}
        self._scripts = load(self.SCRIPTS, sharded=self._link.in_cluster)
        self._budgets: set[str] = set()  # tenants that have one, as `tell_terms` said
        self._free: dict[str, float] = {}  # tenant that has no limits -> when it was told so
        self._look_again: dict[str, float] = {}  # tenant -> when its reservations may be looked at again

    async def close(self) -> None:
        await self._link.close()
        for slot in self._slots.values():
            await slot.close()

    def slot(self, name: str) -> RequestReads:
        """Reads of another slot: of a model, or of one of its shards."""
        if name not in self._slots:
            self._slots[name] = SlotReads(self._url, name, patience=self._patience)
        return self._slots[name]

    async def find(self, tenant: str, key: str, name: str) -> Claim | None:
        """The claim of a key, if there is one. ``name``: the model as the client wrote it."""
        claim = claim_name(tenant, key, name)
        value: bytes | None = await self._link.command("GET", HOME + claim)
        return None if value is None else _claim(claim, value)

    async def claim(self, tenant: str, key: str, name: str, *, model: str, rid: str, body: str) -> Claim:
        """Claim a key for the request ``rid`` of ``model``, or find who has it: ``mine`` tells."""
        claim = claim_name(tenant, key, name)
        args = (HOME, claim, model, rid, body, FIRST_LOOK_MS)
        found = await self._link.script(self._scripts["claim"], HOME + claim, args)
        held_by, owner, held_body = (part.decode() for part in found)
        return Claim(claim, held_by, owner, held_body, mine=owner == rid)

    async def claim_or_find(self, tenant: str, key: str, name: str, *, model: str, rid: str, body: str) -> Claim:
        """As `claim`; a claim for another model or body is freed if its request was refused, or never came. So the
        claim is for this ``model`` and ``body``, or there is its request."""
        while True:
            claim = await self.claim(tenant, key, name, model=model, rid=rid, body=body)
            if (claim.model, claim.body) == (model, body) or not await self.slot(claim.model).void(claim.rid):
                return claim
            await self.free(claim)

    async def due(self, model: str, count: int) -> list[Claim]:
        """Claims for requests of ``model`` that it is time to look at, the longest due first."""
        names = await self._due(f"sweep:{model}", count)
        values = await self._link.pipeline([("GET", HOME + name.decode()) for name in names])
        found = [
            _claim(name.decode(), value or f"{model} - -".encode()) for name, value in zip(names, values, strict=True)
        ]
        return [claim for claim in found if claim.model == model]  # else it was freed and claimed anew meanwhile

    async def free(self, claim: Claim) -> None:
        """Its rid is void: the key may be claimed anew. Nothing if it was."""
        await self.free_or_put_off([(claim, None)])

    async def free_or_put_off(self, looked_at: Sequence[tuple[Claim, int | None]]) -> None:
        """After `void_each`: free claims whose rids are void (None), let those expire whose requests have ended (when
        their records go), and put off the next look at the others (0)."""
        if looked_at:
            calls = [
                (HOME, claim.name, claim.model, claim.rid, "" if gone is None else gone, FIRST_LOOK_MS)
                for claim, gone in looked_at
            ]
            await self._link.script_each(self._scripts["unclaim"], HOME + looked_at[0][0].name, calls)

    # -------------------------------------------------------------- limits of tenants

    async def accept(
        self,
        bus: GatewayBus,
        job: Job,
        *,
        rid: str,
        claim: Claim | None = None,
        tenant_limits: TenantLimits | None = None,
        prompt_tokens: int = 0,
        idempotency: str | None = None,
        reply_to: str | None = None,
        limits: Limits = Limits(),  # noqa: B008 (immutable)
    ) -> Accepted:
        """`GatewayBus.accept` under a reservation, where the tenant has limits. ``claim``: of its idempotency key.
        ``tenant_limits`` None: those that a gateway told last. InvalidRequest for a prompt beyond all the tokens that
        its tenant has in a minute."""
        held, claimed = Reservation(None), claim is not None and not claim.mine
        if not (claimed and await bus.read_request(rid) is not None):  # else it has its reservation, or has ended
            held = await self.reserve(job.tenant, rid, bus.keys.model, prompt_tokens, tenant_limits)
        try:
            accepted = await bus.accept(
                job, rid=rid, idempotency=idempotency, reply_to=reply_to, limits=limits, prompt_tokens=prompt_tokens,
                reserved=held.tokens, fingerprint=claim.body if claim is not None else None, claimed=claimed,
            )  # fmt: skip
        except Unavailable:
            raise  # it may have been accepted: the sweep sees to it
        except HeadraceError as error:
            await self.withdraw(bus, job.tenant, rid, held, claim)
            if isinstance(error, Overloaded):
                error.left = held.left
            raise
        if accepted.rid != rid:
            await self.withdraw(bus, job.tenant, rid, held, claim)
        return replace(accepted, left=held.left)

    async def withdraw(
        self, bus: RequestReads, tenant: str, rid: str, held: Reservation, claim: Claim | None = None
    ) -> None:
        """Give back what a request had reserved that was not accepted. Where others may know its rid, by ``claim``,
        that is made void first: nobody can run it without its reservation then."""
        if held.tokens is None:
            return
        if claim is not None:
            if not await bus.void(rid):
                return
            await self.free(claim)
        await self.give_back(tenant, rid)

    async def reserve(
        self, tenant: str, rid: str, slot: str, tokens: int, limits: TenantLimits | None = None
    ) -> Reservation:
        """Reserve request ``rid`` with so many prompt tokens, before it is accepted in ``slot``. Overloaded,
        InvalidRequest. At the limit of requests at once it is looked whether some have ended, which is settled only a
        moment later. BudgetSpent where its money of today is spent."""
        known = self._free.get(tenant) if tenant not in self._budgets else None
        if known is not None and (limits == NO_LIMITS or (limits is None and time.monotonic() - known < FREE_S)):
            return Reservation(None)
        told = ("-", "-", "-") if limits is None else _texts(limits)
        args = (HOME, check_name(tenant, "tenant"), rid, slot, tokens, *told, FIRST_LOOK_MS)
        reply = await self._link.script(self._scripts["reserve"], HOME + tenant, args)
        if reply[:2] == [b"limit", b"concurrent"] and await self._free_ended(tenant):
            reply = await self._link.script(self._scripts["reserve"], HOME + tenant, args)
        self._free.pop(tenant, None)
        match reply:
            case [b"held", *left]:
                return Reservation(tokens, _left(left))
            case [b"limit", b"prompt", *_]:
                raise InvalidRequest("the prompt has more tokens than this key has in a minute", param="prompt")
            case [b"limit", b"budget", *_]:
                raise BudgetSpent("the budget of this key for today is spent; it is renewed at midnight (UTC)")
            case [b"limit", which, wait_ms, *left]:
                raise Overloaded(LIMIT_MET[which.decode()], retry_after=max(1.0, wait_ms / 1000), left=_left(left))
        if len(self._free) >= MOST_TENANTS:
            self._free.clear()
        self._free[tenant] = time.monotonic()
        return Reservation(None)

    async def give_back(self, tenant: str, rid: str, *, ended: bool = False) -> None:
        """End a reservation whose request was not accepted, or (``ended``) whose tokens stay used."""
        await self._unreserve([(tenant, rid, "ended" if ended else "back")])

    async def settle(self, slot: str, number: int, owed: Sequence[bytes]) -> None:
        """Take in a batch that `LeaderBus.collect` told of ``slot``."""
        await self._link.script(self._scripts["settle"], HOME + slot, (HOME, slot, number, *owed))

    async def tell_terms(self, terms: Mapping[str, str]) -> None:
        """Budgets and prices from now on, all of them (`Routing.money`). Whoever reads the table of routes says what it
        has read, so that they hold for requests of every way in."""
        self._budgets = {name[2:] for name in terms if name.startswith("b:")}
        key = HOME + "terms"
        reply = fields_of(await self._link.command("HGETALL", key))
        had = {name.decode(): text.decode() for name, text in reply.items()}
        if terms and terms != had:
            await self._link.command("HSET", key, *(part for pair in terms.items() for part in pair))
        if gone := had.keys() - terms.keys():
            await self._link.command("HDEL", key, *gone)

    async def spent(self, tenant: str) -> float:
        """The money of today that has been settled."""
        found: bytes | None = await self._link.command("HGET", self._spent_key(), tenant)
        return int(found or 0) / BILLION

    async def spend(self, tenant: str, money: float) -> None:
        """Count money of an answer that no slot of ours accounts for. Counted twice, at worst, if a reply was lost."""
        key = self._spent_key()
        count = ("HINCRBY", key, tenant, round(money * BILLION))
        await self._link.pipeline([count, ("PEXPIRE", key, SPENT_STAYS_MS)])

    @staticmethod
    def _spent_key() -> str:
        return f"{HOME}spent:{int(time.time() // DAY_S)}"

    async def due_holds(self, slot: str, count: int) -> list[Hold]:
        """Reservations of ``slot`` that it is time to look at, the longest due first."""
        names = await self._due(f"holds:{slot}", count)
        return [Hold(*name.decode().split(" ")) for name in names]

    async def end_or_put_off(self, looked_at: Sequence[tuple[Hold, int | None]]) -> None:
        """After `void_each`: give back reservations whose rids are void (None), end those whose requests have ended,
        and put off the next look at the others (0)."""
        await self._unreserve(
            [
                (hold.tenant, hold.rid, "back" if gone is None else "ended" if gone else FIRST_LOOK_MS)
                for hold, gone in looked_at
            ]
        )

    async def add_served(self, model: str, tokens: Mapping[str, float]) -> dict[str, float]:
        """Add to what all shards of ``model`` have served these tenants; the sums."""
        key = f"{HOME}served:{model}"
        added = [("HINCRBYFLOAT", key, tenant, repr(count)) for tenant, count in tokens.items()]
        replies = await self._link.pipeline([*added, ("PEXPIRE", key, SERVED_STAY_MS)])
        return {tenant: float(total) for tenant, total in zip(tokens, replies, strict=False)}

    async def _free_ended(self, tenant: str) -> bool:
        """Look at some of a tenant's requests; the reservations of those that have ended are freed. Not again at once,
        where there were many: a client that asks on and on costs no more than it would with few."""
        if time.monotonic() < self._look_again.get(tenant, 0.0):
            return False
        _, flat = await self._link.command("HSCAN", f"{HOME}run:{tenant}", 0, "COUNT", MOST_HOLDS)
        if len(self._look_again) >= MOST_TENANTS:
            self._look_again.clear()
        self._look_again[tenant] = time.monotonic() + LOOK_S * len(flat) / 2
        of: dict[str, list[str]] = {}
        for rid, held in zip(flat[::2], flat[1::2], strict=True):
            of.setdefault(held.decode().split(" ")[0], []).append(rid.decode())
        ended = [rid for slot, rids in of.items() for rid in await self.slot(slot).ended(rids)]
        await self._unreserve([(tenant, rid, "ended") for rid in ended])
        return bool(ended)

    async def _unreserve(self, calls: Sequence[tuple[str, str, Argument]]) -> None:
        """``calls``: tenant, rid, what becomes of its reservation."""
        if calls:
            await self._link.script_each(
                self._scripts["unreserve"], HOME + calls[0][0], [(HOME, *call) for call in calls]
            )

    async def _due(self, name: str, count: int) -> list[bytes]:
        """Members of a set that is ordered by the time of the next look, as far as that has come."""
        seconds, micros = await self._link.command("TIME")
        now = int(seconds) * 1000 + int(micros) // 1000
        found: list[bytes] = await self._link.command(
            "ZRANGEBYSCORE", HOME + name, "-inf", now, "LIMIT", 0, count
        )  # fmt: skip
        return found


def _claim(name: str, value: bytes) -> Claim:
    model, rid, body = value.decode().split(" ")
    return Claim(name, model, rid, body, mine=False)


def _left(told: Sequence[bytes]) -> RatesLeft:
    """What is left of the limits per minute."""
    requests, tokens = ((float(text) if text else None) for text in told)
    return RatesLeft(requests, tokens)


def _texts(limits: TenantLimits) -> tuple[Argument, ...]:
    told = (limits.concurrent, limits.requests_per_minute, limits.tokens_per_minute)
    return tuple("" if bound is None else bound for bound in told)
