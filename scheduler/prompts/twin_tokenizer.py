"""A copy of a tokenizer that knows the control tokens by secret names only.

To it the public names are text like any other. A chat whose own control tokens are written under their secret names
is encoded in one go, so every id outside of hostile text is what the tokenizer itself would have made.
"""

from __future__ import annotations

import json
import secrets
from typing import Any

from tokenizers import Tokenizer

from scheduler.prompts.special_tokens import ControlTokens, encode, encode_all

NONCE = 6  # private-use characters (about 94 bits), or four times as many letters
FIRST, SIZE = 0xF1000, 0xE000  # private-use characters of the nonce; those of the numbers lie below
LETTERS = "abcdefghijklmnopqrstuvwxyz"


class TwinFailed(ValueError):
    """This tokenizer has no twin, or the twin did not do what is asked of it; the message says why."""


class TwinTokenizer:
    """Built from the tokenizer's JSON: 0.4 s and 36 MiB with 49,000 pieces, some 3 s and 98 MiB with 152,000."""

    def __init__(self, backend: Any, tokens: ControlTokens) -> None:
        self._nonce, self._names = _names(backend, sorted(tokens.words))
        self._ids = tokens.ids
        try:
            description = json.loads(backend.to_str())
            unknown = _unknown(description["model"])
            self._twin = Tokenizer.from_str(json.dumps(_renamed(description, self._names)))
        except Exception as error:  # tokenizers raises plain Exception
            raise TwinFailed(f"the tokenizer cannot be copied ({type(error).__name__})") from None
        # an unknown character becomes the unknown token in any text: that one is no control token here
        self._control = {id for word, id in tokens.ids.items() if word != unknown}
        self._verify(backend)

    def encode(self, text: str, spans: list[tuple[int, int]]) -> list[int]:
        """Ids of ``text`` in which the tokens at ``spans`` alone are control tokens. TwinFailed if the ids say
        otherwise: then nothing may be made of them."""
        if self._nonce in text:
            raise TwinFailed("the text holds the secret")
        written: list[str] = []
        expected: list[int] = []
        at = 0
        for first, last in spans:
            word = text[first:last]
            written += text[at:first], self._names[word]
            expected.append(self._ids[word])
            at = last
        ids = encode(self._twin, "".join(written) + text[at:])
        control = self._control
        if [id for id in ids if id in control] != [id for id in expected if id in control]:
            raise TwinFailed("a control token was lost or made")
        return ids

    def _verify(self, backend: Any) -> None:
        words, names = list(self._names), list(self._names.values())
        if encode_all(self._twin, names) != encode_all(backend, words):
            raise TwinFailed("a control token has other ids under its secret name")
        if not all(map(self._control.isdisjoint, encode_all(self._twin, words))):
            raise TwinFailed("a control token is known by its public name")


def _names(backend: Any, words: list[str]) -> tuple[str, dict[str, str]]:
    """A nonce and, beginning with it, a name for each word: private-use characters, which compose with nothing, or
    letters where the normalizer takes those away (BERT's)."""
    private = "".join(chr(FIRST + secrets.randbelow(SIZE)) for _ in range(NONCE))
    if backend.normalizer is None or private in backend.normalizer.normalize_str(private):
        return private, {word: private + _number(i) for i, word in enumerate(words)}
    nonce = "0" + "".join(secrets.choice(LETTERS) for _ in range(4 * NONCE))
    return nonce, {word: f"{nonce}{i:06d}" for i, word in enumerate(words)}


def _number(i: int) -> str:
    """Two private-use characters, none of them one of a nonce."""
    return chr(FIRST - 1 - i // 0x800) + chr(0xF0000 + i % 0x800)


def _unknown(model: dict[str, Any]) -> str | None:
    if model.get("unk_id") is not None:
        return str(model["vocab"][model["unk_id"]][0])
    return model.get("unk_token")


def _renamed(description: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """``description`` (a tokenizer.json) with each control token under its name, wherever it stands."""
    for token in description["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = description["model"]
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(piece, piece): id for piece, id in vocab.items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
    if model.get("unk_token"):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if model.get("merges"):  # none that makes or takes a control token: text does not reach its piece
        pairs = [merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]
        model["merges"] = [(a, b) for a, b in pairs if names.keys().isdisjoint((a, b, a + b))]
    # chats are encoded as they are: nothing is added, cut or padded
    return {**description, "post_processor": None, "truncation": None, "padding": None}
