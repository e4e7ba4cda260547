"""A step as tables in device memory: filled on the host in one piece, copied at once, read by a launch of fixed size.

A layout fixes where everything lies for up to so many tokens and rows. A step that holds less leaves the rest as
padding: tokens that are written nowhere, rows of work without tokens. Block tables stay on the device, by seat; a
step brings only what was appended.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from workers.engines.checks import Limits
from workers.torch_engine.cuda.triton_attention import Work
from workers.torch_engine.cuda.work_list import ITEM, WorkShape, fill_decodes, fill_work
from workers.torch_engine.inputs import HostStep, Seats
from workers.torch_engine.staging import to_device


@dataclass(frozen=True)
class StepTables:
    """What a forward pass sees of a step: tensors on the device and sizes of the layout, nothing of the step itself."""

    ids: torch.Tensor  # int64 [T]: token ids that the host knows
    id_seats: torch.Tensor  # int64 [T]: the seat whose last sampled id is the token's, -1: it is in ``ids``
    positions: torch.Tensor  # int64 [T]
    slots: torch.Tensor  # int64 [T]: -1 for padding
    logit_rows: torch.Tensor  # int64 [R]: flat indices of the tokens whose logits are wanted, then zeros
    work: Work
    last_id: torch.Tensor  # int64 [seats]
    block_size: int
    single: bool  # each row has one token, sampled before: no row reads what another one of the step writes

    def input_ids(self) -> torch.Tensor:
        """int64 [1, T], put together on the device."""
        sampled = self.last_id[self.id_seats.clamp(min=0)]
        return torch.where(self.id_seats >= 0, sampled, self.ids)[None]


@dataclass(frozen=True)
class Layout:
    """Where the tables of steps of at most ``tokens`` tokens in ``rows`` rows lie in one buffer."""

    tokens: int
    rows: int
    shape: WorkShape
    single: bool

    @property
    def nbytes(self) -> int:
        return 8 * self._longs + 4 * self.shape.items * ITEM

    @property
    def _longs(self) -> int:
        return sum(self._lengths())

    def _lengths(self) -> list[int]:
        """Of the parts before the work list, in int64 words. All begin at multiples of 16 bytes: Triton compiles a
        kernel anew for pointers that do not."""
        tokens, rows = self.tokens + self.tokens % 2, self.rows + self.rows % 2
        return [tokens] * 4 + [rows]

    def fill(self, buffer: np.ndarray, step: HostStep, ids: np.ndarray, id_seats: np.ndarray) -> None:
        """Write ``step`` into ``buffer``, uint8 [nbytes at least]."""
        given = (ids, id_seats, step.positions, step.slots, step.logit_rows)
        head, at = buffer[: 8 * self._longs].view(np.int64), 0
        for array, length, padding in zip(given, self._lengths(), (0, -1, 0, -1, 0), strict=True):
            head[at : at + len(array)] = array
            head[at + len(array) : at + length] = padding
            at += length
        items = buffer[8 * self._longs : self.nbytes].view(np.int32).reshape(-1, ITEM)
        if self.single:
            fill_decodes(self.shape, self.tokens, step.contexts, step.seats, items)
        else:
            fill_work(self.shape, self.tokens, step.counts, step.contexts, step.seats, items)

    def views(self, buffer: torch.Tensor, seats: TableSeats) -> StepTables:
        """The tables of a step as they lie in ``buffer``, uint8 [nbytes at least] on the device."""
        parts = torch.split(buffer[: 8 * self._longs].view(torch.int64), self._lengths())
        ids, id_seats, positions, slots = (part[: self.tokens] for part in parts[:4])
        logit_rows = parts[4][: self.rows]
        items = buffer[8 * self._longs : self.nbytes].view(torch.int32).view(-1, ITEM)
        work = Work(self.shape, items, seats.device_tables)
        return StepTables(
            ids, id_seats, positions, slots, logit_rows, work, seats.last_id, seats.block_size, self.single
        )


class TableSeats(Seats):
    """Seats whose block tables are kept on the device too. Their number is fixed: captured launches point there."""

    def __init__(
        self, seats: int, max_model_len: int, block_size: int, vocab_size: int, device: torch.device, limits: Limits
    ) -> None:
        self._appended: list[tuple[int, np.ndarray]] = []  # (flat index in the tables, block ids) still to be sent
        super().__init__(seats, max_model_len, block_size, vocab_size, device, limits)
        self.device_tables = torch.zeros(seats, self.widest, dtype=torch.int32, device=device)

    def _extended(self, seat: int, size: int, blocks: np.ndarray) -> None:
        if len(blocks):
            self._appended.append((seat * self.widest + size, blocks))

    def single(self, step: HostStep) -> bool:
        """Whether each row has one token that was sampled before. A prompt's token may fill a block that another row
        of the same step reads already; a sampled one's block is no one else's before the step has been reported."""
        return bool((step.counts == 1).all() and (step.computed >= self.given[step.seats]).all())

    def known_ids(self, step: HostStep) -> tuple[np.ndarray, np.ndarray]:
        """(ids, id_seats), int64 [T] each, as StepTables has them."""
        beyond = step.computed >= self.given[step.seats]
        id_seats = np.full(int(step.row_starts[-1]), -1, np.int64)
        id_seats[step.row_starts[:-1][beyond]] = step.seats[beyond]
        if beyond.all():
            return np.zeros(len(id_seats), np.int64), id_seats
        return self._given_ids(~beyond, step.seats, step.counts, step.computed, step.row_starts), id_seats

    def send_tables(self) -> None:
        """Queue the copy of what was appended since the last call. Stream order keeps it behind the steps before."""
        if not self._appended:
            return
        appended, self._appended = self._appended, []
        at = np.concatenate([np.arange(start, start + len(blocks)) for start, blocks in appended])
        blocks = np.concatenate([blocks for _, blocks in appended]).astype(np.int32)
        if len(appended) > 1:  # a seat that was emptied and filled again: the later one holds
            at, last = np.unique(at[::-1], return_index=True)
            blocks = np.ascontiguousarray(blocks[::-1][last])
        self.device_tables.view(-1).index_copy_(0, to_device(at, self.device), to_device(blocks, self.device))
