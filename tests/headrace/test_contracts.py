"""The defaults that a hosting service's environment gives; a container's command line as it is, served."""

from __future__ import annotations

import json
import os
import urllib.request
from pathlib import Path

import pytest
import yaml
from aiohttp import ClientSession

from gateway.app import Gateway, GatewayConfig
from headrace.contracts import defaults
from headrace.option_table import OPTIONS
from protocol.errors import StartError
from tests.stack import Stack, free_port

DEMO = Path(__file__).parents[2] / "examples" / "demo-model"


def test_each_contract_says_where_to_listen_and_what_to_serve(tmp_path: Path) -> None:
    nested = tmp_path / "registered" / "1" / "my-model"
    nested.mkdir(parents=True)
    (nested / "config.json").touch()
    assert defaults(["serve"], {}) == {}
    assert defaults(["worker", "--contract", "sagemaker"], {}) == {}
    found = defaults(["gateway", "--contract=sagemaker"], {"SAGEMAKER_BIND_TO_PORT": "9000"})
    assert found == {"HEADRACE_HOST": "0.0.0.0", "HEADRACE_PORT": "9000"}
    found = defaults(["serve"], {"HEADRACE_CONTRACT": "azureml", "AZUREML_MODEL_DIR": str(tmp_path)})
    assert found == {"HEADRACE_HOST": "0.0.0.0", "HEADRACE_PORT": "5001", "HEADRACE_MODEL": str(nested)}
    found = defaults(["serve", "--contract", "vertex"], {"AIP_HTTP_PORT": "7080", "AIP_STORAGE_URI": str(nested)})
    assert (found["HEADRACE_PORT"], found["HEADRACE_MODEL"]) == ("7080", str(nested))
    with pytest.raises(StartError, match="AIP_STORAGE_URI"):
        defaults(["serve", "--contract", "vertex"], {"AIP_STORAGE_URI": "s3://bucket/model"})
    found = defaults(["serve", "--contract", "vertex"], {"AIP_STORAGE_URI": "gs://bucket/model"})
    assert found["HEADRACE_MODEL"] == "gs://bucket/model"
    named = ["serve", "--contract", "vertex", "--model", "x"]
    assert "HEADRACE_MODEL" not in defaults(named, {"AIP_STORAGE_URI": "gs://bucket/model"})


async def test_the_files_of_deploy_name_ports_and_paths_that_are_there(redis_url: str) -> None:
    deploy = DEMO.parents[1] / "deploy"
    vertex = yaml.safe_load((deploy / "vertex" / "model.yaml").read_text())["containerSpec"]
    azure = yaml.safe_load((deploy / "azureml" / "deployment.yml").read_text())
    probes = azure["environment"]["inference_config"]
    asked: dict[str, tuple[dict[str, str], set[int], list[str]]] = {
        "vertex": (
            {one["name"]: one["value"] for one in vertex["env"]},
            {one["containerPort"] for one in vertex["ports"]},
            [vertex["healthRoute"], vertex["predictRoute"]],
        ),
        "azureml": (
            azure["environment_variables"],
            {one["port"] for one in probes.values()},
            [one["path"] for one in probes.values()],
        ),
    }
    for name, (environ, ports, paths) in asked.items():
        assert environ["HEADRACE_CONTRACT"] == name
        assert environ.keys() <= {option.env for option in OPTIONS}
        (port,) = ports
        assert defaults(["serve"], environ)["HEADRACE_PORT"] == str(port)
        async with Gateway(GatewayConfig(redis_url, port=0, contract=name)) as gateway, ClientSession() as session:
            for path in paths:
                async with session.get(f"http://127.0.0.1:{gateway.port}{path}") as reply:
                    told = await reply.json()
                assert told.get("error", {}).get("code") != "route_not_found", path
    assert azure["endpoint_name"] == yaml.safe_load((deploy / "azureml" / "endpoint.yml").read_text())["name"]
    sagemaker = [
        json.loads((deploy / "sagemaker" / f"{name}.json").read_text()) for name in ("model", "endpoint-config")
    ]
    assert sagemaker[1]["ProductionVariants"][0]["ModelName"] == sagemaker[0]["ModelName"]


def test_a_container_of_sagemaker_serves(tmp_path: Path) -> None:
    """`docker run IMAGE serve`, with nothing but the environment that deploy/sagemaker/model.json sets."""
    container = json.loads((DEMO.parents[1] / "deploy/sagemaker/model.json").read_text())["PrimaryContainer"]
    env = {**container["Environment"], "HEADRACE_MODEL": str(DEMO), "SAGEMAKER_BIND_TO_PORT": str(free_port())}
    stack = Stack(tmp_path, "--engine", "simulated", env=env)
    at = stack.command.index("--port")
    del stack.command[at : at + 2]
    stack.port = int(env["SAGEMAKER_BIND_TO_PORT"])
    with stack:
        with urllib.request.urlopen(f"http://127.0.0.1:{stack.port}/ping", timeout=30) as reply:
            assert reply.status == 200
        body = json.dumps({"prompt": "hi", "max_tokens": 3}).encode()
        asked = urllib.request.Request(
            f"http://127.0.0.1:{stack.port}/invocations", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(asked, timeout=60) as reply:
            assert json.loads(reply.read())["usage"]["completion_tokens"] == 3
    assert "HEADRACE_PORT" not in os.environ
