"""Which part of a model a rank of tensor parallelism holds, and how it reads no more than that part of the files.

A rank's model is transformers' own, built from a config with the rank's share of the heads, of the MLPs' width and of
the vocabulary. Where its parameters are smaller than the whole model's they are parts of them: the names below say
which part, and a difference that has no name here is refused. Files are read through `Part`s, which stand in for the
tensors of a checkpoint while transformers renames and converts them.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils.hub import cached_file

from protocol.errors import StartError

PANEL = 16  # widths are cut into panels of the CPU kernels where there are enough of them
_WIDTHS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")

Span = tuple[int, int]  # from, up to


@dataclass(frozen=True)
class Shares:
    """What rank ``rank`` of ``ranks`` holds of a model with so many heads."""

    rank: int
    ranks: int
    heads: int
    kv_heads: int

    def of_heads(self) -> Span:
        each = self.heads // self.ranks
        return self.rank * each, (self.rank + 1) * each

    def of_kv_heads(self) -> Span:
        """Where there are fewer key heads than ranks, several ranks hold the same one."""
        if self.kv_heads < self.ranks:
            head = self.rank * self.kv_heads // self.ranks
            return head, head + 1
        each = self.kv_heads // self.ranks
        return self.rank * each, (self.rank + 1) * each

    def of_width(self, width: int) -> Span:
        """As even as whole panels allow."""
        unit = PANEL if width % PANEL == 0 and width // PANEL >= self.ranks else 1
        count, more = divmod(width // unit, self.ranks)
        begin = self.rank * count + min(self.rank, more)
        return begin * unit, (begin + count + (self.rank < more)) * unit

    def of_vocabulary(self, size: int) -> Span:
        """The same number for each rank; the last one's may go beyond the end."""
        each = -(-size // self.ranks)
        return self.rank * each, (self.rank + 1) * each


def shares_of(config: Any, rank: int, ranks: int) -> Shares:
    """StartError, naming the numbers that would do, for a model that does not divide into ``ranks``."""
    text = config.get_text_config()
    if getattr(config, "quantization_config", None) is not None:
        raise StartError("several ranks: a quantized checkpoint is not split yet; use one")
    if ranks > 1 and not (getattr(text, "base_model_tp_plan", None) or getattr(text, "base_model_ep_plan", None)):
        raise StartError(f"--tensor-parallel-size: transformers has no plan that splits {config.model_type}; use 1")
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    widths = [width for name in _WIDTHS if (width := getattr(text, name, None))]
    if not _divides(ranks, heads, kv_heads, widths):
        fitting = [str(n) for n in range(1, heads + 1) if _divides(n, heads, kv_heads, widths)]
        raise StartError(
            f"--tensor-parallel-size {ranks}: the model's {heads} attention heads and {kv_heads} key heads do not "
            f"divide into so many ranks; {', '.join(fitting)} would do"
        )
    return Shares(rank, ranks, heads, kv_heads)


def _divides(ranks: int, heads: int, kv_heads: int, widths: list[int]) -> bool:
    return (
        heads % ranks == 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0) and min(widths, default=ranks) >= ranks
    )


def local_config(config: Any, shares: Shares) -> Any:
    """A copy of ``config`` for the model of one rank."""
    local = copy.deepcopy(config)
    text = local.get_text_config()
    if getattr(text, "head_dim", None) is None:  # models would compute it from the rank's number of heads
        text.head_dim = text.hidden_size // shares.heads
    begin, end = shares.of_heads()
    text.num_attention_heads = end - begin
    begin, end = shares.of_kv_heads()
    text.num_key_value_heads = end - begin
    for name in _WIDTHS:
        if width := getattr(text, name, None):
            begin, end = shares.of_width(width)
            setattr(text, name, end - begin)
    begin, end = shares.of_vocabulary(text.vocab_size)
    text.vocab_size, text.pad_token_id = end - begin, None  # its row may be another rank's
    return local


class Parts:
    """The parts of a checkpoint's tensors that the model of a rank consists of."""

    def __init__(self, kind: Any, stage: Any, config: Any, local: Any, shares: Shares) -> None:
        """``kind`` and ``config`` of the whole model, ``stage`` and ``local`` of the rank's."""
        self.shares = shares
        whole, ours = on_meta(kind, config), on_meta(stage, local)
        self._interleaved = any(getattr(module, "is_concatenated", True) is False for module in whole.modules())
        self.names = {name: tuple(tensor.shape) for name, tensor in whole.state_dict().items()}
        self._axes = {name: _axis(name, self.names[name], tuple(t.shape)) for name, t in ours.state_dict().items()}
        if not any(".o_proj." in name and axis for name, axis in self._axes.items()) and shares.ranks > 1:
            raise StartError(f"--tensor-parallel-size: the attention of {kind.__name__} does not divide; use 1")
        for name, tensor in ours.state_dict().items():
            self._check(name, tuple(tensor.shape))
        mapping = get_model_conversion_mapping(whole)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._prefix = whole.base_model_prefix

    def _check(self, name: str, ours: tuple[int, ...]) -> None:
        """Raise StartError where the model of a rank does not have the part that is this rank's: its size may come from
        a field of the config that is not known here, and what is not divided must not be summed."""
        axis, leaf = self._axes[name], _leaf(name)
        if self.shares.ranks == 1 or leaf not in _SPLIT:
            return
        if axis is not None:
            fits = sum(end - begin for begin, end in self._pieces(name, self.names[name][axis])) == ours[axis]
        elif leaf in ("k_proj", "v_proj"):
            fits = self.shares.kv_heads == 1  # the one that all hold
        else:
            fits = leaf in ("o_proj", "down_proj") and name.endswith("bias")  # of a sum
        if not fits:
            raise StartError(f"--tensor-parallel-size: it is not known how {name} divides between ranks; use 1")

    def of(self, key: str, source: Any) -> Any:
        """What takes the place of ``source``, a slice of the file's tensor ``key``; None: it has none here."""
        name, _ = rename_source_key(key, self._renamings, self._converters, self._prefix, self.names)
        if name in self.names and name not in self._axes:  # another stage's
            return None
        axis = self._axes.get(name)
        if axis is None:
            return source
        size, whole = source.get_shape()[axis], self.names[name][axis]
        pieces = self._pieces(name, whole)
        if size * len(pieces) == whole and len(pieces) == 2:  # gate or up by itself, to be joined by transformers
            pieces = [self.shares.of_width(size)]
        elif size != whole:
            return source  # of another model than config.json: transformers says so
        return Part(source, axis, [(begin, min(end, size)) for begin, end in pieces], self._padded(name, size))

    def _padded(self, name: str, size: int) -> int:
        """Rows of zeros that a rank's vocabulary ends with."""
        if _leaf(name) not in ("embed_tokens", "lm_head"):
            return 0
        begin, end = self.shares.of_vocabulary(size)
        return min(max(0, end - size), end - begin)

    def _pieces(self, name: str, whole: int) -> list[Span]:
        shares, leaf = self.shares, _leaf(name)
        if leaf in ("q_proj", "o_proj", "sinks"):
            return [_times(shares.of_heads(), whole // shares.heads)]
        if leaf in ("k_proj", "v_proj"):
            return [_times(shares.of_kv_heads(), whole // shares.kv_heads)]
        if leaf in ("gate_proj", "up_proj", "down_proj"):
            return [shares.of_width(whole)]
        if leaf == "gate_up_proj":
            begin, end = shares.of_width(whole // 2)
            return (
                [(2 * begin, 2 * end)] if self._interleaved else [(begin, end), (whole // 2 + begin, whole // 2 + end)]
            )
        return [shares.of_vocabulary(whole)]


_SPLIT = {
    "q_proj", "k_proj", "v_proj", "o_proj", "sinks", "gate_proj", "up_proj", "down_proj", "gate_up_proj",
    "embed_tokens", "lm_head",
}  # fmt: skip


def _leaf(name: str) -> str:
    """The module or parameter that tells how a tensor is split."""
    return name.removesuffix(".weight").removesuffix(".bias").removesuffix("_bias").rpartition(".")[2]


def _times(span: Span, size: int) -> Span:
    return span[0] * size, span[1] * size


def _axis(name: str, whole: tuple[int, ...], ours: tuple[int, ...]) -> int | None:
    """Where a rank's tensor is smaller than the whole, counted from the end."""
    axes = [at - len(whole) for at, (a, b) in enumerate(zip(whole, ours, strict=True)) if a != b]
    if not axes:
        return None
    if len(axes) > 1 or _leaf(name) not in _SPLIT:
        raise StartError(f"--tensor-parallel-size: it is not known how {name} divides between ranks; use 1")
    return axes[0]


def on_meta(kind: Any, config: Any) -> Any:
    """A model without weights."""
    with torch.device("meta"):
        return kind(copy.deepcopy(config))


@dataclass
class Part:
    """Some rows or columns of a tensor in a file, as transformers' loading asks for them. ``padded`` rows of zeros
    follow."""

    source: Any
    axis: int
    spans: list[Span]
    padded: int = 0

    def get_shape(self) -> list[int]:
        shape = list(self.source.get_shape())
        shape[self.axis] = sum(max(0, end - begin) for begin, end in self.spans) + self.padded
        return shape

    def get_dtype(self) -> str:
        return str(self.source.get_dtype())

    def __getitem__(self, wanted: Any) -> torch.Tensor:
        assert wanted is Ellipsis
        before = (slice(None),) * (len(self.source.get_shape()) + self.axis)
        pieces = [self.source[(*before, slice(min(begin, end), end))] for begin, end in self.spans]
        read: torch.Tensor = pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.axis)
        if not self.padded:
            return read
        zeros = read.new_zeros(self.padded, *read.shape[1:])
        return torch.cat([read, zeros])


def files_of(model: str) -> list[Path]:
    """The safetensors files of a local directory or hub id. StartError where there are none."""
    index = cached_file(model, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    if index is None:
        names = ["model.safetensors"]
    else:
        names = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
    found: list[Path] = []
    for name in names:
        path = cached_file(model, name, _raise_exceptions_for_missing_entries=False)
        if path is None:
            raise StartError(f"{model}: there is no {name}; fetch the model again")
        found.append(Path(path))
    return found


def read_parts(files: list[Path], part_of: Callable[[str, Any], Any]) -> dict[str, Any]:
    """What stands for each tensor of ``files``; nothing is read yet."""
    parts = {key: part_of(key, source) for path in files for key, source in slices_of(path)}
    return {key: part for key, part in parts.items() if part is not None}


def slices_of(path: Path) -> Iterator[tuple[str, Any]]:
    """What stands for each tensor of a file; nothing is read yet."""
    opened: Any = safe_open(path, framework="pt", device="cpu")  # it stays open as long as its slices are there
    for key in opened.keys():  # noqa: SIM118 - not a dictionary
        yield key, opened.get_slice(key)
