"""SageMaker's, Vertex AI's and Azure ML's endpoints: their health checks, and their one address for all requests.

What comes in is an OpenAI body (``messages`` or ``prompt``), answered and streamed as at its own address, or the
service's form around it:

- Vertex AI: ``{"instances": [BODY, ...], "parameters": {...}}`` -> ``{"predictions": [ANSWER, ...]}``
- Azure ML: ``{"input_data": {"input_string": [MESSAGE, ...], "parameters": {...}}}`` -> ``{"output": TEXT}``

Sources: "Use your own inference code with hosting services" (SageMaker), "Custom container requirements for prediction"
(Vertex AI), "Deploy a custom container to an online endpoint" (Azure ML).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import msgspec
from aiohttp import web

from gateway.api import Api
from gateway.auth import Caller
from gateway.edge import BODY, Handler, Routes, decode_body, encode_json, json_answer, read_body
from protocol.errors import InvalidRequest, StartError

MAX_INSTANCES = 64  # requests in one body
_object = msgspec.json.Decoder(dict[str, Any])


class Refused(Exception):
    """One of several requests was answered by an error, which is the answer to all."""

    def __init__(self, answer: web.StreamResponse) -> None:
        super().__init__(answer.status)
        self.answer = answer


class Contract:
    def __init__(self, api: Api) -> None:
        self.api = api

    def routes(self, name: str, environ: Mapping[str, str]) -> Routes:
        """The endpoints of ``sagemaker``, ``vertex`` or ``azureml``. StartError for a path that is none."""
        routes = Routes()
        if name == "sagemaker":
            routes.add("GET", "/ping", self.api.ready)
            routes.add("POST", "/invocations", self.invoke)
        elif name == "vertex":
            routes.add("GET", _path(environ, "AIP_HEALTH_ROUTE", "/ping"), self.api.ready)
            routes.add("POST", _path(environ, "AIP_PREDICT_ROUTE", "/predict"), self.predict)
        elif name == "azureml":
            routes.add("POST", "/score", self.score)
        else:
            raise StartError(f"--contract: {name!r} is none of sagemaker, vertex, azureml")
        return routes

    async def invoke(self, request: web.BaseRequest, caller: Caller, _: str) -> web.StreamResponse:
        """An OpenAI body of either kind."""
        raw = await read_body(request, self.api.body_timeout)
        return await self._handler(decode_body(raw, _object))(_with(request, raw), caller, "")

    async def predict(self, request: web.BaseRequest, caller: Caller, _: str) -> web.StreamResponse:
        """Instances with their predictions; or a body as for `invoke` (Vertex AI's rawPredict)."""
        raw = await read_body(request, self.api.body_timeout)
        body = decode_body(raw, _object)
        if "instances" not in body:
            return await self._handler(body)(_with(request, raw), caller, "")
        instances, parameters = body["instances"], _mapping(body.get("parameters"), "parameters")
        if not isinstance(instances, list) or not 1 <= len(instances) <= MAX_INSTANCES:
            raise InvalidRequest(f"instances must be an array of 1 to {MAX_INSTANCES} objects", param="instances")
        whole = [{**parameters, **_mapping(one, f"instances[{at}]")} for at, one in enumerate(instances)]
        tasks = [asyncio.create_task(self._answer(request, caller, one, "instances")) for one in whole]
        try:
            return json_answer({"predictions": [await task for task in tasks]})
        except Refused as refused:
            return refused.answer
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def score(self, request: web.BaseRequest, caller: Caller, _: str) -> web.StreamResponse:
        """Azure ML's form of a chat, its parameters beside it; or a body as for `invoke`."""
        raw = await read_body(request, self.api.body_timeout)
        body = decode_body(raw, _object)
        if "input_data" not in body:
            return await self._handler(body)(_with(request, raw), caller, "")
        data = _mapping(body["input_data"], "input_data")
        given = data.get("input_string")
        parameters = {**_mapping(data.get("parameters"), "input_data.parameters")}
        if "max_new_tokens" in parameters:
            parameters["max_tokens"] = parameters.pop("max_new_tokens")
        key = "messages" if isinstance(given, list) and all(isinstance(one, dict) for one in given) else "prompt"
        try:
            answer = await self._answer(request, caller, {**parameters, key: given}, "input_data")
        except Refused as refused:
            return refused.answer
        choice = answer["choices"][0]
        return json_answer({"output": choice["message"]["content"] if key == "messages" else choice["text"]})

    # -------------------------------------------------------------- parts

    def _handler(self, body: dict[str, Any]) -> Handler:
        if "messages" in body:
            return self.api.chat_completions
        if "prompt" in body:
            return self.api.completions
        raise InvalidRequest("the body needs messages or prompt, as at /v1/chat/completions or /v1/completions")

    async def _answer(self, request: web.BaseRequest, caller: Caller, body: dict[str, Any], where: str) -> Any:
        """The whole answer to one of the requests in a body. Refused, InvalidRequest."""
        if body.get("stream"):
            raise InvalidRequest("stream cannot be true here: send the body itself, without a wrapping", param=where)
        handler = self._handler(body)
        answer = await handler(_with(request, encode_json(body)), caller, "")
        if answer.status != 200 or not isinstance(answer, web.Response) or not isinstance(answer.body, bytes):
            raise Refused(answer)
        return msgspec.json.decode(answer.body)


def _with(request: web.BaseRequest, raw: bytes) -> web.BaseRequest:
    """The request with this body, of one that came with another or was read already."""
    one = request.clone()
    one[BODY] = raw
    return one


def _mapping(value: Any, name: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidRequest(f"{name} must be an object", param=name)
    return value


def _path(environ: Mapping[str, str], variable: str, default: str) -> str:
    path = environ.get(variable, default).rstrip("/")
    if not path.startswith("/"):
        raise StartError(f"{variable} must be a path that begins with /, not {path!r}")
    return path
