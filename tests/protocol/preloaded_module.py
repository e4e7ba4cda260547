"""What the tests of protocol.preloaded load: a few things to do, good and bad."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from protocol.errors import StartError
from protocol.preloaded import LAST, Answer, Message, Tell, run


def load(arguments: Message, tell: Tell) -> Answer:
    (wanted,) = arguments
    if wanted == "refuse":
        raise StartError("there is nothing here to load")
    if wanted == "break":
        raise ZeroDivisionError("in the middle")
    if wanted == "vanish":
        os._exit(3)
    ballast = bytearray(64 << 20)
    tell(os.getpid(), len(ballast))
    return lambda question: answer(question) if ballast else ()


def answer(question: Message) -> Message:
    what, *values = question
    match what:
        case "echo":
            told: list[Any] = ["echo", os.getpid(), os.getppid(), *values]
        case "spin":
            while True:
                pass
        case "sleep":
            time.sleep(600)
        case "allocate":
            try:
                held = [bytearray(1 << 20) for _ in range(values[0])]
                told = ["held", len(held)]
            except MemoryError:
                told = ["no memory"]
        case "last":
            told = [LAST, "goodbye"]
        case _:
            sys.exit(5)
    return told


if __name__ == "__main__":
    run(load)
