"""What a checkpoint's generation_config.json states about sampling: the defaults of that model.

Only values that the file itself holds count. transformers' GenerationConfig fills in its own (top_k 50, for one), which
nobody who made the model asked for.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import msgspec

from protocol.errors import InvalidRequest
from protocol.sampling import SamplingParams

log = logging.getLogger("headrace.scheduler")

FIELDS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}  # the file's names -> ours


def read(model: str) -> dict[str, float]:
    """Defaults for requests to ``model`` (a directory or a hub id). A file that cannot be read states nothing; a value
    that no request could have is passed over with a warning."""
    stated = _file(model)
    defaults: dict[str, float] = {}
    for name, ours in FIELDS.items():
        value = stated.get(name)
        if value is None:
            continue
        try:
            msgspec.convert({ours: value}, SamplingParams).check()
        except (msgspec.ValidationError, InvalidRequest) as error:
            log.warning("%s: generation_config.json: %s is passed over: %s", model, name, error)
        else:
            defaults[ours] = value
    return defaults


def _file(model: str) -> dict[str, Any]:
    from transformers.utils.hub import cached_file

    try:
        path = cached_file(model, "generation_config.json", _raise_exceptions_for_missing_entries=False)
        stated = json.loads(Path(path).read_bytes()) if path else {}
    except (OSError, ValueError) as error:
        log.warning("%s: generation_config.json cannot be read: %s", model, type(error).__name__)
        return {}
    return stated if isinstance(stated, dict) else {}
