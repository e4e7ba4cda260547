"""Loading a quantized checkpoint: each weight's tensors are found in the files, and either stay in few bits where the
model has a linear layer for them, or are widened one by one while transformers builds the model from them (experts,
whose weights it joins, and all of them on request)."""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from protocol.errors import StartError
from workers.torch_engine.parallel.split import on_meta, slices_of
from workers.torch_engine.quantized.formats import WIDE, Format, Source, formats_of
from workers.torch_engine.quantized.linear import QuantizedLinear, refuse_not_finite
from workers.torch_engine.quantized.weights import QuantizedWeight

log = logging.getLogger(__name__)

# What else such checkpoints hold, which is not read: scales of keys and values, bounds of activation scales.
UNREAD = {
    "k_scale", "v_scale", "q_scale", "kv_scale", "output_scale", "prob_output_scale", "input_scale_ub",
    "q_zero_point", "k_zero_point", "v_zero_point", "output_zero_point",
}  # fmt: skip


@dataclass
class Stored:
    """A weight in the files, as transformers' loading asks for tensors: widened to ``dtype`` when it is read."""

    name: str
    format: Format
    parts: dict[str, Source]
    dtype: torch.dtype

    def get_shape(self) -> list[int]:
        return self.format.shape(self.parts)

    def get_dtype(self) -> str:
        return "F32"

    def read(self) -> QuantizedWeight | torch.Tensor:
        try:
            found = self.format.read(self.parts)
        except StartError as error:
            raise StartError(f"{self.name}: {error}") from None
        except (RuntimeError, ValueError, IndexError, KeyError) as error:
            raise StartError(
                f"{self.name}: its tensors do not fit each other ({error}); fetch the model again"
            ) from error
        if isinstance(found, QuantizedWeight):
            refuse_not_finite(self.name, found)
        return found

    def __getitem__(self, wanted: Any) -> torch.Tensor:
        found = self.read()
        return found.dequantized(self.dtype) if isinstance(found, QuantizedWeight) else found.to(self.dtype)


def load(
    kind: Any, files: Iterable[Path], config: Any, keep: Collection[str], dtype: torch.dtype, **options: Any
) -> tuple[Any, Any]:
    """(model, what transformers says of its loading). ``kind``: the model's class. ``keep``: kinds of weights that stay
    in few bits where they are linear layers'. StartError for weights that are not what config.json says."""
    stated = dict(config.quantization_config)
    config = copy.deepcopy(config)
    del config.quantization_config
    tensors = weights_of(files, formats_of(stated), dtype)
    places = _linear_layers(kind, config, {key: t for key, t in tensors.items() if _kind(t) in keep})
    kept: dict[str, QuantizedWeight] = {}
    for name, key in places.items():
        weight = tensors[key].read()
        if isinstance(weight, QuantizedWeight):  # else it is read once more: few are of a form that has no product
            kept[name] = weight
            del tensors[key]
    if kept:
        taken = sum(weight.nbytes for weight in kept.values()) / (1 << 30)
        log.info("%d linear layers stay in few bits and take %.2f GiB", len(kept), taken)
    quantized = _with_places(kind, kept, dtype)
    return quantized.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype, **options)  # type: ignore[no-any-return]


def _kind(tensor: Any) -> str:
    return tensor.format.kind(tensor.parts) if isinstance(tensor, Stored) else WIDE


def weights_of(files: Iterable[Path], formats: list[Format], dtype: torch.dtype) -> dict[str, Any]:
    """What stands for each weight of ``files``, by the name that it has in a model that is not quantized."""
    found: dict[str, Any] = {}
    groups: dict[str, dict[str, Source]] = {}
    for path in files:
        for key, source in slices_of(path):
            owner, part = _split(key, formats)
            if part is None:
                found[key] = source
            elif part not in UNREAD:
                groups.setdefault(owner, {})[part] = source
    for owner, parts in groups.items():
        chosen = next((each for each in formats if each.takes(parts)), None)
        if chosen is not None:
            name = owner if "blocks" in parts else owner + ".weight"
            found[name] = Stored(name, chosen, parts, dtype)
        elif set(parts) == {"weight"}:
            found[owner + ".weight"] = parts["weight"]
        else:
            raise StartError(
                f"{owner}: {', '.join(sorted(parts))} are not the tensors of a quantized weight that is known"
            )
    return found


def _split(key: str, formats: list[Format]) -> tuple[str, str | None]:
    """(owner, part) of a tensor's name; no part where it is nothing of a quantized weight."""
    owner, _, leaf = key.rpartition(".")
    names = frozenset().union(*(each.names for each in formats))
    if leaf in names or leaf in UNREAD:
        return owner, leaf
    owner, _, leaf = key.rpartition("_")
    return (owner, leaf) if leaf in names & {"blocks", "scales"} else (key, None)


def _linear_layers(kind: Any, config: Any, tensors: Mapping[str, Any]) -> dict[str, str]:
    """Module name -> key in the files, of quantized weights that belong to one linear layer of the model."""
    whole = on_meta(kind, config)
    names = whole.state_dict()
    mapping = get_model_conversion_mapping(whole)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    found = {}
    for key, tensor in tensors.items():
        if not isinstance(tensor, Stored):
            continue
        name, converted = rename_source_key(key, renamings, converters, whole.base_model_prefix, names)
        if converted is not None or name not in names:
            continue
        module = whole.get_submodule(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if type(module) is nn.Linear and tensor.get_shape() == list(names[name].shape):
            found[name.removesuffix(".weight")] = key
    return found


def _with_places(kind: Any, kept: dict[str, QuantizedWeight], dtype: torch.dtype) -> Any:
    """The class ``kind`` of models, with ``kept`` in the place of these linear layers."""
    if not kept:
        return kind

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, config, *args, **kwargs)
        for name, weight in kept.items():
            owner, _, last = name.rpartition(".")
            place = self.get_submodule(owner) if owner else self
            setattr(place, last, QuantizedLinear(weight, getattr(place, last).bias, dtype))

    return type(kind.__name__, (kind,), {"__init__": __init__, "__module__": kind.__module__})
