"""The installed release, and what services of different ones understand of each other's jobs, for updates under load.

A job and its sampling refuse unknown fields, so an older scheduler or worker must never be given a newer one. Every
release that adds such a field raises LEVEL. A leader notes its level beside its epoch and accept refuses, for the
moment, a job that needs more; a worker tells its level in its capacity and is given no sequence that needs more.
"""

from __future__ import annotations

import functools
from importlib.metadata import PackageNotFoundError, version

import msgspec

from protocol.messages import Job
from protocol.sampling import SamplingParams

LEVEL = 6
# What each adds: 1 structure, tools, formats of calls and thoughts, more than four stops; 2 default length;
# 3 traceparent, cache of answers, suffix, tokenize;
# 4 bad_words, logprobs of prompts and of named ids, max_tokens 0, how a prompt is made;
# 5 tool_choice, parallel_tool_calls; 6 opened_by of a structure
STOPS_BEFORE = 4


def sampling_level(params: SamplingParams) -> int:
    """The least level of a worker that can read ``params``."""
    if params.structure is not None and params.structure.opened_by:
        return 6
    if params.bad_words or params.max_tokens == 0:
        return 4
    if params.logprob_token_ids is not None or params.prompt_logprobs is not None:
        return 4
    newer = params.structure is not None or params.content is not None or len(params.stop) > STOPS_BEFORE
    return int(newer or params.allowed_token_ids is not None)


def job_level(job: Job) -> int:
    """The least level of a scheduler that can read ``job``."""
    of_sampling = sampling_level(job.sampling)
    if of_sampling > 5:
        return of_sampling
    if job.tool_choice is not None or job.parallel_tool_calls is not None:
        return 5
    if not job.add_special_tokens or job.truncate_prompt_tokens is not None or job.continue_final_message:
        return 4
    if job.trace is not None or job.cache is not None or job.suffix is not None or job.tokenize:
        return max(3, of_sampling)
    if job.default_max_tokens is not None:
        return max(2, of_sampling)
    return max(of_sampling, int(job.tools is not None or job.format is not None))


def plainer(job: Job) -> Job:
    """``job`` for an older scheduler: without the newest of what can be done without: its place in a trace, its wish
    about a cache that is not there and ``tokenize`` (which saves the one token that such a job asks for), a default
    length, or what only tells readers how to show an answer that needs no telling."""
    if job.trace is not None or job.cache is not None or job.tokenize:
        return msgspec.structs.replace(job, trace=None, cache=None, tokenize=False)
    if job.default_max_tokens is not None:
        return msgspec.structs.replace(job, default_max_tokens=None)
    return job if job.tools is not None else msgspec.structs.replace(job, format=None)


@functools.cache
def release() -> str:
    """The version of the package, as /version and the metric build_info tell it; "unknown" where it runs from a
    checkout that was never installed."""
    try:
        return version("headrace")
    except PackageNotFoundError:
        return "unknown"
