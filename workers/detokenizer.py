"""Incremental detokenization: the text that each further token adds, whole characters only.

Most tokenizers only write bytes: a token of a byte-level BPE, or of a sentencepiece with byte fallback,
has bytes of its own whatever stands around it, so text is those bytes through an incremental UTF-8 decoder: one
dictionary look-up for a usual token. That this holds for a tokenizer is checked at load against its own ``decode``;
where it does not (WordPiece and others), a sliding window is decoded twice per token instead: the prefix and read
offsets of text-generation-inference (server/text_generation_server/models/model.py) and vLLM
(v1/engine/detokenizer.py).

Everything here is a function of the ids alone: replaying known ids rebuilds the same state.
"""

from __future__ import annotations

import codecs
import json
import logging
import random
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

log = logging.getLogger("headrace.worker")

REPLACEMENT = "\ufffd"
CONTEXT = 5  # prompt tokens that the window sees, so that a first word keeps its space (as vLLM)
WINDOW = 64  # tokens without text, or with bad text only, after which the window moves on all the same


class TextStream(Protocol):
    """The text of one sequence's output."""

    def push(self, token: int) -> str:
        """The text that ``token`` completes; "" while a character is unfinished."""

    @property
    def held(self) -> str:
        """What an end here would still add: U+FFFD for an unfinished character, else ""."""


class Vocabulary:
    """The text of a tokenizer's ids. One per worker; ``stream`` makes the state of one sequence."""

    def __init__(
        self,
        token_bytes: Callable[[int], bytes],
        special: Iterable[int] = (),
        *,
        strips: bool = False,
        errors: str = "replace",
    ) -> None:
        """``strips``: a space at the very start of a text is not written. ``errors``: codec handler of bad bytes."""
        self._keep = _Pieces(token_bytes, frozenset())
        self._skip = _Pieces(token_bytes, frozenset(special))
        self._strips = strips
        self._errors = errors

    @staticmethod
    def of(tokenizer: Any) -> Vocabulary | WindowVocabulary:
        """From a ``tokenizers.Tokenizer`` or any transformers tokenizer."""
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if not hasattr(backend, "get_added_tokens_decoder"):  # a transformers tokenizer without a Rust one
            return WindowVocabulary(lambda ids, skip: _decode_slow(tokenizer, ids, skip))
        decode = lambda ids, skip: backend.decode(ids, skip_special_tokens=skip)  # noqa: E731
        table = _byte_table(backend)
        if table is not None and _agrees(table, decode, backend):
            return table
        log.info("tokenizer: no table of bytes fits its decoder; text is made by a sliding window")
        return WindowVocabulary(decode)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of ``token`` alone, a special one's name included."""
        piece = self._keep[token]
        return piece.encode() if isinstance(piece, str) else piece

    def stream(self, prompt: Sequence[int], skip_special: bool = True) -> TextStream:
        """The state before the first output token after ``prompt``."""
        pieces = self._skip if skip_special else self._keep
        at_start = self._strips and not any(pieces[token] for token in prompt)
        return _ByteStream(pieces, self._errors, at_start)


class _Pieces(dict[int, "str | bytes"]):
    """Token id -> its text, or its bytes where they are no whole characters. Filled on first use."""

    def __init__(self, token_bytes: Callable[[int], bytes], silent: frozenset[int]) -> None:
        self._token_bytes = token_bytes
        self._silent = silent

    def __missing__(self, token: int) -> str | bytes:
        raw = b"" if token in self._silent else self._token_bytes(token)
        try:
            piece: str | bytes = raw.decode()
        except UnicodeDecodeError:
            piece = raw
        self[token] = piece
        return piece


class _ByteStream:
    __slots__ = ("_errors", "_pending", "_pieces", "_plain", "_start")

    def __init__(self, pieces: _Pieces, errors: str, at_start: bool) -> None:
        self._pieces = pieces
        self._errors = errors
        self._start = at_start
        self._pending = b""
        self._plain = not at_start  # nothing pending, not at the start

    def push(self, token: int) -> str:
        piece = self._pieces[token]
        if self._plain and type(piece) is str:
            return piece
        raw = piece.encode() if isinstance(piece, str) else piece
        text, used = codecs.utf_8_decode(self._pending + raw, self._errors, False)
        self._pending = (self._pending + raw)[used:]
        if self._start and text:
            self._start = False
            text = text.removeprefix(" ")
        self._plain = not self._start and not self._pending
        return text

    @property
    def held(self) -> str:
        return self._pending.decode("utf-8", self._errors) if self._pending else ""


# ------------------------------------------------------------------ tables from a tokenizer's decoder

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _replace_each(error: UnicodeError) -> tuple[str, int]:
    """One U+FFFD for each bad byte, as byte fallback writes them."""
    assert isinstance(error, UnicodeDecodeError)
    return REPLACEMENT * (error.end - error.start), error.end


codecs.register_error("headrace.replace_each", _replace_each)


def _byte_table(backend: Any) -> Vocabulary | None:
    """The table for decoders whose tokens have bytes of their own, None for all others."""
    if backend.decoder is None:
        return None
    decoder = json.loads(backend.decoder.__getstate__())
    parts = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [part["type"] for part in parts if part["type"] != "Fuse"]
    special = [token for token, added in backend.get_added_tokens_decoder().items() if added.special]
    if kinds == ["ByteLevel"]:
        byte_of = {character: byte for byte, character in enumerate(byte_characters())}
        return Vocabulary(lambda token: _byte_level(backend.id_to_token(token), byte_of), special)
    strips = kinds[-1:] == ["Strip"] and (parts[-1]["content"], parts[-1]["start"], parts[-1]["stop"]) == (" ", 1, 0)
    if strips:
        kinds.pop()
    if kinds in (["Replace", "ByteFallback"], ["ByteFallback", "Replace"]):
        replace = next(part for part in parts if part["type"] == "Replace")
        old, new = replace["pattern"].get("String"), replace["content"]
        if old is None:
            return None
        return Vocabulary(
            lambda token: _fallback(backend.id_to_token(token), old, new),
            special, strips=strips, errors="headrace.replace_each",
        )  # fmt: skip
    return None


def _byte_level(token: str | None, byte_of: dict[str, int]) -> bytes:
    if token is None:  # an id beyond the tokenizer's: models pad their vocabulary
        return b""
    try:
        return bytes([byte_of[character] for character in token])
    except KeyError:  # an added token, written as it stands
        return token.encode()


def _fallback(token: str | None, old: str, new: str) -> bytes:
    if token is None:
        return b""
    if byte := _BYTE_TOKEN.fullmatch(token):
        return bytes([int(byte[1], 16)])
    return token.replace(old, new).encode()


def byte_characters() -> list[str]:
    """The printable character that byte-level BPE writes for each byte (GPT-2's bytes_to_unicode)."""
    plain = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def _agrees(table: Vocabulary, decode: Decode, backend: Any) -> bool:
    """Whether ``table`` writes what the tokenizer itself does: every added token, and seeded random ids.

    Tokens that are no whole characters are left out: in a run of bytes that is not UTF-8, byte fallback gives up
    the whole run, where a stream has shown its good characters already.
    """
    draw = random.Random(0)
    size = backend.get_vocab_size(with_added_tokens=True)
    whole = [t for t in draw.sample(range(size), min(size, 2048)) if isinstance(table._keep[t], str)]
    added = list(backend.get_added_tokens_decoder())
    samples = [whole[i : i + 16] for i in range(0, len(whole), 16)] + [
        [*whole[:1], token, *whole[:1]] for token in added
    ]
    for ids in samples:
        for skip in (True, False):
            stream = table.stream([], skip)
            if "".join(map(stream.push, ids)) + stream.held != decode(ids, skip):
                return False
    return True


# ------------------------------------------------------------------ the sliding window

Decode = Callable[[list[int], bool], str]  # (ids, skip special tokens)


class WindowVocabulary:
    """The same for tokenizers whose text of a token depends on its neighbours."""

    def __init__(self, decode: Decode) -> None:
        self._decode = decode

    def token_bytes(self, token: int) -> bytes:
        return self._decode([token], False).encode()

    def stream(self, prompt: Sequence[int], skip_special: bool = True) -> TextStream:
        return _WindowStream(self._decode, prompt, skip_special)


class _WindowStream:
    __slots__ = ("_decode", "_ids", "_read", "_shown", "_skip", "held")

    def __init__(self, decode: Decode, prompt: Sequence[int], skip_special: bool) -> None:
        self._decode = decode
        self._skip = skip_special
        self._ids = list(prompt[-CONTEXT:])  # from the prefix offset on
        self._read = len(self._ids)  # ids up to here are written
        self._shown = decode(self._ids, skip_special)
        self.held = ""

    def push(self, token: int) -> str:
        self._ids.append(token)
        new = self._decode(self._ids, self._skip)[len(self._shown) :]
        unread = len(self._ids) - self._read
        if (not new or new.endswith(REPLACEMENT)) and unread < WINDOW:
            self.held = new
            return ""
        del self._ids[: self._read]
        self._read = len(self._ids)
        self._shown = self._decode(self._ids, self._skip)
        self.held = ""
        return new


def _decode_slow(tokenizer: Any, ids: list[int], skip: bool) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False))
