"""What a GGUF file's metadata mean to transformers: config, tokenizer, ids that end a sequence.

transformers' own tables say which key of the file is which field of a config. They leave out what changes the
numbers without changing a shape (scaled rotary, soft-capping, the scale of attention), so an architecture is read
only where all of its keys are accounted for: a key that nobody here knows ends the conversion, by name.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from tokenizers import pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.integrations.gguf.gguf_tokenizer_mapping import (
    GGUF_PRE_TOKENIZER_SPLITS,
    convert_gguf_tokenizer,
    get_gguf_tokenizer,
)

from workers.gguf.file import GgufFile

# Architecture of the file -> model_type of transformers. What stands here is tested against the original weights.
MODEL_TYPES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
}
# What transformers' table lacks: key of the file -> field of the config.
MORE_FIELDS = {
    "llama": {"attention.key_length": "head_dim"},
    "qwen3": {"attention.key_length": "head_dim"},
    "gemma2": {
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    "phi3": {"attention.sliding_window": "sliding_window"},
}
# Models whose attention is scaled by hidden size / heads and not by the head's size, told by their number of layers
# alone, as llama.cpp tells them (llm_load_hparams): Gemma 2 27B and Gemma 3 27B.
SCALED_BY_HIDDEN_SIZE = {("gemma2", 46), ("gemma3", 62)}
GEMMA3_LOCAL_ROPE = 10_000.0
# Without a value of their own, these say nothing that a config would need.
EMPTY = {"expert_count", "expert_used_count", "rope.scaling.finetuned"}
LAYOUT = {"rope.dimension_count", "attention.key_length", "attention.value_length"}  # all must be the head's size
ROPE = {
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.freq_base_swa",
}

ROPE_FACTORS = "rope_freqs.weight"  # a tensor that is no weight: by what each frequency is divided
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

# Pre-tokenizers of byte-level vocabularies: those that transformers cuts right by name, and those that take each digit
# by itself before GPT-2's rule (llama.cpp, llm_tokenizer_bpe).
GPT2_RULE = {"gpt-2", "gpt2"}
SINGLE_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"}

END_OF_TURN = {"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>"}
CONTROL = 3  # a token's type


# ------------------------------------------------------------------ config


def architecture(file: GgufFile) -> str:
    """The architecture that the file names. StartError if it is not read here."""
    name = file.metadata.get("general.architecture")
    if name not in MODEL_TYPES:
        raise file.broken(f"its architecture is {name!r}, and {', '.join(MODEL_TYPES)} are read")
    if file.metadata.get("split.count", 1) > 1:
        raise file.broken("it is one part of several; put them together with llama-gguf-split --merge")
    return str(name)


def config_of(file: GgufFile) -> Any:
    """The model's config. StartError names a key that is missing or not understood."""
    arch = architecture(file)
    stated = {key.removeprefix(arch + "."): v for key, v in file.metadata.items() if key.startswith(arch + ".")}
    known: dict[str, str | None] = GGUF_CONFIG_MAPPING[arch]  # type: ignore[assignment]
    table = {k: f for k, f in known.items() if f} | MORE_FIELDS.get(arch, {})
    fields = {field: stated[key] for key, field in table.items() if key in stated and key not in ROPE}
    for key in ("block_count", "context_length", "embedding_length", "attention.head_count", "feed_forward_length"):
        if not isinstance(stated.get(key), int) or stated[key] < 1:
            raise file.broken(f"its {arch}.{key} is missing or no number above 0")
    if stated["block_count"] > len(file.tensors):
        raise file.broken(f"it names {stated['block_count']} layers and holds {len(file.tensors)} tensors")
    for key, value in stated.items():
        if key not in table and key not in ROPE and key not in LAYOUT and not (key in EMPTY and not value):
            raise file.broken(f"its key {arch}.{key} = {str(value)[:40]} is not understood, and may change the model")
    head = fields.setdefault("head_dim", _head_size(file, stated))
    for key in LAYOUT & stated.keys():
        if stated[key] != head:
            raise file.broken(f"its {arch}.{key} is {stated[key]} where a head has {head}; that is not read")
    if arch.startswith("gemma"):
        wide = (arch, stated["block_count"]) in SCALED_BY_HIDDEN_SIZE
        heads = stated["attention.head_count"]
        fields["query_pre_attn_scalar"] = stated["embedding_length"] // heads if wide else head
    fields["vocab_size"] = next((t.shape[0] for t in file.tensors if t.name == "token_embd.weight"), 0)
    fields["tie_word_embeddings"] = all(t.name != "output.weight" for t in file.tensors)
    fields["rope_parameters"] = rope_parameters(file, arch, stated, head)
    for field in ("bos", "eos"):
        fields[f"{field}_token_id"] = file.metadata.get(f"tokenizer.ggml.{field}_token_id")
    fields["pad_token_id"] = file.metadata.get("tokenizer.ggml.padding_token_id")
    return AutoConfig.for_model(MODEL_TYPES[arch], **fields)


def _head_size(file: GgufFile, stated: dict[str, Any]) -> int:
    """What the keys say of it, else hidden size / heads."""
    for key in ("attention.key_length", "rope.dimension_count"):
        if key in stated:
            return int(stated[key])
    return int(stated["embedding_length"]) // int(stated["attention.head_count"])


def rope_parameters(file: GgufFile, arch: str, stated: dict[str, Any], head: int) -> dict[str, Any]:
    """transformers' rope_parameters: base and scaling, for gemma3 those of either kind of layer."""
    theta = float(stated.get("rope.freq_base", 10_000.0))
    kind = stated.get("rope.scaling.type", "none")
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if kind in ("linear", "yarn"):
        found |= {"rope_type": kind, "factor": float(stated.get("rope.scaling.factor", 1.0))}
        if kind == "yarn":
            longest = stated.get("rope.scaling.original_context_length", stated["context_length"])
            found["original_max_position_embeddings"] = longest
    elif kind != "none":
        raise file.broken(f"its {arch}.rope.scaling.type is {kind!r}; none, linear and yarn are read")
    factors = next((t for t in file.tensors if t.name == ROPE_FACTORS), None)
    if factors is not None:
        found = _llama3_rope(file, file.values(factors), theta, head)
    if arch != "gemma3":
        return found
    local = float(stated.get("rope.freq_base_swa", GEMMA3_LOCAL_ROPE))
    return {"full_attention": found, "sliding_attention": {"rope_type": "default", "rope_theta": local}}


def _llama3_rope(file: GgufFile, factors: np.ndarray, theta: float, head: int) -> dict[str, Any]:
    """Llama 3.1's scaling from its divisors (shape [head / 2]): of its four numbers only one ever varied."""
    stated: dict[str, Any] = {"rope_theta": theta, "factor": float(factors.max()), **LLAMA3_ROPE}
    low, high = LLAMA3_ROPE["low_freq_factor"], LLAMA3_ROPE["high_freq_factor"]
    waves = 2 * math.pi * theta ** (np.arange(0, head, 2) / head)  # tokens in one turn of each frequency
    smooth = np.clip((LLAMA3_ROPE["original_max_position_embeddings"] / waves - low) / (high - low), 0.0, 1.0)
    if factors.shape != waves.shape or not np.allclose(factors, 1 / ((1 - smooth) / stated["factor"] + smooth), 1e-3):
        raise file.broken(f"its {ROPE_FACTORS} is not the scaling of Llama 3.1; that is not read")
    return {"rope_type": "llama3", **stated}


# ------------------------------------------------------------------ tokenizer


def tokenizer_of(file: GgufFile) -> Any:
    """The tokenizer with its chat template, as one that needs nothing but tokenizer.json."""
    kind = file.metadata.get("tokenizer.ggml.model")
    cut = file.metadata.get("tokenizer.ggml.pre")
    if kind == "gpt2" and cut not in GPT2_RULE | SINGLE_DIGITS | set(GGUF_PRE_TOKENIZER_SPLITS):
        raise file.broken(f"its tokenizer cuts texts by the rule {cut!r}, which is not known here")
    if "tokenizer.chat_template" in file.metadata and not isinstance(file.metadata["tokenizer.chat_template"], str):
        raise file.broken("its chat template is no text")
    try:
        arch, parts, settings = get_gguf_tokenizer(str(file.path))
        backend, _ = convert_gguf_tokenizer(arch, parts)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise file.broken(f"its tokenizer cannot be built ({str(error)[:80]})") from None
    if kind == "gpt2" and cut in SINGLE_DIGITS:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    special = {name: settings[name] for name in ("bos_token", "eos_token", "unk_token", "pad_token") if settings[name]}
    tokenizer: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        add_bos_token=bool(settings.get("add_bos_token", False)),
        add_eos_token=bool(settings.get("add_eos_token", False)),
        clean_up_tokenization_spaces=False,
        **special,
    )
    tokenizer.chat_template = settings.get("chat_template")
    return tokenizer


def end_ids(file: GgufFile) -> list[int]:
    """Ids that end a sequence: those that the file names, and its control tokens that end a turn. Sorted."""
    named = (file.metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom"))
    tokens, kinds = file.metadata.get("tokenizer.ggml.tokens", ()), file.metadata.get("tokenizer.ggml.token_type", ())
    marks = (i for i, (t, k) in enumerate(zip(tokens, kinds, strict=False)) if k == CONTROL and t in END_OF_TURN)
    return sorted({int(i) for i in (*named, *marks) if i is not None})
