"""Grammars over one tokenizer: compiled once, kept in bounds, a matcher for each sequence. The only user of llguidance.

The scheduler compiles to refuse (``check``), the worker to constrain (``matcher``): both with the same counted limits,
so that what was admitted is never refused after a move. A matcher's state is a function of the output ids alone.
The gateway never imports this: the library and its tables of the vocabulary are not for it.

Source of the library: https://github.com/guidance-ai/llguidance (its docs/ describe the grammars).
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark

from protocol.errors import StructureNotSupported
from protocol.structures.json_schema import Path, cannot_serve, library_options, served_schema, subschemas
from protocol.structures.structural_tag import tag_grammar
from protocol.structures.structure import Structure

LIMITS = LLParserLimits(
    max_items_in_row=2000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=250_000,
    max_grammar_size=500_000,
    verbose_errors=False,  # states hold what was generated
)
MAX_COMPILED = 256  # grammars kept, the least recently used go first
MAX_COMPILED_BYTES = 4 << 20  # of their sources
MAX_COMPILE_S = 5.0  # at ingest alone: what takes longer is refused before it is admitted
PROBED_STEPS = 8
MAX_REASON_CHARS = 300
MAX_TRIED = 64  # subschemas compiled by themselves to find the one at fault


class Grammars:
    """Compiled grammars. Safe to use from several threads."""

    def __init__(self, tokenizer: Any, vocab_size: int, end_ids: Iterable[int]) -> None:
        """``tokenizer``: the text of a tokenizer.json, or a TokenVocabulary.

        StructureNotSupported if the library cannot take it: what a request for structure is then answered with.
        """
        self.vocab_size = vocab_size
        self.end_ids = sorted(set(end_ids))
        if not self.end_ids:
            raise StructureNotSupported("structured output needs a model with an end token", param="structure")
        self._tokenizer = _make_tokenizer(tokenizer, vocab_size, self.end_ids)
        self._free: np.ndarray | None = None
        self.words = -(-max(vocab_size, self._tokenizer.vocab_size) // 32)  # int32 words of a mask
        self._compiled: OrderedDict[bytes, tuple[LLMatcher, int]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def check(self, structure: Structure) -> None:
        """Raise StructureNotSupported, which names what is at fault, for what cannot be served with this tokenizer.
        ``structure.check()`` has passed."""
        if structure.kind is None:
            return
        began = time.perf_counter()
        matcher = self.matcher(structure)
        if (reason := self._stuck(matcher)) is not None:
            raise StructureNotSupported(f"{structure.field} cannot be served: {reason}", param=structure.field)
        if time.perf_counter() - began > MAX_COMPILE_S:
            raise StructureNotSupported(f"{structure.field} is too complex", param=structure.field)

    def _stuck(self, matcher: Matcher) -> str | None:
        """Why the first steps into a grammar fail, which shows most of those that exceed the limits: always into the
        first id that is allowed. None if they do not."""
        row = MaskRow(self.words)
        for _ in range(PROBED_STEPS):
            if not matcher.fill(row):
                return matcher.failed
            allowed = np.flatnonzero(np.unpackbits(row.bits.view(np.uint8), bitorder="little"))
            if not len(allowed):
                return "no token of the vocabulary fits"
            if int(allowed[0]) in self.end_ids:
                return None
            matcher.advance_one(int(allowed[0]))
        return matcher.failed

    def matcher(self, structure: Structure, stop_ids: Sequence[int] = ()) -> Matcher:
        """A matcher at the beginning of an output. StructureNotSupported as for ``check``."""
        compiled = self._compile(structure) if structure.kind is not None else None
        return Matcher(self, structure, compiled, stop_ids)

    def free_mask(self) -> np.ndarray:
        """int32 [words]: every id that stands for something, but no end."""
        if self._free is None:
            bits = np.zeros(32 * self.words, bool)
            size, decode = min(self.vocab_size, self._tokenizer.vocab_size), self._tokenizer.decode_bytes
            bits[:size] = [decode([token]) != b"<[%d]>" % token for token in range(size)]  # so padding is shown
            bits[self.end_ids] = False
            self._free = np.packbits(bits, bitorder="little").view(np.int32)
        return self._free

    def special_token(self, text: str) -> str | None:
        """How a Lark grammar names the special token that ``text`` is; None where it is none."""
        ids = self._tokenizer.tokenize_str(text, parse_special=True)
        return f"<[{ids[0]}]>" if len(ids) == 1 and self._tokenizer.is_special_token(ids[0]) else None

    def _compile(self, structure: Structure) -> LLMatcher:
        source = structure.source()
        key = hashlib.sha256(f"{structure.kind}\0{source}".encode()).digest()
        with self._lock:
            found = self._compiled.get(key)
            if found is not None:
                self._compiled.move_to_end(key)
                return found[0].deep_copy()
        matcher = self._new(self._grammar(structure, source))
        if matcher.is_error():
            raise self._refusal(structure, matcher.get_error())
        with self._lock:
            if key not in self._compiled:
                self._compiled[key] = (matcher, len(source))
                self._bytes += len(source)
                while len(self._compiled) > MAX_COMPILED or self._bytes > MAX_COMPILED_BYTES:
                    _, (_, size) = self._compiled.popitem(last=False)
                    self._bytes -= size
        return matcher.deep_copy()

    def _new(self, grammar: str) -> LLMatcher:
        return LLMatcher(self._tokenizer, grammar, log_level=0, limits=LIMITS)

    def _grammar(self, structure: Structure, source: str) -> str:
        match structure.kind:
            case "json" | "json_object":
                return _json_grammar(json.loads(source))
            case "regex":
                return LLMatcher.grammar_from_regex(source)
            case "choice":
                options = " | ".join(json.dumps(option) for option in structure.choice or ())
                return LLMatcher.grammar_from_lark(f"start: {options}")
            case "structural_tag":
                tags = tag_grammar(structure.structural_tag, structure.field, self.special_token)
                return LLMatcher.grammar_from_lark(tags)
        try:
            return LLMatcher.grammar_from_lark(any_to_lark(source))
        except RecursionError:
            raise StructureNotSupported(
                f"{structure.field} cannot be served: it is nested too deep", param=structure.field
            ) from None
        except Exception as error:  # the converter raises what it likes; it names line and column
            raise StructureNotSupported(_reason(structure.field, str(error)), param=structure.field) from None

    # ------------------------------------------------------------------ what is at fault

    def _refusal(self, structure: Structure, error: str) -> StructureNotSupported:
        if structure.kind == "json" and (found := self._culprit(structure.schema())) is not None:
            path, keyword, reason = found
            return cannot_serve(keyword, path, structure.field, f": {reason}")
        return StructureNotSupported(_reason(structure.field, error), param=structure.field)

    def _culprit(self, schema: Any) -> tuple[Path, str, str] | None:
        """The deepest subschema that fails by itself, the keyword at fault in it, and why."""
        if not isinstance(schema, dict):
            return None
        shared = {key: served_schema(schema[key]) for key in ("$defs", "definitions", "$schema") if key in schema}
        places = list(subschemas(schema))[:MAX_TRIED]
        for path, one in sorted(places, key=lambda place: -len(place[0])):
            alone = served_schema(one)
            tried = self._new(_json_grammar({**shared, **alone} if path else alone))
            if not tried.is_error():
                continue
            reason = _first_line(tried.get_error())
            lost = "Pointer " in reason or "not present in a registry" in reason
            if lost and "$ref" not in one:
                continue  # what it refers to lies outside of it
            return path, _keyword(reason, one), reason
        return None


def _json_grammar(schema: Any) -> str:
    options: Any = library_options(schema)
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options)


_HINTS = (
    ("oneOf", "oneOf"), ("format", "format"), ("regex parse error", "pattern"), ("lookaround", "pattern"),
    ("patternProperty", "patternProperties"), ("multiple", "multipleOf"),
    ("required", "required"), ("Pointer", "$ref"), ("registry", "$ref"), ("anyOf", "anyOf"), ("Invalid type", "type"),
)  # fmt: skip


def _keyword(reason: str, schema: dict[str, Any]) -> str:
    """The keyword that a reason speaks of: quoted in it, known by its words, or the first that is there."""
    if "maxProperties only supported" in reason:  # said of either
        return "minProperties" if "minProperties" in schema else "maxProperties"
    for name in re.findall(r"[\"'`]?(\$?[A-Za-z]+)[\"'`]?", reason):
        if name in schema and name not in ("type", "const"):
            return str(name)
    for words, keyword in _HINTS:
        if words in reason:
            return keyword if keyword in schema else next(iter(schema))
    return next(iter(schema), "schema")


def _first_line(error: str) -> str:
    lines = [line.strip() for line in error.strip().splitlines() if line.strip(" ^")]
    return " ".join(lines)[:MAX_REASON_CHARS]


def _reason(field: str, error: str) -> str:
    return f"{field} cannot be served: {_first_line(error)}"


# ------------------------------------------------------------------ the vocabulary


class TokenVocabulary:
    """A vocabulary as the bytes of each id (empty: stands for nothing), for engines without a tokenizer.json."""

    bos_token_id = None
    is_tokenizer_wrapper = True
    special_token_ids: Sequence[int] = ()

    def __init__(self, tokens: list[bytes], end_ids: Sequence[int]) -> None:
        self.tokens = tokens
        self.eos_token_id = end_ids[0] if end_ids else 0
        self._ids = {text: token for token, text in reversed(list(enumerate(tokens))) if len(text) == 1}

    def __call__(self, text: str | bytes) -> list[int]:
        raw = text.encode() if isinstance(text, str) else text
        return [self._ids[bytes([byte])] for byte in raw]


def _make_tokenizer(tokenizer: Any, vocab_size: int, end_ids: list[int]) -> LLTokenizer:
    size = vocab_size if isinstance(tokenizer, str) else len(tokenizer.tokens)
    try:
        try:
            return LLTokenizer(tokenizer, n_vocab=size, eos_token=end_ids)
        except ValueError as error:
            if "too small" not in str(error):
                raise
            return LLTokenizer(tokenizer, eos_token=end_ids)  # ids beyond the model's are masked by the length of a row
    except Exception as error:
        raise StructureNotSupported(
            f"structured output cannot be served with this model's tokenizer: {_first_line(str(error))}",
            param="structure",
        ) from None


# ------------------------------------------------------------------ one sequence


class MaskRow:
    """The mask of one sequence's next id: ``bits`` int32 [words], id i is bit i % 32 of word i // 32. It stays where it
    is: ``pointer`` is its address."""

    __slots__ = ("bits", "pointer", "size")

    def __init__(self, words: int) -> None:
        self.bits = np.zeros(words, np.int32)
        self.pointer: int = self.bits.ctypes.data
        self.size = self.bits.nbytes


class Matcher:
    """Where one output stands in its grammar. ``failed`` says why nothing more can be drawn, once that is so."""

    __slots__ = ("_after", "_begun", "_compiled", "_count", "_ended", "_ends", "_grammars", "_limit", "_opening",
                 "_shut", "_stops", "_tail", "_undecided", "failed")  # fmt: skip

    def __init__(
        self, grammars: Grammars, structure: Structure, compiled: LLMatcher | None, stop_ids: Sequence[int]
    ) -> None:
        self._grammars = grammars
        self._compiled = compiled
        self._stops = np.array(sorted(set(stop_ids) - set(grammars.end_ids)), np.int64)
        self._ends = frozenset([*grammars.end_ids, *stop_ids])
        self._after = list(structure.after)
        self._shut = np.setdiff1d(self._stops, self._after)  # in what comes before the grammar
        self._limit = structure.after_limit
        self._opening = list(structure.opened_by)  # what is still to come of it
        self._undecided = bool(self._opening)  # until the first id is there
        self._begun = not self._after
        self._tail: list[int] = []
        self._count = 0
        self._ended = False
        self.failed: str | None = None

    def advance_one(self, token: int) -> None:
        """``advance`` by one id, for the usual case as quick as can be."""
        if self._begun and self._compiled is not None and not self._ended and self.failed is None:
            if token in self._ends:
                self._ended = True
            elif not self._compiled.consume_token(token):
                self.failed = _first_line(self._compiled.get_error())
        else:
            self.advance((token,))

    def advance(self, tokens: Sequence[int]) -> None:
        """Take in the next output ids. What comes after an end is nobody's: it is passed over."""
        for at, token in enumerate(tokens):
            if self._undecided:
                self._undecided, self._begun = False, token != self._opening[0]
            if self._begun:
                self._consume(list(tokens[at:]))
                return
            if self._opening:
                del self._opening[0]
                continue
            self._count += 1
            self._tail = [*self._tail, token][-len(self._after) :]
            self._begun = self._tail == self._after

    def _consume(self, tokens: list[int]) -> None:
        if self._compiled is None or self._ended or self.failed is not None:
            return
        for at, token in enumerate(tokens):
            if token in self._ends:
                self._ended, tokens = True, tokens[:at]
                break
        if tokens and not self._compiled.consume_tokens(tokens):
            self.failed = _first_line(self._compiled.get_error())

    def fill(self, row: MaskRow) -> bool:
        """Write the mask of the next id into ``row``; False on failure."""
        if self.failed is not None:
            return False
        if not (self._begun or self._undecided):
            self._fill_before(row.bits)
            return True
        if not self._fill_ruled(row):
            return False
        if self._undecided:
            _set_bits(row.bits, np.array(self._opening[:1]))
        return True

    def _fill_ruled(self, row: MaskRow) -> bool:
        if self._ended:
            row.bits[:] = 0
            _set_bits(row.bits, np.array(self._grammars.end_ids))
        elif self._compiled is None:
            row.bits[:] = -1
        else:
            self._compiled.unsafe_compute_mask_ptr(row.pointer, row.size)
            if self._compiled.is_error():
                self.failed = _first_line(self._compiled.get_error())
                return False
            if len(self._stops):
                self._fill_stops(row.bits)
        return True

    def _fill_before(self, row: np.ndarray) -> None:
        """Before the grammar begins: anything but an end; from the limit on, what it begins after. What opens this
        part comes whole."""
        if not self._opening and (self._limit is None or self._count < self._limit):
            row[:] = self._grammars.free_mask()
            _clear_bits(row, self._shut)
            return
        forced = self._opening[0] if self._opening else self._after[_overlap(self._tail, self._after)]
        row[:] = 0
        _set_bits(row, np.array([forced]))

    def _fill_stops(self, row: np.ndarray) -> None:
        """All end ids count as one end: the request's own are allowed exactly where the model's are."""
        end = self._grammars.end_ids[0]
        if (int(row[end >> 5]) >> (end & 31)) & 1:
            _set_bits(row, self._stops)
        else:
            _clear_bits(row, self._stops)


def _bit(ids: np.ndarray) -> np.ndarray:
    return np.left_shift(np.uint32(1), (ids & 31).astype(np.uint32))


def _set_bits(row: np.ndarray, ids: np.ndarray) -> None:
    np.bitwise_or.at(row.view(np.uint32), ids >> 5, _bit(ids))


def _clear_bits(row: np.ndarray, ids: np.ndarray) -> None:
    np.bitwise_and.at(row.view(np.uint32), ids >> 5, ~_bit(ids))


def _overlap(tail: list[int], after: list[int]) -> int:
    """How many of the first ids of ``after`` the tail ends with, short of all of them."""
    return next((n for n in range(min(len(tail), len(after) - 1), 0, -1) if tail[-n:] == after[:n]), 0)
