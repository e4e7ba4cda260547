"""Several models in one serve: added, scaled, changed and removed while a client of another one streams on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from headrace.serve.fleet import Fleet
from tests.stack import START_S, Stack

SLOW = "{step_us = 20000}"


def text_of(model_dir: Path, **models: str) -> str:
    head = f"least-stay = 20\n[defaults]\nmodel = '{model_dir}'\nengine = 'simulated'\nengine-options = {SLOW}\n"
    return head + "".join(f"[models.{name}]\n{keys}\n" for name, keys in models.items())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    path = tmp_path_factory.mktemp("fleet") / "headrace.toml"
    path.write_text(text_of(model_dir, alpha="", beta=""))
    return path


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, place: Path) -> Iterator[Stack]:
    with Stack(tmp_path_factory.mktemp("stack"), "--config", str(place)) as running:
        until(lambda: "Headrace is ready." in running.output(), running)
        yield running


def until(condition: Callable[[], Any], stack: Stack) -> Any:
    deadline = time.monotonic() + START_S
    while not (found := condition()):
        assert time.monotonic() < deadline, stack.output()
        time.sleep(0.1)
    return found


def ask(stack: Stack, model: str, tokens: int, stream: bool = False, prompt: str = "go on") -> Any:
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "seed": 1, "stream": stream}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(stack.url + "/v1/completions", json.dumps(body).encode(), headers)
    try:
        return urllib.request.urlopen(request, timeout=120)
    except urllib.error.HTTPError as error:
        error.msg = f"{model}: {error.read().decode()}"
        raise


def headrace(stack: Stack, *args: str) -> subprocess.CompletedProcess[str]:
    place = ("--run-dir", str(stack.run_dir / "run"))
    return subprocess.run(
        [sys.executable, "-m", "headrace", *args, *place], capture_output=True, text=True, timeout=START_S
    )


class Reader:
    """A client that streams until the end, in a thread."""

    def __init__(self, stack: Stack, model: str, tokens: int) -> None:
        self.events: list[bytes] = []
        self.reply = ask(stack, model, tokens, stream=True)
        self.thread = threading.Thread(target=self._read)
        self.thread.start()

    def _read(self) -> None:
        for line in self.reply:
            if line.startswith(b"data: "):
                self.events.append(line)

    def ended(self) -> list[bytes]:
        self.thread.join(120)
        assert not self.thread.is_alive()
        return self.events


def metric(fleet: Stack, name: str) -> dict[str, float]:
    """Its value by model, at the gateway."""
    with urllib.request.urlopen(fleet.url + "/metrics", timeout=30) as reply:
        found = re.findall(rf'^{name}{{model="(\w+)"}} (\S+)$', reply.read().decode(), re.M)
    return {model: float(value) for model, value in found}


def test_both_are_served_under_one_door(fleet: Stack) -> None:
    assert fleet.models() == ["alpha", "beta"]
    assert set(fleet.pids("worker")) == {"worker-alpha-0", "worker-beta-0"}
    for model in ("alpha", "beta"):
        with ask(fleet, model, 4) as reply:
            assert json.loads(reply.read())["model"] == model


def test_a_model_comes_and_goes_while_clients_of_another_stream(fleet: Stack, model_dir: Path) -> None:
    watching = Reader(fleet, "alpha", 900)
    others = fleet.pids("worker")["worker-alpha-0"], fleet.pids("scheduler")["scheduler-alpha-0"]
    added = headrace(fleet, "models", "add", "gamma", "--model", str(model_dir))
    assert added.returncode == 0, added.stderr
    assert "gamma is served" in added.stdout
    until(lambda: "gamma" in fleet.models(), fleet)
    again = headrace(fleet, "models", "add", "gamma", "--model", str(model_dir))
    assert (again.returncode, "gamma is served already" in again.stderr) == (78, True)
    last = Reader(fleet, "gamma", 300)  # some six seconds: it ends while the model drains
    removed = headrace(fleet, "models", "remove", "gamma")
    assert removed.returncode == 0, removed.stderr
    assert b'"finish_reason":"length"' in last.ended()[-2]
    until(lambda: fleet.models() == ["alpha", "beta"], fleet)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        ask(fleet, "gamma", 1)
    assert "worker-gamma-0" not in fleet.pids("worker")
    assert b'"finish_reason":"length"' in watching.ended()[-2]
    assert others == (fleet.pids("worker")["worker-alpha-0"], fleet.pids("scheduler")["scheduler-alpha-0"])
    assert headrace(fleet, "models", "remove", "gamma").returncode == 78


def test_a_reload_is_all_or_nothing(fleet: Stack, place: Path, model_dir: Path) -> None:
    assert fleet.process is not None
    before = fleet.processes()
    place.write_text(text_of(model_dir, alpha="workers = 2", beta="", delta="") + "[models.epsilon]\nworkers = 'x'\n")
    os.kill(fleet.process.pid, signal.SIGHUP)
    until(lambda: "models.epsilon.workers: 'x' is no whole number" in fleet.output(), fleet)
    assert "nothing has changed" in fleet.output()
    assert fleet.processes() == before

    place.write_text(text_of(model_dir, alpha="", beta="") + "[gateway]\nmax-waiting-requests = 5\n")
    asked = [sys.executable, "-m", "headrace", "config", "check", "--diff", "--config", str(place)]
    compared = subprocess.run(
        [*asked, "--run-dir", str(fleet.run_dir / "run")], capture_output=True, text=True, timeout=START_S
    )
    assert (compared.returncode, compared.stdout.splitlines()[1:]) == (
        0, ["gateway.max-waiting-requests: needs a restart of serve"],
    ), compared  # fmt: skip

    rules = "[[routes.auto.rules]]\nwords = ['SQL']\nmodels = ['beta']\n[[routes.auto.rules]]\nmodels = ['delta']\n"
    place.write_text(text_of(model_dir, alpha="workers = 2", delta="", beta="max-num-seqs = 8") + rules)
    told = headrace(fleet, "models", "reload").stdout.splitlines()
    assert told[:3] == ["delta: added", "alpha: scaled (workers)", "beta: restarted (max-num-seqs)"]
    assert told[3:] == ["routes.auto: changed"]
    assert set(fleet.pids("worker")) == {"worker-alpha-0", "worker-alpha-1", "worker-beta-0", "worker-delta-0"}
    kept = {p["name"]: p["pid"] for p in before}
    assert fleet.pids("worker")["worker-alpha-0"] == kept["worker-alpha-0"]
    assert fleet.pids("worker")["worker-beta-0"] != kept["worker-beta-0"]
    until(lambda: {"auto", "beta", "delta"} <= set(fleet.models()), fleet)
    for prompt, model in (("go on", "delta"), ("some SQL", "beta")):
        with ask(fleet, "auto", 2, prompt=prompt) as reply:
            assert json.loads(reply.read())["model"] == model
    rows = headrace(fleet, "models", "list").stdout.splitlines()
    assert [row.split()[:3] for row in rows[1:]] == [
        ["alpha", "serving", "2"], ["beta", "serving", "1"], ["delta", "serving", "1"],
    ]  # fmt: skip


def test_a_model_that_fails_is_alone_in_it(fleet: Stack, model_dir: Path, tmp_path: Path) -> None:
    import shutil

    broken = shutil.copytree(model_dir, tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{}")
    added = headrace(fleet, "models", "add", "broken", "--model", str(broken))
    assert added.returncode == 78
    until(lambda: "model broken has failed, the others go on" in fleet.output(), fleet)
    with ask(fleet, "alpha", 2) as reply:
        assert reply.status == 200


def test_an_idle_model_gives_its_memory_back_and_is_loaded_again_when_asked(fleet: Stack, model_dir: Path) -> None:
    added = headrace(fleet, "models", "add", "nap", "--model", str(model_dir), "--keep-alive", "500ms")
    assert added.returncode == 0, added.stderr
    until(lambda: "model nap was idle and has given its memory back" in fleet.output(), fleet)
    until(lambda: "worker-nap-0" not in fleet.pids("worker"), fleet)
    assert "scheduler-nap-0" in fleet.pids("scheduler")
    until(lambda: {*metric(fleet, "headrace_ready_workers")} == {"alpha", "beta", "delta"}, fleet)  # no alarm for it
    (row,) = [row.split() for row in headrace(fleet, "models", "list").stdout.splitlines() if row.startswith("nap")]
    assert row[:3] == ["nap", "asleep", "0"]
    asked = [sys.executable, "-m", "headrace", "doctor", "--data-dir", str(fleet.run_dir / "data"), "--port", "0"]
    found = subprocess.run(asked, capture_output=True, text=True, timeout=START_S).stdout
    assert re.search(r"^ok +nap: led in epoch 1, asleep until it is asked$", found, re.M), found
    with ask(fleet, "nap", 4) as reply:
        assert json.loads(reply.read())["usage"]["completion_tokens"] == 4
    assert "model nap is loaded again" in fleet.output()
    (log,) = (fleet.run_dir / "run" / "logs").glob("scheduler-nap-*.log")
    until(lambda: '"load_s"' in log.read_text(), fleet)  # the line comes after the answer
    told = [json.loads(line) for line in log.read_text().splitlines() if '"load_s"' in line]
    assert 0 < told[-1]["load_s"] <= told[-1]["queue_s"]  # the cold start


def test_an_alias_moves_for_who_asks_next(fleet: Stack) -> None:
    assert "prod -> alpha 1" in headrace(fleet, "models", "alias", "prod", "alpha").stdout
    until(lambda: "prod" in fleet.models(), fleet)
    with ask(fleet, "prod", 2) as reply:
        assert json.loads(reply.read())["model"] == "alpha"
        assert reply.headers["X-Headrace-Route"] == "model=alpha; asked=prod; why=alias"
    refused = headrace(fleet, "models", "alias", "prod", "gone")
    assert (refused.returncode, "nothing has the name gone" in refused.stderr) == (78, True)
    assert headrace(fleet, "models", "alias", "prod").returncode == 0
    until(lambda: "prod" not in fleet.models(), fleet)


def test_models_that_share_a_card_take_turns_and_who_waits_is_told_why(fleet: Stack, model_dir: Path) -> None:
    """The least stay is that of a test: long enough to see who waits."""
    for name in ("day", "night"):
        added = headrace(fleet, "models", "add", name, "--model", str(model_dir), "--card", "gpu0")
        assert added.returncode == 0, added.stderr
    rows = headrace(fleet, "models", "list").stdout
    assert {row.split()[0]: row.split()[1] for row in rows.splitlines()}.items() >= {"day": "serving"}.items()
    assert "worker-night-0" not in fleet.pids("worker")
    running = Reader(fleet, "day", 2500)  # fifty seconds: longer than its least stay
    waiting = ask(fleet, "night", 4, stream=True)
    why = re.compile(
        "waits for its turn on gpu0: day stays for 20 s at least|waits until day has ended what it runs on"
    )
    until(lambda: why.search(headrace(fleet, "models", "list").stdout), fleet)

    def told() -> str:
        with ask(fleet, "night", 1, stream=True) as second:
            return str(second.headers["X-Headrace-Waits"])

    until(lambda: why.search(told()), fleet)  # gateways read it every three seconds
    assert waiting.read().endswith(b"data: [DONE]\n\n")
    assert "model day gives its place on gpu0 to night" in fleet.output()
    assert "worker-day-0" not in fleet.pids("worker")
    assert b'"finish_reason":"length"' in running.ended()[-2]
    with ask(fleet, "day", 4) as back:
        assert json.loads(back.read())["usage"]["completion_tokens"] == 4
    assert "model night gives its place on gpu0 to day" in fleet.output()


def test_what_is_added_gets_a_free_metrics_port_where_none_was_asked_for() -> None:
    fleet: Any = Fleet.__new__(Fleet)
    fleet.layout = SimpleNamespace(values={"metrics_host": "127.0.0.1", "metrics_port": None}, metrics_ports={})
    port = fleet._metrics_port("worker-nap-0")
    assert port > 0
    assert fleet._metrics_port("worker-nap-0") == port
