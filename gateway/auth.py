"""API keys: who calls, and with which limits. Only hashes are kept, and no key is ever logged.

The file is JSON, ``[{"sha256": "<hex>", "tenant": "name", "concurrent": 8, "requests_per_minute": 60,
"tokens_per_minute": 100000}]``; the limits are optional and hold for one gateway process. It is read again
when it changes; a file that cannot be read leaves the last good keys in force.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import time
from dataclasses import dataclass, field

import msgspec
from aiohttp import web

from protocol.errors import Overloaded, StartError, Unauthorized
from protocol.keys import NAME
from protocol.messages import DEFAULT_TENANT

log = logging.getLogger("headrace.gateway")


class ApiKey(msgspec.Struct, forbid_unknown_fields=True):
    sha256: str
    tenant: str = DEFAULT_TENANT
    concurrent: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


class Allowance:
    """A token bucket that refills ``per_minute`` in a minute and may be overdrawn by a cost known only later."""

    def __init__(self, per_minute: int) -> None:
        self.size = float(per_minute)
        self.rate = per_minute / 60.0
        self.left = self.size
        self.stamp = time.monotonic()

    def refill(self) -> None:
        now = time.monotonic()
        self.left = min(self.size, self.left + (now - self.stamp) * self.rate)
        self.stamp = now

    def wait_s(self, need: float) -> float:
        """Seconds until ``need`` tokens are available; 0: now."""
        self.refill()
        return max(0.0, (need - self.left) / self.rate)


@dataclass
class Caller:
    """The holder of one key, with its current use."""

    tenant: str = DEFAULT_TENANT
    concurrent: int | None = None
    requests: Allowance | None = None
    tokens: Allowance | None = None
    running: int = field(default=0)

    def begin(self) -> None:
        """Count a request. Overloaded says when to retry."""
        if self.concurrent is not None and self.running >= self.concurrent:
            raise Overloaded(f"at most {self.concurrent} requests at once with this key", retry_after=1.0)
        if self.tokens is not None and (wait := self.tokens.wait_s(1.0)):
            raise Overloaded("the tokens per minute of this key are used up", retry_after=wait)
        if self.requests is not None:
            if wait := self.requests.wait_s(1.0):
                raise Overloaded("the requests per minute of this key are used up", retry_after=wait)
            self.requests.left -= 1.0
        self.running += 1

    def end(self, tokens: int = 0) -> None:
        self.running -= 1
        if self.tokens is not None:
            self.tokens.refill()
            self.tokens.left -= tokens


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
        if self.path is None:
            return self._anyone
        self._reload_if_changed()
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthorized("an API key is needed: send it as 'Authorization: Bearer KEY'")
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).hexdigest()
        entry, caller = self._callers.get(digest, (None, self._anyone))
        known = entry.sha256 if entry is not None else "0" * 64
        if not hmac.compare_digest(known, digest) or entry is None:
            raise Unauthorized("the API key is not known")
        return caller

    def _load(self) -> None:
        assert self.path is not None
        stat = os.stat(self.path)
        with open(self.path, "rb") as file:
            entries = msgspec.json.decode(file.read(), type=list[ApiKey])
        callers: dict[str, tuple[ApiKey, Caller]] = {}
        for entry in entries:
            if len(entry.sha256) != 64 or not NAME.fullmatch(entry.tenant):
                raise ValueError("each key needs a sha256 of 64 hex digits and a tenant of [A-Za-z0-9_-]{1,64}")
            entry.sha256 = entry.sha256.lower()
            kept = self._callers.get(entry.sha256)
            callers[entry.sha256] = kept if kept is not None and kept[0] == entry else (entry, _caller(entry))
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
    return Caller(
        tenant=key.tenant,
        concurrent=key.concurrent,
        requests=Allowance(key.requests_per_minute) if key.requests_per_minute else None,
        tokens=Allowance(key.tokens_per_minute) if key.tokens_per_minute else None,
    )
