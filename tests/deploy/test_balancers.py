"""nginx and haproxy as deploy/balancers configures them, in front of two real gateways: a stream passes token by token,
a gateway is killed in the middle of it, and the client goes on without a lost or repeated token."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.stack import START_S, Stack, free_port

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "demo-model"
FILES = {"nginx": "nginx.conf", "haproxy": "haproxy.cfg"}
TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")  # folders that nginx wants to write to
TOKENS = 60
STEP_US = 40_000
BODY = {"prompt": "hi", "max_tokens": TOKENS, "temperature": 1, "seed": 3, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    options = ["--engine", "simulated", "--engine-options", json.dumps({"step_us": STEP_US}), "--gateways", "2"]
    with Stack(tmp_path_factory.mktemp("stack"), "--model", str(DEMO), *options) as running:
        running.wait_ready(running.port + 1)
        yield running


@pytest.fixture(params=list(FILES))
def door(request: pytest.FixtureRequest, stack: Stack, tmp_path: Path) -> Iterator[str]:
    """The address of the balancer."""
    program = shutil.which(request.param, path="/usr/sbin:/usr/bin:/usr/local/sbin")
    if program is None:
        pytest.skip(f"{request.param} is not installed")
    port = free_port()
    text = (ROOT / "deploy" / "balancers" / FILES[request.param]).read_text()
    addresses = {"8080": port, "127.0.0.1:8000": stack.url[7:], "127.0.0.1:8001": f"127.0.0.1:{stack.port + 1}"}
    for ours, theirs in addresses.items():
        text = text.replace(ours, str(theirs))
    config = tmp_path / "config"
    if request.param == "nginx":
        folders = "".join(f"{kind}_temp_path {tmp_path}/{kind}; " for kind in TEMPORARY)
        text = f"daemon off; pid {tmp_path}/pid; events {{}} http {{ access_log off; {folders} {text} }}"
        command = [program, "-e", "stderr", "-c", str(config)]
    else:
        command = [program, "-db", "-f", str(config)]
    config.write_text(text)
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        until_answered(f"http://127.0.0.1:{port}/ready", process, tmp_path / "log")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(START_S)


def until_answered(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)


def events(reply: Iterator[bytes]) -> Iterator[tuple[str, str]]:
    """(id, data) of each event, until the connection ends in whatever way."""
    shown = ""
    try:
        for line in reply:
            if line.startswith(b"id: "):
                shown = line[4:].strip().decode()
            elif line.startswith(b"data: "):
                yield shown, line[6:].strip().decode()
    except OSError:
        return


def stream(url: str, body: dict[str, object] | None = None, last: str = "") -> Iterator[bytes]:
    headers = {"Content-Type": "application/json", "X-Headrace-Resume": "60"}
    asked = urllib.request.Request(url, json.dumps(body).encode() if body else None, headers)
    if last:
        asked.add_header("Last-Event-ID", last)
    return iter(urllib.request.urlopen(asked, timeout=START_S))


def text_of(found: list[tuple[str, str]]) -> str:
    pieces = [json.loads(data) for _, data in found if data != "[DONE]"]
    return "".join(piece["choices"][0]["text"] for piece in pieces if piece["choices"])


def test_a_stream_goes_on_when_its_gateway_is_killed(door: str, stack: Stack) -> None:
    undisturbed = list(events(stream(f"{door}/v1/completions", BODY)))
    assert undisturbed[-1][1] == "[DONE]"
    found: list[tuple[str, str]] = []
    reading = events(stream(f"{door}/v1/completions", BODY))
    for event in reading:
        found.append(event)
        if len(found) == 5:
            break  # it passes token by token: far from its end
    request = json.loads(found[0][1])["id"]
    for name in stack.pids("gateway"):
        stack.kill("gateway", name)  # whichever it went through; both come back by themselves
    found += reading
    assert found[-1][1] != "[DONE]"
    deadline = time.monotonic() + START_S
    while found[-1][1] != "[DONE]":
        assert time.monotonic() < deadline
        try:
            found += events(stream(f"{door}/v1/streams/{request}", last=found[-1][0]))
        except (urllib.error.HTTPError, OSError):  # no gateway is there yet
            time.sleep(0.2)
    assert text_of(found) == text_of(undisturbed)
    assert len({shown for shown, data in found if data != "[DONE]"}) == len(found) - 1


def test_the_balancer_of_compose_takes_the_file_with_the_gateways_names(tmp_path: Path) -> None:
    """As its container does: haproxy reads the result."""
    program = shutil.which("haproxy", path="/usr/sbin:/usr/bin:/usr/local/sbin")
    if program is None:
        pytest.skip("haproxy is not installed")
    service = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["balancer"]
    shell, option, script = service["command"]
    made = tmp_path / "haproxy.cfg"
    script = script.replace("/haproxy.cfg >/tmp/haproxy.cfg", f"{ROOT}/deploy/balancers/haproxy.cfg >{made}")
    script = script.replace("exec haproxy -f /tmp/haproxy.cfg", f"exec {program} -c -f {made}")
    subprocess.run([shell, option, script], check=True, timeout=60)
    servers = [line.split()[1:3] for line in made.read_text().splitlines() if line.split()[:1] == ["server"]]
    assert servers == [["gateway-0", "gateway-0:8000"], ["gateway-1", "gateway-1:8000"]]
    assert service["ports"] == ["127.0.0.1:8000:8080"]
