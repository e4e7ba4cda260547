"""The command line: every option is explained and has its environment variable; what is wrong is said in a sentence."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from headrace import cli
from headrace.option_table import OPTIONS, options_of
from headrace.options import argv_of, child_environment, served_name
from headrace.serve import layout, machine
from protocol.errors import EX_CONFIG, StartError
from tests.stack import free_port

COMMANDS = sorted(cli.COMMANDS)


def run(*args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "headrace", *args], capture_output=True, text=True, timeout=120, env=env
    )


def parsed(argv: list[str], environ: dict[str, str] | None = None) -> dict[str, Any]:
    return vars(cli.build_parser(environ or {}).parse_args(argv))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_option_and_its_variable(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.build_parser({}).parse_args([command, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    unwrapped = shown.replace("\n", "").replace(" ", "")
    for option in options_of(command):
        assert option.flag in shown
        assert f"[{option.env}]" in unwrapped
        assert option.help.replace(" ", "") in unwrapped
    if command != "version":
        assert "example" in shown


def test_no_two_options_of_a_command_share_a_flag_or_a_variable() -> None:
    for command in COMMANDS:
        options = options_of(command)
        assert len({o.flag for o in options}) == len(options)
        assert len({o.env for o in options}) == len(options)
    assert {c for o in OPTIONS for c in o.commands.split()} <= set(COMMANDS)


SAMPLES = {"port": "9000", "count": "3", "whole": "3", "seconds": "90s", "size": "2GiB", "boolean": "yes",
           "number": "0.5", "share": "0.5", "rate": "2.5", "span": "8:16", "json_object": '{"top_k": 1}',
           "str": "x"}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_read_from_the_environment_and_the_command_line_wins(command: str) -> None:
    for option in options_of(command):
        text = option.choices[-1] if option.choices else SAMPLES[option.kind.__name__]
        value = option.kind(text)
        assert parsed([command], {option.env: text})[option.dest] == value
        assert parsed([command], {option.env: ""})[option.dest] == option.default
        if not option.switch:
            assert parsed([command, option.flag, text], {option.env: "nonsense"})[option.dest] == value


@dataclass(frozen=True)
class Value:
    kind: str
    text: str
    value: object  # None: refused


@pytest.mark.parametrize(
    "case",
    [
        Value("size", "2GiB", 2 << 30), Value("size", "512M", 512 << 20), Value("size", "1.5GB", 1_500_000_000),
        Value("size", "4096", 4096), Value("size", "1 KiB", 1024), Value("size", "two", None),
        Value("size", "-1", None), Value("size", "2XB", None),
        Value("seconds", "30", 30.0), Value("seconds", "500ms", 0.5), Value("seconds", "10m", 600.0),
        Value("seconds", "2h", 7200.0), Value("seconds", "soon", None), Value("seconds", "-3", None),
        Value("port", "0", 0), Value("port", "65535", 65535), Value("port", "65536", None), Value("port", "http", None),
        Value("count", "1", 1), Value("count", "0", None), Value("count", "1.5", None),
        Value("whole", "0", 0), Value("whole", "-1", None),
        Value("boolean", "on", True), Value("boolean", "0", False), Value("boolean", "maybe", None),
        Value("span", "64", (64, 64)), Value("span", "8:16", (8, 16)), Value("span", "16:8", None),
        Value("span", ":", None),
        Value("rate", "2.5", 2.5), Value("rate", "0", None), Value("rate", "inf", None), Value("number", "nan", None),
        Value("json_object", '{"a": 1}', {"a": 1}), Value("json_object", "[1]", None),
        Value("json_object", "{", None),
    ],
    ids=lambda case: f"{case.kind} {case.text}",
)  # fmt: skip
def test_values(case: Value) -> None:
    kind = next(o.kind for o in OPTIONS if o.kind.__name__ == case.kind)
    if case.value is not None:
        assert kind(case.text) == case.value
    else:
        with pytest.raises(argparse.ArgumentTypeError, match=r"is|:"):
            kind(case.text)


def test_what_serve_hands_on_comes_back_the_same() -> None:
    """A child's command line and environment together repeat the values, whatever the environment of serve says."""
    given = parsed(
        ["serve", "--model", "m", "--kv-cache-memory", "1.5GiB", "--drain-timeout", "500ms", "--threads", "2"]
    )
    given |= {"name": "worker-0", "redis_url": "redis://user:secret@queue/0"}
    argv = argv_of(options_of("worker"), given)
    assert "secret" not in " ".join(argv)
    environ = child_environment(OPTIONS, given["redis_url"], {"HEADRACE_THREADS": "64", "HOME": "/h"})
    assert environ["HOME"] == "/h"
    received = parsed(["worker", *argv], environ)
    for option in options_of("worker"):
        assert received[option.dest] == given.get(option.dest, option.default), option.flag


def test_a_bad_variable_stops_only_who_reads_it() -> None:
    import os

    env = {**os.environ, "HEADRACE_PORT": "abc"}
    refused = run("gateway", env=env)
    assert refused.returncode == 2
    assert "HEADRACE_PORT: 'abc' is no whole number" in refused.stderr
    assert run("version", env=env).returncode == 0


def test_the_command_line_itself_loads_no_service() -> None:
    code = "import sys, headrace.cli as c; c.build_parser(); print([m for m in sys.modules if m.split('.')[0] in " \
           "('torch', 'transformers', 'aiohttp', 'redis', 'numpy', 'rich')])"  # fmt: skip
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert shown.stdout.strip() == "[]"


# ------------------------------------------------------------------ what serve decides before it starts anything


def wanted(*args: str) -> layout.Layout:
    return layout.resolve(parsed(["serve", *args]))


def model_dir(tmp_path: Path) -> Path:
    return Path(shutil.copytree(Path(__file__).parents[2] / "examples" / "demo-model", tmp_path / "my-model"))


def test_defaults_are_decided_once(tmp_path: Path) -> None:
    decided = wanted("--model", str(model_dir(tmp_path)), "--port", "0", "--gateways", "2", "--workers", "2")
    assert decided.values["served_model_name"] == "my-model"
    assert len(set(decided.ports)) == 2
    assert all(decided.ports)
    assert set(decided.metrics_ports) == {"scheduler-0", "worker-0", "worker-1"}
    assert decided.data_dir is not None
    assert wanted("--model", "a/b", "--redis-url", "redis://x", "--port", "0").data_dir is None


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--model", "/nowhere/at/all"], "no such directory"),
        (["--model", "./gone"], "no such directory"),
        (["--model", "{empty}"], "has no config.json"),
        (["--model", "a/b", "--served-model-name", "two words"], "--served-model-name"),
        (["--model", "a/b", "--port", "{busy}"], "in use.*--port"),
        (["--model", "a/b", "--port", "65535", "--gateways", "2"], "no port number"),
    ],
)
def test_what_cannot_start_is_said_first(args: list[str], says: str, tmp_path: Path) -> None:
    import socket

    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        places = {"empty": str(tmp_path), "busy": str(busy.getsockname()[1])}
        with pytest.raises(StartError, match=says):
            wanted(*(a.format(**places) for a in args))


def test_served_names() -> None:
    assert served_name("Qwen/Qwen2.5-0.5B-Instruct") == "Qwen/Qwen2.5-0.5B-Instruct"
    assert served_name(str(Path(__file__).parent)) == "headrace"


def test_a_second_serve_in_the_same_place_is_refused(tmp_path: Path) -> None:
    with machine.exclusive(tmp_path), pytest.raises(StartError, match="in use by another"), machine.exclusive(tmp_path):
        pass
    with machine.exclusive(tmp_path):
        pass


def test_a_start_error_is_one_sentence_and_exit_code_78() -> None:
    ended = run("serve", "--model", "/nowhere/at/all")
    assert ended.returncode == EX_CONFIG
    assert ended.stderr == (
        "headrace serve: --model /nowhere/at/all: no such directory (a hub id has the form owner/name)\n"
    )


def test_addresses(tmp_path: Path) -> None:
    model = ("--model", "a/b", "--port", "0")
    assert wanted(*model, "--host", "0.0.0.0").url.startswith("http://127.0.0.1:")
    assert wanted(*model, "--host", "127.0.0.1").url.startswith("http://127.0.0.1:")


def test_threads_leave_room_where_there_is_some(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, workers, threads in ((1, 1, 1), (2, 1, 2), (2, 2, 1), (4, 1, 3), (16, 1, 14), (16, 2, 7), (2, 8, 1)):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        assert machine.worker_threads(workers) == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert machine.worker_threads(1) == 5


def test_workers_share_out_the_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / name).mkdir()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [machine.gpus_of(k, 3, 1, None, tmp_path) for k in range(3)] == ["0", "1", "0"]
    assert machine.gpus_of(0, 2, 1, None, tmp_path / "none") is None
    assert machine.gpus_of(0, 1, 1, None, tmp_path) is None
    assert machine.gpus_of(0, 2, 1, "cpu", tmp_path) is None
    assert machine.gpus_of(1, 2, 1, "cuda:1", tmp_path) is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert [machine.gpus_of(k, 2, 1, "cuda", tmp_path) for k in range(2)] == ["3", "5"]
    assert [machine.gpus_of(k, 2, 2, "cuda", tmp_path) for k in range(2)] == ["3,5", "3,5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,7")
    assert [machine.gpus_of(k, 2, 2, "cuda", tmp_path) for k in range(2)] == ["3,5", "6,7"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine.gpus_of(0, 2, 1, None, tmp_path) is None


# ------------------------------------------------------------------ a mistyped line


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("headrace ")


@pytest.mark.parametrize(
    ("argv", "nearest"), [(["serve", "--modle", "x"], "--model"), (["bench", "--concurency=4"], "--concurrency")]
)
def test_a_mistyped_option_names_the_nearest_one(
    argv: list[str], nearest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"did you mean {nearest}?" in line
    assert f"usage: headrace {argv[0]} " in line


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["serv"], "did you mean serve?"),
        (["serve", "--port", "99999"], "--port: '99999' is no port number (0 to 65535);"),
        (["serve", "--engine", "torhc"], "did you mean torch?"),
        ([], "are required: COMMAND;"),
    ],
)
def test_a_wrong_line_is_told_in_one(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(argv)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert f"headrace{' serve' * (len(argv) > 1)} --help` explains it" in line


@pytest.mark.parametrize("argv", [["submit", "--prompt", "x"], ["top", "--once"], ["requests", "ls"]])
def test_where_nothing_runs_the_first_thing_to_do_is_told(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_STATE_HOME", "HEADRACE_REDIS_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cli, "DEFAULT_REDIS", f"redis://127.0.0.1:{free_port()}/0")
    assert cli.main(argv) == EX_CONFIG
    (line,) = capsys.readouterr().err.splitlines()
    assert "no `headrace serve` runs here" in line
    assert "--redis-url" in line


def test_two_kinds_of_load_at_once_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--concurrency", "4", "--rate", "2"]) == EX_CONFIG
    assert "give one of them" in capsys.readouterr().err


def test_a_missing_file_of_keys_is_told_at_once() -> None:
    with pytest.raises(StartError, match="--api-keys-file /no/keys"):
        wanted("--port", "0", "--api-keys-file", "/no/keys")


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: f"{option.flag}-{option.commands.split()[0]}")
def test_every_option_tells_its_default(option: Any) -> None:
    assert "(default:" in option.described
