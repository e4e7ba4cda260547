"""Real processes, a real load, random faults: the promise under fire.

Headrace runs as `headrace serve` starts it, with two of each role and the simulated engine drawing truly random
tokens, so that a token made twice is a token made differently. Redis stands behind a proxy that can cut a
process off. Faults are drawn from a seed; at the end the history is judged against the journals.

    python -m tests.chaos.driver --minutes 60 --every 20 --seed 1
    python -m tests.chaos.driver --minutes 10 -- --tensor-parallel-size 2    # ranks are killed and frozen too
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import redis.asyncio

from headrace.serve.embedded import server_command
from tests.bus import Bus
from tests.chaos.flood import Flood, fold_spaces
from tests.chaos.history import History, leftovers
from tests.chaos.load import Load
from tests.chaos.proxy import Proxy
from tests.chaos.shards import Shards
from tests.models import save_thinking_model
from tests.stack import Stack, free_port

MODEL = "chaos"
JUDGED_WITHIN_S = 7200.0  # after the last request: texts of a flood are prepared when nobody else wants the processor
RECOVERY_S = 8.0  # the promise: tokens flow again within this, plus the prefill
FLOOD = "flood"
# Nothing can stand in for the server, nor for the gateway at which a reader stays: their silence counts from the end.
ALONE = ("restart redis", "freeze redis", "no disk for redis", "no memory for redis", "freeze gateway", "cut gateway")


@dataclass
class Fault:
    kind: str
    at: float
    until: float
    recovery: float = 0.0  # the longest silence that it had a part in
    single: float = 0.0  # the longest one in which it had no other fault beside it

    def felt(self, end: float, gap: float) -> bool:
        """Whether it may have had a part in a silence: that began while it lasted or while it was recovered from."""
        return self.at <= end and end - gap <= self.until + RECOVERY_S

    def silence(self, end: float, gap: float) -> float:
        return min(gap, max(0.0, end - self.until)) if self.kind in ALONE else gap


@dataclass
class Chaos:
    """One run. ``args`` are further options of `headrace serve`; ``env`` goes to its processes."""

    folder: Path
    seed: int
    args: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    structured: float = 0.3  # share of the requests that ask for a structure
    streams: int = 8  # clients that stream at a time
    calls: int = 2  # clients that stream tool calls at a time
    texts: int = 64  # on their way at once in a flood
    faults: list[Fault] = field(default_factory=list)
    history: History = field(default_factory=History)
    ranks: set[int] = field(default_factory=set)  # pids of engine processes that were seen
    server: subprocess.Popen[bytes] | None = None
    draining: list[asyncio.Task[None]] = field(default_factory=list)  # each waits for the end of a flood

    async def run(
        self, seconds: float, every: float, kinds: list[str] | None = None, *, once: bool = False, rolling: bool = False
    ) -> None:
        """Load for ``seconds``, a fault every ``every``, or one rolling restart; then rest, judge, and stop.
        ``once``: until every kind has come, if that is sooner."""
        self.rng = random.Random(self.seed)
        self.redis_port = free_port()
        self._start_server()
        self.proxy = Proxy(self.redis_port)
        await self.proxy.start()
        direct, proxied = (f"redis://127.0.0.1:{port}/0" for port in (self.redis_port, self.proxy.port))
        self.stack = Stack(
            self.folder / "stack", "--redis-url", proxied, "--model", str(self._model()), "--served-model-name", MODEL,
            "--engine", "simulated", "--engine-options", '{"random": true}',
            "--tool-format", "hermes", "--max-model-len", "4096",
            "--workers", "2", "--schedulers", "2", "--gateways", "2",
            "--retention", str(seconds + JUDGED_WITHIN_S),  # all journals are judged at the end
            *self.args, env=self.env,
        )  # fmt: skip
        shards = Shards(direct, MODEL)
        bus = shards.buses[0]
        try:
            await asyncio.to_thread(self.stack.__enter__)
            await shards.connect()
            urls = [f"http://127.0.0.1:{self.stack.port + i}" for i in range(2)]
            self.load = Load(
                urls, MODEL, self.history, random.Random(self.seed + 1), shards, structured=self.structured
            )
            self.flood = Flood(urls, MODEL, bus, self.history, at_once=self.texts)
            loading = asyncio.create_task(
                self.load.run(streams=self.streams, detached=2, wholes=2, producers=2, calls=self.calls)
            )
            watching = [asyncio.create_task(self._watch_epoch(bus)), asyncio.create_task(self._watch_moves(shards))]
            if rolling:
                await self._restart_all()
            else:
                await self._inject(seconds, every, kinds or list(self._table()), loading, once)
            self.load.stop.set()
            await asyncio.wait_for(loading, 300)
            for task in watching:
                task.cancel()
            await asyncio.gather(*self.draining)
            self.flood.judge()
            await self._rest(shards, direct)
            await self.history.judge(shards)
            self._measure()
        except BaseException:
            print(self.stack.output(), file=sys.stderr)
            raise
        finally:
            with suppress(Exception):
                await shards.close()
            code = await asyncio.to_thread(self.stack.stop, None)
            await self.proxy.stop()
            self._stop_server()
        if code:
            self.history.blame(f"serve ended with {code}")
        self._blame_orphans()

    def _model(self) -> Path:
        """Only its tokenizer and config are read: the engine is simulated."""
        path = self.folder / "model"
        path.mkdir(parents=True)
        save_thinking_model(path)
        fold_spaces(path)
        return path

    # -------------------------------------------------------------- the server

    def _start_server(self) -> None:
        data = self.folder / "redis"
        data.mkdir(parents=True, exist_ok=True)
        with (self.folder / "redis.log").open("ab") as log:
            self.server = subprocess.Popen(
                server_command(data, port=self.redis_port), stdout=log, stderr=subprocess.STDOUT,
                restore_signals=False,  # a file that may not grow is an error of write, not a signal
            )  # fmt: skip

    def _stop_server(self) -> None:
        if self.server is not None:
            self.server.kill()
            self.server.wait()

    # -------------------------------------------------------------- faults

    def _table(self) -> dict[str, Callable[[], Awaitable[None]]]:
        table: dict[str, Callable[[], Awaitable[None]]] = {}
        for role in ("gateway", "scheduler", "worker"):
            table[f"kill {role}"] = lambda role=role: self._kill(role)
            table[f"freeze {role}"] = lambda role=role: self._freeze(self._pid(role))
            table[f"cut {role}"] = lambda role=role: self._cut(role)
            table[f"lose reply {role}"] = lambda role=role: self._lose_reply(role)
            table[f"term {role}"] = lambda role=role: self._kill(role, signal.SIGTERM)
        if any(option.endswith("-parallel-size") for option in self.args):
            table["kill rank"] = lambda: self._kill_rank()
            table["freeze rank"] = lambda: self._freeze(self._rank())
        table["restart redis"] = self._restart_redis
        table["no memory for redis"] = self._starve_redis
        table["no disk for redis"] = self._fill_disk
        table[FLOOD] = self._flood
        table["freeze redis"] = lambda: self._freeze(self.server.pid if self.server else 0)
        return table

    def _pid(self, role: str) -> int:
        pids = self.stack.pids(role)
        return self.rng.choice(sorted(pids.values()))

    async def _kill(self, role: str, sig: int = signal.SIGKILL) -> None:
        os.kill(self._pid(role), sig)

    def _rank(self) -> int:
        """An engine process of a worker."""
        worker = self._pid("worker")
        ranks = [int(pid) for task in Path(f"/proc/{worker}/task").iterdir() for pid in _children(task)]
        self.ranks.update(ranks)
        return self.rng.choice(sorted(ranks))

    def _blame_orphans(self) -> None:
        for rank in self.ranks:
            if Path(f"/proc/{rank}/exe").exists():
                self.history.blame(f"the rank with pid {rank} is left over")

    async def _kill_rank(self) -> None:
        os.kill(self._rank(), signal.SIGKILL)

    async def _freeze(self, pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(15)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)

    async def _cut(self, role: str) -> None:
        self.proxy.cut(self._pid(role), 10)
        await asyncio.sleep(10)

    async def _lose_reply(self, role: str) -> None:
        self.proxy.lose_reply(self._pid(role))

    async def _flood(self) -> None:
        """Texts of a megabyte for a while; what was pushed is refused in the time after, beside the next faults."""
        await self.flood.run()
        self.draining.append(asyncio.create_task(self.flood.drained()))

    async def _restart_redis(self) -> None:
        assert self.server is not None
        self.server.kill()
        await asyncio.to_thread(self.server.wait)
        await asyncio.sleep(self.rng.uniform(0.1, 3))
        self._start_server()

    async def _starve_redis(self) -> None:
        """Less memory than it holds, for a while: nothing new is taken, all else goes on."""
        async with redis.asyncio.Redis(port=self.redis_port) as client:
            await client.config_set("maxmemory", 1 << 20)
            await asyncio.sleep(self.rng.uniform(2, 10))
            await client.config_set("maxmemory", 0)

    async def _fill_disk(self) -> None:
        """Its file cannot grow any more: it ends at the next write, and is started again and again until it can."""
        deadline = time.monotonic() + self.rng.uniform(3, 10)
        largest = max(file.stat().st_size for file in (self.folder / "redis" / "appendonlydir").iterdir())
        while time.monotonic() < deadline:
            self._limit_file_size(largest + self.rng.randrange(1 << 14))
            await self._restart_if_ended(deadline - time.monotonic())
        self._limit_file_size(resource.RLIM_INFINITY)
        await self._restart_if_ended(0.2)

    def _limit_file_size(self, most: int) -> None:
        assert self.server is not None
        with suppress(ProcessLookupError):
            resource.prlimit(self.server.pid, resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))

    async def _restart_if_ended(self, within_s: float) -> None:
        assert self.server is not None
        with suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(self.server.wait, max(0.0, within_s))
            await asyncio.sleep(self.rng.uniform(0.1, 1))
            self._start_server()

    async def _inject(
        self, seconds: float, every: float, kinds: list[str], loading: asyncio.Task[None], once: bool
    ) -> None:
        begun, deck = time.monotonic(), list[str]()
        table = self._table()
        await asyncio.sleep(min(3, every))
        while time.monotonic() - begun < seconds:
            if loading.done():
                loading.result()
            deck = deck or self.rng.sample(kinds, len(kinds))  # every kind comes before one comes twice
            kind, at = deck.pop(), time.monotonic()
            with suppress(IndexError, ProcessLookupError):  # none of the role is up at this moment
                await table[kind]()
                self.faults.append(fault := Fault(kind, at, time.monotonic()))
                if kind == FLOOD:
                    self.draining[-1].add_done_callback(
                        lambda _, fault=fault: setattr(fault, "until", time.monotonic())
                    )
                print(f"{at - begun:7.1f} s  {kind:24} done {self.load.done}, resumed {self.load.resumed}", flush=True)
            await asyncio.sleep(every * self.rng.uniform(0.6, 1.4))
            if once and not deck:
                return

    async def _restart_all(self) -> None:
        """SIGTERM to every process in turn, each followed by the next only once its successor serves."""
        await asyncio.sleep(3)
        for role in ("gateway", "scheduler", "worker"):
            for name, pid in sorted(self.stack.pids(role).items()):
                at = time.monotonic()
                os.kill(pid, signal.SIGTERM)
                while self.stack.pids(role).get(name, pid) == pid:  # noqa: ASYNC110 (another process tells by a file)
                    await asyncio.sleep(0.2)
                for port in (self.stack.port, self.stack.port + 1):
                    await asyncio.to_thread(self.stack.wait_ready, port=port)
                await asyncio.sleep(3)
                self.faults.append(Fault(f"restart {role}", at, time.monotonic()))

    # -------------------------------------------------------------- judging

    async def _watch_epoch(self, bus: Bus) -> None:
        while True:
            with suppress(Exception):  # the server may be down: that is the point
                self.history.epochs.append((await bus.read_leader()).epoch)
            await asyncio.sleep(0.5)

    async def _watch_moves(self, shards: Shards) -> None:
        while True:
            with suppress(Exception):  # the same
                await self.history.watch_moves(shards)
            await asyncio.sleep(0.3)

    async def _rest(self, shards: Shards, url: str) -> None:
        """Wait until nothing is under way; what is left over after half a minute is a violation."""
        client = redis.asyncio.Redis.from_url(url)
        try:
            for _ in range(60):
                left = await shards.each(lambda bus: leftovers(bus, client))
                if not left:
                    return
                await asyncio.sleep(0.5)
            for item in left:
                self.history.blame(f"left over: {item}")
        finally:
            await client.aclose()

    def _measure(self) -> None:
        """Lay every silence at the door of the faults that may have had a part in it."""
        self.together, self.flooded = 0.0, 0.0
        for end, gap in self.load.gaps:
            felt = [fault for fault in self.faults if fault.felt(end, gap)]
            for fault in felt:
                fault.recovery = max(fault.recovery, gap)
            if any(fault.kind == FLOOD for fault in felt):
                self.flooded = max(self.flooded, min(fault.silence(end, gap) for fault in felt))
            elif len(felt) == 1:
                felt[0].single = max(felt[0].single, felt[0].silence(end, gap))
            elif felt:
                self.together = max(self.together, min(fault.silence(end, gap) for fault in felt))

    def report(self) -> str:
        by_kind = defaultdict(list)
        for fault in self.faults:
            by_kind[fault.kind].append(fault)
        lines = [f"{'fault':26}{'times':>6}{'longest silence p50':>22}{'max':>8}{'alone':>10}"]
        for kind, faults in sorted(by_kind.items()):
            values, single = [fault.recovery for fault in faults], max(fault.single for fault in faults)
            lines.append(
                f"{kind:26}{len(values):6}{statistics.median(values):20.1f} s{max(values):6.1f} s{single:8.1f} s"
            )
        tokens = sum(len(t) for view in self.history.views for t in view.tokens.values())
        worst = max(self.faults, key=lambda fault: fault.single, default=None)
        lines += [
            f"longest silence of a single fault without the flood: {worst.single if worst else 0:.1f} s "
            f"({worst.kind if worst else 'none'}; promised: {RECOVERY_S:.0f} s and the prefill); of several at once: "
            f"{self.together:.1f} s; with the flood, alone or beside others: {self.flooded:.1f} s",
            f"(of faults of which nothing stands in, {', '.join(ALONE)}: from their end on)",
            f"flood: {dict(self.flood.answers)} over HTTP, {len(self.flood.pushed)} pushed",
            f"requests {len(self.history.accepted)}, tokens seen {tokens}, resumed {self.load.resumed} times, "
            f"structured {dict(self.history.structured)}, "
            f"refused or failed attempts {dict(self.history.failures)}, violations {len(self.history.violations)}",
        ]
        return "\n".join(lines + [f"VIOLATION {v}" for v in self.history.violations[:50]])


def _children(task: Path) -> list[str]:
    try:
        return (task / "children").read_text().split()
    except OSError:  # it has ended meanwhile
        return []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--every", type=float, default=20, help="seconds between two faults")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--kinds", nargs="*", help="only these kinds of fault")
    parser.add_argument("--structured", type=float, default=0.3, help="share of the requests that keep a JSON schema")
    parser.add_argument("--streams", type=int, default=8, help="clients that stream at a time (default: %(default)s)")
    parser.add_argument("--calls", type=int, default=2, help="clients that stream tool calls (default: %(default)s)")
    parser.add_argument("--texts", type=int, default=64, help="texts of a megabyte in a flood (default: %(default)s)")
    parser.add_argument("serve", nargs="*", help="further options of serve, after --")
    options = parser.parse_args()
    print(f"seed {options.seed}")
    with tempfile.TemporaryDirectory(prefix="headrace-chaos-") as folder:
        chaos = Chaos(
            Path(folder), options.seed, tuple(options.serve), structured=options.structured, texts=options.texts,
            streams=options.streams, calls=options.calls,
        )  # fmt: skip
        asyncio.run(chaos.run(options.minutes * 60, options.every, options.kinds))
    print(chaos.report())
    return 1 if chaos.history.violations else 0


if __name__ == "__main__":
    raise SystemExit(main())
