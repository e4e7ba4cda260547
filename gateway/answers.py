"""One request from accept to its last byte: submit, follow, answer, and cancel when its client disconnects.

More than 400 lines: one class, whose methods are the stations of a request's life in their order.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import msgspec
from aiohttp import web

from gateway.auth import Caller
from gateway.edge import encode_json, error_answer, error_body, json_answer
from gateway.headers import rate_headers
from gateway.metrics import ACTIVE, DURATION, E2E, MOVED, OUTPUT_TOKENS, PROMPT_TOKENS, REQUESTS
from gateway.models import Model, Models
from gateway.openai.render import Chunks, EventId, Tally, whole_answer
from gateway.openai.view import View
from gateway.routing.money import Money
from gateway.routing.patience import said_in_time
from gateway.routing.router import Step
from gateway.routing.slot import Slot
from gateway.sse import EventReader, ReaderStalled
from gateway.streams import Collector, Follower, Moved
from gateway.tracing import AnswerTrace
from protocol.bus import HomeBus
from protocol.errors import (
    Conflict,
    HeadraceError,
    NotFound,
    Overloaded,
    RequestError,
    ServiceError,
    StreamDiverged,
    Unavailable,
    Voided,
    http_status,
)
from protocol.messages import Job, body_hash, encode, new_rid
from protocol.records import Accepted, Claim, Limits, RequestRecord
from protocol.telemetry.context import trace_id_of

log = logging.getLogger("headrace.gateway")
request_log = logging.getLogger("headrace.gateway.requests")

TOKEN_BYTES = 4  # characters per token, roughly, for the bounds on waiting work
STALL_GRACE_S = 60.0  # how long a request continues after its stalled reader was dropped
GIVE_UP_S = 600.0  # how long a cancel is retried while Redis is unreachable


@dataclass(eq=False)
class Ask:
    """One HTTP request to a model, and its state."""

    model: Model
    slot: Slot  # the shard of the model that it runs in
    caller: Caller
    job: Job
    view: View
    stream: bool = False
    numbered: bool = False  # its events have ids, to go on from
    idempotency: str | None = None
    trace: AnswerTrace = field(default_factory=lambda: AnswerTrace(None, "", None))
    fresh_rid: str = ""  # of a new request, unless an idempotency key names an older one
    step: Step | None = None  # how the request came to this model; None: it was begun before
    last: bool = True  # no other candidate would be asked instead
    others: Iterator[Ask] | None = None  # the same request to the candidates after this one
    moved_from: Ask | None = None  # which said nothing in time
    arrived: float = field(default_factory=time.monotonic)
    # set later
    rid: str = ""
    rates: dict[str, str] = field(default_factory=dict)  # what is left of the caller's limits
    follower: Follower | None = None
    echoed: list[str] | None = None
    status: int = 0
    stalled: bool = False
    moved_to: str = ""  # rid of the request that took its place
    cold: bool = False  # no worker served when it came

    def __post_init__(self) -> None:
        self.fresh_rid = new_rid(self.slot.shard.number)
        self.cold = self.model.without_workers

    @property
    def cold_start_s(self) -> float | None:
        """How long it waited for the first worker; None: there was one, or it has not come."""
        since = self.model.served_since
        return max(0.0, since - self.arrived) if self.cold and since is not None else None

    @property
    def headers(self) -> dict[str, str]:
        said = self.follower.tally.cache if self.follower is not None else ""
        cached = {"X-Headrace-Cache": said} if said else {}
        rid = {"X-Request-Id": self.rid} if self.rid else {}
        return {**rid, **self.rates, **cached, **(self.step.header if self.step is not None else {})}


class Draining(Unavailable):
    """This gateway shuts down; the request continues and can be resumed on any other."""


class RunsElsewhere(Unavailable):
    """The request of this idempotency key runs on ``model``, for which the client's name stood at the time."""

    def __init__(self, model: str) -> None:
        super().__init__("the request of this idempotency key runs on another model")
        self.model = model


class HandedOn(Exception):
    """Another candidate has the request now."""

    def __init__(self, ask: Ask) -> None:
        super().__init__()
        self.ask = ask


class Answers:
    """Answers requests of every model. ``name`` is this process's reply channel."""

    def __init__(self, name: str, limits: Limits, stall_s: float, money: Money, home: HomeBus, models: Models) -> None:
        self.name = name
        self._home = home
        self._models = models
        self.limits = limits
        self.money = money
        self.stall_s = stall_s
        self.draining = False
        self.open: set[Ask] = set()
        self._background: set[asyncio.Task[Any]] = set()

    # -------------------------------------------------------------- a request's way

    async def answer(self, ask: Ask, request: web.BaseRequest) -> web.StreamResponse:
        """Run a new request and answer it, streamed or whole."""
        ask.trace.begin(ask.job, ask.fresh_rid, ask.arrived)
        work = self._run(ask, request)
        while True:
            try:
                return await self._accounted(ask, work)
            except HandedOn as handed:
                ask = handed.ask
                work = self._answer(ask, request)

    async def resume(self, ask: Ask, rid: str, shown: EventId | None, request: web.BaseRequest) -> web.StreamResponse:
        """Continue the stream of request ``rid`` after the event ``shown`` (None: from its beginning)."""
        ask.trace.resume(ask.job, rid, ask.arrived)
        with ask.caller.reading():
            return await self._accounted(ask, self._resume(ask, rid, shown, request))

    async def _run(self, ask: Ask, request: web.BaseRequest) -> web.StreamResponse:
        if ask.view.echo:
            ask.echoed = await ask.model.prompt_texts(ask.job)
        try:
            await self._submit(ask)
        except BaseException:
            self._leave(ask)
            raise
        return await self._answer(ask, request)

    async def _answer(self, ask: Ask, request: web.BaseRequest) -> web.StreamResponse:
        """The answer of a request that was accepted, or HandedOn."""
        try:
            await self._offer_others(ask)
            return await (self._stream(ask, request) if ask.stream else self._whole(ask))
        finally:
            self._leave(ask)

    async def _resume(self, ask: Ask, rid: str, shown: EventId | None, request: web.BaseRequest) -> web.StreamResponse:
        if ask.view.echo:
            ask.echoed = await ask.model.prompt_texts(ask.job)
        ask.rid = rid
        reader = self._reader(ask, rid, ask.job, ask.view, shown)
        reader.behind = True  # accepts no rows until the part already shown is counted
        self._follow(ask, reader)
        try:
            record = await ask.slot.bus.attach(rid, ask.caller.tenant, self.name)
            log.debug("request %s is resumed", rid)
            ask.slot.outlet.saw(rid, record.attached)
            reader.learn(record)
            if shown is not None:
                await _replay(reader.chunks, shown, ask)
                reader.put_unshown()
            reader.fall_behind()
            return await self._stream(ask, request)
        finally:
            self._leave(ask)

    # -------------------------------------------------------------- submit

    async def _submit(self, ask: Ask) -> None:
        """Accept the job; its follower is registered before the first row can arrive. If the client disconnects
        meanwhile, the request is cancelled once accept has returned."""
        claim = await self._claim(ask) if ask.idempotency else None
        rid, found = (ask.fresh_rid, False) if claim is None else (claim.rid, not claim.mine)
        follower = self._made(ask, rid, ask.job, ask.view)
        follower.accepted = False
        self._follow(ask, follower)
        began = time.monotonic()
        accepting = self._spawn(self._accept(ask, rid, claim))
        try:
            accepted = await asyncio.shield(accepting)
        except BaseException as error:
            ask.follower = None  # it may not exist
            ask.slot.outlet.remove(follower)
            if isinstance(error, asyncio.CancelledError):
                self._spawn(self._give_up_when_accepted(ask, accepting))
            elif isinstance(error, Unavailable) and not found:  # it may be there, only the reply was lost
                self._spawn(self._give_up(ask.slot, ask.caller.tenant, rid, 0, ask.view.grace_s))
            raise
        ask.rid = accepted.rid
        ask.trace.accepted(began)
        log.debug("request %s is %s", accepted.rid, "joined" if accepted.joined else "accepted")
        ask.rates = rate_headers(ask.caller.limits, accepted.left)
        follower.accepted = True
        ask.slot.outlet.saw(accepted.rid, accepted.attached)
        if accepted.joined:
            ask.slot.outlet.remove(follower)
            await self._join(ask, accepted)

    async def _claim(self, ask: Ask) -> Claim:
        """The claim of the request's idempotency key: a new one, or that of whoever came first. RunsElsewhere,
        Conflict."""
        asked, key = (ask.step.asked if ask.step is not None else ""), ask.idempotency or ""
        first, body = ask.model.first, _fingerprint(ask)
        if ask.slot is not first and await first.bus.find_request(ask.caller.tenant, key) is not None:
            self._move(ask, first)  # perhaps accepted before there were claims, and other shards
        claim = await self._home.claim_or_find(
            ask.caller.tenant, key, asked or ask.model.name, model=ask.slot.shard.tag, rid=ask.fresh_rid, body=body
        )  # fmt: skip
        if claim.model.partition("#")[0] != ask.model.name:
            raise RunsElsewhere(claim.model.partition("#")[0])
        if claim.body != body:
            raise Conflict("this idempotency key was used with another body", param="Idempotency-Key")
        if claim.model != ask.slot.shard.tag:
            slot = ask.model.slot_of(claim.rid)
            if slot is None:
                raise Unavailable("the request of this idempotency key is in a shard that is not known here yet")
            self._move(ask, slot)
        return claim

    @staticmethod
    def _move(ask: Ask, slot: Slot) -> None:
        """To the shard where the request of its idempotency key is."""
        ask.slot, ask.fresh_rid = slot, new_rid(slot.shard.number)

    async def _accept(self, ask: Ask, rid: str, claim: Claim | None) -> Accepted:
        async with ask.slot.accepting:
            if ask.follower is None:
                raise Unavailable("the client has gone before its turn came")
            try:
                return await self._home.accept(
                    ask.slot.bus,
                    ask.job,
                    rid=rid,
                    idempotency=ask.idempotency,
                    reply_to=self.name,
                    limits=_part(
                        (ask.step.limits if ask.step is not None else None) or self.limits, len(ask.model.slots)
                    ),
                    tenant_limits=ask.caller.limits,
                    prompt_tokens=_prompt_tokens(ask.job),
                    claim=claim,
                )
            except Voided:
                if claim is not None:
                    await self._home.free(claim)
                raise

    async def _join(self, ask: Ask, accepted: Accepted) -> None:
        """Follow the request that an idempotency key named, from its beginning, and show it as it was asked for."""
        ask.follower = None
        record = await ask.slot.bus.read_request(accepted.rid)
        if record is None:
            raise NotFound("the request of this idempotency key is not there any more")
        attached = accepted.attached
        if record.moved is not None:
            record = await self._go_after(ask, record)
            attached = record.attached
        ask.job, ask.view = record.job, View.of(record)
        follower = self._made(ask, record.rid, record.job, ask.view)
        self._follow(ask, follower, attached)
        follower.learn(record)
        follower.fall_behind()

    async def _go_after(self, ask: Ask, pointer: RequestRecord) -> RequestRecord:
        """The request to which a record points, with this process among its readers."""
        found = await self._models.where_it_runs(ask.model, pointer)
        if found is None:
            await ask.slot.bus.forget_pointer(pointer.rid, pointer.tenant, ask.idempotency)
            raise Unavailable("what this idempotency key stood for is not kept any more; send it again", retry_after=1)
        ask.model, record = found
        ask.rid, ask.slot = record.rid, ask.model.slot_of(record.rid) or ask.model.first
        return await ask.slot.bus.attach(record.rid, record.tenant, self.name)

    def _made(self, ask: Ask, rid: str, job: Job, view: View) -> Follower:
        if ask.stream:
            return self._reader(ask, rid, job, view)
        collector = Collector(rid, job.choices)
        collector.tally.awaits_record = collector.tally.awaits_admission = view.ids
        return collector

    def _reader(self, ask: Ask, rid: str, job: Job, view: View, shown: EventId | None = None) -> EventReader:
        chunks = Chunks(rid, ask.model.name, view, job.choices, job.sampling.n, ask.echoed, job, ask.numbered)
        reader = EventReader(rid, chunks, ask.model.name, ask.arrived, shown)
        reader.trace_id = ask.trace.id
        return reader

    def _follow(self, ask: Ask, follower: Follower, attached: int = 0) -> None:
        ask.follower = follower
        ask.slot.outlet.add(follower, attached)

    # -------------------------------------------------------------- another candidate's turn

    async def _offer_others(self, ask: Ask) -> None:
        """Wait for the first token as long as the rule allows; then give the request to the first of the other
        candidates that takes it (HandedOn). It stays if none does, or if it has begun meanwhile.

        The other one accepts first, under an id of its own that nobody knows yet. Then one script ends the request here
        if nothing of it was said, and makes its record a pointer. Dying in between leaves one answer that nobody reads.
        Of a gateway that died while it waited, the one does it where the client repeats its idempotency key; without a
        key nobody can ask for the request any more, since its id goes out with the first token.
        """
        if ask.step is None or ask.step.within_s is None or ask.follower is None:
            return
        other = self._next_other(ask)
        if other is None or await said_in_time(
            ask.follower, ask.slot.bus, ask.model, self._models, time.monotonic() + ask.step.within_s
        ):
            return
        while other is not None:
            other.moved_from, other.arrived, other.others = ask, ask.arrived, ask.others
            other.trace.caller = ask.trace.place.text if ask.trace.place is not None else other.trace.caller
            other.trace.begin(other.job, other.fresh_rid, time.monotonic())
            if await self._moved(ask, other):
                raise HandedOn(other)
            other = self._next_other(ask) if not ask.follower.begun_to_speak else None

    @staticmethod
    def _next_other(ask: Ask) -> Ask | None:
        """The next candidate; not the one that has the request, where an earlier gateway has moved it."""
        return next((other for other in ask.others or () if other.model is not ask.model), None)

    async def _moved(self, ask: Ask, other: Ask) -> bool:
        try:
            await self._submit(other)
        except (RequestError, ServiceError) as error:
            log.info("%s does not take a request that %s is slow with: %s", other.model.name, ask.model.name, error)
            return False
        tenant, taken = ask.caller.tenant, False
        try:
            taken = await ask.slot.bus.move(ask.rid, tenant, other.model.name, other.rid)
        except BaseException:  # it may have been moved: then the other one goes on as this one would
            if not ask.view.detached:
                self._drop(other, ask.view.grace_s)
            raise
        if not taken:
            self._drop(other, 0.0)
            if ask.follower is not None:
                await ask.follower.catch_up(ask.slot.bus)  # it has begun, or another gateway has moved it
            return False
        ask.moved_to = other.rid
        MOVED.labels(ask.model.name, other.model.name).inc()
        log.info("request %s of %s said nothing in time and goes on as %s", ask.rid, ask.model.name, other.rid)
        return True

    def _drop(self, ask: Ask, grace_s: float) -> None:
        if ask.follower is not None:
            ask.slot.outlet.remove(ask.follower)
        self._spawn(self._give_up(ask.slot, ask.caller.tenant, ask.rid, 0, grace_s))

    # -------------------------------------------------------------- answer

    async def _stream(self, ask: Ask, request: web.BaseRequest) -> web.StreamResponse:
        """The 200 goes out when the request is admitted. A failure before that is an HTTP error, a later one an error
        event."""
        reader = ask.follower
        assert isinstance(reader, EventReader)
        await self._until(reader, ask, begun=True)
        if reader.over and (refusal := _refusal(reader, ask)):
            return refusal
        answer = await reader.begin(request, {**ask.headers, **self._waits(ask)})
        ask.status = 200
        if self.draining:
            answer.force_close()
        try:
            await reader.run(ask.slot.bus, self.stall_s)
        except (Draining, Moved):
            reader.break_off()
        except HeadraceError as error:
            reader.write_error(error_body(error))
        except ReaderStalled:
            log.info("a reader stalled and was dropped: %s", ask.rid)
            ask.stalled = True
        return answer

    def _waits(self, ask: Ask) -> dict[str, str]:
        """Why the first token may take long: no worker serves yet, or another model has this one's card."""
        terms = self._models.routing.models.get(ask.model.name)
        waits = terms.waits if terms is not None else ""
        if not waits and ask.model.without_workers:
            waits = "no worker serves yet"
        return {"X-Headrace-Waits": waits} if waits else {}

    async def _whole(self, ask: Ask) -> web.StreamResponse:
        collector = ask.follower
        assert isinstance(collector, Collector)
        await self._until(collector, ask, begun=False)
        if refusal := _refusal(collector, ask):
            return refusal
        journals = [b"".join(pieces) for pieces in collector.journals]
        body, _ = whole_answer(
            ask.rid,
            ask.model.name,
            ask.view,
            ask.job.sampling.n,
            journals,
            collector.tally.prompt_tokens or 0,
            ask.echoed,
            ask.job,
            collector.tally.thinking,
            collector.tally.prompts_of_record,
        )
        if ask.view.kind == "generate":
            body = {"response": body["choices"][0]["text"]}
        elif ask.view.kind == "tokens":
            body = await _tokens(ask, body["choices"][0]["prompt_token_ids"])
        ask.status = 200
        cold = ask.cold_start_s
        told = {"Server-Timing": f"cold-start;dur={1000 * cold:.0f}"} if cold is not None else {}
        return json_answer(body, headers={**ask.headers, **told})

    async def _until(self, follower: Follower, ask: Ask, *, begun: bool) -> None:
        """Wait for the admission, or for the end with all that the answer needs."""
        while not (follower.begun if begun else follower.over):
            await follower.news.wait()
            follower.news.clear()
            if follower.behind:
                await follower.catch_up(ask.slot.bus)
        while not follower.failed and follower.over and follower.tally.prompt_tokens is None:
            await follower.catch_up(ask.slot.bus)
        follower.news.set()  # the next step has to check the state first

    # -------------------------------------------------------------- the end

    def _leave(self, ask: Ask) -> None:
        """Stop following. A request that still runs is cancelled, unless it was to continue without its client."""
        follower = ask.follower
        if follower is None:
            return
        outlet = ask.slot.outlet
        seen = outlet.attached.get(ask.rid, 0)
        outlet.remove(follower)
        ended, handed_on = follower.tally.open == 0, isinstance(follower.failed, Draining | Moved) or ask.moved_to
        if ended or handed_on or ask.view.detached or not ask.rid:
            return
        grace_s = max(ask.view.grace_s, STALL_GRACE_S if ask.stalled else 0.0)
        self._spawn(self._give_up(ask.slot, ask.caller.tenant, ask.rid, seen, grace_s))

    async def _give_up(self, slot: Slot, tenant: str, rid: str, seen: int, grace_s: float) -> None:
        """Cancel after the grace, if nobody has picked the request up since. It waits for up to a day, so it must
        hold nothing of the request's body: not the `Ask`."""
        if grace_s:
            await asyncio.sleep(grace_s)
        deadline = time.monotonic() + GIVE_UP_S
        while not slot.outlet.follows(rid):
            try:
                await slot.bus.cancel(rid, tenant, attached=seen)
            except NotFound:
                pass  # it was never accepted, or is gone already
            except ServiceError as error:
                if isinstance(error, Unavailable) and time.monotonic() < deadline:
                    await asyncio.sleep(1.0)  # Redis is unreachable
                    continue
                log.warning("request %s could not be cancelled: %s", rid, type(error).__name__)
            return

    async def _give_up_when_accepted(self, ask: Ask, accepting: asyncio.Task[Accepted]) -> None:
        slot, tenant, view = ask.slot, ask.caller.tenant, ask.view
        del ask
        try:
            accepted = await accepting
        except HeadraceError:
            return
        finally:
            del accepting  # it holds the `Ask`
        if not view.detached:
            await self._give_up(slot, tenant, accepted.rid, accepted.attached, view.grace_s)

    # -------------------------------------------------------------- accounts

    async def _accounted(self, ask: Ask, work: Coroutine[Any, Any, web.StreamResponse]) -> web.StreamResponse:
        """Count, time and log one answer, however it ends."""
        active = ACTIVE.labels(ask.model.name)
        self.open.add(ask)
        active.inc()
        try:
            answer = await work
            ask.status = ask.status or answer.status
            return answer
        except HandedOn:
            raise
        except (RequestError, ServiceError) as error:
            ask.status = error.status
            if isinstance(error, RunsElsewhere):
                raise
            if isinstance(error, Overloaded):
                if not ask.rid and not ask.last:
                    raise  # nothing was accepted: another candidate may take it
                ask.rates = rate_headers(ask.caller.limits, error.left) or ask.rates
            return error_answer(error, ask.headers)
        except (asyncio.CancelledError, ConnectionError):
            ask.status = 499  # the client closed its connection
            raise
        except BaseException:
            ask.status = 500
            raise
        finally:
            self.open.discard(ask)
            active.dec()
            self._account(ask)

    def _account(self, ask: Ask) -> None:
        model, seconds = ask.model.name, time.monotonic() - ask.arrived
        tally = ask.follower.tally if ask.follower is not None else Tally(1)
        if not ask.moved_to:
            REQUESTS.labels(model, str(ask.status)).inc()
            DURATION.observe_traced(model, seconds, ask.trace.id)
        if not tally.open:
            E2E.observe_traced(model, seconds, ask.trace.id)
        PROMPT_TOKENS.labels(model).inc(tally.prompt_tokens or 0)
        OUTPUT_TOKENS.labels(model).inc(tally.completion_tokens - tally.replayed_tokens)
        first = getattr(ask.follower, "first_token_s", None)
        ask.trace.end(ask.job, ask.rid, ask.status, ask.caller.tenant, first)
        cost = None
        if ask.step is not None and not ask.moved_to:
            if first is not None:
                self.money.saw_first_token(model, first)
            tokens = tally.prompt_tokens or 0, tally.completion_tokens
            cost = self.money.count(model, ask.caller.tenant, ask.step.asked, ask.step.rule, *tokens)
        if request_log.isEnabledFor(logging.INFO) and not ask.moved_to:
            line = {
                "event": "request",
                "id": ask.rid,
                "trace": trace_id_of(ask.rid, ask.job.trace) if ask.rid else None,
                "model": model,
                "tenant": ask.caller.tenant,
                "kind": ask.view.kind,
                "asked": ask.step.asked if ask.step is not None else "",
                "rule": ask.step.rule if ask.step is not None else "",
                "stream": ask.stream,
                "status": ask.status,
                "prompt_tokens": tally.prompt_tokens or 0,
                "output_tokens": tally.completion_tokens,
                "cached_tokens": tally.cached_tokens,
                "cache": tally.cache or None,
                "cost": cost,
                "first_token_s": None if first is None else round(first, 4),
                "cold_start_s": None if ask.cold_start_s is None else round(ask.cold_start_s, 2),
                "seconds": round(seconds, 4),
                "finish_reasons": tally.ends,
            }
            if ask.moved_from is not None:
                line["moved_from"] = ask.moved_from.rid
            request_log.info("%s", encode_json(line).decode())

    # -------------------------------------------------------------- leaving

    def break_off(self) -> None:
        """End what is still open in a way that can be resumed."""
        for ask in list(self.open):
            if ask.follower is not None:
                ask.follower.fail(Draining("this gateway is leaving; the request goes on", retry_after=1.0))

    async def close(self) -> None:
        """Finish cancels in progress. Grace periods end with this process; their requests continue."""
        if self._background:
            await asyncio.wait(self._background, timeout=1.0)
        for task in list(self._background):
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task


def _refusal(follower: Follower, ask: Ask) -> web.StreamResponse | None:
    """The HTTP error of a request that failed before anything of it was sent. Raises what ended the follower."""
    if follower.failed is not None:
        raise follower.failed
    failure = follower.tally.failure()
    if failure is None or (ask.stream and follower.tally.completion_tokens):
        return None
    return json_answer(failure, http_status(failure["error"]["code"]), ask.headers)


async def _tokens(ask: Ask, ids: list[int]) -> dict[str, Any]:
    """The answer to a request for the ids of its prompt."""
    body: dict[str, Any] = {"count": len(ids), "max_model_len": ask.model.card.max_model_len, "tokens": ids}
    if ask.view.strings:
        body["token_strs"] = await ask.model.token_strings(ids)
    return body


async def _replay(chunks: Chunks, shown: EventId, ask: Ask) -> None:
    """Advance ``chunks`` to the event ``shown``. StreamDiverged if the journals differ from what was shown."""
    if len(shown.cursors) > chunks.choices:
        raise StreamDiverged("the event id belongs to another stream")
    journals = []
    for choice, cursor in enumerate(shown.cursors):
        whole = await ask.slot.bus.read_journal(ask.rid, choice) if cursor else b""
        journals.append(whole[:cursor])
    chunks.replay(shown, journals)


def _part(limits: Limits, slots: int) -> Limits:
    """The bounds of one shard, of those of a model."""
    if slots == 1:
        return limits
    parts = {name: bound and -(-bound // slots) for name, bound in asdict(limits).items()}
    return Limits(**parts)


def _prompt_tokens(job: Job) -> int:
    """Prompt tokens of this job: exact for ids, an estimate for text."""
    if job.messages is not None:
        return sum(len(message["content"]) for message in job.messages) // TOKEN_BYTES
    return sum(len(p) // TOKEN_BYTES if isinstance(p, str) else len(p) for p in job.prompts())


def _fingerprint(ask: Ask) -> str:
    """What two requests under one idempotency key must share: everything but the time of arrival."""
    job = msgspec.structs.replace(
        ask.job,
        format=None,
        trace=None,
        view={**(ask.job.view or {}), "created": 0, "fingerprint": "", "stream": ask.stream},
    )
    return body_hash(encode(job))
