"""The bodies of /v1/completions and /v1/chat/completions, and the jobs made of them.

A field is supported, ignored on purpose, or refused by name: nothing that could change the answer is
ignored silently. The field lists follow OpenAI's specification and, for sampling, what vLLM added to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from gateway.openai.reasoning import template_arguments
from gateway.openai.structured import structure_of
from gateway.openai.view import View
from protocol.chat import check_template_arguments, normal_messages
from protocol.errors import ContextLengthExceeded, InvalidRequest, NoTokenLeft
from protocol.formats.tool_use import Tool, tool_use
from protocol.jobs import check_making
from protocol.keys import check_name
from protocol.messages import (
    MAX_PROMPTS,
    MAX_REQUEST_CHOICES,
    PRIORITIES,
    Job,
    ModelCard,
)
from protocol.sampling import MAX_TOP_LOGPROBS, SamplingParams
from protocol.structures.structure import Structure

DEFAULT_MAX_TOKENS = 16  # of /v1/completions, as OpenAI's
MAX_TIMEOUT_S = 86400.0


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # usage so far in every chunk
    include_obfuscation: bool | None = None  # ignored: padding against traffic analysis is left to a proxy


class GenerationBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # sampling
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    seed: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    ignore_eos: bool | None = None
    cache: bool | None = None  # of answers: true allows it with a seed too, false forbids it
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    logprob_token_ids: list[int] | None = None
    prompt_logprobs: int | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    # the request's life
    priority: str | int | None = None
    timeout_s: float | None = None
    request_id: str | None = None
    cache_salt: str | None = None
    background: bool | None = None
    return_token_ids: bool | None = None
    # how the prompt is made
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    # accepted and ignored
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    verbosity: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prediction: Any = None
    # structure of the answer (structured.py)
    response_format: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    # accepted only with values that have no effect
    use_beam_search: Any = None
    spaces_between_special_tokens: Any = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def usage_so_far(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)


class CompletionBody(GenerationBody, kw_only=True, forbid_unknown_fields=True):
    prompt: str | list[int | str | list[int]] | None = None
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    suffix: str | None = None  # what follows the text that is asked for


class ChatBody(GenerationBody, kw_only=True, forbid_unknown_fields=True):
    messages: list[dict[str, Any]] | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    enable_thinking: bool | None = None
    add_generation_prompt: bool | None = None
    include_reasoning: bool | None = None
    thinking_token_budget: int | None = None
    continue_final_message: bool | None = None
    # accepted only with values that have no effect
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    web_search_options: Any = None
    moderation: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None


# The values, besides null, that leave an unsupported field without meaning.
NO_OP: dict[str, tuple[Any, ...]] = {
    "use_beam_search": (False,),
    "spaces_between_special_tokens": (True, False),  # text has none of its own between them
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "moderation": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
}
INSTEAD = {"functions": ": use tools", "function_call": ": use tool_choice"}

completion_decoder = msgspec.json.Decoder(CompletionBody)
chat_decoder = msgspec.json.Decoder(ChatBody)


def model_name(body: GenerationBody) -> str | None:
    """The model's name; None where the body has none, which means the only model that is served."""
    if body.model == "":
        raise InvalidRequest("model is empty; GET /v1/models lists what is served", param="model")
    return body.model


def completion_job(body: CompletionBody, card: ModelCard, tenant: str, created: int) -> Job:
    """The job of a /v1/completions body. InvalidRequest names the field."""
    _refuse_unsupported(body)
    prompt = _prompt(body.prompt, card)
    if body.echo and body.truncate_prompt_tokens is not None:
        raise InvalidRequest("echo together with truncate_prompt_tokens is not supported", param="echo")
    if body.best_of is not None and body.best_of != (n := body.n or 1):
        if body.best_of < n:
            raise InvalidRequest("best_of must not be below n", param="best_of")
        raise _unsupported("best_of above n", ": every choice that is made is an answer", param="best_of")
    sampling = _sampling(body, card, DEFAULT_MAX_TOKENS, body.logprobs, structure_of(body))
    if body.echo and body.logprobs is not None:  # the prompt's tokens have them as well
        alternatives = max(body.logprobs, body.prompt_logprobs or 0)
        sampling = msgspec.structs.replace(sampling, prompt_logprobs=alternatives)
    job = _job(body, sampling, tenant)
    job.prompt = prompt
    if body.suffix:
        if not all(isinstance(one, str) for one in job.prompts()):
            raise InvalidRequest("suffix needs a prompt that is a text", param="suffix")
        job.suffix = body.suffix
    job.add_special_tokens = body.add_special_tokens is not False
    check_making(job)
    _check_size(job, card)
    job.view = View(
        kind="completion",
        created=created,
        usage=body.include_usage,
        usage_so_far=body.usage_so_far,
        echo=bool(body.echo),
        logprobs=body.logprobs,
        prompt_logprobs=body.prompt_logprobs,
        ids=bool(body.return_token_ids),
    ).asdict()
    return job


def chat_job(body: ChatBody, card: ModelCard, tenant: str, created: int) -> Job:
    """The job of a /v1/chat/completions body. InvalidRequest names the field."""
    _refuse_unsupported(body)
    if body.add_special_tokens:
        raise _unsupported("add_special_tokens", ": the chat template writes them")
    if not card.chat:
        raise InvalidRequest("this model has no chat template: use /v1/completions", param="messages")
    logprobs = _chat_logprobs(body)
    if body.max_completion_tokens is not None:
        if body.max_tokens not in (None, body.max_completion_tokens):
            raise InvalidRequest("max_tokens and max_completion_tokens differ", param="max_tokens")
        if body.max_completion_tokens < 0:
            raise InvalidRequest("max_completion_tokens must not be negative", param="max_completion_tokens")
        body.max_tokens = body.max_completion_tokens
    use = tool_use(body.tools, body.tool_choice, body.parallel_tool_calls, card.format, structure_of(body))
    sampling = _sampling(body, card, None, logprobs, _budgeted(body, card, use.structure), use.ends)
    job = _job(body, sampling, tenant)
    job.default_max_tokens = card.default_max_tokens(sampling)
    job.messages = normal_messages(body.messages)
    job.tools = use.tools
    if use.functions or (card.format is not None and card.format.always):
        job.format = card.format
    check_template_arguments(body.chat_template_kwargs or {})
    job.chat_template_kwargs = template_arguments(
        body.chat_template_kwargs, body.reasoning_effort, body.enable_thinking
    )
    job.continue_final_message = bool(body.continue_final_message)
    if body.add_generation_prompt is not None:
        job.chat_template_kwargs = {
            "add_generation_prompt": body.add_generation_prompt, **(job.chat_template_kwargs or {})
        }  # fmt: skip
    check_making(job)
    job.view = View(
        kind="chat",
        created=created,
        usage=body.include_usage,
        usage_so_far=body.usage_so_far,
        logprobs=logprobs,
        prompt_logprobs=body.prompt_logprobs,
        ids=bool(body.return_token_ids),
        thoughts=body.include_reasoning is not False,
        **use.view,
    ).asdict()
    return job


# ------------------------------------------------------------------ parts


def _refuse_unsupported(body: GenerationBody) -> None:
    for name, no_ops in NO_OP.items():
        value = getattr(body, name, None)
        if value is not None and value not in no_ops:
            raise _unsupported(name, INSTEAD.get(name, ""))
    if body.prompt_logprobs is not None and body.stream:
        raise InvalidRequest("prompt_logprobs cannot be streamed: leave stream out", param="prompt_logprobs")
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options needs stream", param="stream_options")


def _unsupported(name: str, instead: str = "", param: str | None = None) -> InvalidRequest:
    return InvalidRequest(f"{name} is not supported{instead}", param=param or name, code="unsupported_parameter")


def _sampling(
    body: GenerationBody,
    card: ModelCard,
    max_tokens: int | None,
    logprobs: int | None,
    structure: Structure | None,
    ends: Sequence[int] = (),
) -> SamplingParams:
    given: dict[str, Any] = card.defaults | {
        name: value
        for name in SamplingParams.__struct_fields__
        if name not in ("logprobs", "stop", "structure", "content") and (value := getattr(body, name)) is not None
    }
    if max_tokens is not None and body.max_tokens is None:
        given["max_tokens"] = max_tokens
    if body.stop is not None:
        given["stop"] = [body.stop] if isinstance(body.stop, str) else body.stop
    if body.top_p == 0:  # the most probable token alone
        given |= {"temperature": 0.0, "top_p": 1.0}
    if body.top_k == -1:
        given["top_k"] = 0
    if ends and not body.ignore_eos:
        given["stop_token_ids"] = [*given.get("stop_token_ids", ()), *ends]
    sampling = SamplingParams(logprobs=logprobs, structure=structure, **given)
    sampling.check(card.vocab_size)
    ending = {*card.eos_token_ids, *sampling.stop_token_ids}
    if sampling.min_tokens and sampling.allowed_token_ids and ending.issuperset(sampling.allowed_token_ids):
        raise NoTokenLeft("min_tokens and allowed_token_ids leave no token", param="allowed_token_ids")
    return sampling


def _budgeted(body: ChatBody, card: ModelCard, structure: Structure | None) -> Structure | None:
    """``structure`` with the most tokens that a thought may have."""
    budget = body.thinking_token_budget
    if budget is None:
        return structure
    close = card.format.close_id() if card.format is not None else None
    if close is None:
        raise InvalidRequest(
            "this model has no token that ends a thought", param="thinking_token_budget", code="unsupported_parameter"
        )
    if budget < 0:
        raise InvalidRequest("thinking_token_budget must not be negative", param="thinking_token_budget")
    base = structure or Structure(field="thinking_token_budget")
    return msgspec.structs.replace(base, after=[close], after_limit=budget)


def _chat_logprobs(body: ChatBody) -> int | None:
    if not body.top_logprobs:  # 0 beside no logprobs says nothing
        return 0 if body.logprobs else None
    if not body.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
    if not 0 <= body.top_logprobs <= MAX_TOP_LOGPROBS:
        raise InvalidRequest(f"top_logprobs must lie in [0, {MAX_TOP_LOGPROBS}]", param="top_logprobs")
    return body.top_logprobs


def _job(body: GenerationBody, sampling: SamplingParams, tenant: str) -> Job:
    priority = body.priority or "standard"
    if isinstance(priority, int):  # vLLM's: lower goes first, 0 is usual
        priority = "interactive" if priority < 0 else "batch"
    if priority not in PRIORITIES:
        raise InvalidRequest(
            f"priority must be one of {', '.join(PRIORITIES)}, or an integer (lower goes first)", param="priority"
        )
    if body.timeout_s is not None and not 0 < body.timeout_s <= MAX_TIMEOUT_S:
        raise InvalidRequest(f"timeout_s must lie in (0, {MAX_TIMEOUT_S:g}]", param="timeout_s")
    if body.request_id is not None:
        check_name(body.request_id, "request_id")
    if body.cache_salt is not None and not 1 <= len(body.cache_salt) <= 256:
        raise InvalidRequest("cache_salt must have 1 to 256 characters", param="cache_salt")
    return Job(
        id=body.request_id,
        sampling=sampling,
        tenant=tenant,
        priority=priority,
        timeout_s=body.timeout_s,
        cache_salt=body.cache_salt,
        cache=None if body.cache is None else "on" if body.cache else "off",
        truncate_prompt_tokens=body.truncate_prompt_tokens,
    )


def _prompt(given: Any, card: ModelCard) -> Any:
    """Text, ids, or a list of either, none of them empty, with every id in the vocabulary."""
    if given is None:
        raise InvalidRequest("prompt is required", param="prompt")
    if isinstance(given, str):
        prompts: list[Any] = [given]
    elif given and all(isinstance(item, int) for item in given):
        prompts = [given]
    else:
        prompts = given
    if not prompts:
        raise InvalidRequest("prompt must not be empty", param="prompt")
    if len(prompts) > MAX_PROMPTS:
        raise InvalidRequest(f"prompt takes at most {MAX_PROMPTS} prompts", param="prompt")
    kinds = {type(item) for item in prompts}
    if len(kinds) != 1 or kinds <= {int}:
        raise InvalidRequest("prompt must be all texts or all lists of token ids", param="prompt")
    for item in prompts:
        if not item:
            raise InvalidRequest("prompt must not be empty", param="prompt")
        if isinstance(item, list) and not (min(item) >= 0 and max(item) < card.vocab_size):
            raise InvalidRequest(f"a token id must lie in [0, {card.vocab_size - 1}]", param="prompt")
    return given


def _check_size(job: Job, card: ModelCard) -> None:
    if job.choices > MAX_REQUEST_CHOICES:
        raise InvalidRequest(f"prompts times n may be at most {MAX_REQUEST_CHOICES}", param="n")
    for prompt in job.prompts() if job.truncate_prompt_tokens is None else ():
        wanted = 1 if job.sampling.max_tokens is None else job.sampling.max_tokens
        if isinstance(prompt, list) and len(prompt) + wanted > card.max_model_len:
            raise ContextLengthExceeded(
                f"the prompt has {len(prompt)} tokens and max_tokens is {job.sampling.max_tokens}; "
                f"together they may be at most {card.max_model_len}",
                param="prompt",
            )
