"""Replacing modules of a transformers model by kernels, without rewriting the model: one walk, one comparison, one
installation for every backend.

A backend yields candidates that it finds by structure: what may take the place of which attributes of a module, and
what the original gives for some input. Class names are no evidence (gemma's RMSNorm multiplies by 1 + w, olmo2 casts
elsewhere), so each candidate is run and compared with the original; one that differs is left to torch and named in the
report.
"""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}  # of the original's largest value
QKV = ("q_proj", "k_proj", "v_proj")
ROTARY = "apply_rotary_pos_emb"


@dataclass
class FuseReport:
    """How many modules of each kind were replaced, and which were left to torch."""

    fused: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)

    @property
    def path(self) -> str:
        """The fastest kind of path through the model that was found: one call for the whole pass, layers as one call
        each or several, modules one by one, or torch alone."""
        for kind, path in {"pass": "whole pass", "layer": "fused layers"}.items():
            if self.fused[kind]:
                return path
        return "fused modules" if self.fused.total() else "torch"

    def __str__(self) -> str:
        said = ", ".join(f"{count} {kind}" for kind, count in sorted(self.fused.items())) or "nothing replaced"
        left = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kept.items()))
        return said + (f"; left to torch: {left}" if left else "")


@dataclass
class Candidate:
    """What may take the place of ``owner``'s attributes ``names``: modules, or functions in the place of forwards.

    ``attempts``, one callable for each name, are built one after another until one gives ``expected`` (one tensor for
    each name) when called with ``inputs`` and ``keywords``. Without ``expected`` the first attempt is installed.
    """

    kind: str  # of the replacement, in the report
    owner: nn.Module
    names: tuple[str, ...]
    attempts: Iterable[tuple[Callable[..., Any], ...]]
    inputs: tuple[Any, ...] = ()
    expected: tuple[torch.Tensor, ...] | None = None
    keywords: dict[str, Any] = field(default_factory=dict)
    left_as: str | None = None  # how the report names the original if none agrees; None: by its class
    errors: tuple[type[Exception], ...] = ()  # of a call, that count as a difference: it is called in another way

    def first_that_agrees(self) -> tuple[Callable[..., Any], ...] | None:
        return next((attempt for attempt in self.attempts if self._agrees(attempt)), None)

    def _agrees(self, attempt: tuple[Callable[..., Any], ...]) -> bool:
        if self.expected is None:
            return True
        try:
            found = [ours(*self.inputs, **self.keywords) for ours in attempt]
        except torch.OutOfMemoryError:
            raise
        except self.errors:
            return False
        return all(agrees(ours, theirs) for ours, theirs in zip(found, self.expected, strict=True))


def replace(candidates: Iterable[Candidate], report: FuseReport) -> None:
    """Install what agrees. ``candidates`` may be a generator, which goes on when its last candidate was decided."""
    for candidate in candidates:
        _decide(candidate, report)
        del candidate  # and with it the original's weights, before the next ones are packed


def _decide(candidate: Candidate, report: FuseReport) -> None:
    ours = candidate.first_that_agrees()
    if ours is None:
        original = getattr(candidate.owner, candidate.names[0])
        report.kept[candidate.left_as or type(original).__name__] += 1
        return
    for name, module in zip(candidate.names, ours, strict=True):
        setattr(candidate.owner, name, module)
    report.fused[candidate.kind] += 1


def agrees(ours: Any, theirs: torch.Tensor) -> bool:
    """Whether two outputs are the same but for the order of summation."""
    if not isinstance(ours, torch.Tensor) or ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    scale = theirs.float().abs().max().clamp_min(1e-6)
    return bool((ours.float() - theirs.float()).abs().max() / scale < TOLERANCE.get(theirs.dtype, 1e-4))


class SeededInput:
    """Normal random tensors, the same at each load."""

    def __init__(self, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device, dtype or self.dtype)


def children_of(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(owner, name, child) for every module below ``model``; those found may be replaced meanwhile."""
    for owner in list(model.modules()):
        for name, child in list(owner.named_children()):
            yield owner, name, child


def like(ours: nn.Module, original: nn.Module) -> nn.Module:
    """``ours`` with what the model around it may ask ``original`` for."""
    for key, value in vars(original).items():
        if not key.startswith("_") and isinstance(value, str | int | float):
            setattr(ours, key, value)
    return ours


def norm_candidates(
    model: nn.Module,
    sample: SeededInput,
    make: Callable[[nn.Parameter, torch.Tensor, float], nn.Module],
    widest: int | None = None,
) -> Iterator[Candidate]:
    """RMSNorms. ``make`` builds one of (weight, gain, eps), where the gain is the weight or 1 + the weight; ``widest``:
    the most numbers that it can normalise."""
    for owner, name, child in children_of(model):
        weight = getattr(child, "weight", None)
        eps = getattr(child, "variance_epsilon", getattr(child, "eps", None))
        if "RMSNorm" not in type(child).__name__ or not isinstance(weight, nn.Parameter) or weight.dim() != 1:
            continue
        if not isinstance(eps, float) or (widest is not None and len(weight) > widest):
            yield Candidate("norm", owner, (name,), ())
            continue
        x = sample(3, len(weight)) * 2
        gains = (weight.detach(), 1 + weight.detach().float())
        attempts = [(make(weight, gain, eps),) for gain in gains]
        yield Candidate("norm", owner, (name,), attempts, (x,), (child(x),))


def rotary_candidates(
    model: nn.Module, make: Callable[[Callable[..., Any]], Callable[..., Any] | None]
) -> Iterator[Candidate]:
    """Attentions whose forward calls `apply_rotary_pos_emb`: it is given a copy of that forward with another one.

    ``make`` returns what takes the place of a model's own function, None if that rotates in another way.
    """
    forwards: dict[type, types.FunctionType | None] = {}
    for module in model.modules():
        kind, forward = type(module), type(module).forward
        if not isinstance(forward, types.FunctionType) or ROTARY not in forward.__code__.co_names:
            continue
        if kind not in forwards:
            ours = make(forward.__globals__[ROTARY])
            forwards[kind] = None if ours is None else _with_rotary(forward, ours)
        copied = forwards[kind]
        attempts = [] if copied is None else [(types.MethodType(copied, module),)]
        yield Candidate("rotary", module, ("forward",), attempts, left_as="rotary")


def _with_rotary(forward: types.FunctionType, ours: Callable[..., Any]) -> types.FunctionType:
    """A copy of ``forward`` that calls ``ours`` for its rotary embedding; no other model in the process changes."""
    known = {**forward.__globals__, ROTARY: ours}
    copied = types.FunctionType(forward.__code__, known, forward.__name__, forward.__defaults__, forward.__closure__)
    copied.__kwdefaults__ = forward.__kwdefaults__
    return copied
