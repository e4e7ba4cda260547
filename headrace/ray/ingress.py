"""An application of Ray Serve in front of Headrace: for those who want Ray's ingress. Each replica has a gateway of its
own and hands requests and answers through, as they stream.

    serve run headrace.ray.ingress:application redis-url=redis://queue:6379/0 replicas=1:8
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from headrace.option_table import options_of
from headrace.ray.plan import Program
from headrace.ray.process import Process
from protocol.errors import StartError

MOST_OPEN = 1000  # requests of one replica: a gateway holds as many streams with ease
OPEN_PER_REPLICA = 10  # as the autoscaler of gateways on Kubernetes
DRAIN_S = 300.0
UP_S = 60.0
OURS = ("Accept-Encoding", "User-Agent", "Accept", "Content-Type")  # never added to what a client sent
OF_ONE_CONNECTION = {"connection", "keep-alive", "transfer-encoding", "upgrade", "te", "trailer", "content-length"}


class Ingress:
    def __init__(self, redis_url: str, options: dict[str, Any]) -> None:
        values = {option.dest: option.default for option in options_of("gateway")}
        values |= {"host": "127.0.0.1", "port": 0, "drain_timeout": DRAIN_S, **options}
        values.pop("metrics_host")  # a gateway without keys has its metrics beside the API
        self._gateway = Process(Program("ingress", "gateway", values), redis_url)
        self._url = f"http://127.0.0.1:{self._gateway.state().port}"
        self._session: aiohttp.ClientSession | None = None

    async def check_health(self) -> None:
        """Called by Ray Serve: an exception is a sick replica."""
        if failed := self._gateway.state().failed:
            raise StartError(failed)

    async def __call__(self, request: Request) -> Response:
        """One request to the gateway, its answer piece by piece. A client that goes away is seen there too."""
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=5)
            connector = aiohttp.TCPConnector(limit=0)
            self._session = aiohttp.ClientSession(
                timeout=timeout, connector=connector, auto_decompress=False, skip_auto_headers=OURS
            )
        path = self._url + request.url.path + (f"?{request.url.query}" if request.url.query else "")
        headers = [(k, v) for k, v in request.headers.items() if k not in OF_ONE_CONNECTION]
        body = await request.body()
        try:
            reply = await self._sent(request.method, path, headers, body)
        except aiohttp.ClientError:
            error = {"message": "the gateway of this replica does not answer", "type": "service_error"}
            return JSONResponse({"error": error | {"param": None, "code": "unavailable"}}, 503, {"Retry-After": "1"})
        response = StreamingResponse(_pieces(reply), reply.status)
        response.raw_headers = [
            (k.lower().encode(), v.encode()) for k, v in reply.headers.items() if k.lower() not in OF_ONE_CONNECTION
        ]
        return response

    async def _sent(self, method: str, url: str, headers: Any, body: bytes) -> aiohttp.ClientResponse:
        """Waits for a gateway that is only just starting. Nothing was sent where no connection was made."""
        assert self._session is not None
        deadline = asyncio.get_running_loop().time() + UP_S
        while True:
            try:
                return await self._session.request(
                    method, url, headers=headers, data=body or None, allow_redirects=False
                )
            except aiohttp.ClientConnectorError:
                if asyncio.get_running_loop().time() > deadline:
                    raise
                await asyncio.sleep(0.1)

    def __del__(self) -> None:
        """Ray Serve calls it when a replica has no request any more."""
        if hasattr(self, "_gateway"):
            self._gateway.drain(1.0)


async def _pieces(reply: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    async with reply:
        async for piece in reply.content.iter_any():
            yield piece


def application(args: dict[str, str]) -> serve.Application:
    """``redis-url``; ``replicas`` (N or MIN:MAX, default 1:8); any other is an option of `headrace gateway`."""
    given = {name.replace("-", "_"): str(value) for name, value in args.items()}
    redis_url = given.pop("redis_url", "")
    if not redis_url:
        raise StartError("redis-url=... is needed: a server that every node of the Ray cluster can reach")
    least, _, most = given.pop("replicas", "1:8").partition(":")
    known = {option.dest: option for option in options_of("gateway")}
    if unknown := given.keys() - known.keys():
        raise StartError(f"there is no option {sorted(unknown)[0]} of `headrace gateway`")
    options = {name: known[name].kind(value) for name, value in given.items()}
    scaling = {
        "min_replicas": int(least),
        "max_replicas": int(most or least),
        "target_ongoing_requests": OPEN_PER_REPLICA,
    }
    deployment = serve.deployment(Ingress).options(
        autoscaling_config=scaling, max_ongoing_requests=MOST_OPEN, graceful_shutdown_timeout_s=DRAIN_S,
        ray_actor_options={"num_cpus": 0.5},
    )  # fmt: skip
    return deployment.bind(redis_url, options)
