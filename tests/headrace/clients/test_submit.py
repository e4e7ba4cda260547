"""`headrace submit` as a user runs it: one prompt, and files of jobs that may be broken off and begun again."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import redis

from headrace.clients.submit import name_of
from headrace.serve.embedded import FAST, EmbeddedServer
from protocol.bus import LeaderBus
from protocol.messages import ModelCard


def submit(queue_url: str, *args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "headrace", "submit", "--redis-url", queue_url, *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, input=stdin)


def results(path: Path) -> dict[str, dict]:
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({e["id"] for e in entries}) == len(entries)
    return {e["id"]: e for e in entries}


def test_one_prompt_followed_and_whole(queue_url: str) -> None:
    ask = ("--prompt", "def add(a, b):", "--max-tokens", "20", "--seed", "3")
    followed = submit(queue_url, *ask, "--follow")
    assert followed.returncode == 0, followed.stderr
    assert len(followed.stdout) > 1
    assert submit(queue_url, *ask).stdout == followed.stdout
    read = submit(queue_url, "--prompt", "-", "--max-tokens", "20", "--seed", "3", stdin="def add(a, b):")
    assert read.stdout == followed.stdout
    assert submit(queue_url, *ask, "--chat").returncode == 0


def test_errors_end_with_one(queue_url: str) -> None:
    refused = submit(queue_url, "--prompt", "x", "--temperature", "9")
    assert refused.returncode == 1
    assert "temperature must lie in" in refused.stderr
    assert submit(queue_url, "--prompt", "x", "--file", "y").returncode == 78


def test_a_file_of_jobs_goes_on_where_it_was(queue_url: str, tmp_path: Path) -> None:
    source, target = tmp_path / "jobs.jsonl", tmp_path / "results.jsonl"
    lines = [
        json.dumps({"prompt": f"number {k}", "sampling": {"max_tokens": 5 + k, "ignore_eos": True}}) for k in range(30)
    ]
    lines[3] = json.dumps(
        {"id": "named", "messages": [{"role": "user", "content": "hi"}], "sampling": {"ignore_eos": True}}
    )
    lines[4] = json.dumps({"prompt": "x", "sampling": {"n": 99}})
    lines[5] = "not json"
    lines[6] = json.dumps({"prompt": "x", "surprise": 1})
    source.write_text("\n".join(lines) + "\n\n")
    ask = ("--file", str(source), "--out", str(target), "--max-tokens", "7", "--window", "8")

    first = submit(queue_url, *ask)
    assert first.returncode == 1
    assert "30 jobs, 3 failed" in first.stderr
    assert "already" not in first.stderr
    found = results(target)
    assert len(found) == 30
    assert found["named"]["choices"][0]["tokens"] == 7  # the option fills in what the job leaves open
    assert found[name_of(lines[10], 10)]["choices"][0]["tokens"] == 15
    assert found[name_of(lines[4], 4)]["error"]["param"] == "n"
    assert "no JSON object" in found[name_of(lines[5], 5)]["error"]["message"]
    assert "surprise" in found[name_of(lines[6], 6)]["error"]["message"]

    # broken off in the middle of a line; begun again with the bad lines mended
    kept = target.read_text().splitlines(keepends=True)
    target.write_text("".join(kept[:20]) + kept[20][:9])
    lines[4:7] = [json.dumps({"prompt": "mended", "sampling": {"max_tokens": 3}})] * 3
    source.write_text("\n".join(lines))
    second = submit(queue_url, *ask)
    assert second.returncode == 0, second.stderr
    again = results(target)
    assert len(again) == 30
    same = [name for name in found if "error" not in found[name]]
    assert [again[name] for name in same] == [found[name] for name in same]  # request ids and all: nothing ran twice


def test_a_model_that_nobody_serves_is_told_and_nothing_is_sent(tmp_path: Path) -> None:
    """The card of a model stays when its scheduler and workers are gone."""
    with EmbeddedServer(tmp_path, settings=FAST) as server:
        asyncio.run(publish(server.url))
        refused = submit(server.url, "--prompt", "x")
        assert refused.returncode == 78
        assert "nobody serves gone now: nothing was sent (--wait" in refused.stderr
        client = redis.Redis.from_url(server.url)
        kept = {key.decode() for key in client.scan_iter() if client.ttl(key) == -1}
        client.close()
    assert kept == {"headrace:models", "headrace:{gone}:tokenizer"}


async def publish(url: str) -> None:
    bus = LeaderBus(url, "gone")
    await bus.connect()
    await bus.publish_card(ModelCard(model="gone", created=1, max_model_len=8, vocab_size=8), b"{}")
    await bus.close()
