"""A kernel that is compiled once steps are served is told; one that comes from the cache is not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from triton import knobs

from workers.torch_engine.cuda import compiles


def test_what_is_compiled_late_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(knobs.compilation, "listener", None)
    compiles.watch()
    told = {"metadata": {}, "metadata_group": {}, "times": SimpleNamespace(total=1_250_000)}
    knobs.compilation.listener(src=SimpleNamespace(name="attend_items"), cache_hit=True, **told)
    assert compiles.late == []
    knobs.compilation.listener(src=SimpleNamespace(name="draw_rows"), cache_hit=False, **told)
    assert compiles.late == ["draw_rows"]
    assert "draw_rows was compiled while serving: 1.25 s" in caplog.text
    compiles.watch()
    assert compiles.late == []
