"""The bodies of /tokenize and /detokenize. A text is tokenized by the gateway itself; a chat by the scheduler, in
a request that ends at its admission, so its ids are those that a chat completion would have."""

from __future__ import annotations

from typing import Any

import msgspec

from gateway.openai.bodies import ChatBody, chat_job
from gateway.openai.view import View
from protocol.errors import InvalidRequest
from protocol.formats.tool_use import Tool
from protocol.messages import Job, ModelCard
from protocol.sampling import SamplingParams


class TokenizeBody(msgspec.Struct, forbid_unknown_fields=True):
    """Either ``prompt``, or ``messages`` with what a chat completion may say of its prompt."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[Tool] | None = None
    tool_choice: Any = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    enable_thinking: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: Any = None
    add_special_tokens: bool | None = None  # of a text, by default; a chat's are written by its template
    return_token_strs: bool | None = None


class DetokenizeBody(msgspec.Struct, forbid_unknown_fields=True):
    tokens: list[int] | None = None
    model: str | None = None


OF_CHATS = tuple(
    name for name in TokenizeBody.__struct_fields__ if name not in ("model", "prompt", "return_token_strs")
)

tokenize_decoder = msgspec.json.Decoder(TokenizeBody)
detokenize_decoder = msgspec.json.Decoder(DetokenizeBody)


def check_tokenize(body: TokenizeBody) -> None:
    """InvalidRequest names the field."""
    if body.prompt is None and body.messages is None:
        raise InvalidRequest("prompt or messages is required", param="prompt")
    if body.prompt is not None:
        for name in OF_CHATS:
            if name != "add_special_tokens" and getattr(body, name) is not None:
                raise InvalidRequest(f"{name} cannot be given together with prompt", param=name)


def tokens_job(body: TokenizeBody, card: ModelCard, tenant: str, created: int) -> Job:
    """The job that asks for the ids of a chat's prompt. InvalidRequest names the field."""
    job = chat_job(ChatBody(**{name: getattr(body, name) for name in OF_CHATS}, max_tokens=1), card, tenant, created)
    job.sampling = SamplingParams(max_tokens=1)  # nothing that rules an answer has to be compiled
    job.tokenize = True
    job.view = View(kind="tokens", created=created, ids=True, strings=bool(body.return_token_strs)).asdict()
    return job
