"""Paged attention on a GPU: one Triton kernel for decodes, prefill chunks and both in one batch.

A program takes one item of the work list (work_list.py) and one key head. The query heads that share this key head
are packed, token by token, into the rows of its tile, so keys and values are read once for all of them. It walks its
stretch of keys by block table with a running softmax (FlashAttention-2, arXiv:2307.08691); where a tile is cut into
several stretches (Flash-Decoding), each leaves a partial result and is counted; the program that finds all others
counted merges them, in the order of their slots whoever comes last, so that a row's sums never depend on timing.

Where every row has one token, sampled before (a decode step), nobody else reads the key and value that the row brings:
the program that sees it last rotates and stores it, and rotates the queries, so no launch before is needed.

Nothing here depends on what a step holds but through device memory: the same launches serve every step of a bucket,
which is what a CUDA graph needs. Sums are float32; products of float32 operands are not rounded to TF32. Where the
pool is FP8 (e4m3, as it is, without a scale), keys and values are widened once they are in registers.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return"
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from workers.torch_engine.attention import AttentionRule
from workers.torch_engine.cuda.triton_kernels import fitted
from workers.torch_engine.cuda.work_list import ITEM, WorkShape

LOG2E = 1.4426950408889634
PREFILL_ROWS = 64  # rows of a tile where rows have several tokens: one wgmma of Hopper
SHARED_DEFAULT = 96 << 10  # bytes of shared memory a program may use where the device does not say


@triton.jit
def _bounded(scores, softcap):
    """softcap * tanh(scores / softcap), by exp: there is no tanh in the language itself."""
    return softcap * (2.0 / (1.0 + tl.exp(tl.minimum(-2.0 * scores / softcap, 80.0))) - 1.0)


@triton.jit
def attend_items(
    query, keys, values, out, partial, partial_ml, done, items, tables, sinks, fresh_key, fresh_value, cos, sin,
    q_token, q_head, k_slot, k_head, v_slot, v_head, table_stride, scale, softcap,
    fk_token, fk_head, fv_token, fv_head, angle_row,
    GROUP: tl.constexpr, GROUP_P2: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    DK: tl.constexpr, DK_P2: tl.constexpr, DV: tl.constexpr, DV_P2: tl.constexpr, KEYS: tl.constexpr,
    PAGE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, ITEM_: tl.constexpr,
    LOG2: tl.constexpr, FRESH: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Grid (items, key heads). ``out`` is [T, HEADS, DV], contiguous; partial results [slots, KV_HEADS, ROWS, DV].

    ``done`` int32 [slots, KV_HEADS]: partial results so far, by the first slot of their tile; zeros between launches.
    """
    item = items + tl.program_id(0) * ITEM_
    kv_head = tl.program_id(1)
    count = tl.load(item + 1)
    if count == 0:
        return
    token = tl.load(item)
    position = tl.load(item + 2)
    table = tables + tl.load(item + 3).to(tl.int64) * table_stride
    begin = tl.load(item + 4)
    end = tl.load(item + 5)
    slot = tl.load(item + 6)

    row = tl.arange(0, ROWS)
    nth, head = row // GROUP_P2, kv_head * GROUP + row % GROUP_P2
    real = (nth < count) & (row % GROUP_P2 < GROUP)
    dk, dv = tl.arange(0, DK_P2), tl.arange(0, DV_P2)
    q_at = query + (token + nth).to(tl.int64)[:, None] * q_token + head[:, None] * q_head + dk[None, :]
    q = tl.load(q_at, mask=real[:, None] & (dk < DK)[None, :], other=0.0)
    turned = tl.where(dk < DK // 2, dk + DK // 2, dk - DK // 2)  # the other one of a rotated pair
    if ROTATE:
        angle = token.to(tl.int64) * angle_row + dk
        cosine = tl.load(cos + angle, mask=dk < DK, other=0.0).to(tl.float32)
        sine = tl.load(sin + angle, mask=dk < DK, other=0.0).to(tl.float32)
        sine = tl.where(dk < DK // 2, -sine, sine)
        p_at = query + (token + nth).to(tl.int64)[:, None] * q_token + head[:, None] * q_head + turned[None, :]
        partner = tl.load(p_at, mask=real[:, None] & (dk < DK)[None, :], other=0.0).to(tl.float32)
        q = (q.to(tl.float32) * cosine[None, :] + partner * sine[None, :]).to(query.dtype.element_ty)

    at = position + nth
    stored = end
    if FRESH:
        stored = tl.minimum(end, position)  # the row's own key is not in the pool yet
    if WINDOW > 0:
        begin = tl.maximum(begin, ((position - WINDOW + 1) // KEYS) * KEYS)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DV_P2], tl.float32)
    for start in range(begin, stored, KEYS):
        key_at = start + tl.arange(0, KEYS)
        inside = key_at < stored
        block = tl.load(table + key_at // PAGE, mask=inside, other=0).to(tl.int64)
        slots = block * PAGE + key_at % PAGE
        k_at = keys + slots[None, :] * k_slot + kv_head * k_head + dk[:, None]
        k = tl.load(k_at, mask=inside[None, :] & (dk < DK)[:, None], other=0.0).to(q.dtype)
        scores = tl.dot(q, k, input_precision="ieee") * scale
        if SOFTCAP:
            scores = _bounded(scores, softcap)
        seen = inside[None, :] & (key_at[None, :] <= at[:, None])
        if WINDOW > 0:
            seen = seen & (key_at[None, :] > at[:, None] - WINDOW)
        scores = tl.where(seen, scores * LOG2, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen nothing yet
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(best - base)
        mass = mass * shrink + tl.sum(weights, 1)
        v_at = values + slots[:, None] * v_slot + kv_head * v_head + dv[None, :]
        v = tl.load(v_at, mask=inside[:, None] & (dv < DV)[None, :], other=0.0).to(q.dtype)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        best = higher

    if FRESH:
        sees_it = end > position
        if sees_it:
            home = tl.load(table + position // PAGE).to(tl.int64) * PAGE + position % PAGE
            fk_at = fresh_key + token.to(tl.int64) * fk_token + kv_head * fk_head
            fv_at = fresh_value + token.to(tl.int64) * fv_token + kv_head * fv_head
            new_key = tl.load(fk_at + dk, mask=dk < DK, other=0.0)
            if ROTATE:
                other = tl.load(fk_at + turned, mask=dk < DK, other=0.0).to(tl.float32)
                new_key = new_key.to(tl.float32) * cosine + other * sine
            new_key = fitted(new_key, keys.dtype.element_ty)
            new_value = fitted(tl.load(fv_at + dv, mask=dv < DV, other=0.0), values.dtype.element_ty)
            tl.store(keys + home * k_slot + kv_head * k_head + dk, new_key, mask=dk < DK)
            tl.store(values + home * v_slot + kv_head * v_head + dv, new_value, mask=dv < DV)
            score = tl.sum(q.to(tl.float32) * new_key.to(tl.float32)[None, :], 1) * scale
            if SOFTCAP:
                score = _bounded(score, softcap)
            score = score * LOG2
            higher = tl.maximum(best, score)
            weight, shrink = tl.exp2(score - higher), tl.exp2(best - higher)
            mass = mass * shrink + weight
            acc = acc * shrink[:, None] + weight[:, None] * new_value.to(tl.float32)[None, :]
            best = higher

    written = real[:, None] & (dv < DV)[None, :]
    if slot >= 0:
        line = (slot * KV_HEADS + kv_head).to(tl.int64) * ROWS + row
        tl.store(partial + line[:, None] * DV + dv[None, :], acc, mask=written)
        tl.store(partial_ml + line * 2, best, mask=real)
        tl.store(partial_ml + line * 2 + 1, mass, mask=real)
        first = tl.load(item + 7)
        slots = tl.load(item + 8)
        counter = done + first * KV_HEADS + kv_head
        tl.debug_barrier()  # what every thread has stored is before the count, and is read only behind it
        before = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
        if before < slots - 1:
            return
        tl.debug_barrier()
        tl.store(counter, 0)
        best = tl.full([ROWS], float("-inf"), tl.float32)
        mass = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, DV_P2], tl.float32)
        for nth_slot in range(first, first + slots):
            line = (nth_slot * KV_HEADS + kv_head).to(tl.int64) * ROWS + row
            their_best = tl.load(partial_ml + line * 2, mask=real, other=float("-inf"), cache_modifier=".cg")
            their_mass = tl.load(partial_ml + line * 2 + 1, mask=real, other=0.0, cache_modifier=".cg")
            higher = tl.maximum(best, their_best)
            base = tl.where(higher == float("-inf"), 0.0, higher)
            shrink, theirs = tl.exp2(best - base), tl.exp2(their_best - base)
            mass = mass * shrink + their_mass * theirs
            part = tl.load(
                partial + line[:, None] * DV + dv[None, :], mask=written, other=0.0, cache_modifier=".cg"
            )  # fmt: skip
            acc = acc * shrink[:, None] + part * theirs[:, None]
            best = higher
    if SINKS:
        sink = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32) * LOG2
        mass = mass + tl.exp2(sink - tl.where(best == float("-inf"), sink, best))
    acc = acc / tl.where(mass > 0, mass, 1.0)[:, None]
    o_at = out + ((token + nth).to(tl.int64)[:, None] * HEADS + head[:, None]) * DV + dv[None, :]
    tl.store(o_at, acc.to(out.dtype.element_ty), mask=written)


@dataclass(frozen=True)
class Work:
    """One step's work list on the device. ``shape`` is the bucket's, the table's contents the step's."""

    shape: WorkShape
    items: torch.Tensor  # int32 [shape.items, ITEM]
    tables: torch.Tensor  # int32 [seats, widest]: block tables


@dataclass(frozen=True)
class Fresh:
    """Keys [T, kv_heads, key_size] and values that a step of single tokens brings: stored, and the keys and the step's
    queries rotated by ``cos`` and ``sin`` [T, key_size] where these are given."""

    key: torch.Tensor
    value: torch.Tensor
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None


@dataclass(frozen=True)
class Launch:
    """What fits one layer's sizes into a multiprocessor."""

    keys: int
    warps: int
    stages: int


FEW_ITEMS = 128  # of a launch, with which the time of a round counts and not how many programs fit


def choose_launch(
    rows: int, key_size: int, value_size: int, itemsize: int, shared: int, items: int = 1 << 20
) -> Launch:  # fmt: skip
    """Keys per round, warps and pipeline depth whose buffers fit ``shared`` bytes.

    Measured on an H100 for decodes of 8 key heads of 128 at context 512, us: 1 row 9.9 with 128 keys and two rounds in
    flight, 11.3 with 64 and three; 32 rows 30.2, 32.7; 256 rows 199.9, 207.0, and 192.3 with 64 and two.
    """
    keys, stages = (64 if key_size <= 128 else 32), 3
    if rows == 16 and itemsize == 2:
        keys, stages = (2 * keys if items <= FEW_ITEMS else keys), 2
    while stages > 1 and stages * keys * (key_size + value_size) * itemsize + rows * key_size * itemsize > shared:
        if stages > 2:
            stages -= 1
        elif keys > 16:
            keys //= 2
        else:
            stages -= 1
    warps = 8 if rows * value_size >= 64 * 256 else 4
    return Launch(keys, warps, stages)


class TritonAttention:
    """The kernels over one pool. Partial results have one buffer for all layers and steps: a stream runs in order."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.programs = 2 * _multiprocessors(device)  # that keep the device busy
        self.shared = _shared_bytes(device)
        self._partial = torch.zeros(0, dtype=torch.float32, device=device)
        self._partial_ml = torch.zeros(0, dtype=torch.float32, device=device)
        self._done = torch.zeros(0, dtype=torch.int32, device=device)

    def reserve(self, shape: WorkShape, kv_heads: int, group: int, value_size: int) -> None:
        """Room for the partial results of steps of ``shape`` in a layer of these sizes; before anything is captured."""
        lines = shape.slots * kv_heads * tile_rows(shape.tile, group)
        if self._partial.numel() < lines * value_size:
            self._partial = torch.zeros(lines * value_size, dtype=torch.float32, device=self.device)
        if self._partial_ml.numel() < lines * 2:
            self._partial_ml = torch.zeros(lines * 2, dtype=torch.float32, device=self.device)
        if self._done.numel() < shape.slots * kv_heads:
            self._done = torch.zeros(shape.slots * kv_heads, dtype=torch.int32, device=self.device)

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        work: Work,
        page: int,
        rule: AttentionRule,
        sinks: torch.Tensor | None,
        fresh: Fresh | None = None,
    ) -> torch.Tensor:
        """[T, heads, value_size] from queries [T, heads, key_size] (elements adjacent, else strided) and one layer's
        pool tensors. ``page``: tokens of a block. ``fresh``: what a step of single tokens brings to the pool."""
        if query.stride(2) != 1:
            query = query.contiguous()
        tokens, heads, key_size = query.shape
        kv_heads, value_size = keys.shape[1], values.shape[2]
        group = heads // kv_heads
        rows = tile_rows(work.shape.tile, group)
        self.reserve(work.shape, kv_heads, group, value_size)
        dk, dv = max(16, triton.next_power_of_2(key_size)), max(16, triton.next_power_of_2(value_size))
        launch = choose_launch(rows, dk, dv, query.element_size(), self.shared, work.shape.items)
        out = query.new_empty(tokens, heads, value_size)
        sizes = {
            "GROUP": group, "GROUP_P2": triton.next_power_of_2(group), "ROWS": rows, "HEADS": heads,
            "KV_HEADS": kv_heads, "DV": value_size, "DV_P2": dv, "SINKS": sinks is not None, "LOG2": LOG2E,
        }  # fmt: skip
        given = sinks if sinks is not None else query  # a pointer is asked for; it is not read
        new = fresh if fresh is not None else Fresh(query, query)
        cos, sin = (query, query) if new.cos is None or new.sin is None else (new.cos, new.sin)
        attend_items[(work.shape.items, kv_heads)](
            query, keys, values, out, self._partial, self._partial_ml, self._done, work.items, work.tables, given,
            new.key, new.value, cos, sin,
            query.stride(0), query.stride(1), keys.stride(0), keys.stride(1), values.stride(0), values.stride(1),
            work.tables.stride(0), rule.scale, rule.softcap or 1.0,
            new.key.stride(0), new.key.stride(1), new.value.stride(0), new.value.stride(1), cos.stride(0),
            DK=key_size, DK_P2=dk, KEYS=launch.keys, PAGE=page, WINDOW=rule.window or 0,
            SOFTCAP=rule.softcap is not None, ITEM_=ITEM, FRESH=fresh is not None, ROTATE=new.cos is not None,
            num_warps=launch.warps, num_stages=launch.stages, **sizes,
        )  # fmt: skip
        return out


def tile_rows(tile: int, group: int) -> int:
    """Rows of a tile of ``tile`` tokens whose ``group`` query heads share a key head; a product has 16 at least."""
    return max(16, tile * triton.next_power_of_2(group))


def tile_tokens(group: int, itemsize: int) -> int:
    """Tokens of a tile where rows have several. float32 has no matrix unit: larger tiles would spill registers."""
    return max(1, (PREFILL_ROWS if itemsize == 2 else 16) // triton.next_power_of_2(group))


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _shared_bytes(device: torch.device) -> int:
    """Shared memory that one program may fill: some is left to the compiler's own use."""
    if device.type != "cuda":
        return SHARED_DEFAULT
    most = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0) or (99 << 10)
    return int(most * 0.8)
