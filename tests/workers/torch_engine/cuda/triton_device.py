"""Where the Triton kernels of the tests run: compiled on a GPU where there is one, else in Triton's interpreter.

Whether they are interpreted is settled when triton is first imported (tests/conftest.py asks for it in time).
"""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="the kernels need triton (on Linux: pip install triton)")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu" and type(triton.language.max).__name__ != "InterpretedFunction":
    pytest.skip("triton was loaded without its interpreter: TRITON_INTERPRET=1", allow_module_level=True)

on_gpu = pytest.mark.skipif(DEVICE.type == "cpu", reason="the interpreter has no products of bfloat16")
