"""Penalties on tokens that a sequence has in its prompt or has drawn: repetition, frequency and presence.

Counts exist only for seats that have penalties, on the device, so that a step is queued before the one before it has
been read back.
"""

from __future__ import annotations

import numpy as np
import torch

from protocol.sampling import SamplingParams
from workers.torch_engine.staging import to_device


class Penalties:
    """Counts of earlier tokens for the seats that use them: one row ("slot") of the two tables each."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.device = device
        self.slots: dict[int, int] = {}
        self.factors: dict[int, tuple[float, float, float]] = {}  # seat -> repetition, frequency, presence
        self._free: list[int] = []
        self.in_prompt = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)
        self.drawn = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)  # times each id was drawn

    def add(self, seat: int, params: SamplingParams, ids: np.ndarray, prompt_len: int) -> None:
        slot = self._take_slot()
        self.slots[seat] = slot
        self.factors[seat] = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
        self.in_prompt[slot].zero_()
        self.in_prompt[slot, to_device(ids[:prompt_len], self.device)] = True
        outputs = to_device(ids[prompt_len:], self.device)
        self.drawn[slot].zero_()
        self.drawn[slot].index_add_(0, outputs, torch.ones_like(outputs, dtype=torch.int32))

    def _take_slot(self) -> int:
        if not self._free:
            size = self.drawn.shape[0]
            more = max(4, size)
            self.in_prompt = torch.nn.functional.pad(self.in_prompt, (0, 0, 0, more))
            self.drawn = torch.nn.functional.pad(self.drawn, (0, 0, 0, more))
            self._free = list(range(size + more - 1, size - 1, -1))
        return self._free.pop()

    def drop(self, seat: int) -> None:
        slot = self.slots.pop(seat, None)
        if slot is not None:
            self._free.append(slot)
            del self.factors[seat]

    def apply(self, logits: torch.Tensor, rows: dict[int, int]) -> torch.Tensor:
        """``logits`` with the penalties of the rows that have any; a copy unless there is none.

        Repetition (CTRL, arXiv:1909.05858) covers prompt and output, frequency and presence the output only.
        """
        seats = [seat for seat in rows if seat in self.slots]
        if not seats:
            return logits
        at = to_device(np.array([rows[seat] for seat in seats]), self.device)
        slots = to_device(np.array([self.slots[seat] for seat in seats]), self.device)
        factors = to_device(np.array([self.factors[seat] for seat in seats], np.float32), self.device)
        repetition, frequency, presence = factors[:, :, None].unbind(1)
        drawn = self.drawn[slots]
        seen = self.in_prompt[slots] | (drawn > 0)
        own = logits[at]
        own = torch.where(seen, torch.where(own > 0, own / repetition, own * repetition), own)
        own = own - frequency * drawn - presence * (drawn > 0)
        return logits.index_copy(0, at, own)

    def count(self, seats: np.ndarray, tokens: torch.Tensor) -> None:
        """Count the tokens just drawn for the seats with penalties."""
        if not self.slots:
            return
        counted = [(row, self.slots[int(seat)]) for row, seat in enumerate(seats) if int(seat) in self.slots]
        if counted:
            rows, slots = (to_device(np.array(column), self.device) for column in zip(*counted, strict=True))
            self.drawn.index_put_((slots, tokens[rows]), torch.ones_like(slots, dtype=torch.int32), accumulate=True)
