"""gpt-oss writes messages on channels: ``<|channel|>analysis<|message|>...<|end|><|start|>assistant...``.

Analysis is reasoning; what is addressed to ``functions.NAME`` is a call; everything else is content. The header of the
first message was begun by the prompt. Source: OpenAI's description of the harmony format.
"""

from __future__ import annotations

import re
from collections.abc import Generator

from protocol.formats.events import MAX_NAME, Sink
from protocol.formats.json_text import read_tree
from protocol.formats.source import Alphabet, Cut, Malformed, Reading, Source

_RECIPIENT = re.compile(r"to=functions\.([\w.-]+)")
_OTHER = re.compile(r"to=[\w.-]+")
MAX_HEADER = 1024  # characters


class Harmony:
    def __init__(self, alphabet: Alphabet, source: Source, sink: Sink) -> None:
        self.alphabet = alphabet
        self.source = source
        self.sink = sink
        self.start, self.channel, self.message = map(alphabet.encode, ("<|start|>", "<|channel|>", "<|message|>"))
        self.ends = tuple(map(alphabet.encode, ("<|end|>", "<|call|>", "<|return|>", "<|start|>")))
        self.thinking = False
        self.plain = False  # within a message that is content

    def run(self) -> Reading[None]:
        source = self.source
        while True:
            source.drop()
            if not (yield from source.peek()):
                return
            try:
                header, end = yield from source.until((self.message, *self.ends))
            except Cut:
                header, end = source.text, ""
            if end != self.message or len(header) > MAX_HEADER:
                self.sink.content(header)  # no message at all: what some models write without channels
                continue
            yield from self._body(header)

    def _body(self, header: str) -> Generator[None, None, None]:
        """One message after its header."""
        channel = header.rsplit(self.channel, 1)[1].lstrip() if self.channel in header else ""
        recipient = _RECIPIENT.search(header)
        if recipient is not None and recipient[1] in self.sink.functions and len(recipient[1]) <= MAX_NAME:
            yield from self._call(recipient[1])
            return
        self.thinking = channel.startswith("analysis") or (recipient is None and bool(_OTHER.search(header)))
        self.plain = not self.thinking
        self.sink.turn()
        try:
            emit = self.sink.reasoning if self.thinking else self.sink.content
            yield from self.source.pass_until(self.ends, emit)
        except Cut:
            return
        finally:
            if self.thinking:
                self.sink.turn()
            self.thinking = self.plain = False

    def _call(self, name: str) -> Generator[None, None, None]:
        source, sink = self.source, self.sink
        mark = source.at
        try:
            yield from source.skip_space()
            if (yield from source.peek()) != "{":
                raise Malformed
            sink.begin(name)
            yield from read_tree(source, sink.arguments)
            sink.end()
            yield from source.until(self.ends)
        except Malformed:
            sink.reject(source.text[mark : source.at])
        except Cut:
            if sink.open:
                sink.reject(source.text[mark:], cut=True)
            source.at = len(source.text)
