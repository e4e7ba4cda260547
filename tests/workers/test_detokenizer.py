"""Incremental text against the tokenizers' own decode, over random ids of every kind of decoder."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tests.models import byte_tokenizer
from workers.detokenizer import REPLACEMENT, Vocabulary, WindowVocabulary

TEXT = [
    "def add(a, b):\n    return a + b\n",
    "Größe über alles, naïve café — 日本語のテキスト, 中文字符 👩‍👩‍👧‍👦 🇩🇪 👍🏽 ok\u0301",
    "the quick brown fox jumps over the lazy dog, again and again",
]
SPECIALS = ["<|bos|>", "<|eos|>"]


@cache
def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXT * 3, trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIALS, initial_alphabet=alphabet)
    )
    tokenizer.add_tokens(["<tool call>", "übersetze"])
    return tokenizer


@cache
def sentencepiece(strip: bool = True) -> Tokenizer:
    """As llama-2's: pieces with a space sign, bytes for what has no piece, one leading space stripped."""
    words = sorted({"▁" + word for word in " ".join(TEXT[::2]).split()} | set("▁abcdefghijklmnopqrstuvwxyz"))
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    tokenizer = Tokenizer(
        models.BPE(vocab={piece: i for i, piece in enumerate(vocab)}, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


@cache
def word_piece() -> Tokenizer:
    vocab = ["[UNK]", "[CLS]", "play", "##ing", "##er", "the", "s", "##s", ",", ".", "é", "##ü"]
    tokenizer = Tokenizer(models.WordPiece(vocab={piece: i for i, piece in enumerate(vocab)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer.add_special_tokens(["[CLS]"])
    return tokenizer


@cache
def demo() -> Tokenizer:
    return Tokenizer.from_file(str(Path(__file__).parents[2] / "examples/demo-model/tokenizer.json"))


@cache
def vocabulary_of(make: Callable[[], Tokenizer]) -> Vocabulary | WindowVocabulary:
    return Vocabulary.of(make())


def pieces(vocabulary: Vocabulary | WindowVocabulary, ids: list[int], prompt: list[int], skip: bool) -> list[str]:
    stream = vocabulary.stream(prompt, skip)
    return [*map(stream.push, ids), stream.held]


def ids_of(size: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, size - 1), max_size=40)


def test_which_decoders_have_a_table() -> None:
    assert isinstance(Vocabulary.of(byte_level()), Vocabulary)
    assert isinstance(Vocabulary.of(sentencepiece()), Vocabulary)
    assert isinstance(Vocabulary.of(byte_tokenizer()), Vocabulary)
    assert isinstance(Vocabulary.of(word_piece()), WindowVocabulary)


@settings(max_examples=150, deadline=None)
@given(ids_of(byte_level().get_vocab_size()), st.booleans())
def test_byte_level_equals_full_decode_for_any_ids(ids: list[int], skip: bool) -> None:
    tokenizer = byte_level()
    assert "".join(pieces(vocabulary_of(byte_level), ids, [], skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


@settings(max_examples=100, deadline=None)
@given(st.data(), st.booleans())
def test_the_demo_models_tokenizer_equals_full_decode(data: st.DataObject, skip: bool) -> None:
    tokenizer = demo()
    ids = data.draw(ids_of(tokenizer.get_vocab_size()))
    assert isinstance(vocabulary_of(demo), Vocabulary)
    assert "".join(pieces(vocabulary_of(demo), ids, [], skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 255), max_size=30))
def test_bytes_in_any_disorder_equal_full_decode(ids: list[int]) -> None:
    tokenizer = byte_tokenizer()
    text = "".join(pieces(vocabulary_of(byte_tokenizer), ids, [], True))
    assert text == tokenizer.decode(ids) == bytes(ids).decode(errors="replace")


def runs_are_characters(ids: list[int]) -> bool:
    """Whether every run of byte tokens (ids 3 to 258) is UTF-8."""
    run = bytearray()
    for token in [*ids, 0]:
        if 3 <= token < 259:
            run.append(token - 3)
            continue
        try:
            run.decode()
        except UnicodeDecodeError:
            return False
        run.clear()
    return True


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.integers(0, sentencepiece().get_vocab_size() - 1).map(lambda t: [t]),
            st.text(max_size=3).map(lambda text: [3 + byte for byte in text.encode()]),
        ),
        max_size=20,
    ).map(lambda parts: [token for part in parts for token in part]),
    st.booleans(),
)
def test_byte_fallback_equals_full_decode(ids: list[int], skip: bool) -> None:
    tokenizer = sentencepiece()
    text = "".join(pieces(vocabulary_of(sentencepiece), ids, [], skip))
    full = tokenizer.decode(ids, skip_special_tokens=skip)
    if runs_are_characters([t for t in ids if not (skip and t < 3)]):
        assert text == full
    else:  # decode gives up whole runs of bytes; a stream has shown their good characters
        assert text.count(REPLACEMENT) <= full.count(REPLACEMENT)
        shown = iter(text)
        assert all(character in shown for character in full if character != REPLACEMENT)


@settings(max_examples=100, deadline=None)
@given(ids_of(word_piece().get_vocab_size()), st.booleans())
def test_the_window_equals_full_decode(ids: list[int], skip: bool) -> None:
    tokenizer = word_piece()
    assert "".join(pieces(vocabulary_of(word_piece), ids, [], skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30))
def test_no_piece_holds_half_a_character_of_any_text(text: str) -> None:
    """Each emoji and each letter comes whole, with whichever token completes it, in the window as in the table."""
    tokenizer = byte_level()
    ids = tokenizer.encode(text.replace(REPLACEMENT, "")).ids
    decode = lambda ids, skip: tokenizer.decode(ids, skip_special_tokens=skip)  # noqa: E731
    for vocabulary in (vocabulary_of(byte_level), WindowVocabulary(decode)):
        found = pieces(vocabulary, ids, [], False)
        assert "".join(found) == text.replace(REPLACEMENT, "")
        assert not any(REPLACEMENT in piece for piece in found)


def test_a_family_of_emoji_over_many_tokens() -> None:
    tokenizer = byte_tokenizer()
    family = "👩‍👩‍👧‍👦"
    stream = Vocabulary.of(tokenizer).stream([])
    shown = [stream.push(byte) for byte in family.encode()]
    assert "".join(shown) == family
    assert [piece for piece in shown if piece] == list(family)


def test_held_tells_what_an_end_would_add() -> None:
    tokenizer = byte_tokenizer()
    for vocabulary in (Vocabulary.of(tokenizer), WindowVocabulary(lambda ids, skip: tokenizer.decode(ids, skip))):
        stream = vocabulary.stream([65])
        assert (stream.push(0xF0), stream.held) == ("", REPLACEMENT)
        assert (stream.push(0x9F), stream.held) == ("", REPLACEMENT)
        stream.push(0x91)
        assert (stream.push(0x8D), stream.held) == ("👍", "")


def test_a_first_word_keeps_its_space_after_a_prompt_and_loses_it_at_the_start() -> None:
    tokenizer = sentencepiece()
    the = tokenizer.token_to_id("▁the")
    vocabulary = Vocabulary.of(tokenizer)
    bos = tokenizer.token_to_id("<s>")
    assert pieces(vocabulary, [the, the], [bos, the], True) == [" the", " the", ""]
    assert pieces(vocabulary, [the, the], [bos], True) == ["the", " the", ""]
    assert pieces(Vocabulary.of(sentencepiece(strip=False)), [the], [], True) == [" the", ""]


def test_bytes_of_single_tokens() -> None:
    vocabulary = Vocabulary.of(byte_level())
    for token, text in [(byte_level().token_to_id("<|eos|>"), b"<|eos|>"), (byte_level().token_to_id("Ġ"), b" ")]:
        assert vocabulary.token_bytes(token) == text
    assert Vocabulary.of(sentencepiece()).token_bytes(3 + 0xE4) == b"\xe4"
    assert vocabulary.token_bytes(1 << 20) == b""  # models pad their vocabulary
    assert WindowVocabulary(lambda ids, skip: word_piece().decode(ids, skip)).token_bytes(2) == b"play"


def test_a_window_without_an_end_moves_on() -> None:
    """Tokens that never make a character, and tokens without any text, cost a bounded window each."""
    decoded: list[int] = []

    def decode(ids: list[int], skip: bool) -> str:
        decoded.append(len(ids))
        return byte_tokenizer().decode(ids, skip_special_tokens=skip)

    stream = WindowVocabulary(decode).stream([])
    text = "".join(stream.push(token) for token in [0xE4] * 50 + [257] * 500)
    assert set(text) == {REPLACEMENT}
    assert max(decoded) <= 128


@pytest.mark.parametrize("decoder", [decoders.ByteLevel(), decoders.Sequence([decoders.ByteLevel()])])
def test_a_decoder_in_a_sequence_is_known_too(decoder: decoders.Decoder) -> None:
    tokenizer = Tokenizer.from_str(byte_level().to_str())
    tokenizer.decoder = decoder
    assert isinstance(Vocabulary.of(tokenizer), Vocabulary)


def test_a_tokenizer_that_writes_otherwise_than_its_table_gets_the_window() -> None:
    tokenizer = Tokenizer.from_str(sentencepiece().to_str())
    assert isinstance(Vocabulary.of(tokenizer), Vocabulary)
    steps = [decoders.ByteFallback(), decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 2, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    assert isinstance(Vocabulary.of(tokenizer), WindowVocabulary)
