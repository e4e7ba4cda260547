"""What serve and a worker show of a start, on a terminal and elsewhere."""

from __future__ import annotations

import io
import json
import shlex

import pytest
from rich.console import Console

from headrace.console import StartView, print_block
from headrace.serve import progress


def shown(view: StartView, console: Console) -> list[str]:
    view.close()
    assert isinstance(console.file, io.StringIO)
    return [line[8:].strip() for line in console.file.getvalue().splitlines()]  # without the seconds


def test_without_a_terminal_a_stage_is_a_few_lines() -> None:
    console = Console(file=io.StringIO(), width=60)
    view = StartView(console)
    for percent in range(101):
        view.stage("worker-0", "load", percent / 100)
    view.stage("worker-0", "load", 1.0)
    view.note("a [notice] as it stands " + "x" * 80)
    lines = shown(view, console)
    assert lines[0] == "worker-0 load 0%"
    assert lines[-2] == "worker-0 load 100%"
    assert len(lines) == 6
    assert lines[-1] == "a [notice] as it stands " + "x" * 80


def test_on_a_terminal_there_are_bars_that_go_away() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    view = StartView(console)
    view.stage("server", "start", 1.0)
    view.stage("worker-0", "load", 0.5)
    view.note("worker-0 | WARNING slow")
    view.close()
    view.stage("worker-0", "load", 0.6)  # a restart after the start: told in plain lines, or not at all
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "worker-0 load" in text
    assert "WARNING slow" in text


def test_the_curl_line_is_a_command() -> None:
    console = Console(file=io.StringIO(), width=40)
    print_block(console, "http://127.0.0.1:8000", "org/model.v1", {"logs": "/somewhere/" + "deep/" * 20})
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    curl = text[text.index("  curl") : text.index("}'") + 2]
    assert max(map(len, curl.splitlines())) < 80
    words = shlex.split(curl)
    assert words[2] == "http://127.0.0.1:8000/v1/completions"
    assert json.loads(words[-1])["model"] == "org/model.v1"
    assert "/somewhere/" + "deep/" * 20 in text  # nothing is folded: paths can be copied


def test_a_supervised_worker_reports_lines_that_the_supervisor_reads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(progress.SUPERVISED, "1")
    report = progress.reporter()
    report("load", 0.0)
    report("load", 1.0)
    report("warm up", 1.0)
    lines = capsys.readouterr().err.splitlines()
    assert [progress.parse(line) for line in lines] == [("load", 0.0), ("load", 1.0), ("warm up", 1.0)]
    assert progress.parse("progress of things") is None
    assert progress.parse("anything else") is None
    assert progress.parse("progress load 7.5") == ("load", 1.0)


def test_alone_and_without_a_terminal_only_the_ends_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(progress.SUPERVISED, raising=False)
    report = progress.reporter()
    for percent in range(101):
        report("load", percent / 100)
    assert capsys.readouterr().err.splitlines() == ["load: 0%", "load: 100%"]
