"""Which rule holds: every condition by itself, in order, and words and patterns in time linear in the text."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from gateway.openai.bodies import ChatBody, CompletionBody
from gateway.routing.router import drawn
from gateway.routing.rules import SEEN, Asked, asked, first_match
from protocol.routing.table import Route, Routing, Rule, Upstream, faults

NOON = datetime.datetime(2026, 1, 2, 12, 0, tzinfo=datetime.UTC)


async def meets(request: Asked, now: datetime.datetime = NOON, timezone: str = "UTC", **conditions: Any) -> bool:
    async def count(rule: Rule) -> int:
        return len(str(request.prompt))

    route = Route(rules=[Rule(models=["m"], **conditions)], timezone=timezone)
    return await first_match(route, request, now, count, silent) is not None


async def silent() -> str | None:
    """A scorer that says nothing."""
    return None


@pytest.mark.parametrize(
    ("conditions", "yes", "no"),
    [
        ({"tools": True}, Asked("t", tools=True), Asked("t")),
        ({"tools": False}, Asked("t"), Asked("t", tools=True)),
        ({"schema": True}, Asked("t", schema=True), Asked("t")),
        ({"system": True}, Asked("t", system=True), Asked("t")),
        ({"tenants": ["gold"]}, Asked("gold"), Asked("t")),
        ({"classes": ["batch"]}, Asked("t", "batch"), Asked("t")),
        ({"words": ["SELECT", "c++"]}, Asked("t", text="please select it"), Asked("t", text="selected")),
        ({"words": ["SELECT", "c++"]}, Asked("t", text="in C++?"), Asked("t", text="c")),
        ({"pattern": r"\bdef \w+\("}, Asked("t", text="def add(a, b):"), Asked("t", text="define it")),
        ({"min_prompt_tokens": 3}, Asked("t", prompt="abc"), Asked("t", prompt="ab")),
        ({"max_prompt_tokens": 3}, Asked("t", prompt=[1, 2, 3]), Asked("t", prompt=[1, 2, 3, 4])),
    ],
)
async def test_a_condition(conditions: dict[str, Any], yes: Asked, no: Asked) -> None:
    assert await meets(yes, **conditions)
    assert not await meets(no, **conditions)


async def test_hours_are_those_of_the_routes_time_zone() -> None:
    def at(hour: int) -> datetime.datetime:
        return NOON.replace(hour=hour)

    assert [h for h in range(24) if await meets(Asked("t"), at(h), hours="22:00-06:00")] == [0, 1, 2, 3, 4, 5, 22, 23]
    assert [h for h in range(24) if await meets(Asked("t"), at(h), hours="09:00-11:00")] == [9, 10]
    assert await meets(Asked("t"), at(8), timezone="Europe/Berlin", hours="09:00-09:01")  # 8 UTC, in January


async def test_the_first_match_wins_and_tokens_are_counted_last() -> None:
    counted: list[str] = []

    async def count(rule: Rule) -> int:
        counted.append(rule.name)
        return 50

    rules = [
        Rule(models=["a"], name="tools", tools=True, min_prompt_tokens=1),
        Rule(models=["b"], name="long", min_prompt_tokens=100),
        Rule(models=["c"], name="short", max_prompt_tokens=60),
        Rule(models=["d"], name="rest"),
    ]
    match = await first_match(Route(rules=rules), Asked("t", prompt="x"), NOON, count, silent)
    assert match is not None
    assert (match[0], match[1].name, counted) == (2, "short", ["long", "short"])


def test_what_a_body_tells() -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "image_url"}]},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "x" * SEEN + "two"},
    ]
    found = asked(ChatBody(messages=messages, priority=-1, response_format={"type": "json_object"}), "t")
    assert (found.kind, found.system, found.tools, found.schema) == ("interactive", True, False, True)
    assert found.text.endswith("two")
    assert len(found.text) == SEEN
    assert "one" in str(found.prompt)
    assert asked(ChatBody(response_format={"type": "text"}), "t").schema is False
    assert asked(CompletionBody(prompt=[1, 2, 3]), "t").prompt == [1, 2, 3]
    assert asked(CompletionBody(prompt=["a", "b"]), "t").text == "a\nb"


async def test_a_pattern_that_would_backtrack_takes_no_time() -> None:
    assert not await meets(Asked("t", text="a" * SEEN), pattern="(a+)+$b")


def test_weights_are_kept_and_a_key_stays() -> None:
    counts = {"v1": 0, "v2": 0, "v3": 0}
    for _ in range(4000):
        counts[drawn({"v1": 1, "v2": 9, "v3": 0}, None)] += 1
    assert counts["v3"] == 0
    assert 250 < counts["v1"] < 550  # 400 expected: seven and a half deviations
    assert len({drawn({"v1": 1, "v2": 1}, "t key") for _ in range(20)}) == 1
    assert len({drawn({"v1": 1, "v2": 1}, f"t {k}") for k in range(20)}) == 2


@pytest.mark.parametrize(
    ("table", "where", "says"),
    [
        (Routing(aliases={"a": {"gone": 1}}), ("aliases", "a"), "nothing has the name gone"),
        (Routing(aliases={"a": {"m": 0}}), ("aliases", "a"), "all weights are 0"),
        (Routing(aliases={"m": {"n": 1}}), ("aliases", "m"), "a served model has this name"),
        (Routing(aliases={"a": {"b": 1}, "b": {"a": 1}}), ("aliases", "a"), "a -> b -> a"),
        (
            Routing(aliases={"a": {"r": 1}}, routes={"r": Route(rules=[Rule(models=["m"], fallbacks=["a"])])}),
            ("aliases", "a"), "a -> r -> a",
        ),
        (Routing(routes={"r": Route(rules=[])}), ("routes", "r"), "rules are needed"),
        (Routing(routes={"r": Route(rules=[Rule(models=["x"])])}), ("routes", "r", "rules", 0, "models"), "name x"),
        (
            Routing(routes={"r": Route(rules=[Rule(models=["m"], pattern="(a)\\1")])}),
            ("routes", "r", "rules", 0, "pattern"), "RE2 refuses it",
        ),
        (
            Routing(routes={"r": Route(rules=[Rule(models=["m"], hours="9-10")])}),
            ("routes", "r", "rules", 0, "hours"), "22:00-06:00",
        ),
        (
            Routing(routes={"r": Route(rules=[Rule(models=["m"])], timezone="Mars/Base")}),
            ("routes", "r", "timezone"), "no such time zone",
        ),
        (
            Routing(routes={"r": Route(rules=[Rule(models=["m"], complexity=["simple"])])}),
            ("routes", "r", "rules", 0, "complexity"), "names no scorer",
        ),
        (Routing(routes={"r": Route(rules=[Rule(models=["m"])], scorer="r")}), ("routes", "r", "scorer"), "no served"),
        (
            Routing(routes={"r": Route(rules=[Rule(models=["m"], first_token_within=0)])}),
            ("routes", "r", "rules", 0, "first-token-within"), "seconds in",
        ),
        (Routing(upstreams={"u": Upstream(url="ftp://x")}), ("upstreams", "u", "url"), "http or https"),
        (Routing(upstreams={"u": Upstream(url="https://me:pw@x/v1")}), ("upstreams", "u", "url"), "without user"),
        (Routing(upstreams={"u": Upstream(url="https://x/v1", key_env="sk-123")}), ("upstreams", "u", "key-env"),
         "not a key"),
    ],
)  # fmt: skip
def test_a_fault_of_a_table_is_named(table: Routing, where: tuple[str, ...], says: str) -> None:
    keys, reason = next(faults(table, ["m", "n"]))
    assert keys == where
    assert says in reason
