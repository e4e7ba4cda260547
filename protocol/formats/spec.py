"""FormatSpec: how one model writes tool calls and its reasoning. Data only; it is pinned in a request at accept.

Every field is a text that the model writes. Where such a text (or a part of it) is one token of the tokenizer's added
ones, ``controls`` names its id, and then that id alone stands for it: the same letters, typed, are letters.
Whitespace around and inside markers is not compared: models do not keep to what their template writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

MAX_CONTROLS = 64
MAX_MARKER_CHARS = 256


class Reasoning(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What stands around a thought."""

    open: str
    close: str


class Tools(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a tool call looks like.

    ``kind`` of a call's body:
    - ``json``: an object with the function's name and arguments; ``listed``: all calls are one list of such;
      ``keyed``: the name is the only key, the arguments its value.
    - ``args``: the name, then the arguments as a JSON object.
    - ``tagged``: the name, then each argument between tags, texts raw and everything else as JSON.
    - ``pythonic``: a list of calls in Python's notation.
    - ``gemma``: ``call:name{key:value}``, texts between marks of their own.
    - ``harmony``: messages on channels, calls among them by their recipient (gpt-oss).
    """

    kind: Literal["json", "args", "tagged", "pythonic", "gemma", "harmony"]
    section_open: str = ""  # before the first of several calls, "" where calls stand alone
    section_close: str = ""
    call_open: str = ""
    call_close: str = ""
    between: str = ""  # between calls
    bare: bool = False  # a call has no marker: what begins like one at the very start of an answer is one
    # json
    name_at: tuple[str, ...] = ("name",)  # path in the object
    args_at: tuple[str, ...] = ("arguments",)
    listed: bool = False
    keyed: bool = False
    # args and tagged
    id_close: str = ""  # an id comes first, up to here
    name_prefix: str = ""  # before the name, no part of it
    name_close: str = ""
    args_open: str = ""  # what comes between name and arguments, skipped up to here
    key_open: str = ""
    key_close: str = ""
    value_open: str = ""  # an attribute, `true` for a text, stands between key_close and this
    value_close: str = ""
    lines: bool = False  # a value stands on lines of its own
    # history
    ids: Literal["any", "nine", "indexed"] = "any"  # nine letters (Mistral); functions.NAME:INDEX (Kimi)


class FormatSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The format of one model. ``tools`` and ``reasoning`` are None where there is none."""

    name: str
    tools: Tools | None = None
    reasoning: Reasoning | None = None
    controls: dict[str, int] = {}
    prompted: bool = False  # the template knows no tools: they are told in the system turn, results as a user's
    ends: list[int] = []  # ids that end the model's turn after a call, besides its end ids
    ruled: bool = True  # whether a grammar can keep calls in this form
    opening: list[int] = []  # the ids of what opens a thought, where the first of them does nothing else
    opened: list[list[int]] = []  # how a prompt ends that has opened a thought
    closed: list[list[int]] = []  # how one ends that wants none: it has closed the thought as well

    @property
    def always(self) -> bool:
        """Whether answers are parsed though no tools are given."""
        return self.reasoning is not None or (self.tools is not None and self.tools.kind == "harmony")

    def thinking(self, prompt: Sequence[int], continued: str = "") -> bool:
        """Whether the answer to ``prompt`` (token ids) begins within a thought: the prompt has opened one, or the
        message that is ``continued`` has."""
        marks = self.reasoning
        begun = marks is not None and continued.rfind(marks.open) > continued.rfind(marks.close)
        return begun or _ends(prompt, self.opened)

    def thoughtless(self, prompt: Sequence[int]) -> bool:
        """Whether ``prompt`` has closed the thought, so that the answer begins with none."""
        return _ends(prompt, self.closed)

    def close_id(self) -> int | None:
        """The id that ends a thought, where it is one token."""
        return self.controls.get(self.reasoning.close) if self.reasoning is not None else None


def _ends(prompt: Sequence[int], tails: list[list[int]]) -> bool:
    return any(list(prompt[-len(tail) :]) == tail for tail in tails)


def with_controls(spec: FormatSpec, token_id: dict[str, int]) -> FormatSpec:
    """``spec`` with the ids of those added tokens (text -> id) that occur in its markers."""
    markers = list(marker_texts(spec))
    found = {text: id for text, id in token_id.items() if text.strip() and any(text in marker for marker in markers)}
    return msgspec.structs.replace(spec, controls=found)


def marker_texts(spec: FormatSpec) -> list[str]:
    """All texts of the spec that are markers."""
    texts: list[str] = list(HARMONY_TOKENS) if spec.tools is not None and spec.tools.kind == "harmony" else []
    if spec.tools is not None and spec.tools.kind == "gemma":
        texts.append(GEMMA_QUOTE)
    if spec.tools is not None and spec.tools.bare:
        texts.append(BARE_TOKEN)
    for part in (spec.tools, spec.reasoning):
        if part is not None:
            fields: dict[str, Any] = msgspec.structs.asdict(part)
            texts += [fields[name] for name in fields if name in MARKER_FIELDS]
    return [text for text in texts if text]


MARKER_FIELDS = frozenset(
    {"open", "close", "section_open", "section_close", "call_open", "call_close", "between", "id_close", "name_prefix",
     "name_close", "args_open", "key_open", "key_close", "value_open", "value_close"}
)  # fmt: skip
HARMONY_TOKENS = ("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>", "<|return|>")
BARE_TOKEN = "<|python_tag|>"  # Llama 3 writes it before some calls, and leaves it out before others
GEMMA_QUOTE = '<|"|>'
