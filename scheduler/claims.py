"""What a push needs of the home slot before it is admitted: a claim of its id, and what it holds of its tenant's limits
(protocol/bus/home.py)."""

from __future__ import annotations

from protocol.bus import HomeBus, LeaderBus
from protocol.bus.base import job_fingerprint
from protocol.errors import Conflict
from protocol.messages import Job, new_rid
from protocol.records import Claim, Reservation

CONFLICT = Conflict("this id was used for a job with another body", param="id")


class Elsewhere(Exception):
    """The request of a push's id runs in another slot."""


async def claim_and_reserve(
    bus: LeaderBus, home: HomeBus | None, job: Job, tokens: int
) -> tuple[str, Reservation, Claim | None]:
    """The rid under which a push is to be admitted in this slot. Elsewhere, Conflict, Overloaded."""
    keys, claim = bus.keys, None
    rid = new_rid(keys.shard)
    if home is None:
        return rid, Reservation(None), None
    if job.id is not None:
        model, body = keys.model.partition("#")[0], job_fingerprint(job)
        claim = await home.claim_or_find(job.tenant, job.id, model, model=keys.model, rid=rid, body=body)
        if claim.body != body:
            raise CONFLICT
        if claim.model != keys.model:
            raise Elsewhere
        rid = claim.rid
        if not claim.mine and await bus.read_request(rid) is not None:  # it has its reservation
            return rid, Reservation(None), claim
    return rid, await home.reserve(job.tenant, rid, keys.model, tokens), claim
