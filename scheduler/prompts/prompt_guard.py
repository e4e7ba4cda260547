"""Chats to ids so that no text of a request becomes a control token: messages cannot forge turns.

A chat without suspicious text (nearly all) is rendered and encoded as ever: its ids are the same by construction.
Else it is rendered once more with marks at the suspicious places, which show which control tokens are the template's
own. If all are, the first rendering is encoded as ever; if not, a twin tokenizer, which knows control tokens by secret
names, encodes the chat with the template's own written under these. There is no way back to the unguarded form that
a message could choose: what cannot be told apart is refused (SpecialTokensRefused).

Limits: a template that deletes characters within a text can put a token together from what is left; families whose
turns are marked by plain text cannot be protected (``unprotected`` says so).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable
from typing import Any

from scheduler.prompts.content_marks import Arguments, Marks, Messages, Reading, refusal, walk
from scheduler.prompts.special_tokens import ControlTokens, encode
from scheduler.prompts.template_source import TemplateSource
from scheduler.prompts.twin_tokenizer import TwinFailed, TwinTokenizer

Render = Callable[[Messages, Arguments], str]

NO_BACKEND = "its tokenizer has no Rust backend"
PLAIN_MARKERS = "its chat template marks turns by plain text ({}), which any message can hold"

_CALL = {"id": "call00001", "type": "function", "function": {"name": "zqcall", "arguments": {"zqkey": "zqvalue"}}}
_PARAMETERS = {
    "type": "object",
    "properties": {"zqkey": {"type": "string", "description": "zqtext"}},
    "required": ["zqkey"],
}
_TOOL = {"type": "function", "function": {"name": "zqcall", "description": "zqtext", "parameters": _PARAMETERS}}
TURNS: Messages = [
    {"role": "user", "content": "zqfirst"},
    {"role": "assistant", "content": "zqsecond"},
    {"role": "user", "content": "zqthird"},
]
_CALLED: Messages = [
    {"role": "user", "content": "zqfirst"},
    {"role": "assistant", "content": "", "reasoning_content": "zqreason", "tool_calls": [_CALL]},
    {"role": "tool", "name": "zqcall", "tool_call_id": "call00001", "content": "zqresult"},
]
_BETWEEN = re.compile("zqfirst(.*)zqsecond(.*)zqthird", re.DOTALL)


class PromptGuard:
    """Made once for a tokenizer and its template. Synchronous, used from several threads at once.

    ``backend``: the tokenizer's Rust object, without truncation and padding. ``source``: its chat template.
    ``render``: (messages, template arguments) -> text; what it raises for the chat as it came is the caller's.
    ``always``: names of tokens that count as special (eos, bos, whatever ends a generation).
    """

    def __init__(
        self, backend: Any, source: TemplateSource, render: Render, always: frozenset[str] = frozenset()
    ) -> None:
        self._backend = backend
        self._render = render
        plain = self._sample(TURNS, {}) or self._sample(TURNS, {"tools": [_TOOL]})
        written = plain + "\0" + self._sample(_CALLED, {"tools": [_TOOL]})
        between = _BETWEEN.search(plain)
        turn = between[2] if between else ""
        self.tokens = ControlTokens(backend, source, written=written, turn=turn, always=always)
        self.unprotected = self._plain_markers(between.groups() if between else ())
        self._twin: TwinTokenizer | TwinFailed | None = None
        self._lock = threading.Lock()

    @classmethod
    def of(cls, tokenizer: Any, render: Render, end_ids: Iterable[int]) -> PromptGuard:
        """For a tokenizer of transformers with a Rust backend and a chat template."""
        always = {*tokenizer.all_special_tokens, *filter(None, map(tokenizer.backend_tokenizer.id_to_token, end_ids))}
        source = TemplateSource.of(tokenizer.chat_template)
        return cls(tokenizer.backend_tokenizer, source, render, frozenset(always))

    def prepare(self) -> None:
        """Build the twin before the first chat needs it. TwinFailed: chats that need it will be refused."""
        self._prepared()

    def ids(self, messages: Messages, arguments: Arguments, rendered: Callable[[str], None] | None = None) -> list[int]:
        """Token ids of the chat. SpecialTokensRefused for one whose special tokens cannot be told apart. ``rendered``
        is told of the whole text before it is encoded, and may raise."""
        return self.trace(messages, arguments, rendered)[0]

    def trace(
        self, messages: Messages, arguments: Arguments, rendered: Callable[[str], None] | None = None
    ) -> tuple[list[int], str]:
        """Ids, and how they came: plain (nothing suspicious), checked (all control tokens are the template's own),
        or twin."""
        given: list[str] = []
        inside = edge = alike = False

        def look(text: str, own: bool) -> str:
            nonlocal inside, edge, alike
            found = self.tokens.scan(text, own)
            inside, edge, alike = inside or found.inside, edge or found.edge, alike or found.alike
            given.append(text)
            return text

        walk(messages, arguments, look)
        text = self._render(messages, arguments)
        if rendered is not None:
            rendered(text)
        if not (inside or edge or alike):
            return self._encode(text), "plain"
        own = self._own_tokens(messages, arguments, Marks(self.tokens, "\0".join([text, *given])), text, edge)
        if own.text == text and not alike and own.spans == [match.span() for match in self.tokens.find(text)]:
            return self._encode(text), "checked"
        return self._encode_by_twin(own), "twin"

    def _own_tokens(self, messages: Messages, arguments: Arguments, marks: Marks, text: str, edge: bool) -> Reading:
        """The chat and where in it the template's own control tokens stand. ``text``: as rendered without marks."""
        first = self._read(messages, arguments, marks, edges=True)
        if first.text == text or not edge:
            return first
        # The template changes or compares a text that bears a mark at its edge. Without these marks the text is as it
        # should be; but then every token that runs over an edge passes for the template's, so there must be none.
        second = self._read(messages, arguments, marks, edges=False)
        if _words(first) != _words(second):
            raise refusal()
        return second

    def _read(self, messages: Messages, arguments: Arguments, marks: Marks, *, edges: bool) -> Reading:
        marked = walk(messages, arguments, lambda text, own: marks.put(text, own, edges))
        try:
            rendered = self._render(*marked)
        except Exception:  # the template measures or compares what bears the mark, and now refuses the chat
            raise refusal() from None
        return marks.read(rendered)

    def _encode(self, text: str) -> list[int]:
        return encode(self._backend, text)

    def _encode_by_twin(self, own: Reading) -> list[int]:
        try:
            return self._prepared().encode(own.text, own.spans)
        except TwinFailed:
            raise refusal() from None

    def _prepared(self) -> TwinTokenizer:
        with self._lock:
            if self._twin is None:
                try:
                    self._twin = TwinTokenizer(self._backend, self.tokens)
                except TwinFailed as error:
                    self._twin = error
        if isinstance(self._twin, TwinFailed):
            raise self._twin
        return self._twin

    # -------------------------------------------------------------- what is said at start

    def _sample(self, messages: Messages, arguments: Arguments) -> str:
        """A chat of plain words; "" if the template does not take it."""
        try:
            return self._render(messages, {"add_generation_prompt": True, **arguments})
        except Exception:
            return ""

    def _plain_markers(self, between: tuple[str, ...]) -> str | None:
        """Why messages can forge turns all the same: no control token stands between one turn and the next."""
        for marker in between:
            if not any(self.tokens.find(marker)):
                return PLAIN_MARKERS.format(marker.strip()[:40] or "white space")
        return None


def _words(reading: Reading) -> list[str]:
    return [reading.text[first:last] for first, last in reading.spans]
