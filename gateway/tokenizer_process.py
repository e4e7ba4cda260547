"""What the process of gateway/tokenizer.py runs (``python -m`` this module): the tokenizers library, and nothing else
of a model."""

from __future__ import annotations

import logging

import msgspec
from tokenizers import Tokenizer

from protocol.errors import StartError
from protocol.messages import unpack_ids
from protocol.preloaded import LAST, Answer, Message, Tell, run

log = logging.getLogger("headrace.gateway")

LARGE = 1 << 18  # bytes of text or ids after which a worker's memory is given back, by its end


def load(arguments: Message, tell: Tell) -> Answer:
    """``arguments``: tokenizer.json."""
    (text,) = arguments
    try:
        tokenizer = Tokenizer.from_str(text.decode("utf-8"))
    except Exception as error:  # the library raises no other type
        raise StartError(f"tokenizer.json cannot be read ({error})") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tell()
    return lambda question: answer(tokenizer, question)


def answer(tokenizer: Tokenizer, question: Message) -> Message:
    """``("encode", text, add special tokens)`` -> ``("ids", count, JSON array)``;
    ``("decode", int32 bytes, skip special tokens)`` -> ``("text", text)``;
    ``("strings", int32 bytes, False)`` -> ``("strings", JSON array)``; or ``("refused", message)``."""
    what, given, flag = question
    try:
        if what == "encode":
            (encoded,) = tokenizer.encode_batch_fast([given], add_special_tokens=flag)
            ids = encoded.ids
            told: Message = ("ids", len(ids), msgspec.json.encode(ids))
        elif what == "strings":
            texts = [tokenizer.id_to_token(token_id) or "" for token_id in unpack_ids(given)]
            told = ("strings", msgspec.json.encode(texts))
        else:
            told = ("text", tokenizer.decode(list(unpack_ids(given)), skip_special_tokens=flag))
    except MemoryError:
        return (LAST, "refused", "to tokenize this takes more memory than there is for one text")
    except Exception as error:
        log.error("a text could not be tokenized: %s", type(error).__name__)
        told = ("refused", "this cannot be tokenized")
    return (LAST, *told) if len(given) >= LARGE else told


if __name__ == "__main__":
    run(load)
