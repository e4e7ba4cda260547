"""What C and Python hand each other lies where both think, and a library that is not of these sources is refused."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from workers.native import library, structs
from workers.native.library import KernelsUnavailable, instruction_sets, load_kernels
from workers.native.structs import Linear, Rule

FOLDER = Path(library.__file__).parent


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HEADRACE_REQUIRE_KERNELS", "0")
    load_kernels.cache_clear()
    yield
    load_kernels.cache_clear()


@pytest.mark.parametrize("instruction_set", instruction_sets())
def test_both_sides_agree_on_every_field(instruction_set: str) -> None:
    built = ctypes.CDLL(str(next(FOLDER.glob("_kernels*.so"))))
    assert structs.differences(built, instruction_set) == []
    assert len(structs.layout()) == 1 + sum(1 + len(s._fields_) for s in structs.STRUCTURES) + 1 + len(structs.DRAW)


def changed(structure: type[ctypes.Structure], fields: list[tuple[str, type]]) -> type[ctypes.Structure]:
    return type(structure.__name__, (ctypes.Structure,), {"_fields_": fields})


LONGER = changed(Linear, [*Linear._fields_, ("zero_point", ctypes.c_void_p)])
SWAPPED = changed(Rule, [Rule._fields_[1], Rule._fields_[0], *Rule._fields_[2:]])
NARROWER = changed(Linear, [(name, ctypes.c_int32 if name == "kind" else kind) for name, kind in Linear._fields_])


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (LONGER, "Linear.zero_point is .* missing in the library"),
        (SWAPPED, "Rule.scale is .* Rule.softcap is"),
        (NARROWER, r"Linear.kind is \(offset, bytes\) \(40, 8\) in the library and \(40, 4\) here"),
    ],
)
def test_a_structure_changed_on_one_side_is_refused_at_load(
    monkeypatch: pytest.MonkeyPatch, other: type[ctypes.Structure], told: str
) -> None:
    kept = [s for s in structs.STRUCTURES if s.__name__ != other.__name__]
    monkeypatch.setattr(structs, "STRUCTURES", (*kept, other))
    with pytest.raises(KernelsUnavailable, match=told):
        load_kernels()


def test_a_library_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for path in [*FOLDER.glob("*.inc"), *FOLDER.glob("*.cpp"), *FOLDER.glob("_kernels*.so")]:
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    load_kernels()
    load_kernels.cache_clear()
    with (tmp_path / "vectors.inc").open("a") as source:
        source.write("// a later change\n")
    with pytest.raises(KernelsUnavailable, match="built from other sources"):
        load_kernels()
    for path in [*tmp_path.glob("*.inc"), *tmp_path.glob("*.cpp")]:  # as in an installed package
        path.unlink()
    load_kernels()
