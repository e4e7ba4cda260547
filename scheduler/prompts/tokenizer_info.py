"""What /tokenizer_info says of a tokenizer: what tokenizer_config.json usually does, and no path of a file."""

from __future__ import annotations

from typing import Any

import msgspec

TOLD = (
    "add_bos_token", "add_eos_token", "add_prefix_space", "clean_up_tokenization_spaces", "errors", "legacy",
    "padding_side", "split_special_tokens", "truncation_side",
)  # fmt: skip


def tokenizer_info(tokenizer: Any, max_model_len: int) -> bytes:
    """JSON. ``tokenizer``: transformers' own."""
    given: dict[str, Any] = tokenizer.init_kwargs
    specials: dict[str, Any] = tokenizer.special_tokens_map
    return msgspec.json.encode(
        {
            "tokenizer_class": type(tokenizer).__name__,
            **{name: given[name] for name in TOLD if isinstance(given.get(name), bool | int | float | str)},
            "model_max_length": max_model_len,
            **{name: str(text) for name, text in specials.items() if isinstance(text, str)},
            "all_special_tokens": list(map(str, tokenizer.all_special_tokens)),
            "added_tokens_decoder": {
                str(number): {"content": token.content, "special": token.special}
                for number, token in tokenizer.added_tokens_decoder.items()
            },
            "chat_template": getattr(tokenizer, "chat_template", None),
        }
    )
