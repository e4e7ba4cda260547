"""AsyncClient: submit a request to the queue, stream it, get its result, cancel it. No HTTP in between.

    async with AsyncClient("redis://127.0.0.1:6379/0") as client:
        request = await client.submit(prompt="def add(a, b):", max_tokens=64)
        async for piece in client.stream(request):
            print(piece.text, end="")

A submitted request is durable: it continues without its client, and any client can stream it again by its id for as
long as its journal is kept. Publications only save polling the journal. So after a lost publication or a restart of
Redis, or for a client that connects late, the reader continues from its cursor in the journal.
``headrace.Client`` (clients/sync.py) has the same methods without ``await``.

Over 400 lines: what a client gets is defined where it is filled, piece by piece.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from headrace.clients.parts import CHECK_S, PATIENCE_S, Parts
from protocol.bus import GatewayBus, HomeBus
from protocol.bus.base import job_fingerprint
from protocol.errors import (
    Conflict,
    EngineFailed,
    Expired,
    HeadraceError,
    InvalidRequest,
    Overloaded,
    RequestError,
    Unavailable,
    http_status,
)
from protocol.formats.message import functions_of, parsed_message
from protocol.formats.tool_use import with_tools
from protocol.messages import (
    DEFAULT_TENANT,
    Frame,
    Job,
    ModelCard,
    Priority,
    Row,
    decode_frames,
    new_rid,
    unpack_ids,
)
from protocol.prompt_logprobs import prompt_logprobs_of
from protocol.records import RequestRecord
from protocol.routing.store import RoutingStore, decode
from protocol.sampling import SamplingParams

LOOK_S = 0.1  # how often a leader is looked at, to see that it lives


@dataclass(frozen=True)
class Logprob:
    """``rank``: 1 for the most probable; None where it is not known."""

    logprob: float
    rank: int | None
    decoded_token: str


@dataclass(frozen=True)
class Piece:
    """One token of one choice, or its end. ``token_id`` is None in a piece that only ends the choice; ``error`` is the
    message where ``finish_reason`` is "error". ``frame`` is what the journal holds."""

    choice: int
    text: str
    token_id: int | None = None
    finish_reason: str | None = None
    error: HeadraceError | None = None
    frame: Frame | None = None


@dataclass
class Choice:
    """One ended sequence. ``index`` counts the choices of its request from 0.

    ``text`` is all that was generated. ``content``, ``reasoning_content`` and ``tool_calls`` (OpenAI's) are what it
    holds, read in the model's own format: None but for a chat with tools or of a model that thinks. A turn of calls
    has the finish reason "tool_calls". ``logprobs``: for each token those that were asked for, by id;
    ``prompt_logprobs``: the same of its prompt, None at the first.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: HeadraceError | None = None
    index: int = 0
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None

    def add(self, piece: Piece) -> None:
        """Take the next piece of this choice."""
        self.text += piece.text
        if piece.token_id is not None:
            self.token_ids.append(piece.token_id)
        self.finish_reason, self.error = piece.finish_reason, piece.error
        extra = piece.frame.extra if piece.frame is not None else None
        if extra is not None and "lp" in extra and piece.token_id is not None:
            self.logprobs = self.logprobs or []
            self.logprobs.append(_logprobs_of(piece.token_id, extra))
        if (prompt := prompt_logprobs_of(extra)) is not None:
            told = ({one.token: _logprob(one.logprob, one.rank, one.raw) for one in (own, *top)}
                    for own, top in prompt.positions())  # fmt: skip
            self.prompt_logprobs = [None, *told]


def _logprob(logprob: float, rank: int | None, raw: bytes) -> Logprob:
    return Logprob(logprob, rank, raw.decode(errors="replace"))


def _logprobs_of(token: int, extra: Mapping[str, Any]) -> dict[int, Logprob]:
    """Of the token that was drawn and of its alternatives. Only the order of the most probable ones is known."""
    found = {token: _logprob(extra["lp"], None, extra["tok"])}
    return found | {id: _logprob(logprob, None, raw) for id, raw, logprob in extra.get("top", ())}


@dataclass(frozen=True)
class Result:
    """An ended request. ``text`` is that of the first choice.

    ``outputs`` is ``choices`` under the name that vLLM's RequestOutput gives it. ``prompt_token_ids`` are the ids as
    the scheduler stored them, chat template and special tokens included; None where the request was refused before it
    had any, or has expired in the meantime. For a job of several prompts: those of the first. ``prompt_logprobs`` are
    those of the first choice.
    """

    request_id: str
    choices: list[Choice]
    prompt: str | None = None
    prompt_token_ids: list[int] | None = None

    @property
    def outputs(self) -> list[Choice]:
        return self.choices

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def prompt_logprobs(self) -> list[dict[int, Logprob] | None] | None:
        return self.choices[0].prompt_logprobs


class AsyncClient:
    """One connection to the queue of one model. ``model`` may be left out where only one is served."""

    def __init__(self, redis_url: str, model: str | None = None, *, tenant: str = DEFAULT_TENANT) -> None:
        self.redis_url = redis_url
        self.model = model
        self.tenant = tenant
        self._channel = f"client-{secrets.token_hex(8)}"
        self._parts: Parts | None = None
        self._home = HomeBus(redis_url, patience=PATIENCE_S)
        self._card: ModelCard | None = None
        self._readers: dict[str, set[asyncio.Queue[Row | None]]] = {}  # by rid; None: read the journal

    async def __aenter__(self) -> AsyncClient:
        await self.connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def connect(self) -> None:
        """Find the model and subscribe. StartError or Unavailable if there is no server."""
        cards = await GatewayBus.models(self.redis_url)
        served = sorted(cards)
        if self.model is None and len(served) != 1:
            raise InvalidRequest(f"name the model, one of: {', '.join(served) or 'none is served here'}", param="model")
        self.model = self.model or served[0]
        self._card = cards.get(self.model)
        if self._card is None and await _is_virtual(self.redis_url, self.model):
            raise InvalidRequest(
                f"{self.model} is a name that gateways route: push to it, or name a model", param="model"
            )
        self._parts = Parts(self.redis_url, self.model, self._channel, self._deliver)
        await self._parts.follow()

    async def is_served(self, within_s: float) -> bool:
        """Whether a leader lives and a worker serves, as seen within ``within_s``. Nothing is written."""
        bus, deadline = self._open.first.bus, time.monotonic() + within_s
        first = await bus.read_leader()
        while time.monotonic() < deadline:
            leader = await bus.read_leader()
            lives = leader.owner and (leader.epoch, leader.beat) != (first.epoch, first.beat)
            if lives and any(worker.state == "serving" for worker in await bus.list_workers()):
                return True
            await asyncio.sleep(LOOK_S)
        return False

    async def close(self) -> None:
        """Requests go on; this client only stops listening."""
        if self._parts is not None:
            await self._parts.close()
        await self._home.close()

    # -------------------------------------------------------------- requests

    async def submit(
        self,
        prompt: str | list[int] | None = None,
        *,
        messages: list[dict[str, Any]] | None = None,
        tools: list[dict[str, Any]] | None = None,
        tool_choice: str | dict[str, Any] | None = None,
        parallel_tool_calls: bool | None = None,
        id: str | None = None,
        priority: Priority = "standard",
        timeout_s: float | None = None,
        results: str | None = None,
        truncate_prompt_tokens: int | None = None,
        add_special_tokens: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
        sampling_params: SamplingParams | None = None,
        **sampling: Any,
    ) -> str:
        """Make a request durable; returns its request id. Sampling is given whole, or by field (``max_tokens=64``);
        ``structure`` may be a dict of the fields of Structure. Of a prompt the last ``truncate_prompt_tokens`` are kept
        (-1: as many as fit); ``continue_final_message`` goes on with the last message;
        ``chat_template_kwargs`` go to the template (``enable_thinking``). ``tools``, ``tool_choice`` and
        ``parallel_tool_calls`` are OpenAI's.

        ``id`` makes it idempotent: the same id and content again give the same request, never a second run.
        Raises InvalidRequest, Conflict (same id, other content), Overloaded, Unavailable.
        """
        content = {
            "prompt": prompt, "messages": messages, "id": id, "results": results, "tools": tools,
            "tool_choice": tool_choice, "parallel_tool_calls": parallel_tool_calls,
        }  # fmt: skip
        made = {
            "truncate_prompt_tokens": truncate_prompt_tokens, "add_special_tokens": add_special_tokens,
            "continue_final_message": continue_final_message, "chat_template_kwargs": chat_template_kwargs,
        }  # fmt: skip
        job = self.job(sampling_params, sampling, **content, **made, priority=priority, timeout_s=timeout_s)
        return await self.submit_job(job)

    def job(self, sampling_params: SamplingParams | None, sampling: dict[str, Any], **fields: Any) -> Job:
        """A Job of these fields. Where sampling is not given whole, the model's defaults are for what is not named."""
        card = self._card if sampling_params is None else None
        params = sampling_of(sampling_params, {**(card.defaults if card is not None else {}), **sampling})
        most = card.default_max_tokens(params) if card is not None else None
        return Job(sampling=params, tenant=self.tenant, default_max_tokens=most, **fields)

    def ruled(self, job: Job) -> Job:
        """``job`` as it is accepted: its sampling says what its tools ask, and the format that its answer is read by
        is pinned. InvalidRequest names the field; Unavailable where it has tools and the model was never served."""
        if self._card is not None:
            return with_tools(job, self._card.format)
        if job.tools or job.tool_choice is not None:
            raise Unavailable(f"{self.model} is not served now: how it writes calls is known when it is")
        return job

    async def submit_job(self, job: Job) -> str:
        """``submit`` for a whole Job. Its rows come to this client, whatever its reply_to."""
        if (job.prompt is None) == (job.messages is None):
            raise InvalidRequest("a job needs either prompt or messages", param="prompt")
        job.sampling.check()
        job = self.ruled(job)
        part = await self._open.choose(job)
        rid, claim = new_rid(part.shard.number), None
        if job.id is not None:
            first, body = self._open.first, job_fingerprint(job)
            if part is not first and await first.bus.find_request(job.tenant, job.id) is not None:
                part = first  # perhaps accepted before there were other shards
                rid = new_rid()
            claim = await self._home.claim_or_find(
                job.tenant, job.id, self.model or "", model=part.shard.tag, rid=rid, body=body
            )  # fmt: skip
            if claim.body != body:
                raise Conflict("this id was used for a job with another body", param="id")
            rid = claim.rid
        bus = await self._open.bus_of(rid)
        accepted = await self._home.accept(
            bus, job, rid=rid, claim=claim, idempotency=job.id, reply_to=self._channel
        )  # fmt: skip
        return accepted.rid

    async def submit_when_possible(self, job: Job) -> str:
        """``submit_job``, again and again while the service has too much waiting."""
        while True:
            try:
                return await self.submit_job(job)
            except Overloaded as error:
                await asyncio.sleep(error.retry_after or 1.0)

    async def stream(self, request_id: str) -> AsyncIterator[Piece]:
        """Every piece of a request from its beginning, in order within each choice, to the end of all choices.

        NotFound if there is no such request of this tenant; Expired if its journal is gone already.
        """
        async for choice, frame in self._frames(request_id):
            error = _error_of(frame) if frame.finish == "error" else None
            yield Piece(choice, frame.text, frame.token, frame.finish, error, frame)

    async def result(self, request_id: str) -> Result:
        """Wait for the end; returns all choices. An error is in its choice, not raised."""
        choices: dict[int, Choice] = {}
        shown: dict[int, list[tuple[int | None, str]]] = {}
        async for piece in self.stream(request_id):
            choices.setdefault(piece.choice, Choice(index=piece.choice)).add(piece)
            shown.setdefault(piece.choice, []).append((piece.token_id, piece.text))
        record = await (await self._open.bus_of(request_id)).read_request(request_id)
        ids = list(unpack_ids(record.prompts[0])) if record and record.prompts else None
        prompt = record.job.prompt if record and isinstance(record.job.prompt, str) else None
        if record is not None:
            for index, choice in choices.items():
                _read(choice, record, shown[index])
        return Result(request_id, [choices[i] for i in sorted(choices)], prompt, ids)

    async def cancel(self, request_id: str) -> bool:
        """End a request. False if it had ended already; NotFound if there is none."""
        return await (await self._open.bus_of(request_id)).cancel(request_id, self.tenant)

    # -------------------------------------------------------------- parts

    @property
    def _open(self) -> Parts:
        if self._parts is None:
            raise RuntimeError("the client is not connected: use `async with AsyncClient(...)`")
        return self._parts

    def _deliver(self, rows: list[Row]) -> None:
        if not rows:
            for queues in self._readers.values():
                for queue in queues:
                    queue.put_nowait(None)
        for row in rows:
            for queue in self._readers.get(row.rid, ()):
                queue.put_nowait(row)

    async def _frames(self, rid: str) -> AsyncIterator[tuple[int, Frame]]:
        bus, queue = await self._open.bus_of(rid), asyncio.Queue[Row | None]()
        self._readers.setdefault(rid, set()).add(queue)
        try:
            record = await bus.attach(rid, self.tenant, self._channel)
            cursors = dict.fromkeys(range(record.job.choices), 0)  # choices that have not ended: bytes read
            queue.put_nowait(None)  # what was journaled before
            while cursors:
                for choice, raw in await self._news(bus, rid, queue, cursors):
                    cursors[choice] += len(raw)
                    for frame in decode_frames(raw):
                        yield choice, frame
                        if frame.finish is not None:
                            del cursors[choice]
        finally:
            self._readers[rid].discard(queue)
            if not self._readers[rid]:
                del self._readers[rid]

    async def _news(
        self, bus: GatewayBus, rid: str, queue: asyncio.Queue[Row | None], cursors: dict[int, int]
    ) -> list[tuple[int, bytes]]:
        """The next frames at the cursors: from a publication if it fits, else from the journals."""
        row: Row | None = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CHECK_S):
                row = await queue.get()
        if row is not None:
            cursor = cursors.get(row.choice)
            if cursor is None or row.cursor < cursor:
                return []  # a notice of admission, or read already
            if row.cursor == cursor:
                return [(row.choice, row.frames)]
        found = []
        for choice, cursor in cursors.items():
            if raw := await bus.read_journal(rid, choice, cursor):
                found.append((choice, raw))
        if not found and row is None and await bus.read_request(rid) is None:
            raise Expired("the request has ended and its journal is gone", param="id")
        return found


async def _is_virtual(redis_url: str, name: str) -> bool:
    """Whether an alias or a route has this name: what is accepted under it would wait for ever."""
    store = RoutingStore(redis_url)
    try:
        table = decode(await store.read())
    finally:
        await store.close()
    return name in table.aliases or name in table.routes


def _read(choice: Choice, record: RequestRecord, shown: list[tuple[int | None, str]]) -> None:
    """Tell what the text of ``choice`` holds, where it has a format."""
    job = record.job
    if job.format is None:
        return
    functions, ruled = functions_of(job.tools), job.sampling.ruled
    message = parsed_message(record.rid, choice.index, job.format, functions, record.thinking, shown, eager=ruled)
    choice.content, choice.reasoning_content = message.content, message.reasoning or None
    choice.tool_calls, choice.finish_reason = message.calls or None, message.finish(choice.finish_reason)


def sampling_of(whole: SamplingParams | None, fields: dict[str, Any]) -> SamplingParams:
    """Sampling given as a whole or by field, types and ranges checked. InvalidRequest names the field."""
    if whole is not None and fields:
        raise InvalidRequest(f"give either sampling_params or {', '.join(fields)}", param="sampling_params")
    try:
        given = fields if whole is None else msgspec.to_builtins(whole)
        params = msgspec.convert(given, SamplingParams, strict=True, str_keys=False)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(str(error)) from None
    params.check()
    return params


def _error_of(frame: Frame) -> HeadraceError:
    told = frame.extra or {}
    code, message = str(told.get("code", "engine_failed")), str(told.get("message", "the request failed"))
    if http_status(code) < 500 and http_status(code) != 429:
        return RequestError(message, param=told.get("param"), code=code)
    return EngineFailed(f"{code}: {message}")
