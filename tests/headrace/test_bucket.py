"""Models in a bucket: the real client library, and a server that speaks what it reads of Cloud Storage's JSON API."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from headrace.bucket import fetched
from headrace.model import choose
from protocol.errors import StartError

DEMO = Path(__file__).parents[2] / "examples" / "demo-model"
URI = "gs://models/team/demo"


class Bucket(ThreadingHTTPServer):
    """The bucket `models`: names of objects, what they hold and their generation. ``read`` are those that were read."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.read: list[str] = []


class Handler(BaseHTTPRequestHandler):
    server: Bucket

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        asked = urlsplit(self.path)
        where, query = asked.path, parse_qs(asked.query)
        if where == "/storage/v1/b/models/o":
            prefix = query.get("prefix", [""])[0]
            items = [{"name": n, "bucket": "models", "size": str(len(raw)), "generation": str(generation)}
                     for n, (raw, generation) in self.server.objects.items() if n.startswith(prefix)]  # fmt: skip
            self.answer(200, json.dumps({"kind": "storage#objects", "items": items}).encode())
        elif where.startswith("/download/storage/v1/b/models/o/"):
            name = unquote(where.rpartition("/o/")[2])
            self.server.read.append(name)
            self.answer(200, self.server.objects[name][0])
        else:
            self.answer(404, b'{"error": {"code": 404, "message": "no such bucket"}}')

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    with Bucket() as server:
        for path in DEMO.iterdir():
            server.objects[f"team/demo/1/{path.name}"] = path.read_bytes(), 1
        server.objects["team/demo/"] = b"", 1  # a folder, as consoles make them
        server.objects["team/demo-other/config.json"] = b"{}", 1
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
        yield server
        server.shutdown()


@pytest.mark.ops
@pytest.mark.filterwarnings("default")
def test_a_model_is_copied_once_and_anew_where_it_changed(bucket: Bucket, tmp_path: Path) -> None:
    values = {"model": URI, "served_model_name": None, "cache_dir": str(tmp_path), "engine": "torch"}
    chosen = choose(values, lambda *_: None, lambda _: None)
    assert (chosen.name, chosen.origin) == ("demo", URI)
    for path in DEMO.iterdir():
        assert (Path(chosen.path) / path.name).read_bytes() == path.read_bytes()
    assert len(bucket.read) == len(list(DEMO.iterdir()))
    bucket.read.clear()
    assert choose(values, lambda *_: None, lambda _: None) == chosen
    assert bucket.read == []
    bucket.objects["team/demo/1/README.md"] = b"new", 2
    choose(values, lambda *_: None, lambda _: None)
    assert bucket.read == ["team/demo/1/README.md"]
    assert (Path(chosen.path) / "README.md").read_bytes() == b"new"
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.ops
@pytest.mark.filterwarnings("default")
def test_what_cannot_be_copied_is_told(bucket: Bucket, tmp_path: Path) -> None:
    with pytest.raises(StartError, match="nothing under this name"):
        fetched("gs://models/team/none", tmp_path, lambda *_: None)
    with pytest.raises(StartError, match="cannot be copied"):
        fetched("gs://another/x", tmp_path, lambda *_: None)
    bucket.objects["team/demo/../../../escaped"] = b"x", 1
    with pytest.raises(StartError, match="outside of the model's folder"):
        fetched(URI, tmp_path, lambda *_: None)
    shutil.rmtree(tmp_path / "gcs", ignore_errors=True)


def test_without_the_library_the_start_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    for name in ("google.api_core.exceptions", "google.cloud", "google.cloud.storage"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(StartError, match=r"pip install 'headrace\[gcs\]'"):
        fetched(URI, tmp_path, lambda *_: None)
