"""The table that gateways route by. It is what a configuration file says of it, kept in the store as one JSON document.

A *name* in `model` means, in this order: a served model, an alias, a route (a virtual model with rules) or an upstream.
All names in rules may be any of these; `faults` refuses cycles.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Literal
from zoneinfo import ZoneInfo

import msgspec

from protocol.keys import MODEL_NAME, NAME

Choose = Literal["first", "cheapest", "least-loaded", "fastest"]
Class = Literal["interactive", "standard", "batch"]
Verdict = Literal["simple", "medium", "complex"]
VERDICTS: tuple[Verdict, ...] = ("simple", "medium", "complex")

MOST_NAMES = 256  # aliases, routes, upstreams, tenants: of each
MOST_RULES = 64  # of one route
MOST_CANDIDATES = 16  # of one rule
MOST_WORDS = 256  # of one rule
MOST_PATTERN = 1024  # characters
MOST_WEIGHT = 1_000_000
HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-4]):([0-5]\d)")
ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")


class Part(msgspec.Struct, kw_only=True, omit_defaults=True, forbid_unknown_fields=True, rename="kebab"):
    pass


class Price(Part):
    """Money per million tokens, in whatever currency the operator counts."""

    input: float = 0.0
    output: float = 0.0

    def of(self, prompt_tokens: int, output_tokens: int) -> float:
        return (self.input * prompt_tokens + self.output * output_tokens) / 1e6


class Terms(Part):
    """What holds for one served model."""

    price: Price | None = None
    tenants: list[str] | None = None  # who may use it; None: everyone
    max_waiting_requests: int | None = None  # in place of the gateway's bounds
    max_waiting_tokens: int | None = None
    sleeps: bool = False  # it has no worker while nobody asks for it: one is started for the next request
    waits: str = ""  # why it is not loaded though it has work: what its clients are told


class Rule(Part):
    """If all that it states is so, one of `models` answers; the first rule that matches decides."""

    models: list[str]
    name: str = ""
    choose: Choose = "first"
    fallbacks: list[str] = []
    max_waiting: int | None = None  # a candidate with more waiting requests is passed over
    first_token_within: float | None = None  # seconds; one that has said nothing by then gives the request to the next
    # conditions
    min_prompt_tokens: int | None = None
    max_prompt_tokens: int | None = None
    words: list[str] | None = None  # one of them stands in the user's messages
    pattern: str | None = None  # RE2 finds it there
    tools: bool | None = None  # whether the request has any
    schema: bool | None = None  # whether it asks for a structure of the answer
    system: bool | None = None  # whether it has a system prompt
    tenants: list[str] | None = None
    classes: list[Class] | None = None
    hours: str | None = None  # 22:00-06:00, in the route's time zone
    complexity: list[Verdict] | None = None  # what the route's scorer says of the question


class Route(Part):
    rules: list[Rule]
    timezone: str = "UTC"
    scorer: str | None = None  # a served model, small, that is asked how hard a question is
    scorer_within: float = 2.0  # seconds; a verdict that comes later is none


class Upstream(Part):
    """An OpenAI-compatible server that is not ours. Answers of it have no journal: nothing of them can be resumed."""

    url: str  # with /v1
    model: str | None = None  # its name there; None: the same
    key_env: str | None = None  # the gateway's environment variable that holds the key
    price: Price | None = None
    max_concurrent: int = 64
    first_byte_timeout: float = 60.0  # seconds
    timeout: float = 600.0
    tenants: list[str] | None = None


class Tenant(Part):
    budget: float | None = None  # money per day (UTC)
    over_budget: str = "refuse"  # or the name of what answers from then on


class Routing(Part):
    """The whole table. ``stated`` are the aliases as the file stated them last: one that was moved since stays moved
    until the file states another one."""

    aliases: dict[str, dict[str, int]] = {}  # name -> model -> weight
    stated: dict[str, dict[str, int]] = {}
    models: dict[str, Terms] = {}
    routes: dict[str, Route] = {}
    upstreams: dict[str, Upstream] = {}
    tenants: dict[str, Tenant] = {}
    service: str = ""  # told to upstreams, so that a request that comes back to us is known

    @property
    def budgets(self) -> bool:
        return any(tenant.budget is not None for tenant in self.tenants.values())

    def money(self) -> dict[str, str]:
        """Budgets and prices as the home slot has them (protocol/lua/_limits.lua); {}: nobody has a budget."""
        if not self.budgets:
            return {}
        told = {f"b:{name}": repr(tenant.budget) if tenant.over_budget == "refuse" else "-"
                for name, tenant in self.tenants.items() if tenant.budget is not None}  # fmt: skip
        for name, terms in self.models.items():
            if terms.price is not None:
                told[f"p:{name}"] = f"{terms.price.input!r} {terms.price.output!r}"
        return told

    def price(self, name: str) -> Price | None:
        terms = self.models.get(name) or self.upstreams.get(name)
        return terms.price if terms is not None else None

    def allows(self, name: str, tenant: str) -> bool:
        """Whether a tenant may use a model or an upstream."""
        terms = self.models.get(name) or self.upstreams.get(name)
        return terms is None or terms.tenants is None or tenant in terms.tenants


Fault = tuple[tuple[str | int, ...], str]  # where in the table, as keys of the file; what is wrong


def faults(table: Routing, served: Iterable[str] | None) -> Iterator[Fault]:
    """All that is wrong with a table. ``served``: the models that there are; None: not known here, any may be."""
    models = set(served) if served is not None else None
    for kind in ("aliases", "routes", "upstreams", "tenants"):
        names = getattr(table, kind)
        if len(names) > MOST_NAMES:
            yield (kind,), f"at most {MOST_NAMES} of them"
        for name in names:
            if not (NAME if kind == "tenants" else MODEL_NAME).fullmatch(name):
                yield (kind, name), "this is no name: letters, digits and some signs, see --served-model-name"
            if kind != "tenants" and models is not None and name in models:
                yield (kind, name), "a served model has this name"
    for name in table.routes.keys() & table.aliases.keys():
        yield ("routes", name), "an alias has this name"
    for name in table.upstreams.keys() & (table.aliases.keys() | table.routes.keys()):
        yield ("upstreams", name), "an alias or a route has this name"
    known = None if models is None else models | table.aliases.keys() | table.routes.keys() | table.upstreams.keys()
    yield from _alias_faults(table, known)
    for name, route in table.routes.items():
        yield from _route_faults(("routes", name), route, known, models)
    for name, upstream in table.upstreams.items():
        yield from _upstream_faults(("upstreams", name), upstream)
    for name, tenant in table.tenants.items():
        if tenant.budget is not None and tenant.budget < 0:
            yield ("tenants", name, "budget"), "it is less than 0"
        if tenant.over_budget != "refuse" and known is not None and tenant.over_budget not in known:
            yield ("tenants", name, "over-budget"), f"nothing has the name {tenant.over_budget}; or write refuse"
    for name, terms in table.models.items():
        yield from _price_faults(("models", name), terms.price)
    yield from _cycles(table)


def _alias_faults(table: Routing, known: set[str] | None) -> Iterator[Fault]:
    for name, targets in table.aliases.items():
        if not targets or len(targets) > MOST_CANDIDATES:
            yield ("aliases", name), f"one to {MOST_CANDIDATES} models are needed"
        for target, weight in targets.items():
            if not 0 <= weight <= MOST_WEIGHT:
                yield ("aliases", name), f"the weight of {target} must lie in [0, {MOST_WEIGHT}]"
            if known is not None and target not in known:
                yield ("aliases", name), f"nothing has the name {target}"
        if targets and not any(targets.values()):
            yield ("aliases", name), "all weights are 0"


def _route_faults(
    path: tuple[str | int, ...], route: Route, known: set[str] | None, served: set[str] | None
) -> Iterator[Fault]:
    if not 1 <= len(route.rules) <= MOST_RULES:
        yield path, f"one to {MOST_RULES} rules are needed"
    if route.scorer is not None and served is not None and route.scorer not in served:
        yield (*path, "scorer"), f"no served model has the name {route.scorer}"
    if not 0 < route.scorer_within <= 60:
        yield (*path, "scorer-within"), "seconds in (0, 60] are needed"
    try:
        ZoneInfo(route.timezone)
    except (ValueError, OSError, KeyError):
        yield (*path, "timezone"), "no such time zone"
    for index, rule in enumerate(route.rules):
        at = (*path, "rules", index)
        if not 1 <= len(rule.models) <= MOST_CANDIDATES:
            yield (*at, "models"), f"one to {MOST_CANDIDATES} models are needed"
        if rule.name and not NAME.fullmatch(rule.name):
            yield (*at, "name"), "it must match [A-Za-z0-9_-]{1,64}"
        for key, names in (("models", rule.models), ("fallbacks", rule.fallbacks)):
            for name in names:
                if known is not None and name not in known:
                    yield (*at, key), f"nothing has the name {name}"
        if rule.complexity is not None and route.scorer is None:
            yield (*at, "complexity"), "the route names no scorer"
        if rule.first_token_within is not None and not 0 < rule.first_token_within <= 3600:
            yield (*at, "first-token-within"), "seconds in (0, 3600] are needed"
        if rule.hours is not None and not HOURS.fullmatch(rule.hours):
            yield (*at, "hours"), "write it as 22:00-06:00"
        if rule.words is not None and (len(rule.words) > MOST_WORDS or any(not 0 < len(w) <= 64 for w in rule.words)):
            yield (*at, "words"), f"at most {MOST_WORDS} words of 1 to 64 characters"
        if rule.pattern is not None and (wrong := pattern_fault(rule.pattern)):
            yield (*at, "pattern"), wrong


def _upstream_faults(path: tuple[str | int, ...], upstream: Upstream) -> Iterator[Fault]:
    if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", upstream.url):
        yield (*path, "url"), "an http or https address is needed, without user, query and fragment"
    if upstream.key_env is not None and not ENV_NAME.fullmatch(upstream.key_env):
        yield (*path, "key-env"), "the name of an environment variable is needed, not a key"
    if upstream.max_concurrent < 1:
        yield (*path, "max-concurrent"), "it is less than 1"
    for key in ("first-byte-timeout", "timeout"):
        if not 0 < getattr(upstream, key.replace("-", "_")) <= 86400:
            yield (*path, key), "seconds in (0, 86400] are needed"
    yield from _price_faults(path, upstream.price)


def _price_faults(path: tuple[str | int, ...], price: Price | None) -> Iterator[Fault]:
    if price is not None and not (0 <= price.input < 1e9 and 0 <= price.output < 1e9):
        yield (*path, "price"), "prices must lie in [0, 1e9)"


def pattern_fault(pattern: str) -> str | None:
    """What is wrong with a pattern. RE2 takes time linear in the text, whatever the pattern."""
    if len(pattern) > MOST_PATTERN:
        return f"it has more than {MOST_PATTERN} characters"
    try:
        import re2
    except ImportError:
        return "patterns need the package google-re2: pip install 'headrace[routing]'"
    options = re2.Options()
    options.log_errors = False
    try:
        re2.compile(pattern, options)
    except re2.error as error:
        reason = error.args[0] if error.args else "not understood"
        return f"RE2 refuses it: {reason.decode() if isinstance(reason, bytes) else reason}"
    return None


def _cycles(table: Routing) -> Iterator[Fault]:
    """Names that lead back to themselves, over aliases, candidates, fallbacks and what answers beyond a budget."""
    arrows: dict[str, list[str]] = {name: list(targets) for name, targets in table.aliases.items()}
    for name, route in table.routes.items():
        arrows[name] = [target for rule in route.rules for target in (*rule.models, *rule.fallbacks)]
    done: set[str] = set()
    for start in arrows:
        trail: list[str] = []
        found = _cycle_from(start, arrows, trail, done)
        if found:
            kind = "aliases" if start in table.aliases else "routes"
            yield (kind, start), f"it leads back to itself: {' -> '.join(found)}"
            return


def _cycle_from(name: str, arrows: dict[str, list[str]], trail: list[str], done: set[str]) -> list[str] | None:
    if name in trail:
        return [*trail[trail.index(name) :], name]
    if name in done:
        return None
    trail.append(name)
    for target in arrows.get(name, ()):
        if found := _cycle_from(target, arrows, trail, done):
            return found
    trail.pop()
    done.add(name)
    return None
