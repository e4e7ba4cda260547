"""The examples do what the README says of them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import msgpack

EXAMPLE = Path(__file__).parents[2] / "examples" / "bare_producer.py"


def produce(queue_url: str, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLE), "--redis-url", queue_url, "--model", "org/tiny", *args]
    ended = subprocess.run(command, capture_output=True, timeout=240)
    # as bytes: a carriage return that the model says is not to be read as a newline
    return subprocess.CompletedProcess(command, ended.returncode, ended.stdout.decode(), ended.stderr.decode())


def test_a_producer_needs_redis_and_msgpack_alone() -> None:
    imported = {alias.name for node in ast.walk(ast.parse(EXAMPLE.read_text())) if isinstance(node, ast.Import)
                for alias in node.names}  # fmt: skip
    assert imported == {"argparse", "secrets", "msgpack", "redis"}
    assert not [n for n in ast.walk(ast.parse(EXAMPLE.read_text())) if isinstance(n, ast.ImportFrom)]


def test_it_follows_its_job_and_reads_it_again(queue_url: str) -> None:
    ended = produce(queue_url, "def add(a, b):", "--max-tokens", "25")
    assert ended.returncode == 0, ended.stderr
    text, _, rest = ended.stdout.partition("\nresult: ")
    result_line, journal_line = rest.splitlines()
    result = ast.literal_eval(result_line)
    assert result["text"] == text
    assert 1 <= result["completion_tokens"] <= 25
    assert result["finish_reason"] in ("length", "stop")
    assert ast.literal_eval(journal_line.partition(" frames, text ")[2]) == text


def test_it_is_told_why_a_job_was_refused(queue_url: str) -> None:
    ended = produce(queue_url, "x", "--max-tokens", "999999999")
    assert ended.returncode == 0, ended.stderr
    assert "context_length_exceeded" in ended.stdout


def test_a_job_is_json_as_well(queue_url: str) -> None:
    """What the README does with redis-cli, by another client that speaks the plain protocol."""
    import redis

    server = redis.Redis.from_url(queue_url, socket_timeout=None)
    try:
        job = '{"v":1,"id":"by-hand","prompt":"def add(a, b):","sampling":{"max_tokens":9},"results":"me"}'
        server.execute_command("XADD", "headrace:{org/tiny}:jobs", "*", "job", job)
        ((_, ((_, fields), *_)),) = server.xread({"headrace:{org/tiny}:results:me": "0"}, block=60_000)
        result = msgpack.unpackb(fields[b"result"])
        assert result["id"] == "by-hand"
        rid = server.get("headrace:{org/tiny}:idem:default:by-hand").split()[0].decode()
        assert rid == result["rid"]
        unpacker = msgpack.Unpacker(strict_map_key=False)
        unpacker.feed(server.getrange(f"headrace:{{org/tiny}}:j:{rid}:0", 0, -1))
        assert "".join(frame[1] for frame in unpacker) == result["text"]
    finally:
        server.close()
