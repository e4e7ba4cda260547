"""The server's password, prompts and their tokens are in no log, no command line and no message, at any level."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import redis

from headrace.serve.embedded import EmbeddedServer
from tests.stack import START_S, Stack, free_port

DEMO = Path(__file__).parents[2] / "examples" / "demo-model"
PASSWORD = "correct-horse-battery"
PROMPT = "a-prompt-that-nobody-else-may-read"


def complete(stack: Stack, **fields: object) -> int:
    body = json.dumps({"model": "org/tiny", "prompt": PROMPT, "max_tokens": 8, **fields}).encode()
    ask = urllib.request.Request(stack.url + "/v1/completions", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(ask, timeout=120) as reply:
            reply.read()
            return int(reply.status)
    except urllib.error.HTTPError as error:
        answer, status = error.read().decode(), error.code
    assert PROMPT not in answer
    return status


def command_lines(stack: Stack) -> str:
    assert stack.process is not None
    pids = [stack.process.pid, *(p["pid"] for p in stack.processes())]
    return "\n".join(Path(f"/proc/{pid}/cmdline").read_text() for pid in pids)


def under_fire(stack: Stack, port: int) -> str:
    """Good and bad work, then a server that refuses; returns the command lines that were seen."""
    assert complete(stack) == 200
    assert complete(stack, stream=True) == 200
    assert complete(stack, temperature=-1) == 400
    assert complete(stack, stop=[PROMPT, ""]) == 400
    seen = command_lines(stack)
    with redis.Redis(port=port, password=PASSWORD) as client:
        key = "headrace:{org/tiny}:jobs"
        client.xadd(key, {"job": json.dumps({"v": 1, "prompt": PROMPT, "n": PROMPT})})
        client.xadd(key, {"job": json.dumps({"v": 1, "prompt": PROMPT, "sampling": {"stop": [PROMPT] * 9}})})
        client.xadd(key, {"job": PROMPT.encode()})
        client.config_set("requirepass", "another")  # from now on the stack is refused
        client.client_kill_filter(_type="normal", skipme=True)
    assert stack.process is not None
    assert stack.process.wait(START_S) == 78
    return seen


def test_a_whole_stack_gives_nothing_away(tmp_path: Path, model_dir: Path) -> None:
    port = free_port()
    folder = tmp_path / "stack"
    env = {"HEADRACE_REDIS_URL": f"redis://:{PASSWORD}@127.0.0.1:{port}/0"}
    args = (
        "--model",
        str(model_dir),
        "--served-model-name",
        "org/tiny",
        "--engine",
        "simulated",
        "--log-level",
        "debug",
    )
    with EmbeddedServer(tmp_path / "server", port=port) as server:
        with redis.Redis.from_url(server.url) as client:
            client.config_set("requirepass", PASSWORD)
        stack = Stack(folder, *args, env=env)
        try:
            stack.start()
            stack.wait_ready()
            seen = under_fire(stack, port)
        finally:
            stack.stop(expect=None)
    assert "the Redis server refused us" in stack.log.read_text()
    for log in (folder / "run" / "logs").iterdir():
        seen += log.read_text()
    seen += stack.log.read_text() + (folder / "run" / "processes.json").read_text()
    assert "headrace" in seen
    for secret in (PASSWORD, PROMPT):
        assert secret not in seen, [line for line in seen.splitlines() if secret in line][:3]


def test_what_is_wrong_with_a_url_is_said_without_it(tmp_path: Path) -> None:
    serve = ["serve", "--model", str(DEMO), "--port", "0", "--run-dir", str(tmp_path)]
    starts = [
        ([*serve], f"redis://me:{PASSWORD}@127.0.0.1:{free_port()}/0", "does not answer"),
        ([*serve], f"redis://me:{PASSWORD}#more@127.0.0.1:6379/0", "this is no Redis URL"),
        (["gateway", "--port", "0"], f"redis://me:{PASSWORD}/more@127.0.0.1:6379/0", "this is no Redis URL"),
        (["scheduler", "--model", "a/b"], f"http://me:{PASSWORD}@127.0.0.1:6379/0", "this is no Redis URL"),
        (["worker", "--model", "a/b"], f"redis+cluster://me:{PASSWORD}@h:port", "this is no Redis URL"),
        (["submit", "--prompt", "x"], f"redis://me:{PASSWORD}@127.0.0.1:70000", "this is no Redis URL"),
    ]
    for arguments, url, reason in starts:
        ended = subprocess.run(
            [sys.executable, "-m", "headrace", *arguments],
            capture_output=True, text=True, timeout=START_S, env={**os.environ, "HEADRACE_REDIS_URL": url},
        )  # fmt: skip
        told = ended.stdout + ended.stderr
        assert ended.returncode == 78, told
        assert reason in told
        assert PASSWORD not in told
        assert "Traceback" not in told
