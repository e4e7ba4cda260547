"""How many tokens a text has at least, told by its length alone.

If no token stands for more than L bytes of text, a text of B bytes has at least B / L tokens, and a megabyte that no
context can hold is refused for the price of a division. That is a bound only where every byte of the text reaches some
token: not where a part of the tokenizer deletes text, swallows whitespace, or makes one unknown token of a whole word.
So the parts are looked at, each by name, and a part that is not known to keep every byte gives no bound. (Parts as in
https://huggingface.co/docs/tokenizers/components.)
"""

from __future__ import annotations

import json
from typing import Any

# NFC makes at most 3.5 bytes into one: U+0390 (2 bytes) is also U+1FBE U+0308 U+0301 (7); rounded up, for later Unicode
NFC_SHRINKS = 4
CHARACTER = 4  # bytes of the longest one
BYTES = {f"<0x{byte:02X}>" for byte in range(256)}  # the tokens of a byte fallback
ISOLATING = ("Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")
SPLITTING = ("ByteLevel", "Digits", "Metaspace", "UnicodeScripts", "FixedLength")


def longest_token(tokenizer_json: str | bytes) -> int | None:
    """The most bytes of text, as the client sent it, that one token of this tokenizer.json can stand for; None if there
    is no such bound."""
    parts = json.loads(tokenizer_json)
    added = parts.get("added_tokens") or []
    if any(token.get("lstrip") or token.get("rstrip") for token in added):  # takes any amount of whitespace in
        return None
    shrinks = _normalizer(parts.get("normalizer"))
    if shrinks is None or not _pre_tokenizer(parts.get("pre_tokenizer")):
        return None
    longest = _model(parts["model"], _names(parts.get("normalizer")) | _names(parts.get("pre_tokenizer")))
    if longest is None:
        return None
    return shrinks * max([longest, *(len(token["content"].encode()) for token in added)])


def _normalizer(part: dict[str, Any] | None) -> int | None:
    """How many bytes of text may become one; None: any number."""
    match part and part["type"]:
        case None | "ByteLevel" | "Prepend":
            return 1
        case "NFC":
            return NFC_SHRINKS
        case "Replace":
            pattern = part["pattern"].get("String") if part else None
            return 1 if pattern and part and len(part["content"].encode()) >= len(pattern.encode()) else None
        case "Sequence":
            shrinks = 1
            for inner in part["normalizers"] if part else ():
                if (factor := _normalizer(inner)) is None:
                    return None
                shrinks *= factor
            return shrinks
    return None


def _pre_tokenizer(part: dict[str, Any] | None) -> bool:
    """Whether all of the text is left after this part."""
    match part and part["type"]:
        case None:
            return True
        case "Split" | "Punctuation":
            return bool(part and part.get("behavior") in ISOLATING)
        case "Sequence":
            return all(map(_pre_tokenizer, part["pretokenizers"] if part else ()))
        case kind:
            return kind in SPLITTING


def _model(model: dict[str, Any], parts: set[str]) -> int | None:
    """The bytes of the longest token of a model that makes tokens of all that it is given."""
    vocabulary = model["vocab"]
    falls_back = bool(model.get("byte_fallback"))
    if model.get("type") == "Unigram":  # what it does not know is always fused into one
        tokens = [piece for piece, _ in vocabulary]
        return _longest(tokens) if falls_back and set(tokens) >= BYTES else None
    if model.get("type", "BPE") != "BPE":  # WordPiece, WordLevel: an unknown word is one token, however long
        return None
    if "ByteLevel" in parts:  # a character of a token is a byte of the text
        return max(map(len, vocabulary)) if all(letter in vocabulary for letter in _byte_letters()) else None
    if falls_back and vocabulary.keys() >= BYTES:
        return _longest(vocabulary)
    if model.get("unk_token") is not None and not model.get("fuse_unk"):
        return max(CHARACTER, _longest(vocabulary))
    return None  # characters that it does not know are fused, or dropped


def _longest(tokens: Any) -> int:
    return max(len(token.encode()) for token in tokens)


def _names(part: dict[str, Any] | None) -> set[str]:
    """The kinds of parts in ``part``."""
    if part is None:
        return set()
    inner = part.get("normalizers") or part.get("pretokenizers") or []
    return {part["type"]}.union(*map(_names, inner))


def _byte_letters() -> list[str]:
    """The letters by which byte-level tokenizers write the 256 bytes (openai/gpt-2, encoder.py)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = 256 - len(plain)
    return [chr(byte) for byte in plain] + [chr(256 + number) for number in range(others)]
