"""Where compiled kernels are kept, and what is told of those that are compiled."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from triton import knobs

from protocol.errors import StartError
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


def test_the_start_says_what_it_has_compiled(monkeypatch, tmp_path, caplog) -> None:
    monkeypatch.setattr(knobs.compilation, "listener", None)
    monkeypatch.setenv(compiles.VARIABLE, "/nowhere")
    folder = tmp_path / "new" / "kernels"
    compiles.keep_in(str(folder))
    assert knobs.cache.dir == str(folder), "where Triton looks"
    for name, hit in (("attend_items", True), ("norm_rows", False), ("draw_rows", False)):
        knobs.compilation.listener(
            src=SimpleNamespace(name=name), metadata={}, metadata_group={}, times=SimpleNamespace(total=250_000),
            cache_hit=hit,
        )  # fmt: skip
    with caplog.at_level("INFO"):
        compiles.watch()
    assert f"kernels: 1 from {folder}, 2 compiled in 0.5 s" in caplog.text
    assert compiles.late == []
    compiles.keep_in(str(folder))
    assert (compiles.found, compiles.made) == ([], [])


def test_a_folder_that_cannot_be_written_is_named(monkeypatch, tmp_path, caplog) -> None:
    monkeypatch.setattr(knobs.compilation, "listener", None)
    monkeypatch.setenv(compiles.VARIABLE, "")
    (tmp_path / "file").touch()
    with pytest.raises(StartError, match=r"--kernel-cache .*/file/kernels: Not a directory"):
        compiles.keep_in(str(tmp_path / "file" / "kernels"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    compiles.keep_in(None)
    assert "file/headrace/kernels: Not a directory, so kernels are compiled at every start" in caplog.text
    assert knobs.cache.dir not in ("", str(tmp_path / "file"))


def test_without_the_option_the_variable_holds_and_then_a_folder_of_our_own(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(knobs.compilation, "listener", None)
    monkeypatch.setenv(compiles.VARIABLE, str(tmp_path / "theirs"))
    compiles.keep_in(None)
    assert knobs.cache.dir == str(tmp_path / "theirs")
    monkeypatch.delenv(compiles.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiles.keep_in(None)
    assert knobs.cache.dir == str(tmp_path / "headrace" / "kernels")
