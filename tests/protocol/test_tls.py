"""Redis over TLS by ``rediss://``. The embedded server's binary has no TLS, so a small proxy speaks it in its stead."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import redis

from headrace.serve.embedded import EmbeddedServer
from protocol.errors import StartError
from tests.bus import Bus
from tests.conftest import MODEL
from tests.protocol.stage import Stage

OPENSSL = shutil.which("openssl")
pytestmark = pytest.mark.skipif(OPENSSL is None, reason="no openssl on PATH to make a certificate with")


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """(certificate, key) for localhost, signed by itself."""
    made = folder / f"{name}.crt", folder / f"{name}.key"
    subprocess.run(
        [
            str(OPENSSL), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
            "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-out", made[0], "-keyout", made[1],
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    return made


@pytest.fixture
async def encrypted(server: EmbeddedServer, tmp_path: Path) -> AsyncIterator[tuple[int, Path]]:
    """(port that speaks TLS, its certificate)."""
    path = server.url.removeprefix("unix://")
    crt, key = certificate(tmp_path, "server")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(crt, key)

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while piece := await reader.read(1 << 16):
                writer.write(piece)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_unix_connection(path)
        await asyncio.gather(pump(reader, inner_writer), pump(inner_reader, writer))

    proxy = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    yield proxy.sockets[0].getsockname()[1], crt
    proxy.close()


async def test_a_request_over_tls(encrypted: tuple[int, Path], raw: redis.Redis) -> None:
    port, crt = encrypted
    bus = Bus(f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={crt}", MODEL, patience=10.0)
    await bus.connect()
    stage = Stage(bus, raw)
    subscription = bus.subscribe("gw")
    await subscription.start()
    await stage.lead()
    await stage.register()
    rid = await stage.running(reply_to="gw")
    async with asyncio.timeout(30):
        assert [row.rid for row in await anext(aiter(subscription))] == [rid]
    await subscription.close()
    await bus.close()
    await asyncio.sleep(0.1)  # the proxy sees both ends


async def test_a_certificate_of_a_stranger_is_refused(encrypted: tuple[int, Path], tmp_path: Path) -> None:
    port, _ = encrypted
    stranger, _ = certificate(tmp_path, "stranger")
    bus = Bus(f"rediss://:secret@127.0.0.1:{port}/0?ssl_ca_certs={stranger}", MODEL, patience=0.1)
    with pytest.raises(StartError, match=r"(?i)certificate") as refused:
        await bus.connect()
    assert "secret" not in str(refused.value)
    await bus.close()
