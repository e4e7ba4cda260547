"""How a chat's body asks for thoughts: what of it goes to the chat template."""

from __future__ import annotations

from typing import Any

from protocol.errors import InvalidRequest

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


def template_arguments(
    given: dict[str, Any] | None, effort: str | None, thinking: bool | None
) -> dict[str, Any] | None:
    """The arguments of the chat template: what the request gives as such wins."""
    arguments: dict[str, Any] = {}
    if effort is not None:
        if effort not in EFFORTS:
            raise InvalidRequest(f"reasoning_effort must be one of {', '.join(EFFORTS)}", param="reasoning_effort")
        if effort == "none":
            arguments["enable_thinking"] = False
        else:
            arguments["reasoning_effort"] = effort
    if thinking is not None:
        arguments["enable_thinking"] = thinking
    return {**arguments, **(given or {})} or None
