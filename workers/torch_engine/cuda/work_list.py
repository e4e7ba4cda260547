"""How a step's attention is cut into pieces of work, as two tables of fixed size that a kernel reads on the device.

A *tile* is a few tokens of one row, whose query heads are packed together. A tile that sees many keys is cut into
several *items*, each over its own stretch of keys; their results are *merged* by a second kernel. The tables are as
long as the bucket allows at most, and unused rows say so, so the launch never depends on what a step holds
(the idea of a host-side plan is FlashInfer's, arXiv:2501.01005).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ITEM = 8  # columns: first token, tokens, position of the first, table row, first key, end of keys, slot, -
MERGE = 4  # columns: first token, tokens, first slot, slots


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
    merges: np.ndarray,
) -> None:
    """Write the tables of a step: ``items`` int32 [shape.items, ITEM], ``merges`` int32 [shape.extra, MERGE].

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
    # sum(ceil(end / chunk) - 1) <= sum(end) / chunk <= extra: the tables cannot overflow
    chunk = max(shape.shortest, -(-int(end.sum()) // shape.extra))
    chunk = -(-chunk // shape.shortest) * shape.shortest
    parts = -(-end // chunk)

    of = np.repeat(np.arange(len(row)), parts)
    begin = (np.arange(len(of)) - np.repeat(np.cumsum(parts) - parts, parts)) * chunk
    cut = parts > 1
    slots = np.cumsum(cut[of]) - 1
    used = len(of)
    items[:used, 0] = token[of]
    items[:used, 1] = size[of]
    items[:used, 2] = position[of]
    items[:used, 3] = tables[row[of]]
    items[:used, 4] = begin
    items[:used, 5] = np.minimum(begin + chunk, end[of])
    items[:used, 6] = np.where(cut[of], slots, -1)
    padding = np.arange(int(counts.sum()), tokens, shape.tile)
    used, first = used + len(padding), used
    items[first:used] = 0
    items[first:used, 0] = padding
    items[first:used, 1] = np.minimum(shape.tile, tokens - padding)
    items[first:used, 6] = -1
    items[used:, 1] = 0

    merged = np.flatnonzero(cut)
    merges[: len(merged), 0] = token[merged]
    merges[: len(merged), 1] = size[merged]
    merges[: len(merged), 2] = np.cumsum(parts[merged]) - parts[merged]
    merges[: len(merged), 3] = parts[merged]
    merges[len(merged) :, 1] = 0
