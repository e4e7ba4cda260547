"""Every panel of the dashboard shows something: its queries, asked of a real Prometheus that scrapes a real service
under load. HEADRACE_PROMETHEUS names the program, else the one on PATH (Debian has it in the package prometheus).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.test_grafana import PANELS
from tests.stack import START_S, Stack, free_port

pytestmark = [pytest.mark.ops, pytest.mark.timeout(900)]
DEMO = Path(__file__).parents[2] / "examples" / "demo-model"
SCRAPES = 15  # one a second
CLIENTS = 4  # more than run at once: some wait
CONFIG = f"""
[defaults]
model = '{DEMO}'
engine = 'simulated'
engine-options = {{step_us = 2000}}
response-cache = true
max-num-seqs = 1
[models.one]
price = {{input = 1.0, output = 2.0}}
[[routes.auto.rules]]
models = ["one"]
"""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    place = tmp_path_factory.mktemp("scraped")
    (place / "headrace.toml").write_text(CONFIG)
    with Stack(place / "stack", "--config", str(place / "headrace.toml")) as running:
        until(lambda: "Headrace is ready." in running.output(), running.output)
        stop = threading.Event()
        loads = [threading.Thread(target=ask_on_and_on, args=(running.url, stop, first)) for first in range(CLIENTS)]
        for load in loads:
            load.start()
        yield running
        stop.set()
        for load in loads:
            load.join(START_S)


def until(condition: Any, told: Any) -> Any:
    deadline = time.monotonic() + START_S
    while not (found := condition()):
        assert time.monotonic() < deadline, told()
        time.sleep(0.2)
    return found


def ask_on_and_on(url: str, stop: threading.Event, first: int) -> None:
    """Streams by the route, some of them twice; and a model that is not there."""
    number = 1_000_000 * first
    while not stop.is_set():
        number += 1
        for model, again in (("auto", number // 2), ("auto", -number), ("gone", 0)):
            body = {"model": model, "prompt": f"{again} go on", "max_tokens": 20, "stream": True, "temperature": 0}
            asked = urllib.request.Request(
                f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            try:
                urllib.request.urlopen(asked, timeout=60).read()
            except urllib.error.URLError:
                time.sleep(0.05)


@pytest.fixture(scope="module")
def prometheus(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of one that has scraped the stack for a while."""
    program = os.environ.get("HEADRACE_PROMETHEUS") or shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not installed")
    place, port = tmp_path_factory.mktemp("prometheus"), free_port()
    listed = re.findall(r"\b(scheduler|worker)-\S+ (127\.0\.0\.1:\d+)", stack.output())
    targets = {role: [at for named, at in listed if named == role] for role in ("scheduler", "worker")}
    targets["gateway"] = [stack.url.removeprefix("http://")]
    jobs = [{"job_name": f"headrace-{role}", "static_configs": [{"targets": at}]} for role, at in targets.items()]
    (place / "prometheus.yml").write_text(yaml.safe_dump({"global": {"scrape_interval": "1s"}, "scrape_configs": jobs}))
    command = [program, f"--config.file={place}/prometheus.yml", f"--storage.tsdb.path={place}/data",
               f"--web.listen-address=127.0.0.1:{port}", "--enable-feature=exemplar-storage"]  # fmt: skip
    with (place / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        enough = f"min(count_over_time(up[{10 * SCRAPES}s])) >= {SCRAPES}"
        until(lambda: process.poll() is None and ask(url, enough), (place / "log").read_text)
        assert not ask(url, "up == 0")
        yield url
    finally:
        process.terminate()
        process.wait(60)


def ask(url: str, query: str) -> list[Any]:
    """What an instant query finds; nothing while the server is not up."""
    try:
        with urllib.request.urlopen(
            f"{url}/api/v1/query?{urllib.parse.urlencode({'query': query})}", timeout=30
        ) as reply:
            found: list[Any] = json.load(reply)["data"]["result"]
            return found
    except urllib.error.HTTPError as error:
        if error.code == 503:
            return []
        raise AssertionError(f"{query}: {error.read().decode()}") from None
    except urllib.error.URLError:
        return []


@pytest.mark.parametrize("title", list(PANELS))
def test_a_panel_shows_something(prometheus: str, title: str) -> None:
    def shown() -> list[str]:
        found = []
        for target in PANELS[title]["targets"]:
            query = target["expr"].replace("$__rate_interval", "10s").replace("$model", ".*")
            found += [value for series in ask(prometheus, query) for value in series["value"][1:]]
        return [value for value in found if value != "NaN"]

    until(shown, lambda: title)  # what waits does not wait at every moment
