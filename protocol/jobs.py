"""Jobs from outside: bytes to a Job, and every check that needs no tokenizer.

The gateway builds a Job from an HTTP body, a producer pushes one; both go through `check_job`. Nothing but a
HeadraceError comes out for any input, and no message repeats what a prompt says: it names the field and the limit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

import msgspec

from protocol.errors import InvalidRequest, TooLarge
from protocol.keys import NAME
from protocol.messages import MAX_JOB_BYTES, MAX_MESSAGES, MAX_PROMPTS, MAX_REQUEST_CHOICES, Job
from protocol.sampling import INT64_MAX

JOB_VERSION = 1
MAX_NESTING = 32
MAX_SCHEMA_NESTING = 64  # an object within an object takes two levels of its schema
MAX_TIMEOUT_S = 86_400.0
MAX_SALT_CHARS = 256
INT32_MAX = 2**31 - 1
INT64_MIN = -INT64_MAX - 1
ROLES = ("system", "developer", "user", "assistant", "tool")
OTHER_PARTS = ("image_url", "input_audio", "video_url", "file", "refusal")
MESSAGE_FIELDS = {"role", "content", "name", "tool_calls", "tool_call_id", "refusal", "reasoning_content"}
# arguments of the chat template that are ours to give
RESERVED_TEMPLATE_ARGUMENTS = {
    "chat_template", "conversation", "messages", "tokenize", "tokenizer", "padding", "truncation", "max_length",
    "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "continue_final_message",
}  # fmt: skip

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
    check_job(job)
    return job


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
    structure = job.sampling.structure
    if structure is not None:  # before it is looked into
        _check_tree([structure.json, structure.structural_tag], structure.field, MAX_SCHEMA_NESTING)
    job.sampling.check(vocab_size)
    for stop in job.sampling.stop:
        _check_text(stop, "stop")
    if (job.prompt is None) == (job.messages is None):
        raise InvalidRequest("exactly one of prompt and messages must be given", param="prompt")
    if job.messages is not None:
        _check_messages(job.messages)
    else:
        _check_prompt(job.prompt, vocab_size)
    if job.choices > MAX_REQUEST_CHOICES:
        raise InvalidRequest(f"prompts times n must not exceed {MAX_REQUEST_CHOICES}", param="n")
    if job.chat_template_kwargs is not None:
        _check_template_arguments(job)
    if job.view is not None:
        _check_tree(job.view, "view")


def _check_names(job: Job) -> None:
    for field, value in (("id", job.id), ("tenant", job.tenant), ("reply_to", job.reply_to), ("results", job.results)):
        if value is not None and not NAME.fullmatch(value):
            raise InvalidRequest(f"{field} must match [A-Za-z0-9_-]{{1,64}}", param=field)


def _check_prompt(prompt: Any, vocab_size: int | None) -> None:
    """A text, token ids, a list of texts, or a list of lists of token ids; nothing empty."""
    if not prompt:
        raise InvalidRequest("prompt must not be empty", param="prompt")
    if isinstance(prompt, str):
        return _check_text(prompt, "prompt")
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
                _check_text(one, "prompt")
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


def _check_messages(messages: list[dict[str, Any]]) -> None:
    if not messages:
        raise InvalidRequest("messages must not be empty", param="messages")
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequest(f"messages may hold at most {MAX_MESSAGES} messages", param="messages")
    for number, message in enumerate(messages):
        at = f"messages[{number}]"
        unknown = set(message) - MESSAGE_FIELDS
        if unknown:
            name = min(unknown)[:64]
            raise InvalidRequest(f"unknown parameter: {at}.{_printable(name)}", param=f"{at}.{_printable(name)}")
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise InvalidRequest(f"{at}.role must be one of {', '.join(ROLES)}", param=f"{at}.role")
        calls = message.get("tool_calls")
        if calls is not None and not (role == "assistant" and isinstance(calls, list) and calls):
            raise InvalidRequest(f"{at}.tool_calls must be a list of calls of an assistant", param=f"{at}.tool_calls")
        if message.get("content") is not None or calls is None:
            _check_content(message.get("content"), f"{at}.content")
        for field in ("name", "tool_call_id", "refusal", "reasoning_content"):
            if not isinstance(message.get(field, ""), str | None):
                raise InvalidRequest(f"{at}.{field} must be a string", param=f"{at}.{field}")
    _check_tree(messages, "messages")


def _check_content(content: Any, at: str) -> None:
    """Text, or a list of text parts."""
    if isinstance(content, str):
        return
    if not isinstance(content, list) or not content:
        raise InvalidRequest(f"{at} must be a string or a list of text parts", param=at)
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            named = f", not {kind}" if kind in OTHER_PARTS else ""
            raise InvalidRequest(f"{at}[{number}].type must be text{named}", param=f"{at}[{number}].type")
        if not isinstance(part.get("text"), str):
            raise InvalidRequest(f"{at}[{number}].text must be a string", param=f"{at}[{number}].text")
        if set(part) - {"type", "text"}:
            raise InvalidRequest(f"{at}[{number}] may hold type and text alone", param=f"{at}[{number}]")


def _check_template_arguments(job: Job) -> None:
    arguments = job.chat_template_kwargs or {}
    if job.messages is None:
        raise InvalidRequest("chat_template_kwargs needs messages", param="chat_template_kwargs")
    reserved = sorted(RESERVED_TEMPLATE_ARGUMENTS & set(arguments))
    if reserved:
        at = f"chat_template_kwargs.{reserved[0]}"
        raise InvalidRequest(f"{at} may not be set by a request", param=at)
    _check_tree(arguments, "chat_template_kwargs")


def _check_tree(tree: Any, field: str, deepest: int = MAX_NESTING) -> None:
    """Free-form values: finite numbers, whole Unicode, text keys, at most ``deepest`` deep (counted from the body)."""
    level: list[Any] = [tree]
    for _ in range(deepest):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                if not all(isinstance(key, str) for key in value):
                    raise InvalidRequest(f"{field}: the keys of an object must be strings", param=field)
                _check_leaves(value.keys(), field)
                below.extend(value.values())
            elif isinstance(value, list):
                below.extend(value)
        _check_leaves(below, field)
        level = [value for value in below if isinstance(value, dict | list)]
        if not level:
            return
    raise InvalidRequest(f"{field} is nested more than {deepest} deep", param=field)


def _check_leaves(values: Iterable[Any], field: str) -> None:
    for value in values:
        if isinstance(value, str):
            _check_text(value, field)
        elif isinstance(value, float) and not math.isfinite(value):
            raise InvalidRequest(f"{field} must hold finite numbers", param=field)
        elif isinstance(value, int) and not INT64_MIN <= value <= INT64_MAX:
            raise InvalidRequest(f"{field} must hold numbers of at most 64 bits", param=field)
        elif not isinstance(value, int | float | dict | list | None):
            raise InvalidRequest(f"{field} may hold what JSON can hold, and no more", param=field)


def _check_text(text: str, field: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(f"{field} holds half a surrogate pair, which is no text", param=field) from None


def _printable(name: str) -> str:
    return name.encode("ascii", "backslashreplace").decode()
