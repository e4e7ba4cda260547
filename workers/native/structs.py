"""What C and Python hand each other: ctypes structures that mirror those of the kernels, field by field.

The library says how it lays them out (layout.inc); `differences` compares, and `load_kernels` refuses a library that
disagrees. So a field that was added on one side alone is found at load and not in a wrong result.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch

PANEL = 16  # outputs in a panel of packed weights, tokens in a panel of the pool
TASK_ROWS = 96  # query positions times heads of a group that one task of attention takes: its buffers fit the L2 cache

_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class Linear(ctypes.Structure):
    _fields_ = [
        ("weight", _P), ("scale", _P), ("bias", _P), ("N", _I), ("K", _I), ("kind", _I), ("shift", _P), ("group", _I),
    ]  # fmt: skip


class Step(ctypes.Structure):
    _fields_ = [
        ("tasks", _P), ("tables", _P), ("starts", _P), ("contexts", _P), ("slots", _P),
        ("task_count", _I), ("width", _I), ("T", _I), ("tile", _I),
    ]  # fmt: skip
    arrays: tuple[np.ndarray | torch.Tensor, ...]  # whose memory it points to


class Rule(ctypes.Structure):
    _fields_ = [("scale", _F), ("softcap", _F), ("window", _I), ("sinks", _P)]


class Pool(ctypes.Structure):
    _fields_ = [
        ("keys", _P), ("values", _P), ("kv_heads", _I), ("key_size", _I), ("value_size", _I), ("block_size", _I),
    ]  # fmt: skip


class Layer(ctypes.Structure):
    _fields_ = [
        ("qkv", Linear), ("o", Linear), ("gate_up", Linear), ("down", Linear),
        ("norms", _P * 6), ("eps", _F * 6), ("rule", Rule), ("heads", _I), ("act", _I), ("rot", _I),
    ]  # fmt: skip


class Pass(ctypes.Structure):
    _fields_ = [
        ("layers", _P), ("count", _I), ("cosine", _P), ("sine", _P), ("angle_row", _I), ("embedding", _P), ("head", _P),
        ("norm", _P), ("eps", _F),
    ]  # fmt: skip


DRAW = np.dtype([("temperature", "f4"), ("top_p", "f4"), ("min_p", "f4"), ("uniform", "f4"), ("top_k", "i8")])
STRUCTURES = (Linear, Step, Rule, Pool, Layer, Pass)


class _Field(ctypes.Structure):
    """Of the library's table: a field, or a whole structure."""

    _fields_ = [("name", ctypes.c_char_p), ("offset", _I), ("size", _I)]


def layout() -> dict[str, tuple[int, int]]:
    """(offset, bytes) of each field, (0, bytes) of each structure, as Python has them; PANEL beside them."""
    found = {"PANEL": (0, PANEL), "Draw": (0, DRAW.itemsize)}
    assert DRAW.fields is not None
    for name, (kind, offset, *_) in DRAW.fields.items():
        found[f"Draw.{name}"] = (offset, kind.itemsize)
    for structure in STRUCTURES:
        found[structure.__name__] = (0, ctypes.sizeof(structure))
        for name, *_ in structure._fields_:
            field = getattr(structure, name)
            found[f"{structure.__name__}.{name}"] = (field.offset, field.size)
    return found


def layout_of(library: ctypes.CDLL, instruction_set: str) -> dict[str, tuple[int, int]]:
    """The same as ``library`` has them."""
    function = getattr(library, f"headrace_layout_{instruction_set}")
    function.argtypes, function.restype = [], ctypes.POINTER(_Field)
    found, table = {}, function()
    at = 0
    while table[at].name is not None:
        found[table[at].name.decode()] = (table[at].offset, table[at].size)
        at += 1
    return found


def differences(library: ctypes.CDLL, instruction_set: str) -> list[str]:
    """Where the two disagree, a sentence each; empty where they do not."""
    ours, theirs = layout(), layout_of(library, instruction_set)
    return [
        f"{name} is (offset, bytes) {theirs.get(name, 'missing')} in the library and {ours.get(name, 'missing')} here"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]


def make_step(tables: np.ndarray, starts: np.ndarray, contexts: np.ndarray, slots: torch.Tensor, group: int) -> Step:
    """What attention is told of a step: int32 tables [S, width], starts [S + 1], contexts [S] after the step, and
    slots int64 [T]. Each sequence is cut into tasks of TASK_ROWS rows for ``group`` query heads to a key head; those
    with most to read come first, so that no thread is left with a long one at the end."""
    tile = max(1, TASK_ROWS // group)
    if len(slots) == len(contexts):  # decodes alone, or prompts of one token
        tasks = np.empty((len(contexts), 3), np.int32)
        tasks[:, 0] = tasks[:, 1] = tasks[:, 2] = np.argsort(-contexts, kind="stable")
        tasks[:, 2] += 1
    else:
        counts = np.diff(starts)
        cuts = -(-counts // tile)
        sequence = np.repeat(np.arange(len(counts), dtype=np.int32), cuts)
        nth = np.arange(len(sequence)) - np.repeat(np.cumsum(cuts) - cuts, cuts)
        begin = starts[sequence] + nth * tile
        end = np.minimum(begin + tile, starts[sequence + 1])
        cost = (contexts[sequence] - (starts[sequence + 1] - end)) * (end - begin)
        tasks = np.ascontiguousarray(np.stack([sequence, begin, end], 1)[np.argsort(-cost, kind="stable")], np.int32)
    step = Step(
        tasks.ctypes.data, tables.ctypes.data, starts.ctypes.data, contexts.ctypes.data, slots.data_ptr(),
        len(tasks), tables.shape[1], len(slots), tile,
    )  # fmt: skip
    step.arrays = (tasks, tables, starts, contexts, slots)
    return step
