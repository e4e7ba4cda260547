"""compose.yaml as Docker Compose itself reads it, without a daemon. `make ops` fetches the program."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

pytestmark = [pytest.mark.ops, pytest.mark.timeout(300)]
ROOT = Path(__file__).parents[2]
ALWAYS = {"redis", "gateway-0", "gateway-1", "balancer", "scheduler-0", "scheduler-1", "worker"}


def compose(*options: str, **environ: str) -> str:
    program = shutil.which("docker-compose")
    if program is None:
        pytest.skip("docker-compose is not installed")
    ran = subprocess.run(
        [program, "-f", str(ROOT / "compose.yaml"), *options],
        capture_output=True, text=True, timeout=120, env={**os.environ, **environ},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "level=warning" not in ran.stderr, ran.stderr
    return ran.stdout


@pytest.mark.parametrize(
    ("profiles", "more"),
    [([], set()), (["gpu"], {"worker-gpu"}), (["metrics"], {"prometheus", "grafana"})],
    ids=["plain", "gpu", "metrics"],
)
def test_compose_takes_the_file(profiles: list[str], more: set[str]) -> None:
    asked = [word for profile in profiles for word in ("--profile", profile)]
    assert set(compose(*asked, "config", "--services").split()) == ALWAYS | more
    services = yaml.safe_load(compose(*asked, "config"))["services"]
    for name, service in services.items():
        for volume in service.get("volumes", ()):
            if volume["type"] == "bind":
                assert Path(volume["source"]).exists(), (name, volume)
        if service.get("entrypoint"):  # ours: exit code 78 becomes 0 there
            assert service["restart"] == "on-failure", name


def test_its_variables_reach_the_services() -> None:
    services = yaml.safe_load(compose("config", MODEL="Qwen/Qwen2.5-0.5B-Instruct", IMAGE="mine"))["services"]
    for name in ("scheduler-0", "scheduler-1", "worker"):
        assert services[name]["environment"]["HEADRACE_MODEL"] == "Qwen/Qwen2.5-0.5B-Instruct"
        assert services[name]["image"] == "mine"
