"""bad_words: the token that would complete one leaves the logits, by what has been drawn before it.

A word is the ids that the tokenizer writes for it, alone and after a blank (as in vLLM). The last ids drawn are kept on
the device, so that a step is queued before the one before it has been read back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from workers.torch_engine.staging import to_device

Encode = Callable[[str], Sequence[int]]  # ids of a text, without special tokens

_ANY = -1  # stands before words shorter than the longest
_NONE = -2  # stands before the first token drawn


def ids_of_words(words: Sequence[str], encode: Encode) -> list[list[int]]:
    """The ids of each word at the beginning of a text and, where that differs, after a blank."""
    found: list[list[int]] = []
    for word in words:
        bare = word.lstrip()
        for text in (word, bare, " " + bare) if bare else (word,):
            ids = list(encode(text))
            if ids and ids not in found:
                found.append(ids)
    return found


@dataclass
class _Seat:
    before: torch.Tensor  # int64 [w, l]: what has to stand before the last id of each word
    last: torch.Tensor  # int64 [w]
    recent: torch.Tensor  # int64 [l]: the ids drawn last


class BadWords:
    """Those of all seats that have any."""

    def __init__(self, vocab_size: int, device: torch.device, encode: Encode | None) -> None:
        self.vocab_size, self.device, self.encode = vocab_size, device, encode
        self.seats: dict[int, _Seat] = {}

    def add(self, seat: int, words: Sequence[str], drawn: np.ndarray) -> None:
        """``drawn``: the ids that the sequence has drawn so far."""
        if not words or self.encode is None:
            return
        found = [ids for ids in ids_of_words(words, self.encode) if max(ids) < self.vocab_size]
        if not found:
            return
        length = max(map(len, found)) - 1
        before = np.full((len(found), length), _ANY, np.int64)
        for row, ids in enumerate(found):
            before[row, length - len(ids) + 1 :] = ids[:-1]
        recent = np.concatenate([np.full(length, _NONE, np.int64), drawn])[len(drawn) :]
        last = np.array([ids[-1] for ids in found], np.int64)
        self.seats[seat] = _Seat(*(to_device(array, self.device) for array in (before, last, recent)))

    def drop(self, seat: int) -> None:
        self.seats.pop(seat, None)

    def rule_out(self, logits: torch.Tensor, rows: dict[int, int]) -> None:
        """Write minus infinity into ``logits``, in place, in the rows (by seat) that have bad words."""
        for seat, words in self.seats.items():
            if (row := rows.get(seat)) is not None:
                completed = ((words.before == words.recent) | (words.before == _ANY)).all(-1)
                out = torch.where(completed, -torch.inf, 0.0).to(logits.dtype)
                logits[row].index_put_((words.last,), out, accumulate=True)

    def count(self, seats: np.ndarray, tokens: torch.Tensor) -> None:
        """Take note of the tokens just drawn."""
        if not self.seats:
            return
        for row, seat in enumerate(seats.tolist()):
            if (words := self.seats.get(seat)) is not None and len(words.recent):
                words.recent = torch.cat([words.recent[1:], tokens[row : row + 1]])
