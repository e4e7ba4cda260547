"""How hard a question is, as a small served model sees it: `simple`, `medium` or `complex`, and nothing else.

The model is asked like any other, in the name of the caller's tenant, with an answer that can only be one of the three.
A verdict is kept, so the same question is asked once; one that is late is none, and rules that need it do not hold.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import OrderedDict
from typing import Any

import msgspec

from gateway.metrics import SCORED
from gateway.models import Model
from gateway.openai.bodies import ChatBody, CompletionBody, chat_job, completion_job
from gateway.openai.render import whole_answer
from gateway.openai.view import View
from gateway.streams import Collector
from protocol.errors import HeadraceError, Unavailable
from protocol.messages import Job, new_rid
from protocol.records import Limits
from protocol.routing.table import VERDICTS

log = logging.getLogger("headrace.gateway")

MOST_KEPT = 10_000  # verdicts
KEPT_S = 3600.0
SEEN = 2000  # characters of the question's beginning, and of its end
TASK = (
    "Judge how hard the request below is to answer well. simple: a greeting, a fact, a rewording. medium: a paragraph"
    " of explanation or a short program. complex: proofs, long programs, plans, several steps of reasoning."
    " Do not answer the request. Say one word: simple, medium or complex."
)


class Scorer:
    """``name`` is this process's reply channel."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._kept: OrderedDict[bytes, tuple[float, asyncio.Future[str | None]]] = OrderedDict()

    async def verdict(self, model: Model, text: str, tenant: str, within_s: float, limits: Limits) -> str | None:
        """One of VERDICTS, or None where the model did not say in ``within_s`` seconds."""
        told = f"{model.name} {model.card.fingerprint} {tenant}\n{text}"
        key = hashlib.blake2b(told.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        since, kept = self._kept.get(key, (0.0, None))
        if kept is not None and time.monotonic() - since < KEPT_S and not (kept.done() and kept.result() is None):
            SCORED.labels(model.name, "kept").inc()
            return await asyncio.shield(kept)
        asked: asyncio.Future[str | None] = asyncio.ensure_future(self._ask(model, text, tenant, within_s, limits))
        self._kept[key] = time.monotonic(), asked
        while len(self._kept) > MOST_KEPT:
            self._kept.popitem(last=False)
        said = await asyncio.shield(asked)
        SCORED.labels(model.name, said or "none").inc()
        return said

    async def _ask(self, model: Model, text: str, tenant: str, within_s: float, limits: Limits) -> str | None:
        collector = Collector(new_rid(), 1)
        accepted = False
        try:
            job = _question(model, text, tenant)
            model.outlet.add(collector)
            async with asyncio.timeout(within_s):
                await model.bus.accept(job, rid=collector.rid, reply_to=self.name, limits=limits)
                accepted = True
                while not collector.over:
                    await collector.news.wait()
                    collector.news.clear()
                    if collector.behind:
                        await collector.catch_up(model.bus)
            return _said(collector, model, job)
        except (HeadraceError, TimeoutError) as error:
            log.warning("%s does not judge a request: %s", model.name, error or "it is too slow")
            return None
        finally:
            model.outlet.remove(collector)
            if accepted and collector.tally.open:
                await _cancel(model, collector.rid, tenant)


async def _cancel(model: Model, rid: str, tenant: str) -> None:
    try:
        await model.bus.cancel(rid, tenant)
    except HeadraceError as error:
        log.warning("a question to %s could not be cancelled: %s", model.name, error)


def _question(model: Model, text: str, tenant: str) -> Job:
    shown = text if len(text) <= 2 * SEEN else f"{text[:SEEN]}\n[...]\n{text[-SEEN:]}"
    options: dict[str, Any] = {
        "guided_choice": list(VERDICTS),
        "temperature": 0.0,
        "max_tokens": 16,
        "priority": "interactive",
    }
    if not model.card.chat:
        body = CompletionBody(prompt=f"{TASK}\n\nRequest:\n{shown}\n\nVerdict: ", **options)
        return completion_job(body, model.card, tenant, int(time.time()))
    messages = [{"role": "system", "content": TASK}, {"role": "user", "content": shown}]
    return chat_job(ChatBody(messages=messages, **options), model.card, tenant, int(time.time()))


def _said(collector: Collector, model: Model, job: Job) -> str | None:
    if collector.failed is not None:
        raise collector.failed
    if (failure := collector.tally.failure()) is not None:
        raise Unavailable(str(failure["error"]["message"]))
    view = msgspec.convert(job.view, View)
    journals = [b"".join(pieces) for pieces in collector.journals]
    body, _ = whole_answer(collector.rid, model.name, view, 1, journals, 0, None, job, collector.tally.thinking, [])
    choice = body["choices"][0]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    return text.strip() if isinstance(text, str) and text.strip() in VERDICTS else None
