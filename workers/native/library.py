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

REQUIRE = "HEADRACE_REQUIRE_KERNELS"
PANEL = 16  # outputs in a panel of packed weights, tokens in a panel of the pool
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
ACTIVATIONS = ("silu", "gelu by tanh")
TASK_ROWS = 96  # query positions times heads of a group that one task of attention takes: its buffers fit the L2 cache

_P, _I, _F, _N = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int


class Linear(ctypes.Structure):
    _fields_ = [("weight", _P), ("scale", _P), ("bias", _P), ("N", _I), ("K", _I), ("kind", _I)]


class Step(ctypes.Structure):
    _fields_ = [
        ("tasks", _P), ("tables", _P), ("starts", _P), ("contexts", _P), ("slots", _P),
        ("task_count", _I), ("width", _I), ("T", _I), ("tile", _I),
    ]  # fmt: skip
    arrays: tuple[np.ndarray | torch.Tensor, ...]  # whose memory it points to


class Rule(ctypes.Structure):
    _fields_ = [("scale", _F), ("softcap", _F), ("window", _I), ("sinks", _P)]


class Pool(ctypes.Structure):
    _fields_ = [
        ("keys", _P), ("values", _P), ("kv_heads", _I), ("key_size", _I), ("value_size", _I), ("block_size", _I),
    ]  # fmt: skip


class Layer(ctypes.Structure):
    _fields_ = [
        ("qkv", Linear), ("o", Linear), ("gate_up", Linear), ("down", Linear),
        ("norms", _P * 6), ("eps", _F * 6), ("rule", Rule), ("heads", _I), ("act", _I), ("rot", _I),
    ]  # fmt: skip


class Pass(ctypes.Structure):
    _fields_ = [
        ("layers", _P), ("count", _I), ("cosine", _P), ("sine", _P), ("angle_row", _I), ("embedding", _P), ("head", _P),
        ("norm", _P), ("eps", _F),
    ]  # fmt: skip


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
    "rotary": [_P, _I, _I, _P, _P, _I, _P, _I, _I, _I, _I, _I],
}


DRAW = np.dtype([("temperature", "f4"), ("top_p", "f4"), ("min_p", "f4"), ("uniform", "f4"), ("top_k", "i8")])


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
            ctypes.addressof(whole), ctypes.addressof(step), ctypes.addressof(pools), _pointer(ids),
            positions.data_ptr(), _pointer(x), rows.data_ptr(), len(rows), out.data_ptr(), best.data_ptr(),
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


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def make_step(tables: np.ndarray, starts: np.ndarray, contexts: np.ndarray, slots: torch.Tensor, group: int) -> Step:
    """What attention is told of a step: int32 tables [S, width], starts [S + 1], contexts [S] after the step, and
    slots int64 [T]. Each sequence is cut into tasks of TASK_ROWS rows for ``group`` query heads to a key head; those
    with most to read come first, so that no thread is left with a long one at the end."""
    tile = max(1, TASK_ROWS // group)
    if len(slots) == len(contexts):  # decodes alone, or prompts of one token
        tasks = np.empty((len(contexts), 3), np.int32)
        tasks[:, 0] = tasks[:, 1] = tasks[:, 2] = np.argsort(-contexts, kind="stable")
        tasks[:, 2] += 1
    else:
        counts = np.diff(starts)
        cuts = -(-counts // tile)
        sequence = np.repeat(np.arange(len(counts), dtype=np.int32), cuts)
        nth = np.arange(len(sequence)) - np.repeat(np.cumsum(cuts) - cuts, cuts)
        begin = starts[sequence] + nth * tile
        end = np.minimum(begin + tile, starts[sequence + 1])
        cost = (contexts[sequence] - (starts[sequence + 1] - end)) * (end - begin)
        tasks = np.ascontiguousarray(np.stack([sequence, begin, end], 1)[np.argsort(-cost, kind="stable")], np.int32)
    step = Step(
        tasks.ctypes.data, tables.ctypes.data, starts.ctypes.data, contexts.ctypes.data, slots.data_ptr(),
        len(tasks), tables.shape[1], len(slots), tile,
    )  # fmt: skip
    step.arrays = (tasks, tables, starts, contexts, slots)
    return step


class Packed:
    """A weight [N, K] in panels of 16 outputs, [ceil(N/16), K, 16], in the precision that it came in.

    float16 is widened to float32 (no lossless shorter form that is quick to widen); int8 is made from any
    precision on request, symmetric, one scale per output.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, *, int8: bool = False) -> None:
        outputs, inputs = weight.shape
        scale: torch.Tensor | None = None
        if int8:
            wide = weight.float()
            scale = (wide.abs().amax(dim=1) / 127).clamp_min(1e-12)
            weight = (wide / scale[:, None]).round().to(torch.int8)
            scale = torch.nn.functional.pad(scale, (0, -outputs % PANEL)).contiguous()
        elif weight.dtype == torch.float16:
            weight = weight.float()
        if outputs % PANEL:
            weight = torch.nn.functional.pad(weight, (0, 0, 0, -outputs % PANEL))
        panels = weight.view(-1, PANEL, inputs).transpose(1, 2).contiguous()
        self._keep(panels, outputs, scale, None if bias is None else bias.detach().float().contiguous())

    def _keep(self, panels: torch.Tensor, outputs: int, scale: torch.Tensor | None, bias: torch.Tensor | None) -> None:
        self.weight, self.outputs, self.inputs = panels, outputs, panels.shape[1]
        self.scale, self.bias, self.kind = scale, bias, KINDS[panels.dtype]
        self.linear = Linear(panels.data_ptr(), _pointer(scale), _pointer(bias), self.outputs, self.inputs, self.kind)
        self.pointer = ctypes.addressof(self.linear)

    def unpacked(self) -> torch.Tensor:
        """float32 [N, K]: the weight as it is computed with."""
        rows = self.weight.float().transpose(1, 2).reshape(-1, self.inputs)[: self.outputs]
        return rows if self.scale is None else rows * self.scale[: self.outputs, None]

    @classmethod
    def concat(cls, parts: list[Packed]) -> Packed | None:
        """One for several products of the same input; None where their panels do not line up."""
        first = parts[0]
        if any(p.kind != first.kind or p.inputs != first.inputs for p in parts):
            return None
        if any(p.outputs % PANEL for p in parts[:-1]):
            return None
        whole = cls.__new__(cls)
        biases = [torch.zeros(p.outputs) if p.bias is None else p.bias for p in parts]
        whole._keep(
            torch.cat([p.weight for p in parts]),
            sum(p.outputs for p in parts),
            None if first.scale is None else torch.cat([p.scale for p in parts if p.scale is not None]),
            torch.cat(biases) if any(p.bias is not None for p in parts) else None,
        )
        return whole


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
        chosen = next(i for i in instruction_sets() if hasattr(library, f"headrace_linear_{i}"))
        return Kernels(library, chosen)
    except (OSError, AttributeError, StopIteration) as error:
        raise KernelsUnavailable(f"cannot be loaded: {error}") from error
