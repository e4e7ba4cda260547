"""How a step's attention is cut into pieces of work, as a table of fixed size that a kernel reads on the device.

A *tile* is a few tokens of one row, whose query heads are packed together. A tile that sees many keys is cut into
several *items*, each over its own stretch of keys, all about as long; the last of them to be done merges their results,
in their order. The table is as long as the bucket allows at most, and unused rows say so, so the launch never depends
on what a step holds (the idea of a host-side plan is FlashInfer's, arXiv:2501.01005).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Columns: first token, tokens, position of the first, table row, first key, end of keys, then for a tile that is cut:
# slot of the partial result (-1: not cut), the tile's first slot, its slots. The rest keeps rows at 16 bytes.
ITEM = 12
UNCUT = np.array([0, 1, 0, 0, 0, 0, -1, 0, 0, 0, 0, 0], np.int32)
STEP = 16  # keys: stretches begin at multiples


@dataclass(frozen=True)
class WorkShape:
    """Bounds of the tables. ``tile``: tokens of a tile at most. ``extra``: items beyond one per tile."""

    tile: int
    items: int
    extra: int
    shortest: int = 64  # keys below which a tile is not cut further

    @property
    def slots(self) -> int:
        """Partial results at most: each tile that is cut has at least one item beyond its first."""
        return 2 * self.extra

    @staticmethod
    def of(tokens: int, rows: int, tile: int, extra: int, shortest: int = 64) -> WorkShape:
        """For steps of at most ``tokens`` tokens in at most ``rows`` rows."""
        tiles = tokens if tile == 1 else tokens // tile + min(rows, tokens) + 1
        return WorkShape(tile, tiles + extra, extra, shortest)


def fill_work(
    shape: WorkShape,
    tokens: int,
    counts: np.ndarray,
    contexts: np.ndarray,
    tables: np.ndarray,
    items: np.ndarray,
) -> None:
    """Write the table of a step: ``items`` int32 [shape.items, ITEM].

    By row: ``counts`` tokens in this step, ``contexts`` tokens once it is done, ``tables`` the row of the block
    tables. Rows follow each other in the flat batch. What they leave of its ``tokens`` is padding: work without keys,
    which gives zeros, so that nothing left in memory is computed with.
    """
    tiles = -(-counts // shape.tile)
    row = np.repeat(np.arange(len(counts)), tiles)
    offset = (np.arange(len(row)) - np.repeat(np.cumsum(tiles) - tiles, tiles)) * shape.tile
    size = np.minimum(shape.tile, counts[row] - offset)
    token = (np.cumsum(counts) - counts)[row] + offset
    position = (contexts - counts)[row] + offset
    end = position + size  # the tile's last token sees so many keys
    # sum(round(end / chunk) - 1) <= sum(end) / chunk <= extra: the table cannot overflow
    chunk = max(shape.shortest, -(-int(end.sum()) // shape.extra))
    parts = np.maximum((2 * end + chunk) // (2 * chunk), 1)
    stretch = -(-end // (parts * STEP)) * STEP  # even: not whole chunks and what is left over
    parts = np.maximum(-(-end // stretch), 1)

    of = np.repeat(np.arange(len(row)), parts)
    before = np.cumsum(parts) - parts
    begin = (np.arange(len(of)) - np.repeat(before, parts)) * stretch[of]
    cut = parts > 1
    slots = np.cumsum(cut[of]) - 1
    first = np.cumsum(np.where(cut, parts, 0)) - np.where(cut, parts, 0)
    used = len(of)
    items[:used, 0] = token[of]
    items[:used, 1] = size[of]
    items[:used, 2] = position[of]
    items[:used, 3] = tables[row[of]]
    items[:used, 4] = begin
    items[:used, 5] = np.minimum(begin + stretch[of], end[of])
    items[:used, 6] = np.where(cut[of], slots, -1)
    items[:used, 7] = first[of]
    items[:used, 8] = parts[of]
    padding = np.arange(int(counts.sum()), tokens, shape.tile)
    used, first_padding = used + len(padding), used
    items[first_padding:used] = 0
    items[first_padding:used, 0] = padding
    items[first_padding:used, 1] = np.minimum(shape.tile, tokens - padding)
    items[first_padding:used, 6] = -1
    items[used:, 1] = 0


def fill_decodes(shape: WorkShape, tokens: int, contexts: np.ndarray, tables: np.ndarray, items: np.ndarray) -> None:
    """`fill_work` for rows of one token each: quicker, where no context is so long that it would be cut."""
    rows, chunk = len(contexts), max(shape.shortest, -(-int(contexts.sum()) // shape.extra))
    if 2 * int(contexts.max(initial=0)) >= 3 * chunk:
        fill_work(shape, tokens, np.ones(rows, np.int64), contexts, tables, items)
        return
    items[:tokens] = UNCUT
    items[:tokens, 0] = np.arange(tokens)
    items[:rows, 2] = contexts - 1
    items[:rows, 3] = tables
    items[:rows, 5] = contexts
    items[:rows, 8] = 1
    items[tokens:, 1] = 0
