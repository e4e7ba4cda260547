"""Where the Triton kernels of the tests run: compiled on a GPU where there is one, else in Triton's interpreter.

Whether they are interpreted is settled when triton is first imported (tests/conftest.py asks for it in time).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from workers.torch_engine import verify

triton = pytest.importorskip("triton", reason="the kernels need triton (on Linux: pip install triton)")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu" and type(triton.language.max).__name__ != "InterpretedFunction":
    pytest.skip("triton was loaded without its interpreter: TRITON_INTERPRET=1", allow_module_level=True)


@contextmanager
def short_samples() -> Iterator[None]:
    """What a load compares is shorter in the interpreter, which takes a millisecond for each row of each kernel."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE.type == "cpu":
            from workers.torch_engine.cuda import modules  # needs triton, which is settled above

            patch.setattr(modules, "TEXT", 4)
            patch.setattr(modules, "ROUTED", 8)
            patch.setattr(verify, "LENGTH", 10)  # still longer than a block of the tests
        yield


on_gpu = pytest.mark.skipif(DEVICE.type == "cpu", reason="the interpreter has no products of bfloat16")


def mend_rounding() -> None:
    """Triton 3.9's interpreter loses the carry where rounding to FP8 fills the mantissa (31.9 becomes 16): torch rounds
    in its place, as a GPU does."""
    interpreter = triton.runtime.interpreter
    own = interpreter._convert_float

    def convert(given, source, target, mode):
        if target != triton.language.float8e4nv or source != triton.language.float32:
            return own(given, source, target, mode)
        return torch.from_numpy(given.copy()).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    interpreter._convert_float = convert


if DEVICE.type == "cpu":
    mend_rounding()
