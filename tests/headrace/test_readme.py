"""The README, the compose file and the Makefile say what is so."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from headrace import cli
from headrace.option_table import OPTIONS, markdown
from headrace.options import Unusable

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
OURS = [name for name, one in COMPOSE["services"].items() if "entry.sh" in str(one.get("entrypoint"))]


def test_the_table_of_options_is_the_programs_own() -> None:
    """`.venv/bin/python -m headrace.option_table` prints it anew."""
    table = README.partition("headrace.option_table` -->\n")[2].partition("<!-- end of options -->")[0]
    assert table.strip() == markdown().strip()


def test_every_command_line_of_the_readme_is_accepted() -> None:
    lines = re.findall(r"^(?:\.venv/bin/)?headrace .*$", README, re.M) + re.findall(r"`(headrace [^`A-Z]*)`", README)
    assert len(lines) >= 7
    for line in lines:
        words = shlex.split(line.removeprefix(".venv/bin/"), comments=True)
        parsed = cli.build_parser({}).parse_args(words[1:])
        assert parsed.command == words[1]


def test_files_that_the_readme_names_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_make_knows_the_targets_that_the_readme_names() -> None:
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout
    for target in set(re.findall(r"^make ([a-z-]+)", README, re.M)):
        assert f"make {target} " in shown


@pytest.mark.parametrize(("target", "extra"), [("serve", "gguf"), ("test", "dev")])
@pytest.mark.parametrize("torch", ["", "cpu"])
def test_serving_installs_less_than_testing(tmp_path: Path, target: str, extra: str, torch: str) -> None:
    """And each installs once. A virtual environment of programs that only write down how they are called."""
    calls = tmp_path / "calls"
    for name in ("python", "headrace"):
        program = tmp_path / "venv" / "bin" / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(f'#!/bin/sh\necho {name} "$@" >> {calls}\n')
        program.chmod(0o755)
    places = [f"VENV={tmp_path}/venv", f"KERNELS={tmp_path}/built"]
    subprocess.run(["make", target, *places, f"TORCH={torch}", "MODEL=some/model"], cwd=ROOT, timeout=60, check=True)
    *installs, last = [line for line in calls.read_text().splitlines() if "setup.py" not in line]
    assert [re.findall(r"-e \.\[(\w+)\]", line) for line in installs] == [[]] * bool(torch) + [[extra]]
    assert all(line.startswith("python -m pip install -c constraints.txt ") for line in installs)
    if torch:
        assert re.search(r" torch==[\d.]+\+cpu$", installs[0])
    assert last.startswith("headrace serve --model some/model" if target == "serve" else "python -m pytest ")


@pytest.mark.parametrize("name", OURS)
def test_compose_uses_options_that_exist(name: str) -> None:
    service = COMPOSE["services"][name]
    known = {o.env for o in OPTIONS}
    environ = {k: re.sub(r"\$\{[^}]*\}+", "", v) for k, v in service["environment"].items()}
    assert "HEADRACE_NAME" in known  # what the entry script sets
    assert {k for k in environ if k.startswith("HEADRACE_")} <= known
    parsed = vars(cli.build_parser(environ).parse_args(shlex.split(service["command"])))
    assert parsed["name"] == (None if parsed["command"] == "worker" else name)
    assert not [v for v in parsed.values() if isinstance(v, Unusable)]
    assert parsed["redis_url"] == "redis://redis:6379/0"
    assert service["healthcheck"]["test"][0] == "CMD"
    port = re.search(r"127\.0\.0\.1:(\d+)/health", service["healthcheck"]["test"][-1])
    assert port
    assert int(port[1]) == (parsed["port"] if parsed["command"] == "gateway" else parsed["metrics_port"])


def test_compose_has_the_roles_and_a_durable_server() -> None:
    roles = [COMPOSE["services"][name]["command"].split()[0] for name in OURS]
    assert sorted(roles) == ["gateway", "gateway", "scheduler", "scheduler", "worker", "worker"]
    scaled = COMPOSE["services"]["worker"]
    assert not {"container_name", "ports", "hostname"} & scaled.keys()  # or it could not be scaled
    (device,) = COMPOSE["services"]["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert (COMPOSE["services"]["worker-gpu"]["profiles"], device["capabilities"]) == (["gpu"], ["gpu"])
    server = COMPOSE["services"]["redis"]
    for setting in ("--appendonly yes", "--appendfsync always", "--maxmemory-policy noeviction"):
        assert setting in server["command"]
    assert server["volumes"]


@pytest.mark.parametrize(("code", "becomes"), [(0, 0), (1, 1), (78, 0), (143, 143)])
def test_a_start_that_cannot_succeed_is_not_repeated(tmp_path: Path, code: int, becomes: int) -> None:
    """The real script, with a program in place of headrace that ends with this code: of itself, or when told to."""
    program = tmp_path / "headrace"
    waits = "trap 'exit 143' TERM; echo up; while :; do sleep 0.05; done" if code == 143 else f"echo up; exit {code}"
    program.write_text(f'#!/bin/sh\necho "$HEADRACE_NAME $@" > {tmp_path}/told\n{waits}\n')
    program.chmod(0o755)
    entry = ["/bin/sh", str(ROOT / "deploy" / "compose" / "entry.sh"), "worker", "--device", "cpu"]
    environ = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    with subprocess.Popen(entry, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        if code == 143:
            process.terminate()
        assert process.wait(60) == becomes
        assert process.stderr is not None
        assert (b"not started again" in process.stderr.read()) == (code == 78)
    name = subprocess.run(["hostname"], capture_output=True, text=True, check=True).stdout.strip()
    assert (tmp_path / "told").read_text() == f"{name} worker --device cpu\n"
    services = [service for service in COMPOSE["services"].values() if "entry.sh" in str(service.get("entrypoint"))]
    assert all(any("deploy/compose/entry.sh:" in v for v in service["volumes"]) for service in services)
    assert all(service["restart"] == "on-failure" for service in services)
