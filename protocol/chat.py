"""One form of a chat, whichever door it came through: HTTP bodies and pushed jobs become the same prompt.

``normal_messages`` gives what chat templates understand: role, content as one text, reasoning_content, calls whose
arguments are maps, name, tool_call_id. It is idempotent, so the gateway's messages pass the scheduler unchanged.

- Parts of text are joined by a line break, as most servers do: a part is a paragraph, not half a word.
- ``developer`` is the newer word for ``system``, ``function`` the older one for ``tool``; ``function_call`` and
  ``reasoning`` are older and newer names as well.
- A call's arguments are JSON text in OpenAI's form and a map in most templates: text becomes a map.
- An assistant may say nothing (null, or an empty list): its text is then its refusal, or empty.
- Fields that are not known are left out: clients and proxies add their own (``cache_control``, ``annotations``). But
  what would leave out content, or changes what is asked for, is refused by name.
"""

from __future__ import annotations

from typing import Any

import msgspec

from protocol.errors import InvalidRequest
from protocol.free_form import check_tree
from protocol.messages import MAX_MESSAGES

ROLES = {
    "system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool",
    "function": "tool",
}  # fmt: skip
TEXT_PARTS = ("text", "input_text", "output_text")
OTHER_PARTS = ("image_url", "input_image", "input_audio", "audio_url", "video_url", "file", "input_file")
CONTENT_ELSEWHERE = ("audio", "images", "videos", "attachments", "file_ids")  # content that a text model cannot read
CONTINUED = ("prefix", "partial")  # asks to go on with this message instead of answering it
REASONING = ("reasoning_content", "reasoning", "thinking")  # the first that is given
# arguments of the chat template that are ours to give
RESERVED_TEMPLATE_ARGUMENTS = {
    "chat_template", "conversation", "messages", "tokenize", "tokenizer", "padding", "truncation", "max_length",
    "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "continue_final_message",
    "sanitize_control_tokens",
}  # fmt: skip

Message = dict[str, Any]
_from_json = msgspec.json.Decoder()


def normal_messages(messages: Any) -> list[Message]:
    """The messages in their one form. InvalidRequest names the field and repeats nothing of what it holds."""
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("messages must hold at least one message", param="messages")
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequest(f"messages may hold at most {MAX_MESSAGES} messages", param="messages")
    normal = [_message(message, f"messages[{number}]") for number, message in enumerate(messages)]
    check_tree(normal, "messages")
    return normal


def check_template_arguments(arguments: dict[str, Any]) -> None:
    """Refuse those that are ours to give, and what is no JSON."""
    reserved = sorted(RESERVED_TEMPLATE_ARGUMENTS & set(arguments))
    if reserved:
        at = f"chat_template_kwargs.{reserved[0]}"
        raise InvalidRequest(f"{at} may not be set by a request", param=at)
    check_tree(arguments, "chat_template_kwargs")


def _message(message: Any, at: str) -> Message:
    if not isinstance(message, dict):
        raise InvalidRequest(f"{at} must be an object", param=at)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise InvalidRequest(f"{at}.role must be one of {', '.join(ROLES)}", param=f"{at}.role")
    _refuse_what_is_not_read(message, at)
    normal: Message = {"role": ROLES[role], "content": _content(message, role, at)}
    reasoning = next((name for name in REASONING if message.get(name) is not None), None)
    if reasoning is not None and role == "assistant":
        normal["reasoning_content"] = _string(message[reasoning], f"{at}.{reasoning}")
    if calls := _calls(message, role, at):
        normal["tool_calls"] = calls
    for field in ("name", "tool_call_id"):
        if message.get(field) is not None:
            normal[field] = _string(message[field], f"{at}.{field}")
    return normal


def _refuse_what_is_not_read(message: Message, at: str) -> None:
    for field in CONTENT_ELSEWHERE:
        if message.get(field):
            raise _unsupported(f"{at}.{field}", "is not supported")
    for field in CONTINUED:
        if message.get(field):
            raise _unsupported(f"{at}.{field}", "is not supported: ask by continue_final_message")


# ------------------------------------------------------------------ content


def _content(message: Message, role: str, at: str) -> str:
    content = message.get("content")
    if role == "assistant" and content in (None, "", []):
        refusal = message.get("refusal")
        return "" if refusal is None else _string(refusal, f"{at}.refusal")
    at = f"{at}.content"
    if isinstance(content, str):
        return content
    if content is None:
        raise InvalidRequest(f"{at} must not be null", param=at)
    if not isinstance(content, list) or not content:
        raise InvalidRequest(f"{at} must be a string or a list of text parts", param=at)
    return "\n".join(_part(part, role, f"{at}[{number}]") for number, part in enumerate(content))


def _part(part: Any, role: str, at: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in TEXT_PARTS:
        return _string(part.get("text"), f"{at}.text")
    if kind == "refusal" and role == "assistant":
        return _string(part.get("refusal"), f"{at}.refusal")
    named = f", not {kind}" if kind in OTHER_PARTS else ""
    raise _unsupported(f"{at}.type", f"must be text{named}")


# ------------------------------------------------------------------ calls


def _calls(message: Message, role: str, at: str) -> list[Message]:
    """The calls of an assistant's message; [] where there are none."""
    given, single = message.get("tool_calls"), message.get("function_call")
    if given in (None, []) and single is None:
        return []
    if role != "assistant":
        field = "tool_calls" if given else "function_call"
        raise InvalidRequest(f"{at}.{field} may be given by an assistant alone", param=f"{at}.{field}")
    if given in (None, []):
        return [{"type": "function", "function": _function(single, f"{at}.function_call")}]
    if not isinstance(given, list):
        raise InvalidRequest(f"{at}.tool_calls must be a list of calls", param=f"{at}.tool_calls")
    return [_call(call, f"{at}.tool_calls[{number}]") for number, call in enumerate(given)]


def _call(call: Any, at: str) -> Message:
    if not isinstance(call, dict):
        raise InvalidRequest(f"{at} must be an object", param=at)
    if call.get("type", "function") not in ("function", None):
        raise _unsupported(f"{at}.type", "must be function")
    normal: Message = {"type": "function", "function": _function(call.get("function"), f"{at}.function")}
    if call.get("id") is not None:
        normal = {"id": _string(call["id"], f"{at}.id"), **normal}
    return normal


def _function(function: Any, at: str) -> Message:
    if not isinstance(function, dict):
        raise InvalidRequest(f"{at} must be an object", param=at)
    name = _string(function.get("name"), f"{at}.name")
    return {"name": name, "arguments": _arguments(function.get("arguments"), f"{at}.arguments")}


def _arguments(arguments: Any, at: str) -> dict[str, Any]:
    if isinstance(arguments, str) and arguments.strip():
        try:
            arguments = _from_json.decode(arguments)
        except (msgspec.DecodeError, UnicodeError, ValueError, RecursionError):
            raise InvalidRequest(f"{at} must be a JSON object", param=at) from None
    elif arguments is None or isinstance(arguments, str):
        return {}
    if not isinstance(arguments, dict):
        raise InvalidRequest(f"{at} must be a JSON object", param=at)
    return arguments


def _string(value: Any, at: str) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(f"{at} must be a string", param=at)
    return value


def _unsupported(at: str, reason: str) -> InvalidRequest:
    return InvalidRequest(f"{at} {reason}", param=at, code="unsupported_parameter")
