"""Which names this service answers to in a browser, where no API key protects it.

A page on the web can let its own name point to 127.0.0.1 and then call us as its own origin (DNS rebinding), or send
a form here. Names that only this machine, or the operator's word, can make ours keep it out: see "DNS rebinding" in the
Web Security Model, https://w3c.github.io/webappsec-private-network-access/.
"""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import urlsplit

from aiohttp import web

from gateway.headers import OriginRefused, Origins
from protocol.errors import RequestError, StartError

_HOST = re.compile(r"\[?[A-Za-z0-9._:-]+\]?")


class HostRefused(RequestError):
    status, code = 403, "host_not_allowed"


def parse_hosts(given: str | None) -> frozenset[str]:
    """``gpu1.lan,10.0.0.5``: host names or addresses, without ports. StartError names what is none."""
    hosts = frozenset(one.strip().lower() for one in (given or "").split(",") if one.strip())
    for host in hosts:
        if not _HOST.fullmatch(host):
            raise StartError(f"--allowed-hosts: a host name or an address without a port, not {host!r}")
    return hosts


def host_of(netloc: str) -> str:
    """``localhost:8000`` -> ``localhost``; ``[::1]:8000`` -> ``::1``."""
    try:
        return (urlsplit(f"//{netloc}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Hosts:
    """The hosts of a service without keys: this machine's own names, and those that the operator named."""

    def __init__(self, allowed: frozenset[str], origins: Origins) -> None:
        self.allowed = allowed
        self.origins = origins

    def check_page(self, request: web.BaseRequest) -> None:
        """HostRefused where a browser reached the page by a name that anybody could have made."""
        host = host_of(request.headers.get("Host", ""))
        if not is_loopback(host) and host not in self.allowed:
            raise HostRefused(
                "without API keys the page is shown on this machine only: --allowed-hosts names further hosts"
            )

    def check(self, request: web.BaseRequest) -> None:
        """The same for any request that a page of the web could have sent: it tells its origin. HostRefused,
        OriginRefused."""
        origin = request.headers.get("Origin", "")
        if not origin.startswith(("http://", "https://")):
            return  # no page of the web: programs, and applications with a scheme of their own
        if origin.partition("://")[2].lower() == request.headers.get("Host", "").lower():
            self.check_page(request)
        elif "Access-Control-Allow-Origin" not in self.origins.headers(request):
            raise OriginRefused("pages of this origin may not call: the gateway's --cors-origins names those that may")
