"""What stands in a chat template itself: the text that it writes, and the words that it looks up or compares.

Read from the template's syntax tree, never run. A template that cannot be parsed here is taken for its own source.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

# Words of the chat protocol and of JSON Schema, which templates look up or compare.
PROTOCOL_WORDS = frozenset(
    {
        "id", "type", "function", "name", "description", "parameters", "properties", "required", "items", "enum",
        "strict", "anyOf", "arguments", "text", "string", "object", "array", "number", "integer", "boolean", "null",
    }
)  # fmt: skip


class _Generation(Extension):
    """``{% generation %}``, which marks the assistant's own tokens for training: only its body matters."""

    tags = {"generation"}  # noqa: RUF012 (the base class has it so)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@dataclass(frozen=True)
class TemplateSource:
    """``literals``: every text that the template can write by itself, apart by NUL. ``words``: string constants, names
    of attributes and PROTOCOL_WORDS; a value that equals one of them may be a key, or something that is compared."""

    literals: str
    words: frozenset[str]

    @classmethod
    def of(cls, template: Any) -> TemplateSource:
        """``template``: the text, or several of them by name (``default``, ``tool_use``); None is a template that
        writes nothing."""
        texts = list(template.values()) if isinstance(template, dict) else [template or ""]
        literals: set[str] = set()
        words: set[str] = set(PROTOCOL_WORDS)
        environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols", "jinja2.ext.do", _Generation])
        for text in texts:
            try:
                tree = environment.parse(text)
            except jinja2.TemplateError:
                literals.add(text)
                continue
            constants = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
            literals |= constants | {node.data for node in tree.find_all(nodes.TemplateData)}
            words |= constants | {node.attr for node in tree.find_all(nodes.Getattr)}
        return cls("\0".join(literals), frozenset(words))
