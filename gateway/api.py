"""The routes: what each takes and what it answers. How a request is run is in answers.py.

Over 400 lines: one short method for each route.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import msgspec
from aiohttp import web

from gateway.answers import Answers, Ask, RunsElsewhere
from gateway.auth import Caller
from gateway.edge import Routes, decode_body, json_answer, read_body
from gateway.metrics import exposition
from gateway.models import Model, Models
from gateway.openai import bodies, tokens
from gateway.openai.render import EventId, whole_answer
from gateway.openai.view import View, rid_of
from gateway.openapi import PAGE_HEADERS, Documents
from gateway.routing.router import Router, Step
from gateway.routing.rules import asked
from gateway.routing.slot import Slot
from gateway.routing.upstream import UpstreamDown, Upstreams, check_hops
from gateway.tracing import AnswerTrace
from protocol.errors import Expired, InvalidRequest, NotFound, Overloaded, RequestError, Unavailable
from protocol.keys import NAME
from protocol.levels import release
from protocol.messages import ID_BYTES, Job, ModelCard
from protocol.records import RequestRecord
from protocol.telemetry.context import joined
from protocol.telemetry.traces import Traces

log = logging.getLogger("headrace.gateway")

MAX_GRACE_S = 86400.0
MAX_DETOKENIZE = 1 << 17  # ids in one request


class GenerateBody(msgspec.Struct, forbid_unknown_fields=True):
    prompt: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    model: str | None = None


BODIES: dict[str, type] = {
    "/v1/completions": bodies.CompletionBody,
    "/completions": bodies.CompletionBody,
    "/v1/chat/completions": bodies.ChatBody,
    "/chat/completions": bodies.ChatBody,
    "/generate": GenerateBody,
    "/tokenize": tokens.TokenizeBody,
    "/detokenize": tokens.DetokenizeBody,
}
_generate = msgspec.json.Decoder(GenerateBody)


class Api:
    def __init__(
        self,
        models: Models,
        router: Router,
        upstreams: Upstreams,
        answers: Answers,
        *,
        guarded: bool,
        resume_grace: float,
        body_timeout: float,
        traces: Traces | None = None,
    ) -> None:
        self.models = models
        self.router = router
        self.upstreams = upstreams
        self.answers = answers
        self.guarded = guarded  # by API keys
        self.resume_grace = resume_grace
        self.body_timeout = body_timeout
        self.traces = traces

    def routes(self, metrics: bool) -> Routes:
        """``metrics``: whether /metrics is served here, and not on a port of its own."""
        routes = Routes()
        routes.add("POST", "/v1/completions", self.completions)
        routes.add("POST", "/v1/chat/completions", self.chat_completions)
        routes.add("GET", "/v1/models", self.list_models)
        routes.add("GET", "/v1/models/", self.show_model)
        routes.add("POST", "/completions", self.completions)  # some clients' base address has no /v1
        routes.add("POST", "/chat/completions", self.chat_completions)
        routes.add("GET", "/models", self.list_models)
        routes.add("GET", "/models/", self.show_model)
        routes.add("GET", "/v1/streams/", self.resume_stream, head=False)
        routes.add("GET", "/v1/requests/", self.show_request)
        routes.add("DELETE", "/v1/requests/", self.cancel_request)
        routes.add("POST", "/generate", self.generate)
        routes.add("POST", "/tokenize", self.tokenize)
        routes.add("POST", "/detokenize", self.detokenize)
        routes.add("GET", "/tokenizer_info", self.tokenizer_info)
        routes.add("GET", "/health", self.health)
        routes.add("GET", "/ready", self.ready)
        routes.add("GET", "/accepting", self.accepting)
        routes.add("GET", "/version", self.version)
        routes.add("GET", "/openapi.json", self.openapi)
        routes.add("GET", "/docs", self.docs)
        if metrics:
            routes.add("GET", "/metrics", self.metrics)
        self.documents = Documents(routes, BODIES, release())
        return routes

    # -------------------------------------------------------------- generating

    async def completions(self, request: web.BaseRequest, caller: Caller, _: str) -> web.StreamResponse:
        raw = await read_body(request, self.body_timeout)
        body = decode_body(raw, bodies.completion_decoder)

        def job(model: Model) -> Job:
            return bodies.completion_job(body, model.card, caller.tenant, int(time.time()))

        return await self._routed(request, caller, body, raw, job)

    async def chat_completions(self, request: web.BaseRequest, caller: Caller, _: str) -> web.StreamResponse:
        raw = await read_body(request, self.body_timeout)
        body = decode_body(raw, bodies.chat_decoder)

        def job(model: Model) -> Job:
            return bodies.chat_job(body, model.card, caller.tenant, int(time.time()))

        return await self._routed(request, caller, body, raw, job)

    async def generate(self, request: web.BaseRequest, caller: Caller, _: str) -> web.StreamResponse:
        """{prompt, max_tokens, temperature} -> {response}: the simplest endpoint."""
        body = decode_body(await read_body(request, self.body_timeout), _generate)
        whole = bodies.CompletionBody(
            model=body.model, prompt=body.prompt, max_tokens=body.max_tokens, temperature=body.temperature
        )
        if not isinstance(body.prompt, str):
            raise InvalidRequest("prompt is required", param="prompt")

        def job(model: Model) -> Job:
            made = bodies.completion_job(whole, model.card, caller.tenant, int(time.time()))
            made.view = {**(made.view or {}), "kind": "generate"}
            return made

        return await self._routed(request, caller, whole, None, job)

    async def _routed(
        self,
        request: web.BaseRequest,
        caller: Caller,
        body: bodies.GenerationBody,
        raw: bytes | None,
        job: Callable[[Model], Job],
    ) -> web.StreamResponse:
        """The answer of the first candidate that takes the request. ``raw`` is the body for upstreams; None, or a
        request that is to outlive its client: none of them is asked, since they keep nothing."""
        check_hops(request, self.models.routing.service)
        key, detached = _idempotency_key(request), bool(body.background) or _detached(request)
        kept = detached or raw is None or key is not None
        steps = await self.router.steps(bodies.model_name(body), lambda: asked(body, caller.tenant, kept), caller, key)
        kind = "chat" if isinstance(body, bodies.ChatBody) else "completion"
        for place, step in enumerate(steps):
            last = place == len(steps) - 1
            try:
                if step.model is not None:
                    others = self._others(request, caller, step, steps[place + 1 :], body, detached, job)
                    return await self._run(request, caller, step, last, body, detached, job, others)
                return await self.upstreams.answer(step, request, caller, kind, raw or b"")
            except (Overloaded, UpstreamDown) as error:
                if last:
                    raise
                log.info("%s does not take a request (%s), the next candidate is asked", step.name, error.wire_code)
        raise AssertionError("the last candidate answers or raises")

    async def _run(
        self,
        request: web.BaseRequest,
        caller: Caller,
        step: Step,
        last: bool,
        body: bodies.GenerationBody,
        detached: bool,
        job: Callable[[Model], Job],
        others: Iterator[Ask],
    ) -> web.StreamResponse:
        """Answer by a served model: the candidate, or the one on which the request of this idempotency key runs."""
        assert step.model is not None
        stream = bool(body.stream)
        try:
            ask = self._ask(request, step.model, caller, job(step.model), stream, detached, step, last)
            ask.others = others
            return await self.answers.answer(ask, request)
        except RunsElsewhere as error:
            model = await self.models.get(error.model)
            step = replace(step, name=error.model, model=model, why="its idempotency key")
            ask = self._ask(request, model, caller, job(model), stream, detached, step, last=True)
            return await self.answers.answer(ask, request)

    def _others(
        self,
        request: web.BaseRequest,
        caller: Caller,
        step: Step,
        later: list[Step],
        body: bodies.GenerationBody,
        detached: bool,
        job: Callable[[Model], Job],
    ) -> Iterator[Ask]:
        """The same request to the served models that are left, each made when its turn comes. Upstreams are none of
        them: what was accepted stays with who keeps a journal."""
        began = time.monotonic()
        for one in later:
            model = one.model
            try:
                if model is None:
                    continue
                made = job(model)
            except RequestError:
                continue  # it does not take such a request
            if made.timeout_s is not None:
                made.timeout_s = max(0.001, made.timeout_s - (time.monotonic() - began))
            one = replace(one, why=f"fallback ({step.name} was slow)")
            ask = self._ask(request, model, caller, made, bool(body.stream), detached, one, last=True)
            ask.idempotency = None  # it belongs to the first
            yield ask

    def _ask(
        self,
        request: web.BaseRequest,
        model: Model,
        caller: Caller,
        job: Job,
        stream: bool,
        detached: bool,
        step: Step | None = None,
        last: bool = True,
    ) -> Ask:
        life: dict[str, Any] = {"fingerprint": _system_fingerprint(model.card)}
        if detached or _detached(request):
            life["detached"] = True
        if grace := self._grace(request):
            life["grace_s"] = grace
        job.view = {**(job.view or {}), **life}
        job.cache = _cache_use(request, job)
        return Ask(
            model=model,
            slot=model.choose(caller.tenant, job),
            caller=caller,
            job=job,
            view=msgspec.convert(job.view, View),
            stream=stream,
            numbered=_resumes(request),
            idempotency=_idempotency_key(request),
            trace=AnswerTrace(self.traces, f"POST {request.path.rstrip('/')}", _traced(request)),
            step=step or Step(model.name, model),
            last=last,
        )

    def _grace(self, request: web.BaseRequest) -> float:
        """X-Headrace-Resume: how long the request continues without its client, in seconds."""
        given = request.headers.get("X-Headrace-Resume")
        if given is None:
            return self.resume_grace
        try:
            seconds = float(given)
        except ValueError:
            seconds = math.nan
        if not 0 <= seconds <= MAX_GRACE_S:
            raise InvalidRequest(
                f"X-Headrace-Resume must be seconds in [0, {MAX_GRACE_S:g}]", param="X-Headrace-Resume"
            )
        return seconds

    # -------------------------------------------------------------- requests that are there

    async def resume_stream(self, request: web.BaseRequest, caller: Caller, public: str) -> web.StreamResponse:
        """The rest of a stream after Last-Event-ID (or ?after=), on any gateway."""
        position = request.headers.get("Last-Event-ID") or request.query.get("after")
        shown = EventId.parse(position) if position else None
        found = await self._find(public, caller)
        if found is None:
            if shown is not None:
                raise Expired("this request is not kept any more")
            raise NotFound("no such request", param="id")
        if shown is not None and shown.tail == "d":
            return web.Response(status=204)  # it was read to its end; tells an EventSource to stop
        model, record = found
        trace = AnswerTrace(self.traces, "GET /v1/streams/{id}", _traced(request))
        ask = Ask(
            model=model, slot=_slot(model, record), caller=caller, job=record.job, view=View.of(record), stream=True,
            numbered=True, trace=trace,
        )  # fmt: skip
        return await self.answers.resume(ask, record.rid, shown, request)

    async def show_request(self, request: web.BaseRequest, caller: Caller, public: str) -> web.StreamResponse:
        """State, and when ended the whole response."""
        found = await self._find(public, caller)
        if found is None:
            raise NotFound("no such request", param="id")
        model, record = found
        shown = await _shown(model, record)
        terms = self.models.routing.models.get(model.name)
        if terms is not None and terms.waits and record.open:
            shown["waits"] = terms.waits
        return json_answer(shown, headers={"X-Request-Id": record.rid})

    async def cancel_request(self, request: web.BaseRequest, caller: Caller, public: str) -> web.StreamResponse:
        found = await self._find(public, caller)
        if found is None:
            raise NotFound("no such request", param="id")
        model, record = found
        cancelled = await _slot(model, record).bus.cancel(record.rid, caller.tenant)
        body = {"id": View.of(record).public_id(record.rid), "object": "request", "cancelled": cancelled}
        return json_answer(body, headers={"X-Request-Id": record.rid})

    async def _find(self, public: str, caller: Caller) -> tuple[Model, RequestRecord] | None:
        """The caller's own request. That of another tenant counts as not found."""
        rid = rid_of(public)
        found = await self.models.find_request(rid) if NAME.fullmatch(rid) else None
        return found if found is not None and found[1].tenant == caller.tenant else None

    # -------------------------------------------------------------- models, tokens

    async def list_models(self, request: web.BaseRequest, caller: Caller, _: str) -> web.StreamResponse:
        cards = await self.models.listed()
        allows = self.models.routing.allows
        shown = [_model_object(card) for card in cards if allows(card.model, caller.tenant)]
        shown += [_name_object(name) for name in self.router.visible(caller.tenant)]
        return json_answer({"object": "list", "data": shown})

    async def show_model(self, request: web.BaseRequest, caller: Caller, name: str) -> web.StreamResponse:
        if name in self.router.visible(caller.tenant):
            return json_answer(_name_object(name))
        if not self.models.routing.allows(name, caller.tenant):
            raise NotFound("this model is not served here", param="model", code="model_not_found")
        return json_answer(_model_object((await self.models.get(name)).card))

    async def tokenize(self, request: web.BaseRequest, caller: Caller, _: str) -> web.StreamResponse:
        """The ids of a text, or of a chat as /v1/chat/completions would begin it."""
        body = decode_body(await read_body(request, self.body_timeout), tokens.tokenize_decoder)
        tokens.check_tokenize(body)
        model = await self.router.own(body.model, caller)
        if body.prompt is None:
            job = tokens.tokens_job(body, model.card, caller.tenant, int(time.time()))
            return await self.answers.answer(
                self._ask(request, model, caller, job, stream=False, detached=False), request
            )
        count, ids = await model.tokenize(body.prompt, body.add_special_tokens is not False)
        answer = {"count": count, "max_model_len": model.card.max_model_len, "tokens": ids}
        if body.return_token_strs:
            answer["token_strs"] = await model.token_strings(msgspec.json.decode(ids, type=list[int]))
        return json_answer(answer)

    async def detokenize(self, request: web.BaseRequest, caller: Caller, _: str) -> web.StreamResponse:
        body = decode_body(await read_body(request, self.body_timeout), tokens.detokenize_decoder)
        if body.tokens is None:
            raise InvalidRequest("tokens is required", param="tokens")
        if len(body.tokens) > MAX_DETOKENIZE:
            raise InvalidRequest(f"tokens takes at most {MAX_DETOKENIZE} ids", param="tokens")
        model = await self.router.own(body.model, caller)
        if body.tokens and not (min(body.tokens) >= 0 and max(body.tokens) < model.card.vocab_size):
            raise InvalidRequest(f"a token id must lie in [0, {model.card.vocab_size - 1}]", param="tokens")
        return json_answer({"prompt": await model.detokenize(body.tokens)})

    async def tokenizer_info(self, request: web.BaseRequest, caller: Caller, _: str) -> web.StreamResponse:
        """What the model's tokenizer_config.json says, its chat template too. ?model= where several are served."""
        model = await self.router.own(request.query.get("model"), caller)
        raw = await model.bus.read_tokenizer_info()
        if raw is None:
            raise Unavailable("the tokenizer of this model is not known here yet")
        return json_answer(raw)

    # -------------------------------------------------------------- the service itself

    async def health(self, request: web.BaseRequest, caller: Caller, _: str) -> web.StreamResponse:
        """Whether this process runs. The one route that never asks for a key."""
        return json_answer({"status": "ok"})

    async def ready(self, request: web.BaseRequest, caller: Caller, _: str) -> web.StreamResponse:
        """200 while some model has a worker that serves and a leader with a current beat, and this process is not
        draining."""
        models = self.models.readiness()
        ready = any(model["ready"] for model in models.values()) and not self.answers.draining
        body: dict[str, Any] = {"ready": ready, "draining": self.answers.draining}
        if not self.guarded:
            body["models"] = models
        return json_answer(body, 200 if ready else 503)

    async def accepting(self, request: web.BaseRequest, caller: Caller, _: str) -> web.StreamResponse:
        """200 while requests are taken and kept, with or without a worker: the queue can be reached, a model is known,
        and this process is not draining."""
        accepting = self.models.reachable and bool(self.models.cards) and not self.answers.draining
        return json_answer({"accepting": accepting}, 200 if accepting else 503)

    async def version(self, request: web.BaseRequest, caller: Caller, _: str) -> web.StreamResponse:
        return json_answer({"version": release()})

    async def openapi(self, request: web.BaseRequest, caller: Caller, _: str) -> web.StreamResponse:
        """This API as OpenAPI 3.1."""
        return json_answer(self.documents.json())

    async def docs(self, request: web.BaseRequest, caller: Caller, _: str) -> web.StreamResponse:
        """The same as a page."""
        return web.Response(text=self.documents.html(), content_type="text/html", headers=PAGE_HEADERS)

    async def metrics(self, request: web.BaseRequest, caller: Caller, _: str) -> web.StreamResponse:
        body, kind = exposition(request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": kind})


# ------------------------------------------------------------------ parts


def _slot(model: Model, record: RequestRecord) -> Slot:
    """Where it was found."""
    slot = model.slot_of(record.rid)
    assert slot is not None
    return slot


async def _shown(model: Model, record: RequestRecord) -> dict[str, Any]:
    """A request as GET /v1/requests shows it."""
    view, rid, job = View.of(record), record.rid, record.job
    body: dict[str, Any] = {
        "id": view.public_id(rid),
        "object": "request",
        "status": "running" if record.prompts else "queued",
        "model": model.name,
        "created": view.created,
        "response": None,
        "error": None,
    }
    if record.open:
        return body
    journals = await _slot(model, record).bus.read_journals([(rid, choice) for choice in range(job.choices)])
    prompt_tokens = sum(len(prompt) // ID_BYTES for prompt in record.prompts)
    echoed = await model.prompt_texts(job) if view.echo else None
    answer, tally = whole_answer(
        rid, model.name, view, job.sampling.n, [raw or b"" for raw in journals], prompt_tokens, echoed, job,
        record.thinking, record.prompts,
    )  # fmt: skip
    failure = tally.failure()
    if failure is not None:
        return {**body, "status": "failed", **failure}
    cancelled = any(end == "abort" for end in record.ends)
    return {**body, "status": "cancelled" if cancelled else "completed", "response": answer}


def _model_object(card: ModelCard) -> dict[str, Any]:
    return {
        "id": card.model,
        "object": "model",
        "created": card.created,
        "owned_by": "headrace",
        "max_model_len": card.max_model_len,
        "context_length": card.max_model_len,  # the same by the name that other clients read
        **({"generation_config": card.sampling} if card.sampling else {}),
    }


def _name_object(name: str) -> dict[str, Any]:
    """An alias, a route or an upstream: what it stands for may change at any time."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "headrace"}


def _resumes(request: web.BaseRequest) -> bool:
    """Whether the client asks for a stream that it can go on with. Others get plain events, without ids."""
    return "X-Headrace-Resume" in request.headers or "Last-Event-ID" in request.headers or _detached(request)


def _detached(request: web.BaseRequest) -> bool:
    return _flag(request, "X-Headrace-Detached")


def _traced(request: web.BaseRequest) -> str | None:
    return joined(request.headers.get("traceparent"), request.headers.get("tracestate"))


def _flag(request: web.BaseRequest, name: str) -> bool:
    given = request.headers.get(name, "false").strip().lower()
    if given not in ("true", "false"):
        raise InvalidRequest(f"{name} must be true or false", param=name)
    return given == "true"


def _cache_use(request: web.BaseRequest, job: Job) -> Any:
    """Job.cache: what the body says of the cache of answers, restricted by Cache-Control: no-store (neither look up nor
    keep) and no-cache (keep alone). Other directives are for caches on the way."""
    told = {part.strip().lower() for part in request.headers.get("Cache-Control", "").split(",")}
    if "no-store" in told:
        return "off"
    if "no-cache" in told and job.cache != "off" and (job.sampling.greedy or job.cache == "on"):
        return "refresh"
    return job.cache


def _idempotency_key(request: web.BaseRequest) -> str | None:
    key = request.headers.get("Idempotency-Key")
    if key is not None and not NAME.fullmatch(key):
        raise InvalidRequest("Idempotency-Key must match [A-Za-z0-9_-]{1,64}", param="Idempotency-Key")
    return key


def _system_fingerprint(card: ModelCard) -> str:
    """Changes where the same request may give other tokens: with the version, the model or its weights."""
    told = f"{release()} {card.model} {card.vocab_size} {card.max_model_len} {card.fingerprint}"
    return "fp_" + hashlib.blake2b(told.encode(), digest_size=5).hexdigest()
