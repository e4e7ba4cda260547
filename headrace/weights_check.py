"""Whether the safetensors of a model directory are whole and fit its config, from their headers alone.

A header is a length, then JSON: for each tensor its type, shape and place (https://huggingface.co/docs/safetensors).
So a file that was cut off, a missing shard and a model of another size are told within milliseconds, without torch.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from protocol.errors import StartError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "tf_model.h5", "*.msgpack")
MOST_HEADER = 100_000_000  # bytes, the format's own limit
LFS = b"version https://git-lfs"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")

Shapes = dict[str, tuple[list[int], Path]]  # of each tensor, and the file that holds it


def check_weights(directory: Path, config: Mapping[str, Any]) -> None:
    """StartError with one sentence that names the file, if the weights cannot be this config's."""
    shapes = _shapes(directory)
    _check_layers(directory, config, shapes)
    if "vision_config" not in config:
        _check_embeddings(config, shapes)


def _shapes(directory: Path) -> Shapes:
    if (directory / SINGLE).exists() or (directory / SINGLE).is_symlink():
        return _header(directory / SINGLE)
    index = directory / INDEX
    if not index.exists():
        raise StartError(_without_weights(directory))
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
        files = [directory / str(name) for name in sorted(names)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise StartError(f"{index}: this is no index of weights; fetch the model again") from None
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise StartError(
            f"{index}: it names {len(files)} files of weights, and {missing[0]} is not there; fetch the model again"
        )
    shapes: Shapes = {}
    for file in files:
        shapes |= _header(file)
    return shapes


def _without_weights(directory: Path) -> str:
    pickled = next((file.name for pattern in PICKLED for file in sorted(directory.glob(pattern))), None)
    if pickled:
        return (
            f"{directory / pickled}: only pickled weights are here, which are never loaded since they can run code; "
            f"convert them to {SINGLE}"
        )
    if (directory / "adapter_config.json").exists():
        return f"{directory / 'adapter_config.json'}: this is an adapter alone; merge it into its base model first"
    return f"{directory / SINGLE}: there are no weights here; fetch the model again"


def _header(file: Path) -> Shapes:
    """Shapes of the tensors of ``file``, whose size is what its header says."""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            head = opened.read(8)
            if (head + opened.read(len(LFS) - 8)).startswith(LFS):
                raise StartError(f"{file}: this is a pointer of git-lfs, not the weights; run `git lfs pull` there")
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            if not 2 <= length <= min(MOST_HEADER, size - 8):
                raise _cut_off(file)
            opened.seek(8)
            table = json.loads(opened.read(length))
        table.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in table.values()), default=0)
        shapes: Shapes = {name: ([int(n) for n in entry["shape"]], file) for name, entry in table.items()}
    except OSError as error:
        raise StartError(f"{file}: cannot be read ({error.strerror}); mend that, or fetch the model again") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise StartError(f"{file}: this is no safetensors file; fetch it again") from None
    if size < 8 + length + end:
        raise _cut_off(file)
    if not shapes:
        raise StartError(f"{file}: it holds no weights; fetch it again")
    return shapes


def _cut_off(file: Path) -> StartError:
    return StartError(f"{file}: the file is cut off or damaged ({file.stat().st_size} bytes); fetch it again")


def _check_layers(directory: Path, config: Mapping[str, Any], shapes: Shapes) -> None:
    """transformers would build all the layers that the config names before it missed one."""
    layers = next((config[k] for k in ("num_hidden_layers", "n_layer", "num_layers") if k in config), None)
    numbers = [int(found[1]) for name in shapes if (found := re.search(r"\.(\d+)\.", name))]
    if isinstance(layers, int) and numbers and layers > max(numbers) + 1:
        raise StartError(
            f"{directory / 'config.json'}: it says {layers} layers, and the weights hold {max(numbers) + 1}; "
            "config and weights are of two models"
        )


def _check_embeddings(config: Mapping[str, Any], shapes: Shapes) -> None:
    for name, (shape, file) in shapes.items():
        if not name.endswith(EMBEDDINGS) or name.count(".") > 2 or len(shape) != 2:
            continue
        said = config.get("vocab_size")
        if isinstance(said, int) and shape[0] != said:
            raise StartError(
                f"{file}: {name} has {shape[0]} rows, and vocab_size of config.json is {said}; "
                "config and weights are of two models"
            )
