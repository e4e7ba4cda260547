"""Checkpoints made on the spot: real shapes, random seeded weights in bf16, and a tokenizer whose every id is text.

    python -m benchmarks.models 135m          prints the directory

The one idea: any engine can read them, nothing is downloaded, and all sides of a comparison load the same files. The
words of the tokenizer are of the form " bacofeho", one token each, so a text prompt has exactly the length asked for
(headrace/clients/workload.py) and engines that take no token ids can be measured too.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
from pathlib import Path
from typing import Any

BOS, EOS, PAD = 0, 1, 2
SPECIALS = ["<|bos|>", "<|eos|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SHAPES: dict[str, dict[str, Any]] = {
    "135m": {  # SmolLM2-135M
        "model_type": "llama",
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
    },
    "500m": {  # Qwen2.5-0.5B
        "model_type": "qwen2",
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
    },
    "600m": {  # Qwen3-0.6B: head size 128, more than hidden size / heads
        "model_type": "qwen3",
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
    },
    "8b": {  # Llama-3.1-8B, for a GPU
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
        "max_position_embeddings": 40960,
    },
    "moe-7b": {  # OLMoE-1B-7B: 64 experts of which each token takes 8
        "model_type": "olmoe",
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "intermediate_size": 1024,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "vocab_size": 50304,
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
    },
}


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "headrace" / "bench"


def checkpoint(shape: str, cache: Path | None = None) -> Path:
    """The directory of a shape's checkpoint, made if it is not there. Half-made ones are never left behind."""
    path = (cache or default_cache()) / "models" / shape
    if not (path / "config.json").is_file():
        draft = path.with_name(f"{shape}.{os.getpid()}")
        make_checkpoint(shape, draft)
        try:
            draft.rename(path)
        except OSError:  # another process was faster
            shutil.rmtree(draft)
    return path


def make_checkpoint(shape: str, path: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(SHAPES[shape])
    ids = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    config = AutoConfig.for_model(fields.pop("model_type"), **fields, **ids)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # drawn in bf16: an 8B shape would take 32 GB in float32
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    finally:
        torch.set_default_dtype(default)
    tokenizer(fields["vocab_size"]).save_pretrained(path)
    model.save_pretrained(path)


def tokenizer(size: int) -> Any:
    """A byte-level BPE of exactly ``size`` entries.

    Syllables come from four classes with no consonant in common; only a class and its follower ever merge, so a word
    of four syllables becomes one token whatever stands beside it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges: list[tuple[str, str]] = []

    def merge(left: str, right: str) -> str:
        merges.append((left, right))
        tokens.append(left + right)
        return left + right

    classes = ("bcdfg", "hjklm", "npqrs", "tvwxz")
    syllables = [[merge(c, v) for c in consonants for v in "aeiou"] for consonants in classes]
    heads = [merge(a, b) for a, b in itertools.product(syllables[0], syllables[1])]
    tails = [merge(a, b) for a, b in itertools.product(syllables[2], syllables[3])]
    words = []
    for at in range(len(heads) * len(tails)):  # along the diagonals, so that words differ early
        if len(tokens) + 2 > size:
            break
        words.append(merge(heads[at % len(heads)], tails[(at + at // len(heads)) % len(tails)]))
        merge("\u0120", words[-1])
    tokens += [f"<|spare_{k}|>" for k in range(size - len(tokens))]
    core = Tokenizer(models.BPE({token: k for k, token in enumerate(tokens)}, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=SPECIALS[BOS], eos_token=SPECIALS[EOS], pad_token=SPECIALS[PAD],
        additional_special_tokens=SPECIALS[3:], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--cache", type=Path, default=default_cache(), help="default: %(default)s")
    args = parser.parse_args()
    print(checkpoint(args.shape, args.cache))


if __name__ == "__main__":
    main()
