"""GGUF files as llama.cpp's converters write them, made from tiny models of transformers.

The other direction of workers/gguf, written from convert_hf_to_gguf.py: an independent statement of what the
container means, so that a round trip proves something.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import MODEL_ARCH_NAMES, GGUFWriter, get_tensor_name_map
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize

from tests.models import CHAT_TEMPLATE, VOCAB, byte_tokenizer

F32 = GGMLQuantizationType.F32


def write_gguf(
    path: Path,
    model: Any,
    arch: str,
    kind: GGMLQuantizationType = F32,
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray | None] | None = None,
) -> Path:
    """``model`` as a GGUF file of architecture ``arch``, its matrices stored as ``kind``. ``metadata`` and ``tensors``
    replace or add to what is written; None leaves out."""
    config = model.config
    writer = GGUFWriter(path, arch)
    stated = {**architecture_keys(config, arch), **tokenizer_keys(), **(metadata or {})}
    for key, value in stated.items():
        if value is not None:
            _add(writer, key, value)
    values = {_gguf_name(arch, config, name): _as_stored(arch, config, name, w) for name, w in _stored(model).items()}
    values |= tensors or {}
    for name, value in values.items():
        if value is None:
            continue
        stored = kind if value.ndim > 1 else F32  # as llama.cpp: vectors stay whole
        if stored is F32:
            writer.add_tensor(name, value)
        else:
            writer.add_tensor(name, quantize(value, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def architecture_keys(config: Any, arch: str) -> dict[str, Any]:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    keys: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(rope.get("full_attention", rope)["rope_theta"]),
        "rope.dimension_count": head,
    }
    if arch in ("qwen3", "gemma2", "gemma3"):
        keys |= {"attention.key_length": head, "attention.value_length": head}
    if arch in ("gemma2", "gemma3", "phi3"):
        keys["attention.sliding_window"] = config.sliding_window
    if arch == "gemma2":
        keys["attn_logit_softcapping"] = float(config.attn_logit_softcapping)
        keys["final_logit_softcapping"] = float(config.final_logit_softcapping)
    return {f"{arch}.{key}": value for key, value in keys.items() if value is not None}


def tokenizer_keys() -> dict[str, Any]:
    """The byte tokenizer."""
    tokens = [token for token, _ in sorted(byte_tokenizer().get_vocab().items(), key=lambda item: item[1])]
    kinds = [3 if i >= 256 else 1 for i in range(VOCAB)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": [0.0] * VOCAB,  # in place of merges, which cannot be an empty list
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 257,
        "tokenizer.ggml.padding_token_id": 258,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    else:
        writer.add_string(key, value)


def _stored(model: Any) -> dict[str, np.ndarray]:
    tied = set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
    return {n: w.detach().float().numpy() for n, w in model.state_dict().items() if n not in tied}


def _gguf_name(arch: str, config: Any, name: str) -> str:
    stem, _, leaf = name.rpartition(".")
    kind = next(k for k, v in MODEL_ARCH_NAMES.items() if v == arch)
    found = get_tensor_name_map(kind, config.num_hidden_layers).get_name(stem)
    assert found is not None, name
    return f"{found}.{leaf}"


def _as_stored(arch: str, config: Any, name: str, weight: np.ndarray) -> np.ndarray:
    """What the converter does to a weight before it writes it."""
    if arch == "llama" and (".q_proj." in name or ".k_proj." in name):  # LlamaModel.permute
        heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
        pairs = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)
    if arch.startswith("gemma") and name.endswith("norm.weight"):
        return weight + 1
    return weight
