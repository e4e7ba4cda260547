"""Fill in the middle (``suffix`` of completions): a prompt of a prefix and a suffix, joined by the control tokens that
the model was trained with. Which these are, the tokenizer tells: no family is looked up by name."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Where the prefix and the suffix stand; everything else is a control token.
PREFIX, SUFFIX = "{prefix}", "{suffix}"
FORMS = (
    ("<|fim_prefix|>", PREFIX, "<|fim_suffix|>", SUFFIX, "<|fim_middle|>"),  # Qwen coder, CodeGemma, StableCode
    ("<fim_prefix>", PREFIX, "<fim_suffix>", SUFFIX, "<fim_middle>"),  # StarCoder, Granite
    ("<fim-prefix>", PREFIX, "<fim-suffix>", SUFFIX, "<fim-middle>"),  # SantaCoder
    ("<|code_prefix|>", PREFIX, "<|code_suffix|>", SUFFIX, "<|code_middle|>"),  # CodeGeeX, GLM
    ("<｜fim▁begin｜>", PREFIX, "<｜fim▁hole｜>", SUFFIX, "<｜fim▁end｜>"),  # DeepSeek
    ("[SUFFIX]", SUFFIX, "[PREFIX]", PREFIX),  # Codestral
)
# Code Llama's tokens (▁<PRE>) are left out: its SentencePiece would write a space before each part.

Encode = Callable[[str], "array[int]"]


@dataclass(frozen=True)
class FillInMiddle:
    begin: tuple[int, ...]  # what the tokenizer writes before any text
    parts: tuple[int | str, ...]  # ids of control tokens, PREFIX and SUFFIX

    @classmethod
    def of(cls, tokenizer: Any, vocab_size: int) -> FillInMiddle | None:
        """The form whose control tokens this tokenizer has; None if it has none's."""
        added: dict[str, int] = tokenizer.get_added_vocab() if hasattr(tokenizer, "get_added_vocab") else {}
        known = {text: token_id for text, token_id in added.items() if token_id < vocab_size}
        for form in FORMS:
            if all(part in known or part in (PREFIX, SUFFIX) for part in form):
                parts = tuple(part if part in (PREFIX, SUFFIX) else known[part] for part in form)
                empty = list(tokenizer.encode("", add_special_tokens=True))
                bos = getattr(tokenizer, "bos_token_id", None)
                return cls((bos,) if bos is not None and empty[:1] == [bos] else (), parts)
        return None

    def ids(self, prefix: str, suffix: str, encode: Encode) -> array[int]:
        """The prompt. ``encode`` makes the ids of a text, with nothing added."""
        texts = {PREFIX: prefix, SUFFIX: suffix}
        prompt = array("i", self.begin)
        for part in self.parts:
            if isinstance(part, int):
                prompt.append(part)
            elif texts[part]:
                prompt.extend(encode(texts[part]))
        return prompt
