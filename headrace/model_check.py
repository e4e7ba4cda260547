"""What a model directory lacks, before anything is started: read with plain Python, in milliseconds.

What is refused here could never be served. What is let through may still be refused by the scheduler (tokenizer, chat
template, architecture) or the worker (weights, the model's arithmetic), in a sentence of the same kind: the file, what
is wrong with it, and what to do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headrace.gguf import is_gguf
from headrace.weights_check import check_weights
from protocol.errors import ModelRefused, StartError
from workers.torch_engine.quantized.methods import refusal

OTHER_JSON = (
    "tokenizer_config.json", "generation_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.json", "tokenizer.json", "model.safetensors.index.json",
)  # fmt: skip
TOKENIZERS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "*.model",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "tekken.json",
)
POSITIVE = (
    "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "intermediate_size", "vocab_size",
    "max_position_embeddings", "head_dim", "n_layer", "n_head", "n_embd", "n_positions",
)  # fmt: skip
CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length", "n_ctx")


def check_model(model: str, *, weights: bool = True, max_model_len: int | None = None) -> None:
    """StartError if ``model`` is a path that holds no model that could be served. A hub id passes.

    ``weights`` False: who asks loads none (a scheduler, a simulated engine)."""
    path = Path(model).expanduser()
    try:
        if path.is_dir():
            if not any((path / name).exists() for name in ("config.json", "adapter_config.json")):
                if any(path.glob("*.gguf")):
                    return
                next(path.iterdir(), None)
            _check_directory(path, weights, max_model_len)
        elif path.exists():
            if not is_gguf(path):
                raise StartError(
                    f"--model {model}: this file is no GGUF checkpoint; a model is a directory or a .gguf file"
                )
            _check_gguf(path)
        elif model.startswith((".", "/", "~")) or model.partition(":")[0].count("/") > 1:
            raise StartError(f"--model {model}: no such directory (a hub id has the form owner/name)")
    except PermissionError as error:
        raise StartError(f"{error.filename or path}: this user may not read it; change its permissions") from None
    except OSError as error:
        raise StartError(f"{error.filename or path}: cannot be read ({error.strerror})") from None


def check_config(file: Path, max_model_len: int | None = None) -> dict[str, Any]:
    """The config, as an object. StartError if no model can have it."""
    config = _json(file)
    if not isinstance(config, dict):
        raise StartError(f"{file}: it holds no JSON object, so it is no model's config; fetch it again")
    if "model_type" not in config:
        raise StartError(f"{file}: it names no model_type, so it is no transformers model; fetch it again")
    if "auto_map" in config:
        raise ModelRefused(
            f"{file}: it asks for code of its own (auto_map), which is never run; if transformers knows the "
            "architecture, remove auto_map from a local copy"
        )
    text = _text_of(config)
    for name in POSITIVE:
        value = text.get(name)
        if value is not None and (not isinstance(value, (int, list)) or isinstance(value, bool) or value == 0):
            raise StartError(f"{file}: {name} is {json.dumps(value)[:40]}, not a number above 0; fetch it again")
        if isinstance(value, int) and value < 0:
            raise StartError(f"{file}: {name} is {value}, not a number above 0; fetch it again")
    _check_heads(file, text)
    longest = next((text[name] for name in CONTEXT_FIELDS if isinstance(text.get(name), int)), None)
    if max_model_len and longest and max_model_len > longest:
        raise StartError(
            f"--max-model-len {max_model_len}: the model knows no more than {longest} positions ({file}); lower it"
        )
    _check_quantization(file, config)
    return config


def _check_directory(path: Path, weights: bool, max_model_len: int | None) -> None:
    if not (path / "config.json").exists():
        if (path / "adapter_config.json").exists():
            raise StartError(
                f"{path / 'adapter_config.json'}: this is an adapter alone; merge it into its base model first"
            )
        raise StartError(f"--model {path}: this directory has no config.json, so it is no transformers model")
    config = check_config(path / "config.json", max_model_len)
    for name in OTHER_JSON:
        if (path / name).exists() and not isinstance(_json(path / name), dict):
            raise StartError(f"{path / name}: it holds no JSON object; fetch it again")
    if not any(file.stat().st_size for pattern in TOKENIZERS for file in path.glob(pattern)):
        raise StartError(f"{path / 'tokenizer.json'}: there is no tokenizer here; fetch the model again")
    template = path / "chat_template.jinja"
    if template.exists():
        _text(template)
    if weights:
        check_weights(path, _text_of(config) | {k: config[k] for k in ("vision_config",) if k in config})


def _text_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config that describes the language model."""
    inner = config.get("text_config")
    return dict(inner) if isinstance(inner, dict) else dict(config)


def _check_heads(file: Path, text: Mapping[str, Any]) -> None:
    heads, groups, width = (text.get(k) for k in ("num_attention_heads", "num_key_value_heads", "hidden_size"))
    if not isinstance(heads, int):
        return
    if isinstance(groups, int) and heads % groups:
        raise StartError(
            f"{file}: num_attention_heads {heads} is no multiple of num_key_value_heads {groups}; fetch it again"
        )
    if isinstance(width, int) and text.get("head_dim") is None and text.get("model_type") == "llama" and width % heads:
        raise StartError(f"{file}: hidden_size {width} is no multiple of num_attention_heads {heads}; fetch it again")


def _check_quantization(file: Path, config: Mapping[str, Any]) -> None:
    stated = config.get("quantization_config")
    reason = refusal(stated) if isinstance(stated, dict) and stated else None
    if reason is not None:
        raise ModelRefused(f"{file}: {reason}")


def _check_gguf(path: Path) -> None:
    """The first bytes of a GGUF file: magic, version, number of tensors, number of metadata."""
    with path.open("rb") as file:
        head = file.read(24)
    if not head.startswith(b"GGUF") or len(head) < 24:
        raise StartError(
            f"{path}: this is no GGUF file, or it is cut off ({path.stat().st_size} bytes); fetch it again"
        )


def _json(file: Path) -> Any:
    text = _text(file)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        where = f"line {error.lineno}" if isinstance(error, json.JSONDecodeError) else "too deep"
        raise StartError(f"{file}: this is no JSON ({where}); mend it, or fetch it again") from None


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError:
        raise StartError(f"{file}: this is no UTF-8 text; fetch it again") from None
