from __future__ import annotations

from workers.stages import Stages


def test_each_part_is_told_with_its_seconds_and_one_that_comes_again_once():
    times = iter((0.0, 2.0, 5.0, 6.0, 10.0))
    stages = Stages(lambda: next(times))
    assert stages.enter("load")
    assert not stages.enter("load")
    assert stages.enter("check")
    assert stages.enter("load")
    assert str(stages) == "10.0 s (start 2.0, load 7.0, check 1.0)"
