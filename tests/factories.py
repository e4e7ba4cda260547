"""Builders of the small things that scheduler tests are made of; every argument has a default for a tiny worker."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

from protocol.levels import LEVEL
from protocol.messages import Capacity, HintRow, Plan, PoolCapacity, pack_ids, unpack_ids
from protocol.sampling import SamplingParams
from scheduler.core.events import Arrive, ChoiceState, Effect, SendPlan, StepDone, WorkerServing
from scheduler.core.scheduler import Core, CoreConfig

BLOCK = 4
_numbers = itertools.count()


def capacity(
    *,
    blocks: int = 64,
    block_size: int = BLOCK,
    seqs: int = 8,
    tokens: int = 64,
    model_len: int = 256,
    level: int = LEVEL,
    stages: int = 1,
    fingerprint: str = "",
    host: int = 0,
    copy_us: float = 0.0,
) -> Capacity:
    return Capacity(
        model="m",
        max_model_len=model_len,
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        pools=[PoolCapacity("full", block_size, blocks)]
        + ([PoolCapacity("host", block_size, host, copy_us)] if host else []),
        vocab_size=1000,
        level=level,
        stages=stages,
        fingerprint=fingerprint,
    )


def arrive(
    rid: str | None = None,
    prompt: int | Iterable[int] = 6,
    *more_prompts: Iterable[int],
    max_tokens: int | None = 4,
    n: int = 1,
    tenant: str = "t",
    priority: Any = "standard",
    arrived: float = 0.0,
    deadline: float | None = None,
    attempts: int = 0,
    choices: list[ChoiceState] | None = None,
    cache_salt: str = "",
    fingerprint: str = "",
) -> Arrive:
    """A request. ``prompt`` is ids, or a length for ids that no other request of this run has."""
    number = next(_numbers)
    if isinstance(prompt, int):
        prompt = range(1000 * (number + 1), 1000 * (number + 1) + prompt)
    return Arrive(
        rid=rid or f"r{number}",
        tenant=tenant,
        priority=priority,
        prompts=[array("i", p) for p in (prompt, *more_prompts)],
        sampling=SamplingParams(max_tokens=max_tokens, n=n),
        seed=7,
        arrived=arrived,
        deadline=deadline,
        attempts=attempts,
        choices=choices,
        cache_salt=cache_salt,
        fingerprint=fingerprint,
    )


def serving(wid: str = "w0", gen: int = 1, **kwargs: Any) -> WorkerServing:
    return WorkerServing(wid, gen, capacity(**kwargs))


def core(config: CoreConfig | None = None, **kwargs: Any) -> Core:
    """A core with one worker, "w0"; keyword arguments are its capacity's."""
    made = Core(config or CoreConfig(max_num_batched_tokens=kwargs.get("tokens", 64)))
    made.apply(serving(**kwargs), 0.0)
    return made


def plans(effects: Iterable[Effect], wid: str = "w0") -> list[Plan]:
    return [e.plan for e in effects if isinstance(e, SendPlan) and e.wid == wid]


def rows(plan: Plan) -> dict[int, tuple[int, bool]]:
    """seat -> (tokens, whether it samples)."""
    seats = memoryview(plan.seats).cast("H").tolist()
    counts = list(unpack_ids(plan.counts)) or [1] * len(seats)
    samples = list(plan.samples) or [1] * len(seats)
    assert len(seats) == len(counts) == len(samples)
    return {seat: (count, bool(sample)) for seat, count, sample in zip(seats, counts, samples, strict=True)}


def hint(
    plan: Plan,
    tokens: dict[int, Sequence[int]] | None = None,
    *,
    wid: str = "w0",
    finish: dict[int, str] | None = None,
    cursor: int = 10,
    verdicts: str = "",
    exec_us: int = 1000,
    idle_us: int = 0,
) -> StepDone:
    """The report on ``plan``: one token for each row that samples, or ``tokens`` by seat."""
    finish = finish or {}
    if tokens is None:
        tokens = {seat: [1] for seat, (_, samples) in rows(plan).items() if samples}
    done = [HintRow(seat, pack_ids(ids), cursor, finish.get(seat)) for seat, ids in tokens.items()]
    done += [HintRow(seat, b"", cursor, reason) for seat, reason in plan.ends]
    return StepDone(wid, plan.gen, plan.step, done, exec_us, idle_us, verdicts)


def only(effects: Iterable[Effect], kind: type) -> Any:
    """The one effect of this kind among ``effects``."""
    found = [e for e in effects if isinstance(e, kind)]
    assert len(found) == 1, found
    return found[0]


def run(c: Core, wid: str = "w0", most: int = 1000) -> list[Effect]:
    """Plan and hint in turn until nothing is left to send; ``max_tokens`` ends sequences. All effects."""
    effects: list[Effect] = []
    rest: dict[int, int] = {}
    for _ in range(most):
        made = c.plan(0.0)
        effects += made
        sent = plans(made, wid)
        if not sent:
            return effects
        for plan in sent:
            for new in plan.new:
                rest[new.seat] = new.sampling.max_tokens - (len(new.token_ids) // 4 - new.prompt_len)
            finish, tokens = {}, {}
            for seat, (_, samples) in rows(plan).items():
                if samples and rest.get(seat, 0) > 0:
                    rest[seat] -= 1
                    tokens[seat] = [50 + rest[seat]]
                    if not rest[seat]:
                        finish[seat] = "length"
            effects += c.apply(hint(plan, tokens, finish=finish, wid=wid), 0.0)
            c.check_integrity()
    raise AssertionError("never at rest")
