"""Marks round the places in a request's texts that could be read as control tokens, and how they are read again.

One idea: a template moves, copies and wraps what it is given, so what came from the request is known in its output
by marks that travel with it. A mark is one private-use character which neither the request nor the chat as rendered
without marks holds in any written form.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import quote

from protocol.errors import SpecialTokensRefused
from scheduler.prompts.special_tokens import ControlTokens
from scheduler.prompts.template_source import PROTOCOL_WORDS

Leaf = Callable[[str, bool], str]
Messages = list[dict[str, Any]]
Arguments = dict[str, Any]

OWN_FIELDS = ("content", "reasoning_content", "reasoning", "thinking")  # of an assistant's message
PRIVATE_USE = (0xF0000, 0xFFFE)  # plane 15: first character, how many
TRIES = 64

REFUSAL = (
    "the messages hold text that reads as one of the model's special tokens, and the chat template does not let it be "
    "told from its own; the server's --special-tokens-in-content allow would take it as a special token"
)


def refusal() -> SpecialTokensRefused:
    return SpecialTokensRefused(REFUSAL, param="messages")


def walk(messages: Messages, arguments: Arguments, leaf: Leaf) -> tuple[Messages, Arguments]:
    """The same chat with ``leaf(text, own)`` in the place of every text that the request gives, keys included: all
    but roles, the names of a message's own fields and of arguments, and the protocol's words. ``own`` is true in an
    assistant's own content and reasoning."""

    def tree(node: Any, own: bool) -> Any:
        if isinstance(node, str):
            return node if node in PROTOCOL_WORDS else leaf(node, own)
        if isinstance(node, list | tuple):
            return [tree(value, own) for value in node]
        if isinstance(node, dict):
            return {k if k in PROTOCOL_WORDS else leaf(k, own): tree(value, own) for k, value in node.items()}
        return node

    def message(one: dict[str, Any]) -> dict[str, Any]:
        assistant = one.get("role") == "assistant"
        return {k: v if k == "role" else tree(v, assistant and k in OWN_FIELDS) for k, v in one.items()}

    return [message(one) for one in messages], {k: tree(v, False) for k, v in arguments.items()}


class Reading(NamedTuple):
    """A rendered chat without its marks, and where in it the template's own control tokens stand."""

    text: str
    spans: list[tuple[int, int]]


class Marks:
    """Three marks, absent from ``everything``. SpecialTokensRefused where there are none."""

    def __init__(self, tokens: ControlTokens, everything: str) -> None:
        self._tokens = tokens
        self._start, self._end, self._cut = self._absent(everything.lower(), 3)
        kinds = {form: mark for mark in (self._start, self._end, self._cut) for form in _written(mark)}
        self._kinds = kinds
        self._split = re.compile("(" + "|".join(map(re.escape, sorted(kinds, key=len, reverse=True))) + ")").split

    def put(self, text: str, own: bool, edges: bool) -> str:
        """``text`` with start and end round what looks like a control token; with ``edges``, cuts round all of it
        (inside of its outer white space, which templates trim) where an edge could complete one."""
        pattern = self._tokens.pattern(own)

        def wrapped(part: str) -> str:
            return pattern.sub(lambda match: self._start + match[0] + self._end, part)

        if not edges or not self._tokens.edge(text):
            return wrapped(text)
        head = text[: len(text) - len(text.lstrip())]
        body = text.strip()
        return head + self._cut + wrapped(body) + self._cut + text[len(head) + len(body) :]

    def read(self, rendered: str) -> Reading:
        """Take the marks away. A control token is the template's unless it stands between a start and its end, or
        runs over a mark. SpecialTokensRefused if a mark has been changed into something that is not known here."""
        pieces = self._split(rendered)  # text, mark, text, ..., mark, text
        spans: list[tuple[int, int]] = []
        at = 0
        for i in range(0, len(pieces), 2):
            piece = pieces[i]
            if not self._given(pieces, i):
                spans += [(at + match.start(), at + match.end()) for match in self._tokens.find(piece)]
            at += len(piece)
        clean = "".join(pieces[::2])
        lowered = clean.lower()
        if any(trace in lowered for mark in (self._start, self._end, self._cut) for trace in _traces(mark)):
            raise refusal()
        return Reading(clean, spans)

    def _given(self, pieces: list[str], i: int) -> bool:
        """Whether piece ``i`` is a control token's text that the request gave."""
        if not 0 < i < len(pieces) - 1:
            return False
        before, after = self._kinds[pieces[i - 1]], self._kinds[pieces[i + 1]]
        return before == self._start and after == self._end and bool(self._tokens.pattern(False).fullmatch(pieces[i]))

    @staticmethod
    def _absent(lowered: str, count: int) -> list[str]:
        """Characters of which no trace is there; drawn, so that a text cannot hold the ones that come first."""
        found: list[str] = []
        first, size = PRIVATE_USE
        for _ in range(TRIES):
            mark = chr(first + secrets.randbelow(size))
            if mark not in found and not any(trace in lowered for trace in _traces(mark)):
                found.append(mark)
                if len(found) == count:
                    return found
        raise refusal()


def _written(mark: str) -> tuple[str, ...]:
    """As a template writes it: plain, by tojson with ensure_ascii, by Python's repr of a dict."""
    return mark, json.dumps(mark)[1:-1], repr(mark)[1:-1]


def _traces(mark: str) -> tuple[str, ...]:
    """What is left of it, in lower case, however it is quoted: itself, its surrogates, its number, its bytes."""
    _, high, low = json.dumps(mark)[1:-1].split("\\u")
    return mark, f"{high}\\u{low}", f"{high}\\\\u{low}", f"{ord(mark):x}", quote(mark).lower()
