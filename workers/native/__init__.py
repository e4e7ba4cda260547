"""The CPU kernels and their door: plain C functions reached by ctypes, no torch headers.

The library is built with the package where there is a C++ compiler (setup.py) and is optional: without it
`load_kernels` says why and the engine keeps to torch. It is linked without an OpenMP runtime of its own
and finds torch's, which is mapped already: two runtimes in one process would fight for the cores.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from functools import cache
from importlib import machinery
from pathlib import Path

import torch

PANEL = 16  # outputs in a panel of packed weights
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}

_P, _I, _F, _N = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_SIGNATURES: dict[str, list[type]] = {
    "linear": [_P, _I, _P, _N, _P, _P, _P, _I, _I, _I, _I],
    "attention": [_P, _I, _I, _P, _P, _P, _P, _P, _I, _P, _I, _P, _P, _I, _I, _I, _I, _I, _I, _F, _F, _I, _P],
    "store": [_P, _I, _I, _P, _P, _P, _I, _I, _I, _I],
    "rms_norm": [_P, _I, _P, _P, _I, _I, _F],
    "gated": [_P, _P, _I, _P, _I, _I, _N],
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


def _mapped_openmp() -> list[str]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sorted({line.split()[-1] for line in lines if any(n in line for n in ("libgomp", "libomp", "libiomp"))})


class Kernels:
    """The functions of one instruction set. Tensors are float32 on the CPU unless said otherwise."""

    def __init__(self, library: ctypes.CDLL, instruction_set: str) -> None:
        self.instruction_set = instruction_set
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, f"headrace_{name}_{instruction_set}")
            function.argtypes, function.restype = arguments, None
            setattr(self, "_" + name, function)

    _linear: Callable[..., None]
    _attention: Callable[..., None]
    _store: Callable[..., None]
    _rms_norm: Callable[..., None]
    _gated: Callable[..., None]
    _rotary: Callable[..., None]

    def linear(self, x: torch.Tensor, packed: Packed, out: torch.Tensor) -> torch.Tensor:
        """out [M, N] = x [M, K] @ W^T + b. Rows of x and out may be strided, their elements not."""
        self._linear(
            x.data_ptr(), x.stride(0), packed.weight.data_ptr(), packed.kind, _pointer(packed.scale),
            _pointer(packed.bias), out.data_ptr(), out.stride(0), x.shape[0], packed.outputs, packed.inputs,
        )  # fmt: skip
        return out

    def attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        tables: torch.Tensor,
        starts: torch.Tensor,
        contexts: torch.Tensor,
        *,
        scale: float,
        softcap: float = 0.0,
        window: int = 0,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """Paged attention. q [T, H, dk], out [T, H, dv] contiguous; pools [blocks, block size, KVH, d] (any strides,
        d contiguous); tables int32 [S, width], starts int32 [S + 1], contexts int32 [S]; sinks [H]."""
        self._attention(
            q.data_ptr(), q.stride(0), q.stride(1), k.data_ptr(), _strides(k), v.data_ptr(), _strides(v),
            out.data_ptr(), out.stride(0), tables.data_ptr(), tables.stride(0), starts.data_ptr(), contexts.data_ptr(),
            contexts.shape[0], q.shape[1], k.shape[2], k.shape[3], v.shape[3], k.shape[1], scale, softcap, window,
            _pointer(sinks),
        )  # fmt: skip

    def store(self, x: torch.Tensor, pool: torch.Tensor, slots: torch.Tensor) -> None:
        """Rows of x [T, KVH, d] into the pool's slots (int64 [T]; -1: nowhere)."""
        self._store(
            x.data_ptr(), x.stride(0), x.stride(1), pool.data_ptr(), _strides(pool), slots.data_ptr(), x.shape[0],
            pool.shape[2], pool.shape[3], pool.shape[1],
        )  # fmt: skip

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> torch.Tensor:
        """x [T, C] (rows may be strided) normalised and scaled by weight [C] into out [T, C]."""
        self._rms_norm(x.data_ptr(), x.stride(0), weight.data_ptr(), out.data_ptr(), x.shape[0], x.shape[1], eps)
        return out

    def gated(self, gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor, kind: int) -> torch.Tensor:
        """out [T, F] = act(gate) * up; kind 0: silu, 1: gelu by tanh. gate and up share one row stride."""
        self._gated(gate.data_ptr(), up.data_ptr(), gate.stride(0), out.data_ptr(), out.shape[0], out.shape[1], kind)
        return out

    def rotary(self, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """x [T, H, rot] turned by the halves form; cosine and sine [T, rot] with one row stride."""
        self._rotary(
            x.data_ptr(), x.stride(0), x.stride(1), cosine.data_ptr(), sine.data_ptr(), cosine.stride(0),
            out.data_ptr(), out.stride(0), out.stride(1), x.shape[0], x.shape[1], x.shape[2],
        )  # fmt: skip
        return out


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _strides(pool: torch.Tensor) -> ctypes.Array[ctypes.c_int64]:
    return (_I * 3)(*pool.stride()[:3])


class Packed:
    """A weight [N, K] in panels of 16 outputs, [ceil(N/16), K, 16], in the precision that it came in.

    float16 is widened to float32 (no lossless shorter form that is quick to widen); int8 is made from any
    precision on request, symmetric, one scale per output.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, *, int8: bool = False) -> None:
        self.outputs, self.inputs = weight.shape
        self.scale: torch.Tensor | None = None
        if int8:
            wide = weight.float()
            scale = (wide.abs().amax(dim=1) / 127).clamp_min(1e-12)
            weight = (wide / scale[:, None]).round().to(torch.int8)
            self.scale = torch.nn.functional.pad(scale, (0, -self.outputs % PANEL)).contiguous()
        elif weight.dtype == torch.float16:
            weight = weight.float()
        self.kind = KINDS[weight.dtype]
        if self.outputs % PANEL:
            weight = torch.nn.functional.pad(weight, (0, 0, 0, -self.outputs % PANEL))
        self.weight = weight.view(-1, PANEL, self.inputs).transpose(1, 2).contiguous()
        self.bias = None if bias is None else bias.float().contiguous()


@cache
def load_kernels() -> Kernels:
    """The kernels for this processor. KernelsUnavailable with the reason where there are none."""
    folder = Path(__file__).parent
    built = [p for suffix in machinery.EXTENSION_SUFFIXES for p in folder.glob(f"_kernels{suffix}")]
    if not built:
        raise KernelsUnavailable("not built: installing the package needs a C++ compiler for them")
    runtimes = _mapped_openmp()
    if len(runtimes) != 1:
        raise KernelsUnavailable(f"torch maps {len(runtimes)} OpenMP runtimes, not one")
    try:
        ctypes.CDLL(runtimes[0], mode=ctypes.RTLD_GLOBAL)  # its symbols are what the library links to
        library = ctypes.CDLL(str(built[0]))
        chosen = next(i for i in instruction_sets() if hasattr(library, f"headrace_linear_{i}"))
        return Kernels(library, chosen)
    except OSError as error:
        raise KernelsUnavailable(f"cannot be loaded: {error}") from error
