"""Structural tags: free text in which a trigger opens a stretch with a grammar of its own, up to a fixed end.

Two notations are read: the older ``{"type": "structural_tag", "structures": [{begin, schema, end}], "triggers": [..]}``
and, of the newer ``{"type": "structural_tag", "format": {..}}``, the types ``triggered_tags``, ``tag``, ``sequence``,
``or``, ``const_string``, ``json_schema`` and ``regex`` (as xgrammar documents them). Both become one Lark grammar.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from protocol.errors import InvalidRequest
from protocol.structures.json_schema import check_schema, library_options, served_schema

MAX_TAGS = 128
MAX_TAG_NESTING = 16
TYPES = ("triggered_tags", "tag", "sequence", "or", "const_string", "json_schema", "regex")

# The name of the special token that a text is, or None: then the text is spelled.
SpecialToken = Callable[[str], str | None]


@dataclass(frozen=True)
class Tag:
    begin: str
    content: dict[str, Any]  # a format
    end: str


def check_tag(value: Any, at: str) -> None:
    """Raise InvalidRequest for what is no structural tag, or holds a schema that cannot be served."""
    tag_grammar(value, at, lambda text: None)


def tag_grammar(value: Any, at: str, special: SpecialToken) -> str:
    """The Lark grammar of a structural tag (object, or its JSON text)."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise InvalidRequest(f"{at} is not well-formed JSON", param=at) from None
    if not isinstance(value, dict) or value.get("type", "structural_tag") != "structural_tag":
        raise InvalidRequest(f"{at} must be an object of type structural_tag", param=at)
    writer = _Writer(at, special)
    if "format" in value:
        start = writer.format(value["format"], 0)
    else:
        start = writer.triggered(_older(value, at), _texts(value.get("triggers"), f"{at}.triggers"), False, False, 0)
    return writer.text(start)


def _older(value: dict[str, Any], at: str) -> list[Tag]:
    structures = value.get("structures")
    if not isinstance(structures, list) or not structures:
        raise InvalidRequest(f"{at} must hold structures and triggers, or a format", param=at)
    tags = []
    for one in structures:
        if not isinstance(one, dict):
            raise InvalidRequest(f"{at}.structures must hold objects with begin, schema and end", param=at)
        schema = {"type": "json_schema", "json_schema": one.get("schema", True)}
        tags.append(Tag(_one_text(one.get("begin"), at), schema, _one_text(one.get("end"), at)))
    return tags


def _texts(value: Any, at: str) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(one, str) and one for one in value):
        raise InvalidRequest(f"{at} must be a list of strings", param=at)
    return value


def _one_text(value: Any, at: str) -> str:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str):
        raise InvalidRequest(f"{at}: begin and end of a tag must be strings", param=at)
    return value


class _Writer:
    """Rules gather here; each method returns an expression that stands for what it was given."""

    def __init__(self, at: str, special: SpecialToken) -> None:
        self.at = at
        self.special = special
        self.rules: list[str] = []

    def text(self, start: str) -> str:
        return "\n".join([f"start: {start}", r"TEXT: /(.|\n)*/", *self.rules]) + "\n"

    def literal(self, text: str) -> str:
        if not text:
            return ""
        return self.special(text) or json.dumps(text)

    def format(self, given: Any, depth: int) -> str:
        kind = given.get("type") if isinstance(given, dict) else None
        if kind not in TYPES or depth > MAX_TAG_NESTING:
            raise InvalidRequest(f"{self.at}: a format's type must be one of {', '.join(TYPES)}", param=self.at)
        if kind == "const_string":
            return self.literal(_one_text(given.get("value"), self.at)) or '""'
        if kind == "json_schema":
            check_schema(given.get("json_schema"), self.at)
            schema = served_schema(given["json_schema"])
            options = {"x-guidance": library_options(schema)} if isinstance(schema, dict) else {}
            return "%json " + json.dumps({**schema, **options} if options else schema)
        if kind == "regex":
            return "/" + _one_text(given.get("pattern"), self.at).replace("/", r"\/") + "/"
        if kind == "tag":
            return self.tag(self._tags([given])[0], depth)
        if kind == "triggered_tags":
            triggers = _texts(given.get("triggers"), f"{self.at}.triggers")
            once, least = bool(given.get("stop_after_first")), bool(given.get("at_least_one"))
            return self.triggered(self._tags(given.get("tags")), triggers, once, least, depth)
        parts = given.get("elements")
        if not isinstance(parts, list) or not 1 <= len(parts) <= MAX_TAGS:
            raise InvalidRequest(f"{self.at}: {kind} needs 1 to {MAX_TAGS} elements", param=self.at)
        return "(" + (" " if kind == "sequence" else " | ").join(self.format(one, depth + 1) for one in parts) + ")"

    def _tags(self, given: Any) -> list[Tag]:
        if not isinstance(given, list) or not all(isinstance(one, dict) for one in given):
            raise InvalidRequest(f"{self.at}: tags must be a list of objects", param=self.at)
        return [
            Tag(_one_text(one.get("begin"), self.at), one.get("content") or {}, _one_text(one.get("end"), self.at))
            for one in given
        ]

    def tag(self, tag: Tag, depth: int, cut: int = 0) -> str:
        """The tag, less the first ``cut`` characters of its begin."""
        parts = [self.literal(tag.begin[cut:]), self.format(tag.content, depth + 1), self.literal(tag.end)]
        return "(" + " ".join(part for part in parts if part) + ")"

    def triggered(self, tags: list[Tag], triggers: list[str], once: bool, least: bool, depth: int) -> str:
        """Text, and after each trigger the rest of one of the tags that begin with it."""
        if not 1 <= len(tags) <= MAX_TAGS:
            raise InvalidRequest(f"{self.at}: 1 to {MAX_TAGS} tags are taken", param=self.at)
        bodies: dict[str, list[str]] = {}
        for tag in tags:
            trigger = next((one for one in triggers if tag.begin.startswith(one)), None)
            if trigger is None:
                raise InvalidRequest(f"{self.at}: the begin of each tag must start with a trigger", param=self.at)
            bodies.setdefault(trigger, []).append(self.tag(tag, depth, len(trigger)))
        opened = []
        for trigger, options in bodies.items():
            name, token = f"tag_{len(self.rules)}", self.special(trigger)
            if token is None:
                self.rules.append(f"{name}[lazy]: TEXT {json.dumps(trigger)}")
            else:
                self.rules.append(f"{name}: TEXT {token}")
            opened.append(f"{name} ({' | '.join(options)})")
        some = f"({' | '.join(opened)})"
        if once:
            return some if least else f"({some} | TEXT)"
        return f"({some}{'+' if least else '*'} TEXT)"
