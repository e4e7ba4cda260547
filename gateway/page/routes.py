"""Where the page lies: its files at ``/`` and ``/ui/``, for all; its feed for those who have a key."""

from __future__ import annotations

from aiohttp import web

from gateway.auth import Caller, KeyRing
from gateway.edge import Routes, json_answer
from gateway.models import Models
from gateway.page.feed import feed
from gateway.page.files import read_files
from gateway.page.hosts import Hosts
from protocol.errors import NotFound


class Page:
    """``hosts`` None: API keys protect what is behind the page, so it is shown under any name."""

    def __init__(self, models: Models, keys: KeyRing, hosts: Hosts | None) -> None:
        self.models = models
        self.keys = keys
        self.hosts = hosts
        self.files = read_files()

    def routes(self) -> Routes:
        routes = Routes()
        routes.add("GET", "/", self.show)
        routes.add("GET", "/ui/", self.show)
        routes.add("GET", "/ui/feed", self.feed)
        return routes

    async def show(self, request: web.BaseRequest, _: Caller, name: str) -> web.StreamResponse:
        self._check(request)
        file = self.files.get(name or "index.html")
        if file is None:
            raise NotFound("there is no such route", code="route_not_found")
        return file.answer(request)

    async def feed(self, request: web.BaseRequest, _: Caller, __: str) -> web.StreamResponse:
        self._check(request)
        caller = self.keys.identify(request)
        shown = await feed(self.models, caller.tenant, self.keys.is_admin(request))
        return json_answer(shown, headers={"Cache-Control": "no-store"})

    def _check(self, request: web.BaseRequest) -> None:
        if self.hosts is not None:
            self.hosts.check_page(request)
