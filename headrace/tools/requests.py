"""``headrace requests ls | show | cancel | tail``: the requests of a running service, over all tenants."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from typing import Any

from headrace.clients.queue import AsyncClient
from headrace.tools.show import as_json, duration, table
from headrace.tools.stored import Store, Stores, opened
from protocol.errors import InvalidRequest
from protocol.messages import ID_BYTES, decode_frames
from protocol.records import RequestRecord
from protocol.telemetry.context import trace_id_of

COLUMNS = ("id", "tenant", "state", "age:", "prompt:", "journal:", "open:", "deaths:", "ends")


def run(values: Mapping[str, Any]) -> int:
    """The command. Returns 1 if nothing was there to cancel, or a followed request failed."""
    return asyncio.run(_run(values))


async def _run(values: Mapping[str, Any]) -> int:
    action, ids = values["action"], values["id"]
    if action == "ls" and ids:
        raise InvalidRequest("ls takes no id", param="id")
    if action != "ls" and (not ids or (action != "cancel" and len(ids) > 1)):
        raise InvalidRequest(f"{action} takes {'ids' if action == 'cancel' else 'one id'}", param="id")
    async with opened(values) as stores:
        if action == "ls":
            return await _list(stores, values)
        if action == "cancel":
            return await _cancel(stores, ids)
        store, record = await stores.find(ids[0])
        if action == "show":
            return await _show(store, record)
    return await _tail(values["redis_url"], store.shard.model, record)


async def _list(stores: Stores, values: Mapping[str, Any]) -> int:
    found = (await stores.live(values["tenant"]))[: values["limit"]]
    if values["json"]:
        as_json(found)
        return 0
    rows = [
        (
            one.rid, one.tenant, one.state, duration(one.age_s), str(one.prompt_tokens), f"{one.bytes} B",
            f"{one.open}/{one.choices}", str(one.attempts), one.cancel or "",
        )
        for one in found
    ]  # fmt: skip
    table(COLUMNS, rows, "no request is under way")
    return 0


async def _show(store: Store, record: RequestRecord) -> int:
    """What is stored of a request, but no prompt and no answer."""
    choices = range(len(record.placements))
    journals = await store.bus.read_journals([(record.rid, choice) for choice in choices])
    sampling, now = record.job.sampling, await store.bus.server_ms()
    told = {
        "id": record.rid,
        "trace": trace_id_of(record.rid, record.job.trace),
        "model": store.shard.model,
        "shard": store.shard.number,
        "tenant": record.tenant,
        "priority": record.job.priority,
        "state": "ended" if not record.open else "running" if record.prompts else "inbox",
        "age_s": round((now - record.created_ms) / 1000, 3),
        "deadline_in_s": round((record.deadline_ms - now) / 1000, 3) if record.deadline_ms else None,
        "prompt_tokens": [len(prompt) // ID_BYTES for prompt in record.prompts],
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "seed": record.seed,
        "readers": record.attached,
        "deaths": record.attempts,
        "cancel": record.cancel,
        "moved_to": dict(zip(("model", "id"), record.moved, strict=True)) if record.moved is not None else None,
        "choices": [_choice(record, choice, journals[choice] or b"") for choice in choices],
    }
    print(json.dumps(told, indent=2))
    return 0


def _choice(record: RequestRecord, choice: int, journal: bytes) -> dict[str, Any]:
    tokens = sum(frame.token is not None for frame in decode_frames(journal)) if journal else 0
    return {"tokens": tokens, "placement": record.placements[choice], "finish_reason": record.ends[choice]}


async def _cancel(stores: Stores, ids: list[str]) -> int:
    missed = 0
    for named in ids:
        store, record = await stores.find(named)
        cancelled = await store.bus.cancel(record.rid, record.tenant)
        print(f"{record.rid} {'is cancelled' if cancelled else 'had ended already'}")
        missed += not cancelled
    return 1 if missed else 0


async def _tail(url: str, model: str, record: RequestRecord) -> int:
    """The text of its answer as it comes, from the beginning; of several choices each piece on a line of its own."""
    alone = len(record.placements) == 1
    async with AsyncClient(url, model, tenant=record.tenant) as client:
        async for piece in client.stream(record.rid):
            if piece.error is not None:
                print(f"headrace requests: {piece.error}", file=sys.stderr)
                return 1
            if alone:
                print(piece.text, end="", flush=True)
            elif piece.text:
                print(f"[{piece.choice}] {piece.text}", flush=True)
    if alone:
        print()
    return 0
