"""From a GGUF file to a directory as transformers' save_pretrained leaves it, which every role loads.

Weights are read one tensor at a time and written in shards, so memory holds a shard and a tensor. Nothing is left
over in silence: a tensor of the file without a place in the model, a weight of the model that the file lacks and a
wrong shape each end the conversion by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from workers.engines.base import Progress
from workers.gguf.file import GgufFile
from workers.gguf.model import ROPE_FACTORS, architecture, config_of, end_ids, tokenizer_of

SHARD_BYTES = 2 << 30


def convert(source: Path, directory: Path, progress: Progress) -> None:
    """Write config, tokenizer and weights of ``source`` into the empty ``directory``."""
    file = GgufFile(source)
    config = config_of(file)
    config.dtype = precision(file)
    config.architectures = [model_class(config).__name__]
    tokenizer_of(file).save_pretrained(directory)
    config.save_pretrained(directory)
    generation: Any = GenerationConfig
    generation(bos_token_id=config.bos_token_id, eos_token_id=end_ids(file) or None).save_pretrained(directory)
    _write(directory, weights(file, config), progress, sum(t.size for t in file.tensors))


def precision(file: GgufFile) -> torch.dtype:
    """float32 or float16 for a file that holds nothing shorter, else bfloat16: rounded blocks carry no more."""
    kinds = {tensor.kind for tensor in file.tensors}
    if kinds <= {GGMLQuantizationType.F32, GGMLQuantizationType.F64}:
        return torch.float32
    return torch.float16 if kinds <= {GGMLQuantizationType.F32, GGMLQuantizationType.F16} else torch.bfloat16


def weights(file: GgufFile, config: Any) -> Iterator[tuple[str, torch.Tensor, int]]:
    """(name in the model, weight, bytes of the file read for it), in the file's order."""
    with torch.device("meta"):
        model: Any = model_class(config)(config)
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    tied = set(model._tied_weights_keys or ()) if config.tie_word_embeddings else set()
    arch = architecture(file)
    processors: Any = TENSOR_PROCESSORS
    restore = processors.get(arch, TensorProcessor)(config=config.to_dict())
    # its walk over submodules, for models other than these, builds all names once for each of hundreds
    top: Any = SimpleNamespace(config=config, state_dict=lambda: shapes, named_children=list)
    map_names: Any = get_gguf_hf_weights_map
    names: dict[str, str] = map_names(top, restore)
    missing = shapes.keys() - tied
    for tensor in file.tensors:
        if tensor.name == ROPE_FACTORS:
            continue
        name = names.get(tensor.name)
        if name is None or name not in shapes:
            raise file.broken(f"its tensor {tensor.name} has no place in a {config.model_type} model")
        values = restore.process(weights=file.values(tensor), name=tensor.name).weights
        if values.shape != shapes[name]:
            raise file.broken(
                f"its tensor {tensor.name} has the shape {list(values.shape)}, and {list(shapes[name])} is expected"
            )
        missing.discard(name)
        yield name, torch.from_numpy(np.ascontiguousarray(values)).to(config.dtype), tensor.size
    if missing:
        raise file.broken(f"{len(missing)} weights are missing, {min(missing)} among them")


def model_class(config: Any) -> Any:
    """The class of transformers that AutoModelForCausalLM would make."""
    return AutoModelForCausalLM._model_mapping[type(config)]


def _write(directory: Path, found: Iterator[tuple[str, torch.Tensor, int]], progress: Progress, total: int) -> None:
    """All weights in shards, with an index if there are several. ``total``: bytes that will be read."""
    writer = ShardWriter(directory)
    read = 0
    progress("convert", 0.0)
    for name, weight, taken in found:
        writer.add(name, weight)
        read += taken
        progress("convert", min(0.99, read / max(1, total)))
    writer.close()
    progress("convert", 1.0)


class ShardWriter:
    """safetensors files of at most SHARD_BYTES, named as transformers names them, which it can do only at the end."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.shard_of: dict[str, int] = {}
        self.bytes = 0
        self._shard: dict[str, torch.Tensor] = {}
        self._number = 0

    def add(self, name: str, weight: torch.Tensor) -> None:
        if self._shard and sum(w.nbytes for w in self._shard.values()) + weight.nbytes > SHARD_BYTES:
            self._flush()
        self._shard[name] = weight
        self.shard_of[name] = self._number
        self.bytes += weight.nbytes

    def close(self) -> None:
        self._flush()
        if self._number == 1:
            (self.directory / "shard-0").rename(self.directory / "model.safetensors")
            return
        names = [f"model-{k + 1:05}-of-{self._number:05}.safetensors" for k in range(self._number)]
        for number, name in enumerate(names):
            (self.directory / f"shard-{number}").rename(self.directory / name)
        index = {
            "metadata": {"total_size": self.bytes},
            "weight_map": {weight: names[number] for weight, number in self.shard_of.items()},
        }
        (self.directory / "model.safetensors.index.json").write_text(json.dumps(index))

    def _flush(self) -> None:
        save_file(self._shard, self.directory / f"shard-{self._number}", metadata={"format": "pt"})
        self._shard = {}
        self._number += 1
