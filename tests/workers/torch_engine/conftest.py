from __future__ import annotations

import pytest

from tests.models import tiny_model
from tests.workers.torch_engine.parity import make_engine


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_engine(tiny_model(tmp_path_factory, "llama"))


@pytest.fixture
def engine(llama):
    yield llama
    llama.reset()
