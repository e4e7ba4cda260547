"""The CPU kernels and their door: plain C functions reached by ctypes, no torch headers.

The library is built with the package where there is a C++ compiler (setup.py) and is optional: without it
`load_kernels` says why and the engine keeps to torch; HEADRACE_REQUIRE_KERNELS=1 makes that a failure. Its threads are
its own (team.inc).
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable
from functools import cache
from importlib import machinery
from pathlib import Path

import numpy as np
import torch

from protocol.errors import StartError
from workers.native.packed import Packed, pointer
from workers.native.sources import digest
from workers.native.structs import DRAW, PANEL, Layer, Linear, Pass, Pool, Rule, Step, differences, make_step

__all__ = [
    "ACTIVATIONS", "DRAW", "PANEL", "Kernels", "KernelsUnavailable", "Layer", "Linear", "Packed", "Pass", "Pool",
    "Rule", "Step", "instruction_sets", "load_kernels", "make_step",
]  # fmt: skip

REQUIRE = "HEADRACE_REQUIRE_KERNELS"
ACTIVATIONS = ("silu", "gelu by tanh")

_P, _I, _F, _N = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int

_SIGNATURES: dict[str, list[type]] = {
    "set_threads": [_N],
    "linear": [_P, _P, _I, _P, _I, _I],
    "gate_up": [_P, _I, _P, _I, _P, _I, _I],
    "attention": [_P, _P, _P, _P, _I, _I, _P, _I],
    "store": [_P, _P, _P, _I, _I, _P, _I, _I, _I],
    "pass": [_P, _P, _P, _P, _P, _P, _P, _I, _P, _P, _P],
    "touch": [_P, _I],
    "rms_norm": [_P, _I, _P, _P, _I, _I, _F],
    "draw": [_P, _I, _P, _P, _I, _I],
    "rule_out": [_P, _I, _P, _P, _I, _I, _I],
    "rotary": [_P, _I, _I, _P, _P, _I, _P, _I, _I, _I, _I, _I],
}


class KernelsUnavailable(Exception):
    """The native library cannot be used here; the message says why."""


def instruction_sets() -> list[str]:
    """Those of this processor that a build may hold, best first."""
    found = ["base"]
    if platform.machine() in ("x86_64", "AMD64"):
        flags = set(torch.backends.cpu.get_cpu_capability().split())
        if "AVX2" in flags or "AVX512" in flags:
            found.insert(0, "avx2")
        if "AVX512" in flags:
            found.insert(0, "avx512")
    return found


class Kernels:
    """The functions of one instruction set. Tensors are float32 on the CPU unless said otherwise."""

    def __init__(self, library: ctypes.CDLL, instruction_set: str) -> None:
        self.instruction_set = instruction_set
        self.progress = ctypes.c_int64(0)  # grows while layers are computed
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, f"headrace_{name}_{instruction_set}")
            function.argtypes, function.restype = arguments, None
            setattr(self, "_" + name, function)

    _set_threads: Callable[..., None]
    _linear: Callable[..., None]
    _gate_up: Callable[..., None]
    _attention: Callable[..., None]
    _store: Callable[..., None]
    _pass: Callable[..., None]
    _touch: Callable[..., None]
    _rms_norm: Callable[..., None]
    _rotary: Callable[..., None]
    _draw: Callable[..., None]
    _rule_out: Callable[..., None]

    def set_threads(self, threads: int) -> None:
        """How many threads compute, the caller's among them. Of the process, and not while a call is under way."""
        self._set_threads(threads)

    def linear(self, x: torch.Tensor, packed: Packed, out: torch.Tensor) -> torch.Tensor:
        """out [M, N] = x [M, K] @ W^T + b. Rows of x and out may be strided, their elements not."""
        self._linear(packed.pointer, x.data_ptr(), x.stride(0), out.data_ptr(), out.stride(0), x.shape[0])
        return out

    def gate_up(self, x: torch.Tensor, packed: Packed, act: int, out: torch.Tensor) -> torch.Tensor:
        """out [M, N / 2] = act(gate) * up, where ``packed`` holds the gate's weights before those of up; both are
        whole panels. ``act`` indexes ACTIVATIONS."""
        self._gate_up(packed.pointer, act, x.data_ptr(), x.stride(0), out.data_ptr(), out.stride(0), x.shape[0])
        return out

    def attention(self, q: torch.Tensor, pool: Pool, step: Step, rule: Rule, out: torch.Tensor) -> torch.Tensor:
        """Paged attention. q [T, H, dk] (elements adjacent) against the pool into out [T, H, dv] (contiguous)."""
        self._attention(
            ctypes.addressof(step), ctypes.addressof(pool), ctypes.addressof(rule), q.data_ptr(), q.stride(0),
            q.stride(1), out.data_ptr(), q.shape[1],
        )  # fmt: skip
        return out

    def store(self, key: torch.Tensor, value: torch.Tensor, pool: Pool, slots: torch.Tensor) -> None:
        """key [T, KVH, dk] and value [T, KVH, dv] into the pool's slots (int64 [T]; -1: nowhere)."""
        self._store(
            ctypes.addressof(pool), slots.data_ptr(), key.data_ptr(), key.stride(0), key.stride(1), value.data_ptr(),
            value.stride(0), value.stride(1), key.shape[0],
        )  # fmt: skip

    def layers(
        self,
        layers: ctypes.Array[Layer],
        step: Step,
        pools: ctypes.Array[Pool],
        cosine: torch.Tensor,
        sine: torch.Tensor,
        x: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Decoder layers, one after another, of x [T, C] into out [T, C]; ``pools`` holds one for each, of the same
        number of key heads. cosine and sine [T, rot] with one row stride."""
        only = Pass(
            ctypes.addressof(layers), len(layers), cosine.data_ptr(), sine.data_ptr(), cosine.stride(0), None, None,
            None, 0.0,
        )  # fmt: skip
        self._pass(
            ctypes.addressof(only), ctypes.addressof(step), ctypes.addressof(pools), None, None, x.data_ptr(), None, 0,
            out.data_ptr(), None, ctypes.addressof(self.progress),
        )  # fmt: skip

    def logits(
        self,
        whole: Pass,
        step: Step,
        pools: ctypes.Array[Pool],
        ids: torch.Tensor | None,
        x: torch.Tensor | None,
        positions: torch.Tensor,
        rows: torch.Tensor,
        out: torch.Tensor,
        best: torch.Tensor,
    ) -> None:
        """out [k, vocabulary] = the logits of ``rows`` (int64 [k]) of a step, whose T tokens are ``ids`` (int64) or,
        without an embedding in ``whole``, x [T, C]; best (int64 [k]) = the largest of each row. ``positions`` (int64
        [T]) are rows of its cosines and sines."""
        self._pass(
            ctypes.addressof(whole), ctypes.addressof(step), ctypes.addressof(pools), pointer(ids),
            positions.data_ptr(), pointer(x), rows.data_ptr(), len(rows), out.data_ptr(), best.data_ptr(),
            ctypes.addressof(self.progress),
        )  # fmt: skip

    def touch(self, tensor: torch.Tensor) -> None:
        """Have the system give memory to a contiguous tensor that was made of untouched zeros. Changes no value, not
        even one that is written meanwhile."""
        self._touch(tensor.data_ptr(), tensor.nbytes)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> torch.Tensor:
        """x [T, C] (rows may be strided) normalised and scaled by weight [C] into out [T, C]."""
        self._rms_norm(x.data_ptr(), x.stride(0), weight.data_ptr(), out.data_ptr(), x.shape[0], x.shape[1], eps)
        return out

    def rotary(self, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """x [T, H, rot] rotated by the halves form; cosine and sine [T, rot] with one row stride."""
        self._rotary(
            x.data_ptr(), x.stride(0), x.stride(1), cosine.data_ptr(), sine.data_ptr(), cosine.stride(0),
            out.data_ptr(), out.stride(0), out.stride(1), x.shape[0], x.shape[1], x.shape[2],
        )  # fmt: skip
        return out

    def draw(self, logits: torch.Tensor, draws: np.ndarray) -> torch.Tensor:
        """int64 [T]: a token for each row of logits [T, vocabulary]. ``draws`` [T] of DRAW says how; a temperature of
        zero is greedy."""
        tokens = torch.empty(len(draws), dtype=torch.int64)
        self._draw(
            logits.data_ptr(), logits.stride(0), draws.ctypes.data, tokens.data_ptr(), len(draws), logits.shape[1]
        )
        return tokens

    def rule_out(self, logits: torch.Tensor, rows: np.ndarray, masks: np.ndarray, words: int) -> None:
        """Minus infinity into ``rows`` (int64 [m]) of logits [T, vocabulary], where the row's mask has no bit.
        ``masks``: addresses (uint64 [m]) of ``words`` int32 words each."""
        self._rule_out(
            logits.data_ptr(), logits.stride(0), rows.ctypes.data, masks.ctypes.data, words, len(rows), logits.shape[1]
        )


@cache
def load_kernels() -> Kernels:
    """The kernels for this processor. KernelsUnavailable with the reason where there are none; StartError where the
    environment requires them."""
    try:
        return _loaded()
    except KernelsUnavailable as reason:
        if os.environ.get(REQUIRE, "0") not in ("", "0"):
            raise StartError(f"{REQUIRE} is set, and there are no native CPU kernels: {reason}") from reason
        raise


def _loaded() -> Kernels:
    folder = Path(__file__).parent
    built = [p for suffix in machinery.EXTENSION_SUFFIXES for p in folder.glob(f"_kernels{suffix}")]
    if not built:
        raise KernelsUnavailable("not built: installing the package needs a C++ compiler for them")
    try:
        library = ctypes.CDLL(str(built[0]))
        _check_sources(library, folder)
        chosen = next(i for i in instruction_sets() if hasattr(library, f"headrace_linear_{i}"))
        if differ := differences(library, chosen):
            raise KernelsUnavailable(f"cannot be used: {'; '.join(differ)}")
        return Kernels(library, chosen)
    except (OSError, AttributeError, StopIteration) as error:
        raise KernelsUnavailable(f"cannot be loaded: {error}") from error


def _check_sources(library: ctypes.CDLL, folder: Path) -> None:
    """A checkout's library must be of the sources beside it; an installed one has none beside it."""
    sources = digest(folder)
    if sources is None:
        return
    library.headrace_sources.restype = ctypes.c_char_p
    if library.headrace_sources().decode() != sources:
        raise KernelsUnavailable(
            "built from other sources than those beside them: python setup.py build_ext --inplace builds them again"
        )
