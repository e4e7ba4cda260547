"""Which rule of a route a request meets. Pure: all that a rule looks at is told, but the number of tokens and how hard
the question is, which are asked for only where a rule's other conditions hold.
"""

from __future__ import annotations

import datetime
import functools
import logging
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from zoneinfo import ZoneInfo

from gateway.openai.bodies import ChatBody, CompletionBody, GenerationBody
from protocol.errors import HeadraceError
from protocol.messages import Job
from protocol.routing.table import HOURS, Route, Rule

log = logging.getLogger("headrace.gateway")

SEEN = 1 << 16  # characters, the last ones, in which words and patterns are looked for
BYTES_PER_TOKEN = 4  # roughly, to compare prices before anything is counted

Count = Callable[[Rule], Awaitable[int]]  # prompt tokens, by the tokenizer of a rule's candidate
Score = Callable[[], Awaitable[str | None]]  # what the route's scorer says of the question


@dataclass(frozen=True)
class Asked:
    """What rules look at."""

    tenant: str
    kind: str = "standard"  # class in the queue
    tools: bool = False
    schema: bool = False
    system: bool = False
    text: str = ""  # what the user wrote, its end
    prompt: str | list[int] = ""  # all of it, or ids
    output_tokens: int = 256  # most that are wanted, for comparing prices
    kept: bool = False  # it needs a journal, so a model of ours: it runs detached, or under an idempotency key

    @property
    def prompt_tokens(self) -> int:
        """Roughly."""
        return len(self.prompt) // (BYTES_PER_TOKEN if isinstance(self.prompt, str) else 1)


def asked(body: GenerationBody, tenant: str, kept: bool = False) -> Asked:
    """What rules look at, of a body that has been decoded and not been checked yet."""
    priority = body.priority or "standard"
    if isinstance(priority, int):
        priority = "interactive" if priority < 0 else "batch"
    structures = (body.response_format, body.structured_outputs, body.guided_json, body.guided_regex,
                  body.guided_choice, body.guided_grammar)  # fmt: skip
    plain = isinstance(body.response_format, dict) and body.response_format.get("type") == "text"
    wanted: dict[str, Any] = {"output_tokens": body.max_tokens or 256, "kept": kept}
    if isinstance(body, ChatBody):
        messages = body.messages or []
        wanted["tools"] = bool(body.tools)
        wanted["system"] = any(message.get("role") in ("system", "developer") for message in messages)
        wanted["text"] = "\n".join(_text(m) for m in messages if m.get("role") == "user")[-SEEN:]
        wanted["prompt"] = "\n".join(_text(m) for m in messages)
        wanted["output_tokens"] = body.max_completion_tokens or body.max_tokens or 256
    elif isinstance(body, CompletionBody):
        wanted["prompt"] = _prompt(body.prompt)
        wanted["text"] = wanted["prompt"][-SEEN:] if isinstance(wanted["prompt"], str) else ""
    return Asked(tenant, priority, schema=not plain and any(s is not None for s in structures), **wanted)


def asked_by(job: Job) -> Asked:
    """The same of a job that was pushed: it is kept, so a model of ours answers."""
    messages = job.messages or []
    if job.messages is None:
        prompt = _prompt(job.prompt)
        text = prompt if isinstance(prompt, str) else ""
    else:
        prompt = "\n".join(_text(m) for m in messages)
        text = "\n".join(_text(m) for m in messages if m.get("role") == "user")
    return Asked(
        job.tenant,
        job.priority,
        tools=bool(job.tools),
        schema=job.sampling.structure is not None,
        system=any(message.get("role") in ("system", "developer") for message in messages),
        text=text[-SEEN:],
        prompt=prompt,
        output_tokens=job.sampling.max_tokens or 256,
        kept=True,
    )


async def first_match(
    route: Route, asked: Asked, now: datetime.datetime, count: Count, score: Score
) -> tuple[int, Rule] | None:
    """The first rule that holds, with its place; None if none does. ``now`` has a time zone."""
    local = now.astimezone(ZoneInfo(route.timezone))
    for index, rule in enumerate(route.rules):
        if not (_holds(rule, asked, local) and await _has_tokens(rule, asked, count)):
            continue
        if rule.complexity is None or await score() in rule.complexity:
            return index, rule
    return None


async def _has_tokens(rule: Rule, asked: Asked, count: Count) -> bool:
    if rule.min_prompt_tokens is None and rule.max_prompt_tokens is None:
        return True
    try:
        tokens = len(asked.prompt) if isinstance(asked.prompt, list) else await count(rule)
    except HeadraceError as error:
        log.warning("a rule on prompt tokens is passed over, they cannot be counted: %s", error)
        return False
    return (rule.min_prompt_tokens or 0) <= tokens <= (rule.max_prompt_tokens or tokens)


def _holds(rule: Rule, asked: Asked, local: datetime.datetime) -> bool:
    """Whether all conditions hold, but those on tokens. The dear ones come last."""
    for wanted, found in ((rule.tools, asked.tools), (rule.schema, asked.schema), (rule.system, asked.system)):
        if wanted is not None and wanted != found:
            return False
    if rule.tenants is not None and asked.tenant not in rule.tenants:
        return False
    if rule.classes is not None and asked.kind not in rule.classes:
        return False
    if rule.hours is not None and not _within(rule.hours, local.hour * 60 + local.minute):
        return False
    if rule.words is not None and not _words(tuple(rule.words)).search(asked.text):
        return False
    return rule.pattern is None or _pattern(rule.pattern)(asked.text)


def _within(hours: str, minute: int) -> bool:
    """Whether a minute of the day lies in ``22:00-06:00``; the end is not part of it."""
    found = HOURS.fullmatch(hours)
    assert found is not None
    start, end = int(found[1]) * 60 + int(found[2]), int(found[3]) * 60 + int(found[4])
    return start <= minute < end if start <= end else minute >= start or minute < end


@functools.lru_cache(maxsize=256)
def _words(words: tuple[str, ...]) -> re.Pattern[str]:
    """Any of these, whole. An alternation of fixed texts takes time linear in the text."""
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)", re.IGNORECASE)


@functools.lru_cache(maxsize=256)
def _pattern(pattern: str) -> Callable[[str], bool]:
    try:
        import re2
    except ImportError:
        log.error("a rule with a pattern never holds here: the package google-re2 is not installed")
        return lambda text: False
    found = re2.compile(pattern)
    return lambda text: found.search(text) is not None


def _text(message: dict[str, Any]) -> str:
    """The text of a message, whatever its form; bad ones are refused later, by who renders them."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "\n".join(part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str))


def _prompt(prompt: object) -> str | list[int]:
    if isinstance(prompt, str):
        return prompt
    parts = prompt if isinstance(prompt, list) else []
    if all(isinstance(part, int) for part in parts):
        return parts
    texts = [part for part in parts if isinstance(part, str)]
    return "\n".join(texts) if texts else [0] * sum(len(part) for part in parts if isinstance(part, list))
