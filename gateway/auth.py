"""API keys: who calls, and with which limits. Only hashes are kept, and no key is ever logged.

The file is JSON, ``[{"sha256": "<hex>", "tenant": "name", "concurrent": 8, "requests_per_minute": 60,
"tokens_per_minute": 100000, "readers": 32, "admin": true}]``; ``admin`` shows the whole service on the dashboard; the
limits are optional and hold for the tenant over all models and gateways (``readers``, streams of requests that were
begun before, for one gateway process). Keys of one tenant must name the same limits. The file is read again when it
changes; one that cannot be read leaves the last keys in force.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec
from aiohttp import web

from protocol.errors import Overloaded, StartError, Unauthorized
from protocol.keys import NAME
from protocol.messages import DEFAULT_TENANT
from protocol.records import TenantLimits

log = logging.getLogger("headrace.gateway")


class ApiKey(msgspec.Struct, forbid_unknown_fields=True):
    sha256: str
    tenant: str = DEFAULT_TENANT
    concurrent: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    readers: int | None = None
    admin: bool = False


@dataclass
class Caller:
    """One tenant. Its limits are kept in the store (protocol/bus/home.py), so that they hold over all gateways and for
    requests that outlive their client; only its open readers are counted here."""

    tenant: str = DEFAULT_TENANT
    limits: TenantLimits = field(default_factory=TenantLimits)
    most_readers: int | None = None
    readers: int = 0

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Count one open reader of a request that was begun elsewhere. Overloaded tells when to come again."""
        if self.most_readers is not None and self.readers >= self.most_readers:
            raise Overloaded(f"at most {self.most_readers} readers at once with this key", retry_after=1.0)
        self.readers += 1
        try:
            yield
        finally:
            self.readers -= 1


class KeyRing:
    """Default deny: with a file, every caller needs a key of it; without one, all are the default tenant."""

    CHECK_S = 1.0  # how often the file is checked for changes

    def __init__(self, path: str | None = None) -> None:
        self.path = path
        self._anyone = Caller()
        self._callers: dict[str, tuple[ApiKey, Caller]] = {}
        self._stamp: tuple[int, int] | None = None
        self._checked = 0.0
        if path is not None:
            try:
                self._load()
            except (OSError, ValueError, msgspec.MsgspecError) as error:
                raise StartError(f"--api-keys-file: {error}") from None

    @property
    def required(self) -> bool:
        return self.path is not None

    def identify(self, request: web.BaseRequest) -> Caller:
        """The holder of the request's key. Unauthorized without a known one."""
        return self._anyone if self.path is None else self._entry(request)[1]

    def is_admin(self, request: web.BaseRequest) -> bool:
        """Whether the request's key has the right to see the whole service; all have it where there are no keys."""
        return self.path is None or self._entry(request)[0].admin

    def _entry(self, request: web.BaseRequest) -> tuple[ApiKey, Caller]:
        self._reload_if_changed()
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthorized("an API key is needed: send it as 'Authorization: Bearer KEY'")
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).hexdigest()
        entry, caller = self._callers.get(digest, (None, self._anyone))
        known = entry.sha256 if entry is not None else "0" * 64
        if not hmac.compare_digest(known, digest) or entry is None:
            raise Unauthorized("the API key is not known")
        return entry, caller

    def _load(self) -> None:
        assert self.path is not None
        stat = os.stat(self.path)
        with open(self.path, "rb") as file:
            entries = msgspec.json.decode(file.read(), type=list[ApiKey])
        callers: dict[str, tuple[ApiKey, Caller]] = {}
        tenants: dict[str, Caller] = {}
        before = {caller.tenant: caller for _, caller in self._callers.values()}
        for entry in entries:
            if len(entry.sha256) != 64 or not NAME.fullmatch(entry.tenant):
                raise ValueError("each key needs a sha256 of 64 hex digits and a tenant of [A-Za-z0-9_-]{1,64}")
            entry.sha256 = entry.sha256.lower()
            made = _caller(entry)
            known = tenants.setdefault(entry.tenant, made)
            if (known.limits, known.most_readers) != (made.limits, made.most_readers):
                raise ValueError(f"the keys of tenant {entry.tenant} name different limits: they are the tenant's")
            callers[entry.sha256] = (entry, known)
        for name, caller in tenants.items():
            if name in before:
                caller.readers = before[name].readers
        self._callers = callers
        self._stamp = (stat.st_mtime_ns, stat.st_size)

    def _reload_if_changed(self) -> None:
        assert self.path is not None
        now = time.monotonic()
        if now - self._checked < self.CHECK_S:
            return
        self._checked = now
        try:
            stat = os.stat(self.path)
            if (stat.st_mtime_ns, stat.st_size) != self._stamp:
                self._load()
                log.info("the API keys were read again: %d", len(self._callers))
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            log.error("the API keys could not be read again, the last ones stay: %s", type(error).__name__)


def _caller(key: ApiKey) -> Caller:
    for name in ("concurrent", "requests_per_minute", "tokens_per_minute", "readers"):
        value = getattr(key, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1")
    limits = TenantLimits(key.concurrent, key.requests_per_minute, key.tokens_per_minute)
    return Caller(key.tenant, limits, key.readers)
