"""The supervisor over small programs: what dies comes back, what cannot start ends all, nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from headrace.serve import supervisor as module
from headrace.serve.supervisor import GaveUp, Program, Supervisor
from protocol.errors import EX_CONFIG, StartError

WAIT_S = 60  # generous: the machine may be busy


def program(code: str, name: str = "w-0", **kwargs: bool) -> Program:
    return Program("worker", name, [sys.executable, "-c", code], dict(os.environ), **kwargs)


SLEEP = "import time; print('up', flush=True); time.sleep(1000)"


async def until(condition: Callable[[], object], what: str) -> None:
    for _ in range(WAIT_S * 50):
        if condition():
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"never happened: {what}")


def listed(run_dir: Path) -> dict[str, int]:
    return {p["name"]: p["pid"] for p in json.loads((run_dir / "processes.json").read_text())}


async def test_a_killed_process_comes_back_and_the_list_stays_true(tmp_path: Path) -> None:
    notices: list[str] = []
    kept = Supervisor(tmp_path, on_notice=notices.append)
    kept.start(program(SLEEP, "a"))
    kept.start(program(SLEEP, "b"))
    await until(lambda: len(listed(tmp_path)) == 2, "both listed")
    before = listed(tmp_path)
    assert all(p["role"] == "worker" for p in json.loads((tmp_path / "processes.json").read_text()))
    for pid in before.values():
        os.kill(pid, 0)  # they do run
    os.kill(before["a"], signal.SIGKILL)
    await until(lambda: listed(tmp_path).get("a", before["a"]) != before["a"], "a new pid")
    assert listed(tmp_path)["b"] == before["b"]
    assert any("SIGKILL" in n for n in notices)
    assert not kept.failed.done()
    await kept.stop(*kept.children.values(), timeout=WAIT_S)
    assert listed(tmp_path) == {}
    for pid in before.values():
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


async def test_it_gives_up_after_repeated_deaths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BACKOFF_S", (0.0,))
    notices: list[str] = []
    kept = Supervisor(tmp_path, on_notice=notices.append)
    kept.start(program("import os; raise SystemExit(f'{os.getpid()} the last words')"))
    with pytest.raises(GaveUp, match=r"w-0 died 5 times .*(?s:.*)the last words"):
        await asyncio.wait_for(kept.failed, WAIT_S)
    assert len([n for n in notices if "started again" in n]) == 4


async def test_the_same_end_twice_before_it_served_ends_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BACKOFF_S", (0.0,))
    words = "import sys, time; sys.exit(f'2026-01-01 {time.time()} ERROR w: no such device')"
    kept = Supervisor(tmp_path)
    kept.start(program(words))
    with pytest.raises(GaveUp, match=r"w-0 ended with exit code 1 twice for the same reason: ERROR w: no such device"):
        await asyncio.wait_for(kept.failed, WAIT_S)
    served = Supervisor(tmp_path)
    served.served.add("w-0")
    served.start(program(words))
    with pytest.raises(GaveUp, match="died 5 times"):
        await asyncio.wait_for(served.failed, WAIT_S)


async def test_what_was_up_and_is_lasting_is_never_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BACKOFF_S", (0.0,))
    notices: list[str] = []
    kept = Supervisor(tmp_path, on_notice=notices.append)
    child = kept.start(program("raise SystemExit(1)", lasting=True))
    child.was_up = True
    await until(lambda: len([n for n in notices if "started again" in n]) > 7, "restarted beyond the bound")
    assert not kept.failed.done()
    await kept.stop(child, timeout=WAIT_S)


async def test_a_start_that_cannot_succeed_is_not_repeated(tmp_path: Path) -> None:
    code = f"""
import sys
print('noise', file=sys.stderr)
print('headrace worker: falcon is refused:', file=sys.stderr)
print('it has no attention interface', file=sys.stderr)
raise SystemExit({EX_CONFIG})
"""
    kept = Supervisor(tmp_path)
    kept.start(program(code))
    with pytest.raises(StartError, match=r"^falcon is refused:\nit has no attention interface$"):
        await asyncio.wait_for(kept.failed, WAIT_S)
    assert "noise" in (tmp_path / "logs" / "w-0.log").read_text()


async def test_output_goes_to_the_log_and_stderr_lines_to_the_caller(tmp_path: Path) -> None:
    seen: list[str] = []
    kept = Supervisor(tmp_path, on_line=lambda child, line: seen.append(f"{child.name}:{line}"))
    kept.start(program("import sys,time; print('out'); sys.stdout.flush();"
                       "sys.stderr.write('one\\rtw\\u00f6\\n'); sys.stderr.flush(); time.sleep(1000)"))  # fmt: skip
    await until(lambda: len(seen) == 2, "two lines")
    assert seen == ["w-0:one", "w-0:twö"]
    await kept.stop(*kept.children.values(), timeout=WAIT_S)
    assert {"out", "one", "twö"} <= set((tmp_path / "logs" / "w-0.log").read_text().split())


async def test_stop_kills_what_does_not_leave(tmp_path: Path) -> None:
    seen: list[str] = []
    kept = Supervisor(tmp_path, on_line=lambda child, line: seen.append(line))
    code = """
import signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print('deaf', file=sys.stderr, flush=True)
while True: time.sleep(1)
"""
    kept.start(program(code))
    await until(lambda: seen, "it ignores SIGTERM")
    await asyncio.wait_for(kept.stop(*kept.children.values(), timeout=0.3), WAIT_S)
    assert listed(tmp_path) == {}


async def test_what_a_dead_child_leaves_behind_is_ended(tmp_path: Path) -> None:
    """A worker's own child processes must not outlive it: they may hold the device."""
    seen: list[str] = []
    kept = Supervisor(tmp_path, on_line=lambda child, line: seen.append(line))
    code = f"""
import subprocess, sys, time
inner = subprocess.Popen([sys.executable, '-c', {SLEEP!r}])
print(inner.pid, file=sys.stderr, flush=True)
time.sleep(1000)
"""
    child = kept.start(program(code))  # the grandchild holds our end of stderr open
    await until(lambda: seen, "the grandchild's pid")
    grandchild = int(seen[0])
    assert child.process is not None
    os.kill(child.process.pid, signal.SIGKILL)
    await until(lambda: not running(grandchild), "the grandchild's end")
    await kept.stop(child, timeout=WAIT_S)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's death signal is Linux's")
async def test_children_die_with_a_killed_supervisor(tmp_path: Path) -> None:
    code = f"""
import asyncio, sys
from pathlib import Path
from headrace.serve.supervisor import Program, Supervisor
async def main():
    kept = Supervisor(Path({str(tmp_path)!r}))
    kept.start(Program("worker", "w-0", [sys.executable, "-c", {SLEEP!r}], {{}}))
    await asyncio.sleep(1000)
asyncio.run(main())
"""
    outer = await asyncio.to_thread(subprocess.Popen, [sys.executable, "-c", code])
    try:
        log = tmp_path / "logs" / "w-0.log"
        await until(lambda: log.exists() and "up" in log.read_text(), "the child's start")
        pid = listed(tmp_path)["w-0"]
        assert running(pid)
    finally:
        outer.kill()
        await asyncio.to_thread(outer.wait)
    await until(lambda: not running(pid), "the child's end")


def running(pid: int) -> bool:
    """A zombie (its new parent may be slow to reap) no longer runs."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False
