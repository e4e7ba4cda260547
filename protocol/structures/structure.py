"""Structure: what the text of an answer must look like. One definition for HTTP, queue, offline use and wire.

It travels with the sampling parameters, so that whoever runs a sequence can rebuild the state of its grammar from
the journaled ids alone. Everything that can be judged without a tokenizer is judged by ``check``; the rest where
the prompt is tokenized (protocol/structures/grammar.py), before the request is admitted.
"""

from __future__ import annotations

from typing import Any

import msgspec

from protocol.errors import InvalidRequest
from protocol.structures.json_schema import check_schema, served_schema
from protocol.structures.structural_tag import check_tag

MAX_GRAMMAR_BYTES = 64 << 10
MAX_CHOICE_STRINGS = 1024
MAX_AFTER_IDS = 16
INT32_MAX = 2**31 - 1
KINDS = ("json", "json_object", "regex", "choice", "grammar", "structural_tag")


class Structure(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """At most one of the first six. ``json`` is a JSON schema, as an object, a boolean, or its text.

    With ``after`` the grammar rules only what follows the first occurrence of these ids, one after another, in the
    output (the end of a model's reasoning); before it everything but an end is allowed. ``after_limit`` is the most
    output tokens before them: then they are forced. ``after`` alone constrains nothing and says where content begins.
    With ``opened_by`` there is such a part only in an output that begins with the first of these ids (the others are
    forced then); any other output is ruled from its beginning.
    """

    json: Any = None
    json_object: bool = False
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None  # Lark, or GBNF
    structural_tag: Any = None
    after: list[int] = []
    after_limit: int | None = None
    opened_by: list[int] = []
    field: str = "structure"  # the name that its sender knows it by, for errors

    @property
    def kind(self) -> str | None:
        """Which of KINDS is given; None where only ``after`` is."""
        return next((kind for kind in KINDS if getattr(self, kind) not in (None, False)), None)

    @property
    def constrains(self) -> bool:
        """Whether some token may ever be ruled out."""
        return self.kind is not None or self.after_limit is not None

    def schema(self) -> Any:
        """The JSON schema, decoded where it came as text. InvalidRequest if that is no JSON."""
        if not isinstance(self.json, str):
            return self.json
        try:
            return msgspec.json.decode(self.json)
        except (msgspec.DecodeError, RecursionError):
            raise InvalidRequest(f"{self.field} is not well-formed JSON", param=self.field) from None

    def source(self) -> str:
        """The grammar as one text, equal for equal grammars; what the 64 kB are counted on."""
        kind = self.kind
        if kind == "json":
            return _text(served_schema(self.schema()), self.field)
        if kind == "json_object":
            return '{"type":"object"}'
        value = None if kind is None else getattr(self, kind)
        return value if isinstance(value, str) else _text(value, self.field)

    def check(self, vocab_size: int | None = None) -> None:
        """Raise InvalidRequest for what can be refused without a tokenizer. ``field`` is its param."""
        at = self.field
        given = [kind for kind in KINDS if getattr(self, kind) not in (None, False)]
        if len(given) > 1:
            raise InvalidRequest(f"{at}: {given[0]} and {given[1]} must not be given together", param=at)
        if not given and not self.after:
            raise InvalidRequest(f"{at} must hold one of {', '.join(KINDS)}", param=at)
        self._check_after(vocab_size)
        if self.json is not None and self.json is not False:
            check_schema(self.schema(), at)
        if self.choice is not None:
            self._check_choice(at)
        if self.structural_tag is not None:
            check_tag(self.structural_tag, at)
        for text in (self.regex, self.grammar):
            if text == "":
                raise InvalidRequest(f"{at} must not be empty", param=at)
        size = len(self.source().encode("utf-8", "surrogatepass"))
        if size > MAX_GRAMMAR_BYTES:
            raise InvalidRequest(f"{at} has {size} bytes; at most {MAX_GRAMMAR_BYTES} are allowed", param=at)

    def _check_choice(self, at: str) -> None:
        assert self.choice is not None
        if not 1 <= len(self.choice) <= MAX_CHOICE_STRINGS:
            raise InvalidRequest(f"{at}: choice takes 1 to {MAX_CHOICE_STRINGS} strings", param=at)
        if not all(self.choice):
            raise InvalidRequest(f"{at}: a choice must not be empty", param=at)

    def _check_after(self, vocab_size: int | None) -> None:
        top = INT32_MAX if vocab_size is None else vocab_size - 1
        for name, ids in (("after", self.after), ("opened_by", self.opened_by)):
            at = f"{self.field}.{name}"
            if len(ids) > MAX_AFTER_IDS:
                raise InvalidRequest(f"{at} takes at most {MAX_AFTER_IDS} ids", param=at)
            if not all(0 <= token <= top for token in ids):
                raise InvalidRequest(f"{at} must hold token ids in [0, {top}]", param=at)
        at = f"{self.field}.after"
        if self.after_limit is not None and not (self.after and 0 <= self.after_limit <= INT32_MAX):
            raise InvalidRequest(f"{self.field}.after_limit needs after, and must not be negative", param=at)
        if self.opened_by and not self.after:
            raise InvalidRequest(f"{self.field}.opened_by needs after", param=at)


def _text(value: Any, at: str) -> str:
    try:
        return msgspec.json.encode(value).decode()
    except (UnicodeError, RecursionError, TypeError, OverflowError):
        raise InvalidRequest(f"{at} may hold what JSON can hold, and no more", param=at) from None
