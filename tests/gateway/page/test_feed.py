"""The page's routes over HTTP: its headers, who sees what in the feed, and which names and origins are answered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gateway.page.hosts import host_of, is_loopback, parse_hosts
from protocol.errors import StartError
from tests.gateway.backend import MODEL, Backend
from tests.gateway.front import COMPLETION, Front
from tests.gateway.test_auth import bearer, write_keys
from tests.waits import eventually


async def test_the_page_brings_all_it_needs_and_runs_nothing_else(front: Front) -> None:
    status, body, headers = await front.ask("GET", "/")
    assert status == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "unsafe" not in headers["Content-Security-Policy"]
    text = body.decode()
    assert "http" not in text.replace('http-equiv="', "")  # no foreign host
    for name in ("app.js", "api.js", "chat.js", "board.js", "render.js", "style.css", "marked.umd.js", "icon.svg"):
        status, _, headers = await front.ask("GET", f"/ui/{name}")
        assert (status, headers["X-Content-Type-Options"]) == (200, "nosniff"), name
    status, _, _ = await front.ask("GET", "/ui/app.js", headers={"If-None-Match": headers["ETag"]})
    assert status == 200  # another file's tag
    status, _, headers = await front.ask("GET", "/ui/icon.svg", headers={"If-None-Match": headers["ETag"]})
    assert status == 304
    for path in ("/ui/../app.py", "/ui/none.js", "/ui/static/app.js"):
        assert (await front.ask("GET", path))[0] == 404, path
    assert (await front.ask("POST", "/", json={}))[0] == 405


async def test_without_the_page_its_paths_are_unknown(open_gateway: Any) -> None:
    front = await open_gateway(ui=False)
    for path in ("/", "/ui/feed", "/ui/app.js"):
        assert (await front.ask("GET", path))[0] == 404


async def test_the_feed_tells_counts_and_each_model(front: Front, backend: Backend) -> None:
    _, before, _ = await front.ask("GET", "/ui/feed")
    await front.events("POST", "/v1/completions", json=COMPLETION)
    _, after, _ = await front.ask("GET", "/ui/feed")
    assert after["gateway"]["requests"]["2xx"] == before["gateway"]["requests"].get("2xx", 0) + 1
    assert sum(after["gateway"]["latency"]["ttft"]["counts"]) > sum(before["gateway"]["latency"]["ttft"]["counts"])
    (model,) = after["models"]
    assert (model["name"], model["reachable"]) == (MODEL, True)
    assert model["leader"]["term"] >= 1


async def test_a_key_without_the_right_sees_its_own_tenant_only(open_gateway: Any, tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    write_keys(keys, ann={"admin": True}, bob={})
    front = await open_gateway(api_keys_file=str(keys))
    assert (await front.ask("GET", "/", headers={"Host": "chat.example"}))[
        0
    ] == 200  # public, and keys protect the rest
    assert (await front.ask("GET", "/ui/feed"))[0] == 401
    _, whole, _ = await eventually(lambda: front.ask("GET", "/ui/feed", headers=bearer("ann")))
    assert whole["admin"]
    assert {"leader", "workers", "tenants"} <= whole["models"][0].keys()
    _, own, _ = await front.ask("GET", "/ui/feed", headers=bearer("bob"))
    assert (own["admin"], own["tenant"]) == (False, "bob")
    assert "gateway" not in own
    assert own["models"][0].keys() == {"name", "ready", "sleeps", "waits", "reachable", "own"}


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("localhost:8000", None, 200),
        ("app.localhost", None, 200),
        ("[::1]:8000", None, 200),
        ("gpu1.lan:8000", None, 200),  # named by the operator
        ("evil.example", None, 403),
        ("evil.example", "http://evil.example", 403),  # its name points to us
        ("localhost:8000", "http://localhost:8000", 200),
        ("localhost:8000", "https://evil.example", 403),
        ("localhost:8000", "https://friend.example", 200),
        ("localhost:8000", "vscode-webview://x", 200),
        ("10.0.0.5", None, 403),
    ],
)
async def test_without_keys_only_names_of_this_machine_are_answered(
    open_gateway: Any, host: str, origin: str | None, status: int
) -> None:
    front = await open_gateway(allowed_hosts="gpu1.lan", cors_origins="https://friend.example")
    headers = {"Host": host, **({"Origin": origin} if origin else {})}
    for path in ("/", "/ui/feed"):
        assert (await front.ask("GET", path, headers=headers))[0] == status, path
    # a program may call by any name; what a page of the web could have sent is held to the same rule
    of_api = status if origin else 200
    assert (await front.ask("GET", "/v1/models", headers=headers))[0] == of_api
    assert (await front.post("/v1/completions", {**COMPLETION, "stream": False}, headers=headers))[0] == of_api


def test_hosts_are_read_as_browsers_write_them() -> None:
    assert [host_of(netloc) for netloc in ("a.b:80", "[::1]:80", "LOCALHOST.", "", "a:b:c", "[")] == [
        "a.b", "::1", "localhost", "", "a", "",
    ]  # fmt: skip
    assert all(map(is_loopback, ("localhost", "127.9.9.9", "::1", "x.localhost")))
    assert not any(map(is_loopback, ("", "localhost.evil.example", "127.0.0.1.evil.example", "0.0.0.0")))
    assert parse_hosts(" A.lan, b ") == {"a.lan", "b"}
    with pytest.raises(StartError, match="--allowed-hosts"):
        parse_hosts("http://a.lan")
