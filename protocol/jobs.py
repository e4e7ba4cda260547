"""Jobs from outside: bytes to a Job, and every check that needs no tokenizer.

The gateway builds a Job from an HTTP body, a producer pushes one; both go through `check_job`. Nothing but a
HeadraceError comes out for any input, and no message repeats what a prompt says: it names the field and the limit.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from protocol.chat import check_template_arguments, normal_messages
from protocol.errors import InvalidRequest, TooLarge
from protocol.free_form import MAX_NESTING, check_text, check_tree
from protocol.keys import NAME
from protocol.messages import MAX_JOB_BYTES, MAX_PROMPTS, MAX_REQUEST_CHOICES, Job
from protocol.telemetry.context import MAX_TRACEPARENT, known_state, parse

JOB_VERSION = 1
MAX_SCHEMA_NESTING = 64  # an object within an object takes two levels of its schema
MAX_TIMEOUT_S = 86_400.0
MAX_SALT_CHARS = 256
MAX_TOOLS = 128
INT32_MAX = 2**31 - 1

_from_msgpack = msgspec.msgpack.Decoder(Job)
_from_json = msgspec.json.Decoder(Job)
_AT = re.compile(r" - at (?:`key` in )?`\$\.?([^`]*)`$")
_UNKNOWN = re.compile(r"unknown field `([^`]*)`")
_TYPES = re.compile(r"^Expected `[a-z |]+`, got `[a-z]+`$")


def decode_job(payload: bytes) -> Job:
    """A producer's payload, MessagePack map or JSON text (told apart by the first byte), checked but for its model.

    Raises TooLarge or InvalidRequest with the field at fault in ``param``.
    """
    if len(payload) > MAX_JOB_BYTES:
        raise TooLarge(f"a job may have at most {MAX_JOB_BYTES} bytes")
    if not payload:
        raise InvalidRequest("the job is empty")
    first = payload[0]
    if 0x80 <= first <= 0x8F or first in (0xDE, 0xDF):
        decoder: Any = _from_msgpack
    elif first == ord("{") or payload[:64].lstrip()[:1] == b"{":
        decoder = _from_json
    else:
        raise InvalidRequest("a job is a MessagePack map or a JSON object")
    try:
        job: Job = decoder.decode(payload)
    except msgspec.ValidationError as error:
        raise type_error(error) from None
    except RecursionError:
        raise InvalidRequest(f"the job is nested more than {MAX_NESTING} deep") from None
    except (msgspec.DecodeError, UnicodeError, ValueError, OverflowError):
        raise InvalidRequest("the job is neither well-formed MessagePack nor well-formed JSON in UTF-8") from None
    if job.format is not None:
        raise InvalidRequest("unknown parameter: format", param="format")  # for gateways alone
    if job.default_max_tokens is not None:
        raise InvalidRequest("unknown parameter: default_max_tokens", param="default_max_tokens")
    if job.tokenize:
        raise InvalidRequest("unknown parameter: tokenize", param="tokenize")  # the same
    if job.sampling.content is not None:
        raise InvalidRequest("unknown parameter: content", param="content")  # for schedulers alone
    check_job(job)
    return job


class _Given(msgspec.Struct):
    sampling: dict[str, Any] = {}


def given_sampling(payload: bytes) -> set[str]:
    """Names of the sampling fields that a valid job states itself: an explicit 1.0 is not a default."""
    decode = msgspec.json.decode if payload[:64].lstrip()[:1] == b"{" else msgspec.msgpack.decode
    return set(decode(payload, type=_Given).sampling)


def type_error(error: msgspec.ValidationError) -> InvalidRequest:
    """What a decoder says of a wrong type, as an InvalidRequest that names the field and repeats no value."""
    text = str(error)
    at = _AT.search(text)
    field = at.group(1) if at else ""
    field = field.replace("[...]", "").removeprefix("sampling.")
    reason = text[: at.start()] if at else text
    unknown = _UNKNOWN.search(reason)
    if unknown:
        name = unknown.group(1)[:64]
        inside = f"{field}." if field and field != "sampling" else ""
        return InvalidRequest(f"unknown parameter: {inside}{name}", param=inside + name)
    if not _TYPES.match(reason):
        reason = "not an allowed value"
    return InvalidRequest(f"{field or 'the body'}: {reason.replace('`', '')}", param=field or None)


def check_job(job: Job, *, vocab_size: int | None = None) -> None:
    """Raise InvalidRequest for the first thing wrong with ``job``. ``vocab_size`` bounds its token ids."""
    if job.v != JOB_VERSION:
        raise InvalidRequest(f"v must be {JOB_VERSION}: no other version of a job is known", param="v")
    _check_names(job)
    if job.timeout_s is not None and not 0 < job.timeout_s <= MAX_TIMEOUT_S:
        raise InvalidRequest(f"timeout_s must lie in (0, {MAX_TIMEOUT_S:.0f}]", param="timeout_s")
    if job.cache_salt is not None and not 1 <= len(job.cache_salt) <= MAX_SALT_CHARS:
        raise InvalidRequest(f"cache_salt must have 1 to {MAX_SALT_CHARS} characters", param="cache_salt")
    if job.trace is not None:
        parent, _, state = job.trace.partition(" ")
        if len(parent) > MAX_TRACEPARENT or parse(parent) is None or (state and known_state(state) != state):
            told = f"a traceparent of {MAX_TRACEPARENT} characters, after which a space and a tracestate may follow"
            raise InvalidRequest(f"trace must be {told}", param="trace")
    structure = job.sampling.structure
    if structure is not None:  # before it is looked into
        check_tree([structure.json, structure.structural_tag], structure.field, MAX_SCHEMA_NESTING)
    job.sampling.check(vocab_size)
    for stop in job.sampling.stop:
        check_text(stop, "stop")
    for word in job.sampling.bad_words:
        check_text(word, "bad_words")
    if (job.prompt is None) == (job.messages is None):
        raise InvalidRequest("exactly one of prompt and messages must be given", param="prompt")
    if job.messages is not None:
        check_tree(job.messages, "messages")  # what is left out of them too, for the job is stored as it came
        normal_messages(job.messages)
    else:
        _check_prompt(job.prompt, vocab_size)
    if job.suffix is not None:
        if not all(isinstance(prompt, str) for prompt in job.prompts()) or job.messages is not None:
            raise InvalidRequest("suffix needs a prompt that is a text", param="suffix")
        check_text(job.suffix, "suffix")
    if job.choices > MAX_REQUEST_CHOICES:
        raise InvalidRequest(f"prompts times n must not exceed {MAX_REQUEST_CHOICES}", param="n")
    check_making(job)
    if job.chat_template_kwargs is not None:
        if job.messages is None:
            raise InvalidRequest("chat_template_kwargs needs messages", param="chat_template_kwargs")
        check_template_arguments(job.chat_template_kwargs)
    check_tools(job)
    if job.view is not None:
        check_tree(job.view, "view")


def check_making(job: Job) -> None:
    """How the prompt is made of what was sent. InvalidRequest."""
    kept = job.truncate_prompt_tokens
    if kept is not None and kept != -1 and not 1 <= kept <= INT32_MAX:
        raise InvalidRequest(
            f"truncate_prompt_tokens must lie in [1, {INT32_MAX}], or be -1", param="truncate_prompt_tokens"
        )
    if job.messages is not None and not job.add_special_tokens:
        raise InvalidRequest(
            "add_special_tokens is for prompts: the chat template writes a chat's", param="add_special_tokens"
        )
    if job.continue_final_message:
        if job.messages is None:
            raise InvalidRequest("continue_final_message needs messages", param="continue_final_message")
        if (job.chat_template_kwargs or {}).get("add_generation_prompt"):
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt exclude each other", param="continue_final_message"
            )


def _check_names(job: Job) -> None:
    for field, value in (("id", job.id), ("tenant", job.tenant), ("reply_to", job.reply_to), ("results", job.results)):
        if value is not None and not NAME.fullmatch(value):
            raise InvalidRequest(f"{field} must match [A-Za-z0-9_-]{{1,64}}", param=field)


def _check_prompt(prompt: Any, vocab_size: int | None) -> None:
    """A text, token ids, a list of texts, or a list of lists of token ids; nothing empty."""
    if not prompt:
        raise InvalidRequest("prompt must not be empty", param="prompt")
    if isinstance(prompt, str):
        return check_text(prompt, "prompt")
    kind = type(prompt[0])
    if kind in (str, list):
        if len(prompt) > MAX_PROMPTS:
            raise InvalidRequest(f"prompt may hold at most {MAX_PROMPTS} prompts", param="prompt")
        for one in prompt:
            if type(one) is not kind:
                raise InvalidRequest("prompt must not mix texts and lists of token ids", param="prompt")
            if not one:
                raise InvalidRequest("prompt must not be empty", param="prompt")
            if isinstance(one, str):
                check_text(one, "prompt")
            elif isinstance(one, list):
                _check_token_ids(one, vocab_size)
        return None
    return _check_token_ids(prompt, vocab_size)


def _check_token_ids(ids: list[Any], vocab_size: int | None) -> None:
    top = INT32_MAX if vocab_size is None else vocab_size - 1
    if set(map(type, ids)) != {int}:  # a boolean is no token id
        raise InvalidRequest("prompt must hold token ids (integers), or texts", param="prompt")
    if min(ids) < 0 or max(ids) > top:
        raise InvalidRequest(f"token ids in prompt must lie in [0, {top}]", param="prompt")


def check_tools(job: Job) -> None:
    """``[{"type": "function", "function": {"name", ...}}]``, and what may be said of them. InvalidRequest."""
    for field in ("tools", "tool_choice", "parallel_tool_calls"):
        if getattr(job, field) is not None and job.messages is None:
            raise InvalidRequest(f"{field} needs messages", param=field)
    check_tree([job.tool_choice], "tool_choice")
    tools = job.tools or []
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest(f"tools takes at most {MAX_TOOLS} tools", param="tools")
    for number, tool in enumerate(tools):
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InvalidRequest(
                f"tools[{number}].function.name must be a string", param=f"tools[{number}].function.name"
            )
    check_tree(tools, "tools", MAX_SCHEMA_NESTING)
