"""``headrace dead ls | retry | drop``: dead letters, which say what could not be run and why."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from typing import Any

import msgspec

from headrace.tools.show import as_json, duration, table
from headrace.tools.stored import Letter, Store, Stores, opened
from protocol.errors import InvalidRequest
from protocol.messages import new_rid

ALL = "all"
GONE = "is kept no more (a letter holds a hash of the body alone): its producer has to send it again"


def run(values: Mapping[str, Any]) -> int:
    """The command. Returns 1 if a letter could not be tried again."""
    return asyncio.run(_run(values))


async def _run(values: Mapping[str, Any]) -> int:
    action = values["action"]
    if action != "ls" and not values["id"]:
        raise InvalidRequest(f"{action} takes entries as `headrace dead ls` shows them, or {ALL}", param="entry")
    async with opened(values) as stores:
        letters = await stores.letters()
        if action == "ls":
            return _list([letter for _, letter in letters], values["json"])
        chosen = _chosen(letters, values["id"])
        if action == "drop":
            print(f"{sum([await store.drop(letter) for store, letter in chosen])} dropped")
            return 0
        return 1 if sum([not await _retry(stores, *one) for one in chosen]) else 0


def _list(letters: list[Letter], as_lines: bool) -> int:
    if as_lines:
        as_json(letters)
        return 0
    rows = [
        (one.entry, duration(one.age_s), one.code, one.rid or one.producer_id or "", one.message) for one in letters
    ]
    table(("entry", "age:", "code", "id", "why"), rows, "there are no dead letters")
    return 0


def _chosen(letters: list[tuple[Store, Letter]], named: list[str]) -> list[tuple[Store, Letter]]:
    if named == [ALL]:
        return letters
    known = {letter.entry: (store, letter) for store, letter in letters}
    for entry in named:
        if entry not in known:
            raise InvalidRequest(f"there is no dead letter {entry}", param="entry")
    return [known[entry] for entry in named]


async def _retry(stores: Stores, store: Store, letter: Letter) -> bool:
    """Accept the request anew, as one of its own, while its record is kept; then the letter goes."""
    record = await store.bus.read_request(letter.rid) if letter.rid is not None else None
    if record is None:
        print(f"headrace dead: {letter.entry}: the job {GONE}", file=sys.stderr)
        return False
    job = msgspec.structs.replace(record.job, id=None, tenant=record.tenant, reply_to=None)
    place = stores.place_for(store)
    accepted = await place.bus.accept(job, rid=new_rid(place.shard.number))
    await store.drop(letter)
    print(f"{letter.entry}: runs again as {accepted.rid}")
    return True
