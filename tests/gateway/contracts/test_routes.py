"""Requests as SageMaker, Vertex AI and Azure ML send them, to a real gateway."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.app import Gateway, GatewayConfig
from protocol.errors import StartError
from tests.gateway.backend import MODEL, Backend
from tests.waits import eventually

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
COMPLETION = {"prompt": "hi", "max_tokens": 5}


async def test_sagemaker(open_gateway: Any, backend: Backend) -> None:
    front = await open_gateway(contract="sagemaker")
    status, _, _ = await eventually(lambda: _ready(front, "/ping"))
    assert status == 200
    for body, kind in ((CHAT, "chat.completion"), (COMPLETION, "text_completion")):
        status, answer, _ = await front.post("/invocations", body, headers={"Accept": "*/*"})
        assert (status, answer["object"], answer["model"]) == (200, kind, MODEL)
    events = await front.events("POST", "/invocations", json={**CHAT, "stream": True})
    assert b"[DONE]" in events[-1]
    status, answer, _ = await front.post("/invocations", {"inputs": "hi"})
    assert (status, "messages or prompt" in answer["error"]["message"]) == (400, True)
    status, answer, _ = await front.post("/invocations", {**CHAT, "temperature": 9})
    assert (status, answer["error"]["param"]) == (400, "temperature")
    assert (await front.post("/v1/chat/completions", {**CHAT, "model": MODEL}))[0] == 200  # the API is there as well


async def test_vertex(open_gateway: Any, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIP_HEALTH_ROUTE", "/v1/endpoints/1/deployedModels/2")
    monkeypatch.setenv("AIP_PREDICT_ROUTE", "/v1/endpoints/1/deployedModels/2:predict")
    front = await open_gateway(contract="vertex")
    health, predict = "/v1/endpoints/1/deployedModels/2", "/v1/endpoints/1/deployedModels/2:predict"
    status, _, _ = await eventually(lambda: _ready(front, health))
    assert status == 200
    body: dict[str, Any] = {"instances": [CHAT, {"prompt": "a"}, {"prompt": "b"}], "parameters": {"max_tokens": 5}}
    status, answer, _ = await front.post(predict, body)
    assert status == 200
    assert [one["object"] for one in answer["predictions"]] == ["chat.completion"] + ["text_completion"] * 2
    assert len({one["id"] for one in answer["predictions"]}) == 3
    events = await front.events("POST", predict, json={**CHAT, "stream": True})  # rawPredict
    assert b"[DONE]" in events[-1]
    for wrong, param in (
        ({"instances": []}, "instances"),
        ({"instances": [{"prompt": "a"}] * 65}, "instances"),
        ({"instances": ["a"]}, "instances[0]"),
        ({"instances": [{"prompt": "a", "stream": True}]}, "instances"),
        ({"instances": [{"prompt": "a"}, {"prompt": "a", "temperature": 9}]}, "temperature"),
        ({"instances": [{"prompt": "a"}], "parameters": 1}, "parameters"),
    ):
        status, answer, _ = await front.post(predict, wrong)
        assert (status, answer["error"]["param"]) == (400, param), wrong
    await eventually(lambda: not front.gateway.answers.open)  # nothing goes on behind a refused body


async def test_azureml(open_gateway: Any, backend: Backend) -> None:
    front = await open_gateway(contract="azureml")
    data = {"input_string": CHAT["messages"], "parameters": {"max_new_tokens": 5, "temperature": 0}}
    status, answer, _ = await front.post("/score", {"input_data": data})
    assert status == 200
    _, plain, _ = await front.post("/v1/chat/completions", {**CHAT, "temperature": 0})
    assert answer == {"output": plain["choices"][0]["message"]["content"]}
    status, answer, _ = await front.post("/score", {"input_data": {"input_string": "hi"}})
    assert (status, list(answer)) == (200, ["output"])
    assert (await front.post("/score", CHAT))[1]["object"] == "chat.completion"
    for wrong in ({"input_data": 1}, {"input_data": {}}, {"input_data": {"input_string": 1}}, {"data": []}):
        assert (await front.post("/score", wrong))[0] == 400, wrong


async def test_keys_hold_here_too(open_gateway: Any, tmp_path: Any) -> None:
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps([{"sha256": "0" * 64}]))
    front = await open_gateway(contract="sagemaker", api_keys_file=str(keys))
    assert (await front.post("/invocations", CHAT))[0] == 401


def test_a_wrong_path_or_name_is_a_failed_start(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StartError, match="--contract"):
        Gateway(GatewayConfig("unix:///none", contract="other"))
    monkeypatch.setenv("AIP_PREDICT_ROUTE", "predict")
    with pytest.raises(StartError, match="AIP_PREDICT_ROUTE"):
        Gateway(GatewayConfig("unix:///none", contract="vertex"))


async def _ready(front: Any, path: str) -> Any:
    found = await front.ask("GET", path)
    return found if found[0] == 200 else None
