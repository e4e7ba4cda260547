"""Counting what a step launches: kernels of Triton, interpreted or not, and operations of torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter, jit

from tests.workers.torch_engine.cuda.triton_device import DEVICE

# Operations that make tensors or views of them and compute nothing.
FREE = {
    "view", "_unsafe_view", "reshape", "alias", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze", "select",
    "slice", "split", "split_with_sizes", "unbind", "as_strided", "detach", "empty", "new_empty", "empty_like",
    "empty_strided", "lift_fresh", "_reshape_alias", "narrow", "chunk", "diagonal", "movedim", "sym_size",
}  # fmt: skip


class _Counter(TorchDispatchMode):
    def __init__(self, launches: Counter[str]) -> None:
        super().__init__()
        self.launches = launches
        self.off = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not self.off and name not in FREE:
            self.launches[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Launches by name: operations of torch that compute, and kernels of Triton, whatever their grid."""
    launches: Counter[str] = Counter()
    mode = _Counter(launches)
    kind, method = (interpreter.GridExecutor, "__call__") if DEVICE.type == "cpu" else (jit.JITFunction, "run")
    real = getattr(kind, method)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        launches[self.fn.__name__] += 1
        mode.off = True  # the interpreter copies tensors
        try:
            return real(self, *args, **kwargs)
        finally:
            mode.off = False

    setattr(kind, method, call)
    try:
        with mode:
            yield launches
    finally:
        setattr(kind, method, real)


def of_a_layer(few: Counter[str], many: Counter[str], layers: int) -> dict[str, float]:
    """What each of ``layers`` more layers launches."""
    return {name: (many[name] - few[name]) / layers for name in many if many[name] != few[name]}
