"""The gateway process: HTTP in, events out. Keeps no state that could be lost: any gateway can continue a stream."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import secrets
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from aiohttp import web

from gateway.answers import Answers
from gateway.api import Api
from gateway.auth import Caller, KeyRing
from gateway.contracts.routes import Contract
from gateway.edge import Routes, Server, error_answer
from gateway.headers import Origins, arrived, parse_origins, tell
from gateway.metrics import exposition
from gateway.models import Models
from gateway.page.hosts import Hosts, parse_hosts
from gateway.page.routes import Page
from gateway.routing.money import Money
from gateway.routing.pushes import Pushes
from gateway.routing.router import Router
from gateway.routing.slot import PATIENCE_S
from gateway.routing.upstream import Upstreams
from protocol.bus import HomeBus
from protocol.errors import HeadraceError, NotFound, StartError
from protocol.preloaded import give_back_large_blocks
from protocol.records import Limits
from protocol.telemetry.traces import traces

log = logging.getLogger("headrace.gateway")

OPEN_PATHS = ("/health", "/ready", "/accepting")  # never ask for a key
ANYONE = Caller()
Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class GatewayConfig:
    """``name`` tells gateways apart in logs; the reply channel adds what makes it unique to this process.

    /metrics is on the main port, unless API keys are set or ``metrics_port`` names another one: then it is on
    ``metrics_port`` (0: any) of ``metrics_host``.
    """

    redis_url: str
    host: str = "127.0.0.1"
    port: int = 8000
    name: str = "gateway"
    metrics_host: str = "127.0.0.1"
    metrics_port: int | None = None
    api_keys_file: str | None = None
    max_waiting_requests: int | None = 10000  # beyond these bounds new work is a 429; None: unbounded
    max_waiting_tokens: int | None = None
    max_tenant_requests: int | None = None
    max_tenant_tokens: int | None = None
    resume_grace: float = 0.0  # seconds that a request continues without its client, unless its header says otherwise
    drain_timeout: float = 60.0  # seconds that open requests have to end after SIGTERM
    ready_delay: float = 0.5  # seconds between /ready turning false and the port being closed
    body_timeout: float = 30.0
    cors_origins: str | None = None  # other origins whose pages may call, with commas; * for all
    allowed_hosts: str | None = None  # without keys: hosts besides this machine that browsers may reach the page by
    ui: bool = True  # the page at /
    contract: str | None = None  # endpoints of a hosting service besides: sagemaker, vertex, azureml
    stall_timeout: float = 30.0  # a client that reads nothing for so long is dropped

    @property
    def limits(self) -> Limits:
        return Limits(
            self.max_waiting_requests, self.max_waiting_tokens, self.max_tenant_requests, self.max_tenant_tokens
        )


class Gateway:
    """One gateway of this process. Use as an async context manager; ``port`` is where it listens."""

    def __init__(self, config: GatewayConfig) -> None:
        self.config = config
        self.name = f"{config.name}-{secrets.token_hex(6)}"[-64:]
        self.keys = KeyRing(config.api_keys_file)
        self.home = HomeBus(config.redis_url, patience=PATIENCE_S)
        self.models = Models(config.redis_url, self.name, self.home)
        self.money = Money(self.models, self.home)
        self.answers = Answers(self.name, config.limits, config.stall_timeout, self.money, self.home, self.models)
        self.upstreams = Upstreams(self.money)
        self.traces = traces("gateway")
        self._apart = self.keys.required or config.metrics_port is not None
        router = Router(self.models, self.money, config.limits)
        self._pushes = Pushes(self.models, router, self.name)
        api = Api(
            self.models,
            router,
            self.upstreams,
            self.answers,
            guarded=self.keys.required,
            resume_grace=config.resume_grace,
            body_timeout=config.body_timeout,
            traces=self.traces,
        )
        self._origins = Origins(parse_origins(config.cors_origins))
        self._hosts = None if self.keys.required else Hosts(parse_hosts(config.allowed_hosts), self._origins)
        self._routes = api.routes(metrics=not self._apart)
        self._contract = Contract(api).routes(config.contract, os.environ) if config.contract else Routes()
        self._page = Page(self.models, self.keys, self._hosts).routes() if config.ui else Routes()
        self._runners: list[web.ServerRunner] = []
        self._sites: list[web.TCPSite] = []
        self.port = config.port
        self.metrics_port = config.metrics_port

    async def __aenter__(self) -> Gateway:
        self.models.start()
        self._pushes.start()
        try:
            self.port = await self._listen(self._serve, self.config.host, self.config.port)
            if self._apart:
                self.metrics_port = await self._listen(
                    self._serve_metrics, self.config.metrics_host, self.config.metrics_port or 0
                )
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self.answers.draining = True
        self.answers.break_off()
        for runner in self._runners:
            await runner.cleanup()
        await self._pushes.close()
        await self.answers.close()
        await self.upstreams.close()
        await self.home.close()
        await self.models.close()
        if self.traces is not None:
            await self.traces.close()

    async def drain(self) -> None:
        """Turn /ready false, stop listening, and let open requests end; what is left can be resumed elsewhere."""
        self.answers.draining = True
        await asyncio.sleep(self.config.ready_delay)
        for site in self._sites:
            await site.stop()
        deadline = asyncio.get_running_loop().time() + self.config.drain_timeout
        while (self.answers.open or self.upstreams.open) and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110 (many may end it)
            await asyncio.sleep(0.05)
        self.answers.break_off()

    # -------------------------------------------------------------- parts

    async def _listen(self, handler: Handler, host: str, port: int) -> int:
        runner = web.ServerRunner(Server(handler), shutdown_timeout=2.0)
        await runner.setup()
        self._runners.append(runner)
        site = web.TCPSite(runner, host, port, backlog=4096)
        try:
            await site.start()
        except OSError as error:
            raise StartError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
        self._sites.append(site)
        address: tuple[str, int] = runner.addresses[0]
        return address[1]

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        """The main port. Without a key only the state of the process is visible, not even the list of routes."""
        try:
            arrived(request, self._origins)
            answer = self._origins.preflight(request) or await self._routed(request)
        except HeadraceError as error:
            answer = error_answer(error)
        except (asyncio.CancelledError, ConnectionError):
            raise
        except Exception as error:
            log.exception("a request failed: %s", type(error).__name__)
            answer = error_answer(HeadraceError())
        if not answer.prepared:
            tell(request, answer.headers)
            if self.answers.draining:
                answer.force_close()
        return answer

    async def _routed(self, request: web.BaseRequest) -> web.StreamResponse:
        if self._hosts is not None:
            self._hosts.check(request)
        if self._page.knows(request.path):
            handler, rest = self._page.find(request.method, request.path)
            return await handler(request, ANYONE, rest)
        routes = self._contract if self._contract.knows(request.path) else self._routes
        open_to_all = request.path.rstrip("/") in OPEN_PATHS
        caller = ANYONE if open_to_all else self.keys.identify(request)
        handler, rest = routes.find(request.method, request.path)
        return await handler(request, caller, rest)

    async def _serve_metrics(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.path != "/metrics":
            return error_answer(NotFound("there is no such route", code="route_not_found"))
        body, kind = exposition(request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": kind})


# ------------------------------------------------------------------ the process


async def run_gateway(config: GatewayConfig, *, ready: Callable[[Gateway], None] | None = None) -> int:
    """Serve until SIGTERM or SIGINT, then drain; a second signal ends at once. Returns the exit code.

    ``ready`` is called once the port is open. StartError says why it cannot be opened.
    """
    log_requests()
    _allow_many_streams()
    give_back_large_blocks()
    stop, stop_now = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (stop_now if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    try:
        async with Gateway(config) as gateway:
            log.info("listening on http://%s:%d", config.host, gateway.port)
            if gateway.metrics_port is not None:
                log.info("metrics on http://%s:%d/metrics", config.metrics_host, gateway.metrics_port)
            gc.collect()
            gc.freeze()  # a garbage collection over all imported modules would delay every stream
            if ready is not None:
                ready(gateway)
            await stop.wait()
            log.info("draining")
            draining = asyncio.create_task(gateway.drain())
            hurried = asyncio.create_task(stop_now.wait())
            await asyncio.wait({draining, hurried}, return_when=asyncio.FIRST_COMPLETED)
            for task in (draining, hurried):
                task.cancel()
            await asyncio.gather(draining, hurried, return_exceptions=True)
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
    return 1 if stop_now.is_set() else 0


def log_requests() -> None:
    """The request log is one JSON object a line, on stderr, whatever the rest of the log looks like."""
    logger = logging.getLogger("headrace.gateway.requests")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
        logger.setLevel(logging.INFO)


def _allow_many_streams() -> None:
    """Each stream is an open file; raise the usual soft limit of 1024 to the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):  # macOS refuses "unlimited"
            log.warning("at most %d connections at once: the limit on open files cannot be raised", soft)
