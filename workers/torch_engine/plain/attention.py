"""Paged attention in plain torch, for any device, head size and rule: the fallback behind native kernels.

Rows of one token (decodes) are gathered from the pool into padded batches of similar length; a row of
several tokens (a prefill chunk) attends alone, straight from the batch where its sequence begins in it.
What depends only on the step and the window (gather indices, masks) is made once per step, not per layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from workers.torch_engine.attention import AttentionRule, PagedAttention
from workers.torch_engine.inputs import StepInputs
from workers.torch_engine.staging import to_device


@dataclass(frozen=True)
class Gather:
    """Rows that attend together. B blocks of S slots are read for each of the r rows."""

    tokens: torch.Tensor | slice  # where the rows' queries lie in the flat batch
    blocks: torch.Tensor  # int64 [r, B]
    mask: torch.Tensor  # bool [r, 1, queries, B * S]: which keys are seen


class TorchAttention(PagedAttention[StepInputs]):
    """Runs wherever torch runs. Slot s of the pool is row s of its tensors."""

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        step: StepInputs,
        rule: AttentionRule,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        keys.index_put_((step.slots,), key)
        values.index_put_((step.slots,), value)
        out = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
        for group in step.once(("decodes", rule.window), lambda: decode_groups(step, rule.window)):
            k, v = gather(keys, group.blocks, step.block_size), gather(values, group.blocks, step.block_size)
            hide(group, k, v)
            q = query[group.tokens].unsqueeze(2)  # [r, heads, 1, size]
            out[group.tokens] = scores_to_values(q, k, v, group.mask, rule, sinks).squeeze(2)
        for row in np.flatnonzero(step.counts > 1):
            out[step.row_starts[row] : step.row_starts[row + 1]] = self._prefill(
                int(row), query, key, value, keys, values, step, rule, sinks
            )
        return out

    def _prefill(
        self,
        row: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        step: StepInputs,
        rule: AttentionRule,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """[count, heads, value_size] of one row of several tokens."""
        tokens = slice(int(step.row_starts[row]), int(step.row_starts[row + 1]))
        q = query[tokens].transpose(0, 1)[None]
        count = q.shape[2]
        if step.contexts[row] == count:
            k, v = key[tokens].transpose(0, 1)[None], value[tokens].transpose(0, 1)[None]
            if (rule.window is None or rule.window >= count) and rule.softcap is None and sinks is None:
                causal = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=rule.scale, enable_gqa=True)
                return causal[0].transpose(0, 1)
            mask = step.once(("fresh", row, rule.window), lambda: causal_mask(count, count, rule.window, q.device))
        else:
            group = step.once(("chunk", row, rule.window), lambda: prefill_group(step, row, rule.window))
            k, v = gather(keys, group.blocks, step.block_size), gather(values, group.blocks, step.block_size)
            hide(group, k, v)
            mask = group.mask
        return scores_to_values(q, k, v, mask, rule, sinks)[0].transpose(0, 1)


def scores_to_values(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    rule: AttentionRule,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """[r, heads, queries, value_size] from queries [r, heads, queries, size] and keys [r, kv_heads, L, size].

    Query heads that share a key head lie side by side, as everywhere in transformers (repeat_kv). With one
    query per row they become the queries of that one key head, so that nothing is repeated.
    """
    rows, heads, queries, _ = query.shape
    shared = heads // key.shape[1]
    if rule.softcap is None and sinks is None:
        if queries == 1:
            folded = query.view(rows, key.shape[1], shared, -1)
            out = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=rule.scale)
            return out.reshape(rows, heads, 1, -1)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=rule.scale, enable_gqa=shared > 1
        )
    folded = query.reshape(rows, key.shape[1], shared * queries, -1)
    scores = (folded @ key.transpose(2, 3) * rule.scale).float().view(rows, heads, queries, -1)
    if rule.softcap is not None:
        scores = torch.tanh(scores / rule.softcap) * rule.softcap
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        sink = sinks.float().view(1, heads, 1, 1).expand(rows, heads, queries, 1)
        weights = torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(scores, dim=-1)
    weights = weights.to(value.dtype).view(rows, key.shape[1], shared * queries, -1)
    return (weights @ value).view(rows, heads, queries, -1)


def hide(group: Gather, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Zero what no query sees, in copies [r, kv_heads, L, size]: a NaN that another sequence has left in a block would
    come through a weight of zero."""
    unseen = ~group.mask.any(-2)[..., None]
    keys.masked_fill_(unseen, 0)
    values.masked_fill_(unseen, 0)


def gather(pool: torch.Tensor, blocks: torch.Tensor, block_size: int) -> torch.Tensor:
    """[r, kv_heads, B * block_size, size] of one layer's pool tensor."""
    paged = pool.view(-1, block_size, *pool.shape[1:])
    rows, width = blocks.shape
    read = paged.index_select(0, blocks.reshape(-1))
    return read.view(rows, width * block_size, *pool.shape[1:]).transpose(1, 2)


def decode_groups(step: StepInputs, window: int | None) -> list[Gather]:
    """The rows of one token, those within a factor of two in blocks read together, to pad little."""
    rows = np.flatnonzero(step.counts == 1)
    first, widths = _blocks_seen(step, rows, window)
    device = step.input_ids.device
    groups = []
    for size in np.unique(np.ceil(np.log2(widths))) if len(rows) else ():
        members = np.ceil(np.log2(widths)) == size
        width = int(widths[members].max())
        blocks, positions = _read(step, rows[members], first[members], width)
        last = step.contexts[rows[members]][:, None] - 1
        seen = positions <= last
        if window is not None:
            seen &= positions > last - window
        groups.append(
            Gather(
                to_device(step.row_starts[rows[members]], device),
                to_device(blocks, device),
                to_device(seen, device)[:, None, None],
            )
        )
    return groups


def prefill_group(step: StepInputs, row: int, window: int | None) -> Gather:
    """One row of several tokens whose sequence began in an earlier step."""
    rows = np.array([row])
    first, widths = _blocks_seen(step, rows, window)
    blocks, positions = _read(step, rows, first, int(widths[0]))
    device = step.input_ids.device
    context, count = int(step.contexts[row]), int(step.counts[row])
    at = np.arange(context - count, context)[:, None]
    seen = positions <= at
    if window is not None:
        seen &= positions > at - window
    return Gather(slice(0, 0), to_device(blocks, device), to_device(seen, device)[None, None])


def causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """bool [1, 1, queries, keys], the last query standing at the last key."""
    at = np.arange(keys - queries, keys)[:, None]
    positions = np.arange(keys)[None]
    seen = positions <= at
    if window is not None:
        seen &= positions > at - window
    return to_device(seen, device)[None, None]


def _blocks_seen(step: StepInputs, rows: np.ndarray, window: int | None) -> tuple[np.ndarray, np.ndarray]:
    """First block and number of blocks that each row's queries can see."""
    ends = -(-step.contexts[rows] // step.block_size)
    first = np.zeros(len(rows), np.int64)
    if window is not None:
        earliest = step.contexts[rows] - step.counts[rows] - window + 1
        first = np.maximum(earliest, 0) // step.block_size
    return first, ends - first


def _read(step: StepInputs, rows: np.ndarray, first: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Block ids [r, width] from each row's ``first`` on (0 past its table) and the position of each slot read."""
    columns = first[:, None] + np.arange(width)
    inside = columns < step.block_tables.shape[1]
    blocks = step.block_tables[rows[:, None], np.where(inside, columns, 0)].astype(np.int64)
    blocks[~inside] = 0
    positions = (columns[:, :, None] * step.block_size + np.arange(step.block_size)).reshape(len(rows), -1)
    return blocks, positions
