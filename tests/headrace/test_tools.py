"""The operator's tools on a running service: what they list is there, what they do happens; shells complete them."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from headrace import cli
from headrace.option_table import options_of
from headrace.tools import completion, doctor
from headrace.tools.show import duration
from protocol.messages import CommitRow, Hint, Job, ModelCard, new_rid
from protocol.routing.shards import ShardStore
from tests.bus import Bus
from tests.protocol.stage import Stage as Shard
from tests.protocol.stage import frame
from tests.stack import Stack

MODEL = "org/tiny"
SHARDED = "org/sharded"
PROMPT = "words that no tool may show"
PATIENCE_S = 60.0


def headrace(*args: str, expect: int | None = 0, env: dict[str, str] | None = None) -> str:
    """What the command prints, run in this process: a new one would import for most of the time."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        for name, value in (env or {}).items():
            patch.setenv(name, value)
        code = cli.main(args)
    assert expect is None or code == expect, said.getvalue()
    return said.getvalue()


@pytest.fixture
def stored(queue_url: str) -> Iterator[redis.Redis]:
    with contextlib.closing(redis.Redis.from_url(queue_url)) as client:
        yield client


@pytest.fixture
def long_request(stack: Stack) -> Iterator[str]:
    """One that runs for as long as a test needs it; its id."""
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 20_000, "ignore_eos": True, "stream": True}
    headers = {"Content-Type": "application/json", "X-Headrace-Detached": "true"}
    ask = urllib.request.Request(stack.url + "/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(ask, timeout=60) as reply:
        rid = reply.headers["X-Request-Id"]
        assert reply.read(100)
    yield rid
    gone = urllib.request.Request(f"{stack.url}/v1/requests/{rid}", method="DELETE")
    urllib.request.urlopen(gone, timeout=60).close()


def test_requests_are_listed_shown_followed_and_cancelled(queue_url: str, long_request: str) -> None:
    at = ("--redis-url", queue_url)
    listed = [json.loads(line) for line in headrace("requests", "ls", *at, "--json").splitlines()]
    (found,) = [one for one in listed if one["rid"] == long_request]
    assert (found["tenant"], found["state"], found["choices"], found["open"]) == ("default", "running", 1, 1)
    assert found["prompt_tokens"] > 0 < found["bytes"]
    assert long_request in headrace("requests", "ls", *at)
    assert long_request not in headrace("requests", "ls", *at, "--tenant", "another")
    shown = headrace("requests", "show", long_request[:12], *at)
    told = json.loads(shown)
    assert (told["id"], told["trace"], told["state"], told["max_tokens"]) == (long_request,) * 2 + ("running", 20_000)
    assert told["choices"][0]["tokens"] > 0
    assert PROMPT not in shown
    with subprocess.Popen(
        [sys.executable, "-m", "headrace", "requests", "tail", long_request, *at], stdout=subprocess.PIPE
    ) as tail:
        assert tail.stdout is not None
        assert tail.stdout.read(200)
        assert headrace("requests", "cancel", "cmpl-" + long_request, *at) == f"{long_request} is cancelled\n"
        tail.stdout.read()
        assert tail.wait(60) == 0
    assert "had ended already" in headrace("requests", "cancel", long_request, *at, expect=1)
    assert json.loads(headrace("requests", "show", long_request, *at))["choices"][0]["finish_reason"] == "abort"
    assert "no request 0000" in headrace("requests", "show", "0000", *at, expect=78)
    assert "takes one id" in headrace("requests", "tail", *at, expect=1)


def test_dead_letters_are_listed_tried_again_and_dropped(
    queue_url: str, stored: redis.Redis, long_request: str
) -> None:
    at, key = ("--redis-url", queue_url), f"headrace:{{{MODEL}}}:"
    stored.delete(key + "dead")
    assert "no dead letters" in headrace("dead", "ls", *at)
    stored.xadd(key + "jobs", {"job": b"garbage"})
    deadline = time.monotonic() + PATIENCE_S
    while not stored.xlen(key + "dead") and time.monotonic() < deadline:
        time.sleep(0.02)
    killer = stored.xadd(key + "dead", {"rid": long_request, "code": "engine_failed", "message": "it killed workers"})
    (garbage, again) = [json.loads(line) for line in headrace("dead", "ls", *at, "--json").splitlines()]
    assert (garbage["rid"], again["rid"], again["code"]) == (None, long_request, "engine_failed")
    assert garbage["message"]
    assert "kept no more" in headrace("dead", "retry", garbage["entry"], *at, expect=1)
    told = headrace("dead", "retry", killer.decode(), *at)
    new = told.split()[-1]
    assert json.loads(headrace("requests", "show", new, *at))["max_tokens"] == 20_000
    headrace("requests", "cancel", new, *at)
    assert headrace("dead", "drop", "all", *at) == "1 dropped\n"
    assert "there is no dead letter 1-1" in headrace("dead", "drop", "1-1", *at, expect=1)


def test_top_shows_models_workers_tenants_and_requests(queue_url: str, long_request: str) -> None:
    (line,) = headrace("top", "--redis-url", queue_url, "--once", "--json", "--requests", "5").splitlines()
    told = json.loads(line)
    assert (told["model"], told["leads"], told["live"] > 0) == (MODEL, True, True)
    assert [(worker["wid"], worker["state"], worker["beats"]) for worker in told["workers"]] == [
        ("worker-0", "serving", True)
    ]
    assert [name for name, *_ in told["tenants"]] == ["default"]
    assert long_request in [one["rid"] for one in told["requests"]]
    shown = headrace("top", "--redis-url", queue_url, "--interval", "100ms", env={"COLUMNS": "160"})
    assert "worker-0" in shown
    assert PROMPT not in shown


@pytest.fixture
async def shards(redis_url: str, raw: redis.Redis) -> AsyncIterator[list[Shard]]:
    """Two shards of a model, each with a leader, a worker and a request that runs."""
    store = ShardStore(redis_url)
    stages = [Shard(Bus(redis_url, one.tag, patience=5.0), raw) for one in await store.create(SHARDED, 2)]
    for stage in stages:
        await stage.bus.connect()
        await stage.lead(f"leader-{stage.bus.keys.shard}")
        await stage.register(f"worker-{stage.bus.keys.shard}")
    await stages[0].bus.publish_card(ModelCard(model=SHARDED, created=0, max_model_len=99, vocab_size=99), None)
    yield stages
    await store.close()
    for stage in stages:
        await stage.bus.close()


async def test_all_shards_of_a_model_are_seen_as_one(shards: list[Shard], redis_url: str) -> None:
    at, rids = ("--redis-url", redis_url), []
    for number, stage in enumerate(shards):
        rids.append(new_rid(number))
        await stage.bus.accept(Job(prompt="x"), rid=rids[-1])
        await stage.admit(rids[-1])
        await stage.place(rids[-1], wid=f"worker-{number}")
        stage.raw.xadd(stage.key("dead"), {"rid": rids[-1], "code": "engine_failed", "message": "why"})

    async def told(*args: str, expect: int = 0) -> str:
        return await asyncio.to_thread(headrace, *args, *at, expect=expect)

    def lines(text: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in text.splitlines()]

    assert {one["rid"] for one in lines(await told("requests", "ls", "--json"))} == set(rids)
    (alone,) = lines(await told("requests", "ls", "--json", "--model", shards[1].bus.keys.model))
    assert alone["rid"] == rids[1]
    assert "there is no shard" in await told("requests", "ls", "--model", f"{SHARDED}#9.0", expect=1)
    for named in (rids[1], rids[1][:12]):
        shown = json.loads(await told("requests", "show", named))
        assert (shown["id"], shown["model"], shown["shard"], shown["state"]) == (rids[1], SHARDED, 1, "running")
    looks = lines(await told("top", "--json", "--requests", "5", "--interval", "10ms"))
    assert [(look["model"], look["leader"], look["requests"][0]["rid"]) for look in looks] == [
        (SHARDED, "leader-0", rids[0]), (f"{SHARDED}#1", "leader-1", rids[1])
    ]  # fmt: skip
    assert [look["workers"][0]["wid"] for look in looks] == ["worker-0", "worker-1"]

    first, second = (letter["entry"] for letter in lines(await told("dead", "ls", "--json")))
    assert (first.endswith("s1"), second.endswith("s1")) == (False, True)
    again = (await told("dead", "retry", second)).split()[-1]
    assert again.endswith("s1")
    assert await shards[1].bus.read_request(again) is not None
    assert [letter["entry"] for letter in lines(await told("dead", "ls", "--json"))] == [first]
    assert await told("dead", "drop", "all") == "1 dropped\n"

    row = frame(5, "ended there", "stop")
    await shards[1].bus.commit("worker-1", shards[1].epoch, shards[1].gen, [CommitRow(rids[1], 0, 1, 0, row, "stop")],
                               Hint("worker-1", shards[1].gen, 1, []))  # fmt: skip
    assert await told("requests", "tail", rids[1]) == "ended there\n"
    said = await told("requests", "cancel", rids[0], again)
    assert said == f"{rids[0]} is cancelled\n{again} is cancelled\n"


def test_doctor_finds_the_installation_well(stack: Stack, queue_url: str, model_dir: Path) -> None:
    found = [
        json.loads(line)
        for line in headrace(
            "doctor", "--redis-url", queue_url, "--data-dir", str(stack.run_dir / "data"), "--model", str(model_dir),
            "--port", str(stack.port), "--json", expect=None,
        ).splitlines()
    ]  # fmt: skip
    told = {one["what"]: one["level"] for one in found}
    assert not [one for one in found if one["level"] == "fail" and "is not installed" not in one["what"]], found
    assert any(what.startswith(f"{MODEL}: led in epoch") for what in told)
    assert any("an fsync" in what for what in told)
    assert told[f"{model_dir} can be served, as far as its files tell"] == "ok"
    assert told[f"127.0.0.1:{stack.port}: a gateway of Headrace answers"] == "ok"


def test_doctor_says_what_to_mend(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    data = tmp_path / "data"
    data.mkdir(mode=0o755)
    given = ("--redis-url", "redis://127.0.0.1:9/0", "--data-dir", str(data), "--model", str(tmp_path / "model"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        shown = headrace("doctor", *given, "--port", str(port), expect=1)
    assert "fail  the server:" in shown
    assert f"warn  127.0.0.1:{port} cannot be bound" in shown
    assert f"-> chmod 700 {data}" in shown
    assert "model" in shown


async def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def check_nothing(_: Any) -> Any:
        raise RuntimeError("broken")

    monkeypatch.setattr(doctor, "CHECKS", (check_nothing,))
    found = await doctor.findings({"redis_url": None, "data_dir": str(tmp_path)})
    assert found[0] == doctor.Finding("fail", "the check of nothing broke: RuntimeError: broken")


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.85, "850ms"), (12, "12s"), (200, "3m20s"), (18_120, "5h02m"), (0, "0ms")]
)
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


# ------------------------------------------------------------------ completion


def made(shell: str) -> str:
    words = {name: actions for name, (actions, _) in cli.ACTIONS.items()}
    return completion.script(shell, {name: row[0] for name, row in cli.COMMANDS.items()}, words, options_of)


def complete(*words: str) -> set[str]:
    """What bash offers for the last of ``words``."""
    given = " ".join(f"'{word}'" for word in words)
    program = (
        f"{made('bash')}\nCOMP_WORDS=({given}); COMP_CWORD={len(words) - 1}\n_headrace\n"
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert not done.stderr
    return set(done.stdout.split())


def test_bash_completes_commands_actions_options_and_values() -> None:
    assert complete("headrace", "s") == {"serve", "scheduler", "shards", "submit"}
    assert complete("headrace", "requests", "") >= {"ls", "show", "cancel", "tail", "--redis-url"}
    assert complete("headrace", "serve", "--max-n") == {"--max-num-seqs", "--max-num-batched-tokens"}
    assert complete("headrace", "worker", "--log-level", "w") == {"warning"}
    assert complete("headrace", "serve", "--no-strict") == {"--no-strict-durability"}
    assert complete("headrace", "serve", "--host", "") == set()


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_read_the_script(shell: str, tmp_path: Path) -> None:
    """Every command and option is in it; where the shell is here, it finds no fault."""
    text = made(shell)
    for name in cli.COMMANDS:
        assert name in text
        for option in options_of(name):
            assert option.flag in text or f"-l {option.flag.removeprefix('--')}" in text
    if program := shutil.which(shell):
        (tmp_path / "script").write_text(text)
        subprocess.run([program, "-n", str(tmp_path / "script")], check=True, timeout=30)


def test_fish_completes_commands_actions_options_and_values(tmp_path: Path) -> None:
    program = shutil.which("fish")
    if program is None:
        pytest.skip("fish is not installed")
    (tmp_path / "headrace.fish").write_text(made("fish"))

    def offered(line: str) -> set[str]:
        asked = [program, "--no-config", "-c", f"source {tmp_path}/headrace.fish; complete -C '{line}'"]
        done = subprocess.run(
            asked, capture_output=True, text=True, timeout=60, check=True, env={"HOME": str(tmp_path)}
        )
        return {word.split("\t")[0] for word in done.stdout.splitlines()}

    assert offered("headrace s") == {"serve", "scheduler", "shards", "submit"}
    assert offered("headrace requests ") >= {"ls", "show", "cancel", "tail"}
    assert "--max-num-seqs" in offered("headrace serve --max-n")
    assert offered("headrace worker --log-level w") == {"warning"}


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_the_command_prints_the_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell]) == 0
    assert capsys.readouterr().out == made(shell)


# ------------------------------------------------------------------ logs


def test_logs_are_json_where_asked_for_and_debug_tells_of_requests(tmp_path: Path, model_dir: Path) -> None:
    args = ("--model", str(model_dir), "--served-model-name", MODEL, "--engine", "simulated")
    with Stack(tmp_path / "logs", *args, "--log-format", "json", "--log-level", "debug") as stack:
        body = json.dumps({"model": MODEL, "prompt": PROMPT, "max_tokens": 2}).encode()
        ask = urllib.request.Request(stack.url + "/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(ask, timeout=60) as reply:
            rid = reply.headers["X-Request-Id"]
        stack.stop()
        logs = {log.name: log.read_text() for log in (stack.run_dir / "run" / "logs").glob("*.log")}
    assert not [name for name, text in logs.items() if PROMPT in text]
    told: dict[str, set[str]] = {}
    for name, text in logs.items():
        if name.startswith("redis"):
            continue
        lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        assert lines, name
        told[name.partition("-")[0]] = {line["level"] for line in lines if rid in line.get("message", "")}
        assert all(set(line) >= {"time", "level", "logger", "message"} for line in lines if "level" in line)
    assert told["gateway"] == told["scheduler"] == {"debug"}
