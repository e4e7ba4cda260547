"""Six kinds of small tokenizers, trained on the spot, that know the control tokens of all the real templates.

``<|word|>``, ``<｜word｜>``, ``[WORD]`` and ends of turns are special; ``<word>`` is added and not special, as
``<think>`` and ``<tool_call>`` mostly are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

SPECIAL = (
    r"<\|[^|<>\n'\"{}]{1,40}\|>", r"<｜[^｜<>\n{}]{1,40}｜>", r"\[/?[A-Z_]{3,25}\]", r"<[a-z]+_of_[a-z]+>",
    r"<SPECIAL_\d+>", r"<\|[a-z_\"]+>", r"<[a-z_\"]*\|>", r"\[e~\[|\]~b\]|\]~!b\[",
)  # fmt: skip
PLAIN = r"</?[a-z_:]{3,30}>"
ALWAYS = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>"]
ALWAYS += [f"<｜hy_{word}:opensource｜>" for word in ("User", "Assistant", "begin_of_sentence", "eos", "pad")]
WORDS = 500

TEXT = """The quick brown fox jumps over the lazy dog and then it sleeps until the evening. What is the weather today?
It is sunny in Paris, with 21 degrees. Call the function get_weather with the name of the city and its country code.
def add(a, b): return a + b  # [1, 2, 3] {"type": "object"} <html> user system assistant tool <end> |start| [INST]
"""


def control_tokens(templates: dict[str, str]) -> tuple[list[str], list[str]]:
    """(special, not special) in all templates."""
    everything = "\n".join(templates.values())
    special = {token for pattern in SPECIAL for token in re.findall(pattern, everything)} | set(ALWAYS)
    plain = set(re.findall(PLAIN, everything)) - special
    return sorted(special), sorted(plain)


def _add(tokenizer: Tokenizer, special: list[str], plain: list[str], *, normalized: bool = False) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=normalized) for token in plain])
    return tokenizer


def byte_level_bpe(corpus: list[str], special: list[str], plain: list[str]) -> Tokenizer:
    """As Qwen's and Llama 3's: NFC, a regular expression, bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=256 + WORDS, initial_alphabet=alphabet, show_progress=False))  # fmt: skip
    return _add(tokenizer, special, plain)


def sentencepiece_bpe(corpus: list[str], special: list[str], plain: list[str]) -> Tokenizer:
    """As Llama 2's: one piece of text, spaces replaced, bytes where a character is unknown; control tokens in the
    vocabulary."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split(Regex("▁+|[^▁]+"), "isolated")
    trained.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=WORDS, show_progress=False))
    return _byte_fallback(trained, special, plain, prepend=True)


def gemma_bpe(corpus: list[str], special: list[str], plain: list[str]) -> Tokenizer:
    """As Gemma's: like the one before, without a space at the beginning, whole words looked up first, and white space
    among the added tokens."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split(Regex("▁+|[^▁]+"), "isolated")
    trained.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=WORDS, show_progress=False))
    made = _byte_fallback(trained, special, plain, prepend=False)
    made.add_tokens([AddedToken("\n\n", special=False, normalized=False)])
    return made


def _byte_fallback(trained: Tokenizer, special: list[str], plain: list[str], *, prepend: bool) -> Tokenizer:
    model = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", *(token for token in special if token != "<unk>"), *(f"<0x{i:02X}>" for i in range(256))]
    pieces += sorted(model["vocab"], key=model["vocab"].get)
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    merges = [tuple(merge) for merge in model["merges"]]
    bpe = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True, ignore_merges=not prepend)
    tokenizer = Tokenizer(bpe)
    replace = normalizers.Replace(" ", "▁")
    if prepend:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    else:
        tokenizer.normalizer = replace
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _add(tokenizer, special, plain)


def unigram(corpus: list[str], special: list[str], plain: list[str]) -> Tokenizer:
    """As T5's: NFKC, so that full-width letters look alike; control tokens are pieces of the vocabulary."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(corpus, trainers.UnigramTrainer(
        vocab_size=WORDS + len(special), special_tokens=["<unk>", *(t for t in special if t != "<unk>")],
        unk_token="<unk>", show_progress=False))  # fmt: skip
    return _add(tokenizer, special, plain)


def wordpiece(corpus: list[str], special: list[str], plain: list[str]) -> Tokenizer:
    """As BERT's: lower case, accents and private-use characters taken away."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(corpus, trainers.WordPieceTrainer(
        vocab_size=WORDS + 200, special_tokens=["<unk>"], show_progress=False))  # fmt: skip
    return _add(tokenizer, special, plain)


def normalized_bpe(corpus: list[str], special: list[str], plain: list[str]) -> Tokenizer:
    """A fine-tune's: NFKC and lower case before bytes, and tokens added after that, looked for in normalized text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=256 + WORDS, initial_alphabet=alphabet, show_progress=False))  # fmt: skip
    return _add(tokenizer, special, plain, normalized=True)


Kind = Callable[[list[str], list[str], list[str]], Tokenizer]
KINDS: dict[str, Kind] = {
    made.__name__: made for made in (byte_level_bpe, sentencepiece_bpe, gemma_bpe, unigram, wordpiece, normalized_bpe)
}


class Tokenizers:
    """The six kinds for one set of templates, each trained when it is first asked for."""

    def __init__(self, templates: dict[str, str]) -> None:
        self.special, self.plain = control_tokens(templates)
        self._corpus = [TEXT, *(template[:1200] for template in templates.values())]
        self._made: dict[str, Tokenizer] = {}

    def __getitem__(self, kind: str) -> Tokenizer:
        if kind not in self._made:
            self._made[kind] = KINDS[kind](self._corpus, self.special, self.plain)
        return self._made[kind]
