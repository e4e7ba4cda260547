"""The Redis users of deploy/users.acl: each role works with its own, and is refused what it has no need of."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import redis

from headrace import Client
from headrace.serve.embedded import DURABLE, EmbeddedServer
from protocol.bus import GatewayBus
from protocol.messages import Job
from protocol.routing.table import Routing
from tests.headrace.test_examples import EXAMPLE
from tests.stack import START_S, free_port

ACL = Path(__file__).parents[2] / "deploy" / "users.acl"
MODEL = "org/tiny"


@dataclass(frozen=True)
class Guarded:
    """Services that run under their own users. ``admin`` is a client that may do everything."""

    port: int
    url: str  # the server's, with {user} for the user
    admin: redis.Redis

    def as_user(self, user: str) -> redis.Redis:
        return redis.Redis(unix_socket_path=self.url.split("://")[1], username=user, password=f"CHANGE-ME-{user}")

    def user_url(self, user: str) -> str:
        return self.url.replace("unix://", f"unix://{user}:CHANGE-ME-{user}@")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[Guarded]:
    place = tmp_path_factory.mktemp("acl")
    processes: list[subprocess.Popen[bytes]] = []
    with EmbeddedServer(place / "data", settings=DURABLE) as server:
        path = server.url.removeprefix("unix://")
        with redis.Redis(unix_socket_path=path) as everyone:
            everyone.execute_command("ACL", "SETUSER", "admin", "on", ">admin", "~*", "&*", "+@all")
        admin = redis.Redis(unix_socket_path=path, username="admin", password="admin")
        for line in ACL.read_text().splitlines():
            admin.execute_command("ACL", "SETUSER", *line.split()[1:])
        found = Guarded(free_port(), server.url, admin)
        roles = {
            "scheduler": ["--model", str(model_dir), "--served-model-name", MODEL],
            "worker": ["--model", str(model_dir), "--served-model-name", MODEL, "--engine", "simulated", "--name", "w"],
            "gateway": ["--port", str(found.port)],
        }
        try:
            for role, options in roles.items():
                env = {**os.environ, "HEADRACE_REDIS_URL": found.user_url(role)}
                with (place / f"{role}.log").open("wb") as log:
                    command = [sys.executable, "-m", "headrace", role, *options]
                    processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
            _until_ready(found, processes, place)
            yield found
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait(timeout=60)
            admin.close()


def _until_ready(found: Guarded, processes: list[subprocess.Popen[bytes]], place: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{found.port}/ready", timeout=5):
                return
        except OSError:
            logs = "\n".join(log.read_text()[-2000:] for log in place.glob("*.log"))
            assert all(p.poll() is None for p in processes), logs
            assert time.monotonic() < deadline, f"{logs}\n{found.admin.acl_log()}"
            time.sleep(0.2)


def ask(guarded: Guarded, path: str, body: object = None, method: str | None = None, **headers: str):  # type: ignore[no-untyped-def]
    """The open reply of an HTTP call."""
    raw = json.dumps(body).encode() if body is not None else None
    headers = {"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
    call = urllib.request.Request(f"http://127.0.0.1:{guarded.port}{path}", raw, headers, method=method)
    return urllib.request.urlopen(call, timeout=120)


def test_every_role_works_as_its_own_user(guarded: Guarded) -> None:
    body = {"model": MODEL, "prompt": "def add(a, b):", "max_tokens": 5, "n": 2}
    first, again = (json.load(ask(guarded, "/v1/completions", body, Idempotency_Key="once")) for _ in range(2))
    assert first["id"] == again["id"]
    assert b"[DONE]" in ask(guarded, "/v1/completions", {**body, "stream": True}).read()
    long = {"model": MODEL, "prompt": "x", "max_tokens": 3000, "stream": True, "ignore_eos": True}
    with ask(guarded, "/v1/completions", long, X_Headrace_Detached="true") as reply:
        rid = reply.headers["X-Request-Id"]
        reply.readline()
    ask(guarded, f"/v1/requests/{rid}", method="DELETE").close()
    assert ask(guarded, f"/v1/streams/{rid}").read()
    assert json.load(ask(guarded, "/tokenize", {"prompt": "hello"}))["tokens"]

    command = [sys.executable, str(EXAMPLE), "--redis-url", guarded.user_url("producer"), "--model", MODEL, "def f():"]
    produced = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert produced.returncode == 0, produced.stderr
    assert "result:" in produced.stdout

    table = msgspec.json.encode(Routing(aliases={"fast": {MODEL: 1}}))
    guarded.admin.set("{headrace:models}:routing", table)
    with guarded.as_user("producer") as producer:
        job = {"id": "pushed-1", "prompt": "x", "sampling": {"max_tokens": 2}, "results": "mine"}
        producer.xadd("headrace:{fast}:jobs", {"job": "none"})
        producer.xadd("headrace:{fast}:jobs", {"job": json.dumps(job)})
        deadline = time.monotonic() + START_S
        while not (found := producer.xread({f"headrace:{{{MODEL}}}:results:mine": "0"})):
            assert time.monotonic() < deadline, guarded.admin.acl_log()
            time.sleep(0.2)
        ((_, ((_, entry),)),) = found
        assert msgspec.msgpack.decode(entry[b"result"])["id"] == "pushed-1"
        assert producer.get("headrace:{fast}:routed:default:pushed-1") == MODEL.encode()
    assert guarded.admin.xlen("headrace:{fast}:dead") == 1
    assert asyncio.run(_moved(guarded.user_url("gateway")))

    with Client(guarded.user_url("gateway"), MODEL) as client:  # to the queue, a client is a gateway
        assert client.result(client.submit("x", max_tokens=3)).choices[0].finish_reason

    denied = [(e["username"], e["context"], e["object"]) for e in guarded.admin.acl_log()]
    # the scheduler alone looks at the server's settings, among which are passwords; the others say that they may not
    assert set(denied) <= {(user, "toplevel", "config|get") for user in ("gateway", "worker")}


async def _moved(url: str) -> bool:
    """Whether a gateway may give a request of a model that nobody leads to another one."""
    bus = GatewayBus(url, "org/other")
    await bus.connect()
    await bus.accept(Job(prompt="x"), rid="r" * 32, idempotency="k")
    moved = await bus.move("r" * 32, "default", MODEL, "s" * 32)
    await bus.close()
    return moved


@pytest.mark.parametrize(
    ("user", "command"),
    [
        ("gateway", ["XADD", "headrace:{org/tiny}:plans:w", "*", "p", "x"]),
        ("gateway", ["APPEND", "headrace:{org/tiny}:j:0:0", "x"]),
        ("gateway", ["SET", "headrace:{org/tiny}:j:0:0", "x"]),
        ("gateway", ["HSET", "headrace:models", "m", "x"]),
        ("gateway", ["PUBLISH", "headrace:{org/tiny}:out:a", "x"]),
        ("worker", ["XREADGROUP", "GROUP", "scheduler", "c", "STREAMS", "headrace:{org/tiny}:jobs", ">"]),
        ("worker", ["HSET", "headrace:models", "m", "x"]),
        ("producer", ["HGETALL", "headrace:{org/tiny}:r:0"]),
        ("producer", ["XREAD", "STREAMS", "headrace:{org/tiny}:jobs", "0"]),
        ("producer", ["SET", "headrace:{org/tiny}:idem:default:a", "x"]),
        *((user, ["FLUSHALL"]) for user in ("gateway", "scheduler", "worker", "producer")),
        *((user, ["CONFIG", "GET", "masterauth"]) for user in ("gateway", "worker", "producer")),
        *((user, ["CONFIG", "SET", "appendonly", "no"]) for user in ("gateway", "scheduler", "worker", "producer")),
        *((user, ["KEYS", "*"]) for user in ("gateway", "scheduler", "worker", "producer")),
        *((user, ["GET", "somebody:else"]) for user in ("gateway", "scheduler", "worker", "producer")),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_no_role_may_do_more_than_it_needs(guarded: Guarded, user: str, command: list[str]) -> None:
    with guarded.as_user(user) as client, pytest.raises(redis.exceptions.NoPermissionError):
        client.execute_command(*command)
