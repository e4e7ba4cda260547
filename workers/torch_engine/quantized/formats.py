"""How checkpoints store quantized weights: each Format says which tensors of a file belong to one weight, and makes of
them what is computed with (weights.py).

Which formats a checkpoint may have is told by its quantization_config (methods.py); which of them a weight has, by the
tensors that are there, since layers that were left alone lie between those that were not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from protocol.errors import StartError
from workers.torch_engine.quantized.weights import BLOCK, GROUP, Fp8Weight, IntWeight, QuantizedWeight

WIDE = "wide"  # of no kind that products are of
GROUPS = (32, 64, GROUP)  # of int4 that stay in 4 bits
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # output of each 4 bits of a word, from the lowest
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # magnitudes of e2m1; bit 3 is the sign


class Source(Protocol):
    """A tensor in a file, not read yet (safetensors' slices)."""

    def get_shape(self) -> list[int]: ...

    def get_dtype(self) -> str: ...

    def __getitem__(self, wanted: Any) -> torch.Tensor: ...


Parts = Mapping[str, Source]  # by the last part of their names


class Format(ABC):
    names: frozenset[str]  # of the tensors that it may store for a weight

    def __init__(self, stated: Mapping[str, Any]) -> None:
        """``stated``: the checkpoint's quantization_config."""
        self.stated = stated

    @abstractmethod
    def takes(self, parts: Parts) -> bool:
        """Whether these are the parts of one weight."""

    @abstractmethod
    def kind(self, parts: Parts) -> str:
        """What such a weight is read as, as far as shapes tell: fp8, int8, int4 or WIDE."""

    @abstractmethod
    def shape(self, parts: Parts) -> list[int]:
        """[outputs, inputs], or what else the model has there; nothing is read."""

    @abstractmethod
    def read(self, parts: Parts) -> QuantizedWeight | torch.Tensor:
        """A tensor where nothing is computed with such weights: widened to float32."""


class Fp8(Format):
    """e4m3 times a scale: for all, for each output, or for each block of 128 x 128. The scale may be called an inverse;
    it is multiplied with in any case."""

    names = frozenset({"weight", "weight_scale", "weight_scale_inv", "input_scale", "activation_scale"})

    def takes(self, parts: Parts) -> bool:
        return "weight" in parts and parts["weight"].get_dtype() == "F8_E4M3" and _scale_name(parts) is not None

    def kind(self, parts: Parts) -> str:
        return "fp8"

    def shape(self, parts: Parts) -> list[int]:
        return parts["weight"].get_shape()

    def read(self, parts: Parts) -> QuantizedWeight:
        values = parts["weight"][...]
        outputs, inputs = values.shape
        scale = parts[_scale_name(parts) or ""][...].float()
        found = next((parts[name] for name in ("input_scale", "activation_scale") if name in parts), None)
        given = None if found is None else found[...].float().reshape(-1)
        if given is not None and given.numel() != 1:
            given = None  # of another form: found anew for each row
        blocks = [-(-outputs // BLOCK), -(-inputs // BLOCK)]
        if scale.numel() == 1:
            return Fp8Weight(values, scale.reshape(1, 1).expand(outputs, 1).contiguous(), input_scale=_first(given))
        if scale.numel() == outputs:
            return Fp8Weight(values, scale.reshape(outputs, 1).contiguous(), input_scale=_first(given))
        if [n for n in scale.shape if n != 1] == [n for n in blocks if n != 1]:
            return Fp8Weight(values, scale.reshape(blocks).contiguous(), blocks=True)
        raise StartError(f"a scale of the shape {list(scale.shape)} for a weight of {[outputs, inputs]} is not known")


class Int8(Format):
    """int8 times a scale for each output, or for all: weights of W8A8 and of W8A16. Activations are not rounded."""

    names = frozenset({"weight", "weight_scale", "input_scale", "input_zero_point", "weight_zero_point"})

    def takes(self, parts: Parts) -> bool:
        return "weight" in parts and parts["weight"].get_dtype() == "I8" and "weight_scale" in parts

    def kind(self, parts: Parts) -> str:
        return "int8"

    def shape(self, parts: Parts) -> list[int]:
        return parts["weight"].get_shape()

    def read(self, parts: Parts) -> QuantizedWeight | torch.Tensor:
        codes, scale = parts["weight"][...], parts["weight_scale"][...].float()
        zeros = parts["weight_zero_point"][...] if "weight_zero_point" in parts else torch.zeros(1)
        return _of_int8(
            codes.to(torch.int16) - _by_output(zeros, codes, torch.int16), _by_output(scale, codes, torch.float32)
        )


class Packed(Format):
    """compressed-tensors' pack-quantized: along the inputs, the first in the lowest bits, each with 2^(bits - 1)
    added."""

    names = frozenset({"weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"})

    def takes(self, parts: Parts) -> bool:
        return {"weight_packed", "weight_scale", "weight_shape"} <= set(parts) and _dtype(
            parts, "weight_packed"
        ) == "I32"

    def kind(self, parts: Parts) -> str:
        return f"int{self._bits(parts)}"

    def shape(self, parts: Parts) -> list[int]:
        return [int(n) for n in parts["weight_shape"][...]]

    def read(self, parts: Parts) -> QuantizedWeight | torch.Tensor:
        outputs, inputs = self.shape(parts)
        words, scale = parts["weight_packed"][...], parts["weight_scale"][...]
        bits = self._bits(parts)
        codes = _unpacked(words, bits)[:, :inputs]
        scale = scale.reshape(outputs, -1)
        if "weight_zero_point" in parts:
            zeros = _unpacked(parts["weight_zero_point"][...].t(), bits).t()[:outputs]
        else:
            zeros = torch.full_like(scale, 1 << (bits - 1), dtype=torch.int16)
        index = parts["weight_g_idx"][...].long() if "weight_g_idx" in parts else None
        return _of_codes(codes, zeros, scale, bits, index if index is not None and bool((index >= 0).all()) else None)

    def _bits(self, parts: Parts) -> int:
        return 32 * parts["weight_packed"].get_shape()[1] // self.shape(parts)[1]


class Gptq(Format):
    """Words along the inputs, scales and zeros [groups, outputs]. Zeros are stored less one, but for gptq_v2."""

    names = frozenset({"qweight", "qzeros", "scales", "g_idx"})

    def takes(self, parts: Parts) -> bool:
        return {"qweight", "qzeros", "scales"} <= set(parts)

    def kind(self, parts: Parts) -> str:
        return f"int{self._bits}"

    def shape(self, parts: Parts) -> list[int]:
        rows, outputs = parts["qweight"].get_shape()
        return [outputs, rows * 32 // self._bits]

    @property
    def _bits(self) -> int:
        return int(self.stated.get("bits", 4))

    def read(self, parts: Parts) -> QuantizedWeight | torch.Tensor:
        bits = self._bits
        codes = _unpacked(parts["qweight"][...].t(), bits)
        less = 0 if self.stated.get("checkpoint_format") == "gptq_v2" else 1
        zeros = _unpacked(parts["qzeros"][...], bits).t() + less
        index = parts["g_idx"][...].long() if "g_idx" in parts else None
        return _of_codes(codes, zeros, parts["scales"][...].t(), bits, index)


class Awq(Format):
    """Words along the outputs, in an order of their own; scales and zeros [groups, outputs]."""

    names = Gptq.names

    def takes(self, parts: Parts) -> bool:
        return {"qweight", "scales"} <= set(parts)

    def kind(self, parts: Parts) -> str:
        return "int4"

    def shape(self, parts: Parts) -> list[int]:
        inputs, words = parts["qweight"].get_shape()
        return [words * 8, inputs]

    def read(self, parts: Parts) -> QuantizedWeight | torch.Tensor:
        scale = parts["scales"][...].t()
        codes = _outputs_of(parts["qweight"][...])
        zeros = _outputs_of(parts["qzeros"][...]) if "qzeros" in parts else torch.full_like(scale, 8, dtype=torch.int16)
        return _of_codes(codes, zeros, scale, 4, None)


class Nvfp4(Format):
    """e2m1, two in a byte along the inputs, the first in the low half; times an e4m3 for 16 inputs, times a scale for
    all (modelopt) or divided by one (compressed-tensors). No product here is of such weights: they are widened."""

    names = frozenset(
        {"weight", "weight_packed", "weight_scale", "weight_scale_2", "weight_global_scale", "input_scale",
         "input_global_scale"}
    )  # fmt: skip

    def takes(self, parts: Parts) -> bool:
        codes = "weight_packed" if "weight_packed" in parts else "weight"
        whole = "weight_scale_2" in parts or "weight_global_scale" in parts
        return codes in parts and _dtype(parts, codes) == "U8" and whole and _dtype(parts, "weight_scale") == "F8_E4M3"

    def kind(self, parts: Parts) -> str:
        return WIDE

    def shape(self, parts: Parts) -> list[int]:
        outputs, half = parts["weight_packed" if "weight_packed" in parts else "weight"].get_shape()
        return [outputs, 2 * half]

    def read(self, parts: Parts) -> torch.Tensor:
        codes = parts["weight_packed" if "weight_packed" in parts else "weight"][...]
        scale = parts["weight_scale"][...].float()
        if "weight_scale_2" in parts:
            scale = scale * parts["weight_scale_2"][...].float()
        else:
            scale = scale / parts["weight_global_scale"][...].float()
        return (_fp4(codes).view(len(codes), -1, 16) * scale[..., None]).flatten(1)


class Mxfp4(Format):
    """gpt-oss's experts: e2m1, two in a byte, in blocks of 32 inputs with a power of two (e8m0) each. The model has
    them turned: [experts, inputs, outputs]. They are widened."""

    names = frozenset({"blocks", "scales"})

    def takes(self, parts: Parts) -> bool:
        return set(parts) == self.names

    def kind(self, parts: Parts) -> str:
        return WIDE

    def shape(self, parts: Parts) -> list[int]:
        *experts, outputs, blocks, bytes_ = parts["blocks"].get_shape()
        return [*experts, 2 * blocks * bytes_, outputs]

    def read(self, parts: Parts) -> torch.Tensor:
        powers = parts["scales"][...].to(torch.int32) - 127
        return torch.ldexp(_fp4(parts["blocks"][...]), powers[..., None]).flatten(-2).transpose(-1, -2).contiguous()


OF_METHOD: dict[str, tuple[type[Format], ...]] = {
    "fp8": (Fp8,),
    "fbgemm_fp8": (Fp8,),
    "compressed-tensors": (Fp8, Int8, Packed, Nvfp4),
    "modelopt": (Fp8, Nvfp4),
    "gptq": (Gptq,),
    "awq": (Awq,),
    "mxfp4": (Mxfp4,),
}


def formats_of(stated: Mapping[str, Any]) -> list[Format]:
    """The formats that weights of a checkpoint with this quantization_config, let pass by methods.py, may have."""
    method = str(stated.get("quant_method") or "modelopt")
    if method == "auto-round":
        method = "awq" if "awq" in str(stated.get("packing_format")) else "gptq"
    return [kind(stated) for kind in OF_METHOD[method]]


# ------------------------------------------------------------------ bits


def _unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int16 [rows, n * 32 / bits] of int32 ``words`` [rows, n], the lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return (words[..., None] >> shifts & (1 << bits) - 1).to(torch.int16).flatten(-2)


def _outputs_of(words: torch.Tensor) -> torch.Tensor:
    """int16 [outputs, rows] of AWQ's ``words`` [rows, outputs / 8]."""
    places = torch.tensor(AWQ_ORDER).argsort()
    return _unpacked(words, 4).view(len(words), -1, 8)[..., places].flatten(1).t()


def _fp4(codes: torch.Tensor) -> torch.Tensor:
    """float32 [..., 2 n] of bytes [..., n]."""
    table = torch.tensor([*FP4, *(-value for value in FP4)])
    return table[torch.stack([codes & 15, codes >> 4], -1).long()].flatten(-2)


def _of_codes(
    codes: torch.Tensor, zeros: torch.Tensor, scale: torch.Tensor, bits: int, index: torch.Tensor | None
) -> QuantizedWeight | torch.Tensor:
    """Of codes [outputs, inputs], with zeros and scales [outputs, groups]; ``index`` [inputs]: the group of each input,
    None: one after another."""
    outputs, inputs = codes.shape
    size = inputs // scale.shape[1]
    order = None
    if index is not None and not torch.equal(index, torch.arange(inputs) // size):
        order = index.argsort(stable=True)
        if not torch.equal(index[order], torch.arange(inputs) // size):  # groups of different sizes
            return (codes - zeros[:, index]).float() * scale[:, index].float()
        codes = codes[:, order]
    if bits == 4 and size > GROUP and size % GROUP == 0:
        scale, zeros = (each.repeat_interleave(size // GROUP, 1) for each in (scale, zeros))
        size = GROUP
    if bits == 4 and size in GROUPS:
        kept = None if bool((zeros == 8).all()) else zeros.to(torch.uint8).contiguous()
        return IntWeight.of_codes(codes, scale.contiguous(), size, kept, order)
    numbers = (codes.view(outputs, -1, size) - zeros[..., None]).flatten(1)
    if bits == 8 and order is None and scale.shape[1] == 1:
        return _of_int8(numbers, scale.float())
    wide = (numbers.view(outputs, -1, size).float() * scale.float()[..., None]).flatten(1)
    return wide if order is None else torch.empty_like(wide).index_copy_(1, order, wide)


def _of_int8(numbers: torch.Tensor, scale: torch.Tensor) -> QuantizedWeight | torch.Tensor:
    """Of int16 [outputs, inputs] and scales [outputs, 1]; widened where 8 bits with a sign do not hold them."""
    if int(numbers.min()) < -128 or int(numbers.max()) > 127:
        return numbers.float() * scale
    return IntWeight(numbers.to(torch.int8), scale.contiguous(), numbers.shape[1], 8)


def _by_output(value: torch.Tensor, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[outputs, 1]"""
    return value.to(dtype).reshape(-1, 1).expand(len(codes), 1)


def _scale_name(parts: Parts) -> str | None:
    return next((name for name in ("weight_scale", "weight_scale_inv") if name in parts), None)


def _dtype(parts: Parts, name: str) -> str:
    return parts[name].get_dtype() if name in parts else ""


def _first(value: torch.Tensor | None) -> torch.Tensor | None:
    return None if value is None else value[0]
