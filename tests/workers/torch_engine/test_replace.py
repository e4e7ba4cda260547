"""What replaces a module: the first attempt that gives what the original gives, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from workers.torch_engine.replace import Candidate, FuseReport, agrees, children_of, replace
from workers.torch_engine.shared_input import SharedInput, Slice, bounds


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


X = torch.arange(1.0, 9.0)


def candidate(owner: nn.Module, *factors: float, **fields: object) -> Candidate:
    attempts = [(Times(factor),) for factor in factors]
    return Candidate("times", owner, ("inner",), attempts, (X,), (X * 2,), **fields)  # type: ignore[arg-type]


def model() -> nn.ModuleDict:
    return nn.ModuleDict({"inner": Times(2), "other": Times(5)})


def test_the_first_attempt_that_agrees_is_installed() -> None:
    owner, report = model(), FuseReport()
    replace([candidate(owner, 3.0, 2.000001, 2.0)], report)
    assert owner["inner"].factor == 2.000001
    assert (report.fused, report.kept) == ({"times": 1}, {})


def test_an_original_that_no_attempt_equals_stays() -> None:
    owner, report = model(), FuseReport()
    original = owner["inner"]
    replace([candidate(owner, 2.1), candidate(owner, left_as="named")], report)
    assert owner["inner"] is original
    assert (report.fused, report.kept) == ({}, {"Times": 1, "named": 1})


def test_attempts_after_the_one_that_agrees_are_not_built() -> None:
    owner, built = model(), []

    def attempts():  # type: ignore[no-untyped-def]
        for factor in (3.0, 2.0, 4.0):
            built.append(factor)
            yield (Times(factor),)

    replace([Candidate("times", owner, ("inner",), attempts(), (X,), (X * 2,))], FuseReport())
    assert built == [3.0, 2.0]


def test_several_attributes_are_replaced_together_or_not_at_all() -> None:
    owner = model()
    pair = (Times(2), Times(4))
    both = Candidate("pair", owner, ("inner", "other"), [pair], (X,), (X * 2, X * 5))
    replace([both], FuseReport())
    assert [owner["inner"].factor, owner["other"].factor] == [2, 5]
    assert owner["inner"] is not pair[0]
    both.expected = (X * 2, X * 4)
    replace([both], FuseReport())
    assert (owner["inner"], owner["other"]) == pair


def test_an_error_counts_as_a_difference_only_where_the_candidate_says_so() -> None:
    def fails(x: torch.Tensor) -> torch.Tensor:
        raise TypeError("called in another way")

    def of(errors: tuple[type[Exception], ...]) -> Candidate:
        return Candidate("call", model(), ("inner",), [(fails,)], (X,), (X,), errors=errors)

    report = FuseReport()
    replace([of((Exception,))], report)
    assert report.kept == {"Times": 1}
    with pytest.raises(TypeError):
        replace([of(())], report)


def test_a_generator_sees_what_became_of_its_last_candidate() -> None:
    owner, seen = model(), []

    def candidates():  # type: ignore[no-untyped-def]
        for factor in (3.0, 2.0):
            yield candidate(owner, factor)
            seen.append(owner["inner"].factor)

    original = owner["inner"]
    original.factor = 7.0
    replace(candidates(), FuseReport())
    assert seen == [7.0, 2.0]


def test_children_are_found_while_they_are_replaced() -> None:
    tree = nn.ModuleDict({"a": model(), "b": model()})
    for owner, name, child in children_of(tree):
        if isinstance(child, Times):
            setattr(owner, name, Times(child.factor + 1))
    assert [child.factor for _, _, child in children_of(tree) if isinstance(child, Times)] == [3, 6, 3, 6]


@pytest.mark.parametrize(
    ("ours", "same"),
    [
        (X * 2 * (1 + 5e-6), True),
        (X * 2 + 0.01, False),
        ((X * 2).half(), False),
        ((X * 2)[:-1], False),
        (X * torch.nan, False),
        ((X * 2,), False),
    ],
)
def test_what_agrees(ours: object, same: bool) -> None:
    assert agrees(ours, X * 2) == same


def test_low_precision_may_differ_more() -> None:
    theirs = (X * 2).bfloat16()
    assert agrees((X * 2.02).bfloat16(), theirs)
    assert not agrees((X * 2.2).bfloat16(), theirs)


def test_projections_of_one_input_are_computed_once() -> None:
    class Counted(SharedInput):
        calls = 0

        def product(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return torch.cat([x, 2 * x, 3 * x], dim=-1)

    shared = Counted(8, 24)
    q, k, v = (Slice(shared, *ends) for ends in bounds([8, 8, 8]))
    assert [torch.equal(part(X), X * n) for n, part in enumerate((q, k, v), 1)] == [True] * 3
    assert shared.calls == 1
    other = X.clone()
    assert torch.equal(k(other), 2 * other)
    assert shared.calls == 2
