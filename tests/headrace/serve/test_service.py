"""`headrace serve` as a user meets it: real processes, killed one after the other, and starts that cannot succeed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.models import tiny_model
from tests.stack import START_S, Stack

ROLES = ("redis", "gateway", "scheduler", "worker")


def complete(stack: Stack, tokens: int = 8, timeout: float = 120) -> dict:
    body = json.dumps({"model": "org/tiny", "prompt": "def add(a, b):", "max_tokens": tokens, "seed": 1}).encode()
    ask = urllib.request.Request(stack.url + "/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(ask, timeout=timeout) as reply:
        return dict(json.loads(reply.read()))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_it_says_how_to_use_it_and_the_curl_line_works(stack: Stack) -> None:
    deadline = time.monotonic() + 60  # /ready may be true a moment before serve has looked
    while "Headrace is ready." not in (shown := stack.output()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert "Headrace is ready." in shown
    curl = shown[shown.index("  curl ") : shown.index("}'") + 2]
    answer = subprocess.run(curl, shell=True, capture_output=True, text=True, timeout=120)
    assert "data: [DONE]" in answer.stdout, answer.stderr


def test_the_process_list_is_true(stack: Stack) -> None:
    listed = stack.processes()
    assert [p["role"] for p in listed].count("worker") == 1
    assert {p["role"] for p in listed} == set(ROLES)
    for entry in listed:
        command = Path(f"/proc/{entry['pid']}/cmdline").read_bytes().decode()
        assert ("redis.sock" if entry["role"] == "redis" else f"headrace\0{entry['role']}") in command


@pytest.mark.parametrize("role", ROLES)
def test_a_killed_process_is_replaced_and_requests_go_on(stack: Stack, role: str) -> None:
    before = complete(stack)
    ((name, old),) = stack.pids(role).items()
    others = {p["name"]: p["pid"] for p in stack.processes() if p["name"] != name}
    stack.kill(role)
    deadline = time.monotonic() + START_S
    while stack.pids(role).get(name, old) == old:
        assert time.monotonic() < deadline, stack.output()
        time.sleep(0.1)
    stack.wait_ready()
    assert complete(stack)["choices"] == before["choices"]
    assert not alive(old)
    after = {p["name"]: p["pid"] for p in stack.processes() if p["name"] != name}
    assert after == others, stack.output()


# ------------------------------------------------------------------ ends


def test_jobs_survive_a_whole_restart(tmp_path: Path, model_dir: Path) -> None:
    """Killed as by a power cut: what was accepted before is answered after."""
    from headrace import Client
    from headrace.serve.embedded import server_url

    args = ("--model", str(model_dir), "--served-model-name", "org/tiny", "--engine", "simulated")
    stack = Stack(tmp_path / "s", *args)
    stack.start()
    stack.wait_ready()
    pids = [int(str(p["pid"])) for p in stack.processes()]
    with Client(server_url(tmp_path / "s" / "data"), "org/tiny") as client:
        request = client.submit("go on", max_tokens=600, seed=1, ignore_eos=True)
        assert stack.process is not None
        stack.process.kill()
        stack.process.wait()
        deadline = time.monotonic() + 60
        while any(alive(pid) for pid in pids):
            assert time.monotonic() < deadline, "children outlive a killed supervisor"
            time.sleep(0.05)
        stack.start()
        stack.wait_ready()
        result = client.result(request)
    assert result.choices[0].finish_reason == "length"
    assert len(result.choices[0].token_ids) == 600
    assert stack.stop() == 0
    assert stack.processes() == []


def test_a_second_interrupt_ends_it_at_once(tmp_path: Path, model_dir: Path) -> None:
    stack = Stack(tmp_path / "s", "--model", str(model_dir), "--engine", "simulated")
    stack.start()
    deadline = time.monotonic() + START_S
    while not (tmp_path / "s" / "run" / "processes.json").exists() or len(stack.processes()) < 4:
        assert time.monotonic() < deadline, stack.output()
        time.sleep(0.05)
    pids = [int(str(p["pid"])) for p in stack.processes()]
    assert stack.process is not None
    os.kill(pids[-1], signal.SIGSTOP)  # one that cannot drain
    stack.process.send_signal(signal.SIGINT)
    while "Ctrl-C again" not in stack.output():
        assert time.monotonic() < deadline, stack.output()
        time.sleep(0.05)
    assert stack.stop(expect=130) == 130
    assert not any(alive(pid) for pid in pids)


# ------------------------------------------------------------------ starts that cannot succeed


def start(tmp_path: Path, *args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "headrace", "serve", "--port", "0", "--run-dir", str(tmp_path / "run"), *args]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=START_S,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
    )


def test_a_refused_model_ends_the_start_with_its_reason(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = tiny_model(tmp_path_factory, "falcon")
    ended = start(tmp_path, "--model", str(model), "--data-dir", str(tmp_path / "data"))
    assert ended.returncode == 78
    assert "falcon" in ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr
    assert json.loads((tmp_path / "run" / "processes.json").read_text()) == []


def test_an_unreachable_server_ends_the_start(tmp_path: Path, model_dir: Path) -> None:
    ended = start(tmp_path, "--model", str(model_dir), "--redis-url", "redis://127.0.0.1:1/0")
    assert ended.returncode == 78
    assert "Redis" in ended.stderr


def test_a_data_directory_has_one_server(stack: Stack, tmp_path: Path, model_dir: Path) -> None:
    ended = start(tmp_path, "--model", str(model_dir), "--data-dir", str(stack.run_dir / "data"))
    assert ended.returncode == 78
    assert "in use by another headrace" in ended.stderr
