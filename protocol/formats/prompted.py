"""Tools for chat templates that know none: told in the system turn, results given as a user's. Hermes' wording."""

from __future__ import annotations

import json
from typing import Any

Message = dict[str, Any]

INTRODUCTION = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def write_tools(messages: list[Message], tools: list[dict[str, Any]] | None) -> list[Message]:
    """``messages`` without tools in their fields: system turn, assistant's calls and results say all of it in text.
    Contents are texts; arguments of calls are objects."""
    written = _written(messages)
    if not tools:
        return written
    told = INTRODUCTION.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
    if written and written[0].get("role") == "system":
        first = written[0]
        return [{**first, "content": f"{first['content']}\n\n{told}"}, *written[1:]]
    return [{"role": "system", "content": told}, *written]


def _written(messages: list[Message]) -> list[Message]:
    """Calls as text of the assistant's turn; results that follow each other as one turn of the user."""
    out: list[Message] = []
    results: list[str] = []
    for message in [*messages, None]:
        if message is not None and message.get("role") == "tool":
            results.append(f"<tool_response>\n{message.get('content') or ''}\n</tool_response>")
            continue
        if results:
            out.append({"role": "user", "content": "\n".join(results)})
            results = []
        if message is None:
            break
        calls = message.get("tool_calls")
        if calls:
            texts = [message["content"]] if message.get("content") else []
            texts += [_call_text(call["function"]) for call in calls]
            message = {**message, "content": "\n".join(texts)}
            del message["tool_calls"]
        out.append(message)
    return out


def _call_text(function: dict[str, Any]) -> str:
    call = {"name": function["name"], "arguments": function["arguments"]}
    return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"
