"""Tiny random models, one factory per architecture, and the byte tokenizer that they share.

    path = tiny_model(tmp_path_factory, "llama")    # a directory as save_pretrained leaves it

A model is made once per test process and seeded, so its greedy outputs never change. Weights are drawn so
that activations keep their size from layer to layer: an untouched tiny model repeats one token, and a
parity test that compares repetitions proves nothing.

The tokenizer knows 256 bytes (token id = byte value) and eight special tokens; VOCAB is their number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

BOS, EOS, PAD, IM_START, IM_END = 256, 257, 258, 259, 260
SPECIALS = ["<|bos|>", "<|eos|>", "<|pad|>", "<|im_start|>", "<|im_end|>", "<|tool|>", "<|think|>", "<|spare|>"]
VOCAB = 256 + len(SPECIALS)

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Of a model that thinks: its prompts open the thought, leave that to the model (`opens` false), or close it at once.
THINKING_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['reasoning_content'] %}<think>\n{{ m['reasoning_content'] }}\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% elif opens is not defined or opens %}<think>\n{% endif %}{% endif %}"
)
THINK, THOUGHT = 262, 263  # their ids

# What most tiny models share; a window of 16 is shorter than every context of the tests.
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
MOE: dict[str, Any] = {**SMALL, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**SMALL, "model_type": "llama"},
    "mistral": {**SMALL, "model_type": "mistral", "head_dim": 16, "sliding_window": 16},
    "qwen2": {**SMALL, "model_type": "qwen2"},
    "qwen3": {**SMALL, "model_type": "qwen3", "head_dim": 24},
    "gemma2": {
        **SMALL,
        "model_type": "gemma2",
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": 16,
        "attn_logit_softcapping": 6.0,
        "final_logit_softcapping": 10.0,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "gemma3": {
        **SMALL,
        "model_type": "gemma3_text",
        "head_dim": 16,
        "query_pre_attn_scalar": 1,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "gpt2": {"model_type": "gpt2", "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512},
    "gpt_neox": {
        "model_type": "gpt_neox",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
    },
    "opt": {
        "model_type": "opt",
        "hidden_size": 64,
        "ffn_dim": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "word_embed_proj_dim": 64,
    },
    "phi3": {**SMALL, "model_type": "phi3", "original_max_position_embeddings": 512},
    "phi3_longrope": {
        **SMALL,
        "model_type": "phi3",
        "original_max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 64,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
            "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0],
        },
    },
    "mixtral": {**SMALL, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {
        **SMALL,
        "model_type": "gpt_oss",
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "deepseek_v3": {
        **MOE,
        "model_type": "deepseek_v3",
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 24,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "first_k_dense_replace": 1,
        "num_mtp_layers": 0,
    },
    "nemotron": {**SMALL, "model_type": "nemotron", "head_dim": 16},
    "qwen2_moe": {
        **MOE,
        "model_type": "qwen2_moe",
        "num_experts": 4,
        "shared_expert_intermediate_size": 48,
        "use_sliding_window": True,
        "sliding_window": 16,
        "max_window_layers": 2,
    },
    "qwen3_moe": {**MOE, "model_type": "qwen3_moe", "head_dim": 16, "num_experts": 4},
    # refused at load
    "falcon": {
        "model_type": "falcon",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "new_decoder_architecture": False,
    },
    "bloom": {"model_type": "bloom", "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "mamba": {"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
}

REFUSED = ("falcon", "bloom", "mamba")
SERVED = tuple(name for name in CONFIGS if name not in REFUSED)


def tiny_model(tmp_path_factory: Any, name: str) -> Path:
    """The directory of the tiny model ``name`` with its tokenizer; made on first use in this process."""
    return _saved(name, lambda: Path(tmp_path_factory.mktemp(f"model-{name}")))


_MADE: dict[str, Path] = {}


def _saved(name: str, directory: Callable[[], Path]) -> Path:
    if name not in _MADE:
        path = directory()
        save_tiny_model(name, path)
        _MADE[name] = path
    return _MADE[name]


def save_tiny_model(name: str, path: Path) -> None:
    """Write the tiny model ``name`` and the byte tokenizer into ``path``."""
    build(CONFIGS[name]).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)


def save_thinking_model(path: Path) -> None:
    """Write the tiny llama into ``path``, with a tokenizer and a template of a model that thinks."""
    build({**CONFIGS["llama"], "max_position_embeddings": 2048}).save_pretrained(path)  # told tools take many bytes
    fast = byte_tokenizer()
    fast.chat_template = THINKING_TEMPLATE
    fast.save_pretrained(path)
    file = path / "tokenizer.json"
    written = file.read_text().replace('"<|think|>"', '"<think>"').replace('"<|spare|>"', '"</think>"')
    told = json.loads(written)
    for token in told["added_tokens"]:
        token["special"] = token["id"] not in (THINK, THOUGHT)
    file.write_text(json.dumps(told))


def build(fields: dict[str, Any], seed: int = 0) -> Any:
    """A float32 model of the given config fields (model_type among them), its weights from ``seed``."""
    rest = dict(fields)
    # untied: with a shared matrix a random model's likeliest next token is the one just read
    special: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    special["tie_word_embeddings"] = False
    config = AutoConfig.for_model(rest.pop("model_type"), **{**special, **rest})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        liven(model, seed)
    return model.eval()


@torch.no_grad()
def liven(model: Any, seed: int = 0) -> None:
    """Redraw every weight so that no layer dies out and outputs vary; biases, sinks and norms too."""
    generator = torch.Generator().manual_seed(seed + 1)
    config = model.config.get_text_config()
    gemma = config.model_type.startswith("gemma")  # multiplies its embeddings by sqrt(hidden)
    embedding_scale = config.hidden_size**-0.5 if gemma else 1.0
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float32).to(weight.dtype)
        if weight.ndim >= 2:
            embedding = "emb" in name or "wte" in name or "wpe" in name
            weight.copy_(noise * embedding_scale if embedding else noise * (4.0 / math.sqrt(min(weight.shape[-2:]))))
        else:
            weight.add_(0.1 * noise)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Token id = byte value below 256, special tokens from there; adds nothing to a text."""
    vocab = {character: byte for byte, character in enumerate(_byte_characters())}
    vocab.update({token: 256 + i for i, token in enumerate(SPECIALS)})
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _byte_characters() -> list[str]:
    """The printable character that byte-level BPE writes for each byte (GPT-2's table)."""
    plain = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def read_config(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())
