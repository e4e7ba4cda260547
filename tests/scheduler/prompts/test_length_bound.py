"""The length rule against real tokenizers: where it speaks it is true, and where it cannot be it is silent."""

from __future__ import annotations

import random
import unicodedata
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from scheduler.prompts.length_bound import NFC_SHRINKS, longest_token

LETTERS = list(pre_tokenizers.ByteLevel.alphabet())
BYTES = {f"<0x{byte:02X}>": byte for byte in range(256)}


def byte_level(*tokens: str) -> Tokenizer:
    vocabulary = {token: number for number, token in enumerate([*sorted(LETTERS), *tokens])}
    made = Tokenizer(models.BPE(vocabulary, [(token[:-1], token[-1]) for token in tokens if len(token) > 1]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return made


def characters(**options: Any) -> Tokenizer:
    vocabulary = {"a": 0, "b": 1, "ab": 2, "<unk>": 3, "▁": 4}
    vocabulary |= {token: 5 + number for token, number in BYTES.items()}
    return Tokenizer(models.BPE(vocabulary, [("a", "b")], **options))


def with_parts(tokenizer: Tokenizer, **parts: Any) -> Tokenizer:
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


def with_token(tokenizer: Tokenizer, content: str, **options: bool) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(content, normalized=False, **options)])
    return tokenizer


SPLIT = Regex(r"\s+")
BOUNDED = {
    "byte level": byte_level("ab", "abc"),
    "byte level with NFC": with_parts(byte_level("ab"), normalizer=normalizers.NFC()),
    "byte level with a long added token": with_token(byte_level("ab"), "<|a rather long one|>"),
    "byte fallback": characters(byte_fallback=True),
    "unknown characters one by one": characters(unk_token="<unk>", fuse_unk=False),
    "as Llama: spaces written out": with_parts(
        characters(byte_fallback=True),
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    ),
    "metaspace": with_parts(characters(byte_fallback=True), pre_tokenizer=pre_tokenizers.Metaspace()),
    "split, every piece kept": with_parts(
        byte_level("ab"),
        pre_tokenizer=pre_tokenizers.Sequence(
            [pre_tokenizers.Split(SPLIT, "isolated"), pre_tokenizers.ByteLevel(use_regex=False)]
        ),
    ),
}
UNBOUNDED = {
    "an added token that swallows whitespace": with_token(byte_level("ab"), "<|end|>", lstrip=True),
    "one that swallows it on its right": with_token(byte_level("ab"), "<|end|>", rstrip=True),
    "unknown characters fused": characters(unk_token="<unk>", fuse_unk=True),
    "unknown characters dropped": characters(),
    "a normalizer that strips": with_parts(byte_level("ab"), normalizer=normalizers.Strip()),
    "a normalizer that deletes": with_parts(byte_level("ab"), normalizer=normalizers.Replace("x", "")),
    "a normalizer that deletes by pattern": with_parts(byte_level("a"), normalizer=normalizers.Replace(SPLIT, " ")),
    "accents stripped": with_parts(byte_level("ab"), normalizer=normalizers.StripAccents()),
    "whitespace dropped": with_parts(characters(byte_fallback=True), pre_tokenizer=pre_tokenizers.WhitespaceSplit()),
    "a split that removes": with_parts(
        characters(byte_fallback=True), pre_tokenizer=pre_tokenizers.Split(SPLIT, "removed")
    ),
    "whole unknown words": Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")),
    "word pieces": Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1})),
    "unigram, unknowns fused": Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0, byte_fallback=False)),
    "a byte missing": Tokenizer(models.BPE({"a": 0, "b": 1}, [])),
}


@pytest.mark.parametrize("name", UNBOUNDED)
def test_no_bound_where_text_may_vanish(name: str) -> None:
    assert longest_token(UNBOUNDED[name].to_str()) is None


@pytest.mark.parametrize("name", BOUNDED)
def test_no_text_has_fewer_tokens_than_its_length_says(name: str) -> None:
    tokenizer = BOUNDED[name]
    longest = longest_token(tokenizer.to_str())
    assert longest is not None
    draw = random.Random(name)
    pieces = ["a", "ab", "abc", " ", "\n", "é", "e\u0301", "\u1fbe\u0308\u0301", "\u212a", "你", "👩‍👧"]
    pieces += ["<|a rather long one|>"]
    for length in (1, 2, 5, 20, 100, 1000):
        for _ in range(30):
            text = "".join(draw.choices(pieces, k=length))
            assert len(tokenizer.encode(text).ids) * longest >= len(text.encode()), text


def test_the_bound_is_the_longest_tokens_bytes() -> None:
    assert longest_token(byte_level("ab", "abc").to_str()) == 3
    assert longest_token(with_token(byte_level("ab"), "<|é|>").to_str()) == len("<|é|>".encode())
    assert longest_token(with_parts(byte_level("ab"), normalizer=normalizers.NFC()).to_str()) == 2 * NFC_SHRINKS


def test_nfc_makes_no_character_of_more_bytes_than_we_count() -> None:
    longest: dict[str, int] = {}  # a character in NFD -> bytes of the longest text that decomposes to it
    every = [chr(code) for code in range(0x110000) if unicodedata.decomposition(chr(code))[:1] not in ("", "<")]
    every += ["\uac00", "\uac01"]  # Hangul, which is decomposed by a rule
    for character in every:
        decomposed = unicodedata.normalize("NFD", character)
        if len(decomposed) == 1:
            longest[decomposed] = max(longest.get(decomposed, len(decomposed.encode())), len(character.encode()))
    for character in (*every, *longest):
        if unicodedata.normalize("NFC", character) == character:
            parts = unicodedata.normalize("NFD", character)
            most = sum(longest.get(part, len(part.encode())) for part in parts)
            assert most <= NFC_SHRINKS * len(character.encode()), hex(ord(character))
