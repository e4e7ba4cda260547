"""From the name that a client asked for to what may answer, in the order in which it is tried.

A *step* is one candidate: a served model, or an upstream. Names are followed through aliases and routes; cycles are
refused by `config check`, and what is followed here is bounded all the same. A candidate that is down, or over its
bound of waiting requests, is passed over. If none is left, the first served model gets the request: its queue keeps it.
One that was accepted and said nothing for as long as its rule allows can still be moved (answers.py).
"""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from gateway.auth import Caller
from gateway.models import Model, Models
from gateway.routing.money import Money
from gateway.routing.rules import Asked, first_match
from gateway.routing.scorer import Scorer
from protocol.errors import BudgetSpent, HeadraceError, InvalidRequest, NotFound, Unavailable
from protocol.records import Limits
from protocol.routing.table import Price, Route, Routing, Rule, Upstream

log = logging.getLogger("headrace.gateway")

DEEPEST = 8  # names that are followed one after the other
MOST_STEPS = 32


@dataclass(frozen=True)
class Step:
    """One candidate and why it is one. ``asked`` and ``rule`` are "" where the client named the model itself."""

    name: str
    model: Model | None = None
    upstream: Upstream | None = None
    asked: str = ""
    rule: str = ""
    why: str = ""
    limits: Limits | None = None  # in place of the gateway's
    within_s: float | None = None  # it has to say something by then, else the next one is asked

    @property
    def header(self) -> dict[str, str]:
        if not self.asked:
            return {}
        parts = [f"model={self.name}", f"asked={self.asked}", *([f"rule={self.rule}"] if self.rule else [])]
        return {"X-Headrace-Route": "; ".join([*parts, f"why={self.why}"])}


class Router:
    """``limits`` are the gateway's own bounds of waiting work."""

    def __init__(self, models: Models, money: Money, limits: Limits) -> None:
        self.models = models
        self.money = money
        self.limits = limits
        self._scorer = Scorer(models.name)

    @property
    def table(self) -> Routing:
        return self.models.routing

    async def steps(self, name: str | None, look: Callable[[], Asked], caller: Caller, key: str | None) -> list[Step]:
        """What may answer, best first; at least one. ``look`` tells what rules look at, if any rule does; ``key`` is
        the idempotency key: the same one goes the same way. NotFound for a name that means nothing to this caller,
        BudgetSpent."""
        if name is None or self.table == EMPTY:
            model = await self.models.the_one(name)
            if self.table == EMPTY:
                return [Step(model.name, model)]
            name = model.name
        table, tenant = self.table, caller.tenant
        over = await self.money.over_budget(tenant)
        if over:
            if table.tenants[tenant].over_budget == "refuse":
                raise BudgetSpent("the budget of this key for today is spent; it is renewed at midnight (UTC)")
            name = table.tenants[tenant].over_budget
        if name not in table.aliases and name not in table.routes and name not in table.upstreams:
            found = await self._named(name, tenant)
            return [replace(found, asked=name, why="over budget") if over else found]
        if key is not None and (before := await self._accepted_before(name, tenant, key)):
            return await self._repeated(before, name, look, key)
        asked = look()
        steps = await self._allowed(name, asked, key)
        if not steps:
            if asked.kept:
                raise InvalidRequest("what would answer keeps nothing: it can run neither detached nor idempotent")
            raise NotFound("this model is not served here", param="model", code="model_not_found")
        return [replace(step, why="over budget") for step in steps] if over else steps

    async def own(self, name: str | None, caller: Caller) -> Model:
        """The served model that a name means, for questions about the model itself. An alias means its heaviest."""
        for _ in range(DEEPEST):
            if name is None or name in self.models.cards or name not in self.table.aliases:
                break
            targets = self._targets(name)
            name = max(targets, key=lambda target: targets[target], default="")
        model = await self.models.the_one(name)
        if not self.table.allows(model.name, caller.tenant):
            raise NotFound("this model is not served here", param="model", code="model_not_found")
        return model

    def visible(self, tenant: str) -> list[str]:
        """Further names that this tenant may put in `model`."""
        table = self.table
        names = [*table.aliases, *table.routes, *(u for u in table.upstreams if table.allows(u, tenant))]
        return sorted(set(names) - self.models.cards.keys())

    async def _repeated(self, before: Step, name: str, look: Callable[[], Asked], key: str) -> list[Step]:
        """A repeat goes to the model that has accepted its key. While that one says nothing the request may move, as it
        might have by the gateway that accepted it, which may be dead."""
        try:
            steps = await self._allowed(name, look(), key)
        except HeadraceError:
            return [before]  # no rule can be asked now; this one has the request all the same
        within = next((step.within_s for step in steps), None)
        if within is None:
            return [before]
        return [replace(before, within_s=within), *(step for step in steps if step.name != before.name)]

    # -------------------------------------------------------------- names

    async def _allowed(self, name: str, asked: Asked, key: str | None) -> list[Step]:
        """The steps of a name that this tenant may use, each once."""
        steps = _distinct(await self._follow(name, asked, key, 0))
        allowed = [step for step in steps if self.table.allows(step.name, asked.tenant)][:MOST_STEPS]
        return [replace(step, asked=name, limits=self._limits(step.name)) for step in allowed]

    async def _named(self, name: str, tenant: str) -> Step:
        """A served model by its own name."""
        if not self.table.allows(name, tenant):
            raise NotFound("this model is not served here", param="model", code="model_not_found")
        return Step(name, await self.models.get(name), limits=self._limits(name))

    async def _follow(self, name: str, asked: Asked, key: str | None, depth: int) -> list[Step]:
        """The steps that a name stands for. A name that means nothing now gives none."""
        table = self.table
        if depth > DEEPEST:
            log.error("the names of the table of routes lead on and on: %s", name)
            return []
        if name in table.aliases and name not in self.models.cards:
            targets = self._targets(name)
            if not targets:
                return []
            target = drawn(targets, key and f"{asked.tenant} {key}")
            found = await self._follow(target, asked, key, depth + 1)
            return [replace(step, why=step.why if step.rule else "alias") for step in found]
        if name in table.routes and name not in self.models.cards:
            return await self._by_rules(name, asked, key, depth)
        if name in table.upstreams:
            return [] if asked.kept else [Step(name, upstream=table.upstreams[name], why="upstream")]
        try:
            return [Step(name, await self.models.get(name))]
        except HeadraceError:
            return []

    def _targets(self, alias: str) -> dict[str, int]:
        """What an alias stands for, by weight; a model that was removed is none, though an alias still names it."""
        table = self.table
        known = (self.models.cards, table.aliases, table.routes, table.upstreams)
        weights = table.aliases[alias]
        return {name: weights[name] for name in weights if weights[name] and any(name in names for names in known)}

    async def _by_rules(self, name: str, asked: Asked, key: str | None, depth: int) -> list[Step]:
        async def count(rule: Rule) -> int:
            assert isinstance(asked.prompt, str)
            for candidate in (*rule.models, *rule.fallbacks):
                for step in await self._follow(candidate, replace(asked, prompt=[]), key, depth + 1):
                    if step.model is not None:
                        return (await step.model.tokenize(asked.prompt, False))[0]
            raise Unavailable("no candidate has a tokenizer")

        now = datetime.datetime.now(datetime.UTC)
        route = self.table.routes[name]
        match = await first_match(route, asked, now, count, lambda: self._complexity(route, asked))
        if match is None:
            return []
        index, rule = match
        told = rule.name or f"rule-{index + 1}"
        found = [step for one in rule.models for step in await self._follow(one, asked, key, depth + 1)]
        back = [step for one in rule.fallbacks for step in await self._follow(one, asked, key, depth + 1)]
        wanted, passed = self._up(found, rule)
        ordered = self._ordered(wanted, rule, asked)
        left, _ = self._up(back, rule)
        instead = f"fallback ({passed} passed over)" if passed else "fallback"
        found_up = [(step, rule.choose) for step in ordered] + [(step, instead) for step in left]
        within = rule.first_token_within
        steps = [replace(step, rule=told, why=why, within_s=within) for step, why in found_up]
        if not steps:  # all are down: a queue of ours keeps the request until one is not
            steps = [replace(s, rule=told, why="all are down") for s in (*found, *back) if s.model is not None][:1]
        return steps

    async def _complexity(self, route: Route, asked: Asked) -> str | None:
        """What the route's scorer says; None where it cannot be asked."""
        try:
            model = await self.models.get(route.scorer or "")
        except HeadraceError as error:
            log.warning("the scorer %s cannot be asked: %s", route.scorer, error)
            return None
        limits = self._limits(model.name) or self.limits
        return await self._scorer.verdict(model, asked.text, asked.tenant, route.scorer_within, limits)

    def _up(self, steps: list[Step], rule: Rule) -> tuple[list[Step], str]:
        """Those that can answer now, and the names of the others."""
        up, names = [], []
        for step in steps:
            if step.model is None or self._takes(step.model, rule):
                up.append(step)
            else:
                names.append(step.name)
        return up, " ".join(names)

    def _takes(self, model: Model, rule: Rule) -> bool:
        return self.models.up(model) and (rule.max_waiting is None or model.waiting_requests <= rule.max_waiting)

    def _ordered(self, steps: list[Step], rule: Rule, asked: Asked) -> list[Step]:
        """By the rule's choice; what is equal stays in the order of the table."""
        if rule.choose == "cheapest":
            return sorted(steps, key=lambda s: self._cost(s.name, asked))
        if rule.choose == "least-loaded":
            return sorted(steps, key=lambda s: s.model.load if s.model is not None else self.money.load(s.name))
        if rule.choose == "fastest":
            return sorted(steps, key=lambda s: self._first_token_s(s, asked))
        return steps

    def _cost(self, name: str, asked: Asked) -> float:
        return (self.table.price(name) or Price()).of(asked.prompt_tokens, asked.output_tokens)

    def _first_token_s(self, step: Step, asked: Asked) -> float:
        """What waits before it, at the speed at which tokens come, and the shortest time that was seen of late."""
        seen = self.money.first_token_s(step.name)
        if step.model is None:
            return seen
        return seen + (step.model.waiting_tokens / step.model.rate if step.model.rate > 0 else 0.0)

    def _limits(self, name: str) -> Limits | None:
        terms = self.table.models.get(name)
        if terms is None or (terms.max_waiting_requests is None and terms.max_waiting_tokens is None):
            return None
        own = self.limits
        requests = own.requests if terms.max_waiting_requests is None else terms.max_waiting_requests
        tokens = own.tokens if terms.max_waiting_tokens is None else terms.max_waiting_tokens
        return replace(own, requests=requests, tokens=tokens)

    async def _accepted_before(self, name: str, tenant: str, key: str) -> Step | None:
        """The model that has accepted this idempotency key already, wherever the name points now: a repeat stays on
        the version that it began with."""
        cards = [card for card in self.models.cards if self.table.allows(card, tenant)]
        models = await asyncio.gather(*(self.models.get(card) for card in cards))
        rids = await asyncio.gather(*(model.bus.find_request(tenant, key) for model in models))
        for model, rid in zip(models, rids, strict=True):
            if rid is not None:
                return Step(model.name, model, asked=name, why="accepted before", limits=self._limits(model.name))
        return None


EMPTY = Routing()


def drawn(targets: dict[str, int], key: str | None) -> str:
    """One of these by weight: at random, or the same for the same ``key``."""
    total = sum(targets.values())
    if key is None:
        point = random.randrange(total)
    else:
        point = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) % total
    for name, weight in targets.items():
        point -= weight
        if point < 0:
            return name
    raise AssertionError("weights are 0 or more, and not all 0")


def _distinct(steps: list[Step]) -> list[Step]:
    found: dict[str, Step] = {}
    for step in steps:
        found.setdefault(step.name, step)
    return list(found.values())
