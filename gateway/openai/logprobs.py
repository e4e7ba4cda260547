"""Logprobs in the shapes of OpenAI's chats and completions, and those of prompts also in vLLM's. Pure."""

from __future__ import annotations

import math
from typing import Any

from protocol.messages import LOGPROB_FLOOR, Frame
from protocol.prompt_logprobs import PromptLogprobs, prompt_logprobs_of


def chat_logprob(frame: Frame) -> dict[str, Any]:
    extra = frame.extra or {}
    entry = _logprob_entry(extra.get("tok", b""), extra["lp"])
    entry["top_logprobs"] = [_logprob_entry(raw, lp) for _, raw, lp in extra.get("top", ())]
    return entry


def completion_logprobs(frames: list[Frame], offset: int) -> dict[str, Any]:
    """The older parallel lists. ``offset``: characters before the first of ``frames``."""
    lists: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for frame in frames:
        extra = frame.extra or {}
        raw = extra.get("tok", b"")
        named = _named([*extra.get("top", ()), [frame.token, raw, extra["lp"]]])
        lists["tokens"].append(named[frame.token][0])
        lists["token_logprobs"].append(finite(extra["lp"]))
        lists["top_logprobs"].append(dict(named.values()))
        lists["text_offset"].append(offset)
        offset += len(token_text(raw))
    return lists


def echoed_logprobs(prompt: PromptLogprobs, alternatives: int, echoed: int) -> dict[str, Any]:
    """The same lists for the tokens of a prompt, of which ``echoed`` characters are shown. The first has no logprob.
    What the tokenizer wrote before the text (a bos) is not part of it, and takes no place there."""
    first = prompt.first()
    lists: dict[str, list[Any]] = {
        "tokens": [token_name(first.raw)], "token_logprobs": [None], "top_logprobs": [None], "text_offset": [0]
    }  # fmt: skip
    offset = len(token_text(first.raw))
    for own, top in prompt.positions():
        named = _named([[one.token, one.raw, one.logprob] for one in (*top[:alternatives], own)])
        lists["tokens"].append(named[own.token][0])
        lists["token_logprobs"].append(named[own.token][1])
        lists["top_logprobs"].append(dict(named.values()))
        lists["text_offset"].append(offset)
        offset += len(token_text(own.raw))
    unshown = max(0, offset - echoed)
    lists["text_offset"] = [max(0, at - unshown) for at in lists["text_offset"]]
    return lists


def joined(first: dict[str, list[Any]], then: dict[str, list[Any]] | None) -> dict[str, list[Any]]:
    return {name: [*values, *(then or {}).get(name, ())] for name, values in first.items()}


def told_of_prompt(frames: list[Frame], alternatives: int) -> list[dict[str, Any] | None] | None:
    """vLLM's form: for each prompt token but the first what is told of it and of the most probable ones, by id; None
    where the choice ended before its prompt was computed."""
    prompt = prompt_logprobs_of(frames[0].extra) if frames else None
    if prompt is None:
        return None
    told: list[dict[str, Any] | None] = [None]
    for own, top in prompt.positions():
        told.append(
            {
                str(one.token): {
                    "logprob": one.logprob, "rank": one.rank, "decoded_token": token_text(one.raw),
                }
                for one in (own, *top[:alternatives])
            }
        )  # fmt: skip
    return told


def _named(tokens: list[list[Any]]) -> dict[int | None, tuple[str, float]]:
    """By id, the names and logprobs of ``tokens`` [[id, bytes, logprob], ...]. No two have one name."""
    found: dict[int | None, tuple[str, float]] = {}
    taken: set[str] = set()
    for token, raw, logprob in tokens:
        if token not in found:
            name = token_name(raw)
            found[token] = (name if name not in taken else f"token_id:{token}", finite(logprob))
            taken.add(name)
    return found


def token_name(raw: bytes) -> str:
    """The token's text; by its bytes where these are no whole characters, as OpenAI has it."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def token_text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


def finite(value: float) -> float:
    """JSON has no infinities; a logprob of minus infinity becomes OpenAI's value for it."""
    return value if math.isfinite(value) else LOGPROB_FLOOR


def _logprob_entry(raw: bytes, logprob: float) -> dict[str, Any]:
    return {"token": token_text(raw), "logprob": finite(logprob), "bytes": list(raw)}
