"""LLM: offline use, a model for one program without a server to be looked after.

    llm = LLM("examples/demo-model")
    for result in llm.generate(["def add(a, b):", "import os"], SamplingParams(max_tokens=32, temperature=0)):
        print(result.outputs[0].text)
    llm.close()

It is a whole `headrace serve` underneath (serve/own.py): the same scheduling, the same tokens, one code path. Arguments
and results have the names of vLLM's class of the same name.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from headrace.clients.queue import AsyncClient, Result
from headrace.clients.sync import Client
from headrace.option_table import options_of
from headrace.serve.own import DECIDED, OwnServe
from protocol.errors import InvalidRequest
from protocol.messages import Job
from protocol.sampling import SamplingParams

DEFAULT_NUM_SEQS = 256  # of a worker, where max_num_seqs is not given
# An argument of vLLM's LLM that is no option here -> the one value it may have, and what to use instead.
FIXED: dict[str, tuple[Any, str]] = {
    "trust_remote_code": (False, "code of a checkpoint is never run"),
}

Prompt: TypeAlias = str | list[int] | Mapping[str, Any]
Messages: TypeAlias = list[dict[str, Any]]
Sampling: TypeAlias = SamplingParams | Sequence[SamplingParams] | None


class LLM:
    """A running model. Starts at construction; StartError says why that failed.

    ``options`` are those of ``headrace serve``, such as ``dtype="float32"``, ``max_model_len=512``, ``max_num_seqs``,
    ``max_num_batched_tokens``. TypeError for one that does not exist, ValueError for a value that is not supported.
    Ends at ``close()``, at the end of a ``with`` block, or with the program, however that ends.
    """

    def __init__(self, model: str | Path | None = None, **options: Any) -> None:
        options = serve_options(options)
        workers, seqs = options.get("workers") or 1, options.get("max_num_seqs") or DEFAULT_NUM_SEQS
        self._window = 2 * int(workers) * int(seqs)  # requests at once: as many again as run, so that none is short
        self._serve = OwnServe({"model": model, "drain_timeout": 0.0, **options})
        try:
            self._client = Client(self._serve.redis_url)
        except BaseException:
            self._serve.stop()
            raise

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all processes and remove what they wrote. A second call does nothing."""
        try:
            self._client.close()
        finally:
            self._serve.stop()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Sampling = None,
        *,
        truncate_prompt_tokens: int | None = None,
        add_special_tokens: bool = True,
        **sampling: Any,
    ) -> list[Result]:
        """Continue each prompt; results in the order of the prompts.

        A prompt is a text, a list of token ids, ``{"prompt": text}`` or ``{"prompt_token_ids": ids}``. Sampling is one
        SamplingParams for all, one for each, or fields of it (``max_tokens=32``). InvalidRequest for what cannot be
        sent; a request that fails later has its error in ``outputs[0].error``.
        """
        single = isinstance(prompts, str | Mapping) or _ids(prompts)
        many: Sequence[Any] = [prompts] if single else prompts  # type: ignore[assignment]
        made = {"truncate_prompt_tokens": truncate_prompt_tokens, "add_special_tokens": add_special_tokens}
        return self._run([{"prompt": _prompt(p), **made} for p in many], sampling_params, sampling)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: Sampling = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
        tools: list[dict[str, Any]] | None = None,
        tool_choice: str | dict[str, Any] | None = None,
        parallel_tool_calls: bool | None = None,
        **sampling: Any,
    ) -> list[Result]:
        """The next message of each conversation, or the rest of its last one. A conversation is a list of messages as
        OpenAI's; one or several. ``chat_template_kwargs`` go to the template (``enable_thinking``). ``tools``,
        ``tool_choice`` and ``parallel_tool_calls`` are OpenAI's: what is called is in ``outputs[0].tool_calls``."""
        many = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        arguments = dict(chat_template_kwargs or {})
        if not add_generation_prompt:
            arguments["add_generation_prompt"] = False
        made: dict[str, Any] = {
            "continue_final_message": continue_final_message, "chat_template_kwargs": arguments or None
        }  # fmt: skip
        made |= {"tools": tools, "tool_choice": tool_choice, "parallel_tool_calls": parallel_tool_calls}
        return self._run([{"messages": m, **made} for m in many], sampling_params, sampling)

    def _run(
        self,
        contents: list[dict[str, Any]],
        sampling_params: Sampling,
        fields: dict[str, Any],
    ) -> list[Result]:
        whole = sampling_params is None or isinstance(sampling_params, SamplingParams)
        each: Sequence[Any] = [sampling_params] * len(contents) if whole else sampling_params  # type: ignore[assignment]
        if len(each) != len(contents):
            raise InvalidRequest(f"{len(each)} sampling_params for {len(contents)} prompts", param="sampling_params")
        client = self._client.on_loop
        jobs = [client.job(params, fields, **content) for content, params in zip(contents, each, strict=True)]
        jobs = [client.ruled(job) for job in jobs]
        return self._client.run(run_all(client, jobs, self._window))


def serve_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` as options of serve. TypeError or ValueError names what is not to be had, and what to use instead."""
    known = {option.dest for option in options_of("serve")} - DECIDED
    options = {name: value for name, value in given.items() if name in known}
    for name in given.keys() - known:
        if name not in FIXED:
            raise TypeError(f"there is no option {name}")
        only, instead = FIXED[name]
        if given[name] != only:
            raise ValueError(f"{name}={given[name]!r} is not supported: {instead}")
    return options


def _ids(prompts: Any) -> bool:
    return isinstance(prompts, list) and bool(prompts) and isinstance(prompts[0], int)


def _prompt(prompt: Any) -> str | list[int]:
    if isinstance(prompt, Mapping):
        if len(prompt) != 1 or not prompt.keys() <= {"prompt", "prompt_token_ids"}:
            raise InvalidRequest("a prompt's dict has one key, prompt or prompt_token_ids", param="prompts")
        (prompt,) = prompt.values()
    if isinstance(prompt, str) or (isinstance(prompt, list) and all(type(i) is int for i in prompt)):
        return prompt
    raise InvalidRequest("a prompt is a text, a list of token ids, or a dict of one of them", param="prompts")


async def run_all(client: AsyncClient, jobs: list[Job], window: int) -> list[Result]:
    """Run all jobs, at most ``window`` at once. Whatever is under way when this is cancelled is cancelled too."""
    results: dict[int, Result] = {}
    waiting: Iterator[tuple[int, Job]] = iter(enumerate(jobs))

    async def user() -> None:
        for place, job in waiting:
            request = await client.submit_when_possible(job)
            try:
                results[place] = await client.result(request)
            except asyncio.CancelledError:
                await client.cancel(request)
                raise

    users = [asyncio.create_task(user()) for _ in range(min(window, len(jobs)))]
    try:
        await asyncio.gather(*users)
    finally:
        for task in users:
            task.cancel()
        await asyncio.gather(*users, return_exceptions=True)
    return [results[place] for place in range(len(jobs))]
