"""View: how the answer to a request is rendered. It travels in Job.view, so that any gateway can show it."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from protocol.messages import Job
from protocol.records import RequestRecord


class View(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    kind: Literal["completion", "chat", "generate", "tokens"] = "completion"
    created: int = 0  # Unix seconds, at the first gateway
    usage: bool = False  # a stream ends with a usage chunk
    usage_so_far: bool = False  # every chunk tells it
    fingerprint: str = ""  # of what generates: bodies show it as system_fingerprint
    echo: bool = False  # the prompt comes before its completion
    logprobs: int | None = None  # None: not shown
    prompt_logprobs: int | None = None  # of the prompt's own tokens, in vLLM's form
    ids: bool = False  # token ids are shown
    strings: bool = False  # and their tokens, as the vocabulary has them
    grace_s: float = 0.0  # how long the request continues without a reader
    detached: bool = False  # it continues without one until it ends
    calls: Literal["", "whole", "eager"] = ""  # calls of the job's tools are looked for, shown whole or as they come
    single: bool = False  # one call at most
    thoughts: bool = True  # reasoning is shown

    def asdict(self) -> dict[str, Any]:
        fields: dict[str, Any] = msgspec.to_builtins(self)
        return fields

    @classmethod
    def of(cls, record: RequestRecord) -> View:
        """The view of a stored request; a producer's push has none and is shown as OpenAI would."""
        job: Job = record.job
        if job.view:
            try:
                return msgspec.convert(job.view, cls)
            except msgspec.ValidationError:
                pass  # written by a producer for a reader of its own
        return cls(
            kind="chat" if job.messages is not None else "completion",
            created=record.created_ms // 1000,
            logprobs=job.sampling.logprobs,
            prompt_logprobs=job.sampling.prompt_logprobs,
            detached=True,
            calls="whole" if job.format is not None and job.tools else "",
        )

    @property
    def echo_logprobs(self) -> bool:
        """The echoed prompt has logprobs, which come with the first frame: so does the echo."""
        return self.echo and self.logprobs is not None

    def public_id(self, rid: str) -> str:
        """The `id` of response bodies."""
        return ("chatcmpl-" if self.kind == "chat" else "cmpl-") + rid


def rid_of(public: str) -> str:
    """The rid in an id as bodies show it, or in a bare one."""
    for prefix in ("chatcmpl-", "cmpl-"):
        if public.startswith(prefix):
            return public[len(prefix) :]
    return public
