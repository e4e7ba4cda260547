from __future__ import annotations

import pytest

from workers.engines.ranks import RankedEngine


@pytest.fixture
def ranked():
    """Makes and loads an engine of several ranks; the test's end closes it."""
    made = []

    def make(*args):
        engine = RankedEngine(*args)
        made.append(engine)
        engine.load(lambda stage, fraction: None)
        return engine

    yield make
    for engine in made:
        engine.close()
