"""No fast path is lost in silence: what each architecture takes is what the checked-in table says."""

from __future__ import annotations

import difflib

import pytest
import transformers

from tests.workers.torch_engine import paths
from tests.workers.torch_engine.cuda.triton_device import DEVICE
from workers.native.library import instruction_sets, load_kernels

RENEW = "python -m tests.workers.torch_engine.paths"
WRITTEN = paths.rows_of(paths.TABLE.read_text())

pytestmark = [
    pytest.mark.skipif(DEVICE.type != "cpu", reason="the table is of the interpreter"),
    pytest.mark.usefixtures("one_thread"),
]


def test_the_table_has_every_architecture_of_this_transformers():
    head, *names = [name for name in WRITTEN if not name.startswith("-")]
    assert head == f"transformers {transformers.__version__}", f"look at what changed, then {RENEW}"
    assert names == list(paths.ARCHITECTURES), RENEW
    assert len(names) >= 25
    assert load_kernels().instruction_set in instruction_sets()  # a table of what torch serves alone shows nothing


@pytest.mark.parametrize("name", paths.ARCHITECTURES)
def test_an_architecture_takes_the_path_that_it_took(name):
    found = paths.row(name)
    change = "".join(difflib.ndiff([WRITTEN.get(name, "\n")], [found]))
    assert found == WRITTEN.get(name), f"\n{change}\nif that is meant: {RENEW}"
