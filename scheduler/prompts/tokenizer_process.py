"""The process that loads template and tokenizer, and what its workers do with a job (``python -m`` this module).

What crosses: a job's bytes in, token ids or an error of the one error tree out.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import msgspec

from protocol.errors import EngineFailed, InvalidRequest, RequestError, ServiceError, StructureNotSupported
from protocol.jobs import decode_job, given_sampling
from protocol.messages import Job, encode, pack_ids
from protocol.preloaded import LAST, Answer, Message, Tell, run
from scheduler.prompts.length_bound import longest_token
from scheduler.prompts.tokenization import Prompts, hide_torch
from scheduler.prompts.tokenizer_info import tokenizer_info

log = logging.getLogger("headrace.scheduler")

LARGE = 1 << 18  # bytes of a job after which a worker's memory is given back, by its end

_decode_accepted = msgspec.msgpack.Decoder(Job).decode


def load(arguments: Message, tell: Tell) -> Answer:
    """``arguments`` as `Prompts.load` takes them. Told: the card, tokenizer.json or None, and what
    /tokenizer_info says. What a first request of its kind would wait for is built after that, once for all workers."""
    hide_torch()
    prompts = Prompts.load(*arguments)
    text = prompts.tokenizer_json()
    prompts.longest_token = longest_token(text) if text is not None else None
    tell(encode(prompts.card("", 0)), text, tokenizer_info(prompts.tokenizer, prompts.max_model_len))
    prompts.prepare()
    with contextlib.suppress(StructureNotSupported):  # each request for structure is told so
        prompts.grammars()
    return lambda question: answer(prompts, question)


def answer(prompts: Prompts, question: Message) -> Message:
    """``question``: whether a producer wrote the job or we did, its bytes, most tokens of a context now.
    ``("ids", [int32 bytes], job)``, the job as bytes of ours if it was a push; or ``("refused", class, message, param,
    code)``."""
    push, body, max_model_len = question
    try:
        prompts.max_model_len = max_model_len
        job = prompts.as_accepted(decode_job(body)) if push else _decode_accepted(body)
        ids = prompts.ids(job)
        if push and prompts.defaults:
            job = prompts.with_defaults(job, given_sampling(body), ids)
        told: list[Any] = ["ids", [pack_ids(each) for each in ids], encode(job) if push else None]
    except (RequestError, ServiceError) as error:
        told = refused(error)
    except MemoryError:
        param = "prompt" if b"messages" not in body else "messages"
        too_much = InvalidRequest("to prepare this prompt takes more memory than there is for one", param=param)
        return (LAST, *refused(too_much))
    except Exception as error:
        log.error("a job could not be prepared: %s", type(error).__name__)
        told = refused(EngineFailed("the prompt could not be prepared for the model"))
    return (LAST, *told) if len(body) >= LARGE else told


def refused(error: RequestError | ServiceError) -> list[Any]:
    return ["refused", type(error).__name__, error.message, error.param, error.wire_code]


if __name__ == "__main__":
    run(load)
