"""``headrace serve``: everything on one machine, as separate processes that a supervisor keeps alive.

Resolve the options (errors before anything is started), start server, scheduler, gateway and workers, show their
progress, print how to use them, then wait: for Ctrl-C, which drains gateway, worker, scheduler and server in this
order, or for a process that cannot be kept alive, which ends all with a non-zero code.

A little over 400 lines: one class, whose methods are the stations of a run in their order.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import re
import signal
import sys
from collections.abc import Coroutine, Iterable, Mapping
from typing import Any, TextIO, cast

import msgspec
from rich.console import Console

from headrace import options
from headrace.config.plan import Difference, Wanted, difference, from_file, routed
from headrace.console import Lenient, StartView, print_block
from headrace.model import Chosen
from headrace.model import choose as choose_model
from headrace.option_table import OPTIONS, options_of
from headrace.serve import embedded, progress
from headrace.serve.control import Control
from headrace.serve.durability import check_durability
from headrace.serve.fleet import STOP_MARGIN_S, Fleet
from headrace.serve.layout import Deployment, Layout, check_values, resolve
from headrace.serve.machine import exclusive, make_above, status_of
from headrace.serve.notify import keep_watchdog, notify
from headrace.serve.supervisor import Child, GaveUp, Program, Supervisor
from protocol.bus import GatewayBus, LeaderBus
from protocol.errors import EX_CONFIG, HeadraceError, InvalidRequest, StartError
from protocol.routing.shards import ShardStore, served
from protocol.routing.store import RoutingStore, decode
from protocol.routing.table import Routing, Terms, faults

# a log line as either --log-format has it
IMPORTANT = re.compile(r'\S+ \S+ (WARNING|ERROR|CRITICAL) |\{"time": "[^"]*", "level": "(warning|error|critical)"')
OWN_SCHEDULER = re.compile(r"scheduler-\d+\.[0-9a-f]{8}")  # the owner of a lead, if serve started it
POLL_S = 0.2
MAKE_POLL_S = 0.5
SERVER_POLL_S = 0.02
SERVER_STOP_S = 30.0


def serve(values: Mapping[str, Any], given: Mapping[str, Any] | None = None) -> int:
    """Run until stopped; returns the exit code. ``given``: what of ``values`` the command line and the environment
    name, if there is a configuration file."""
    wanted = from_file(values["config"], given or {}) if values["config"] else Wanted(dict(values), {})
    layout = resolve(wanted.values, wanted.models)
    view = StartView(Console(file=cast("TextIO", Lenient(sys.stdout))))
    with exclusive(layout.run_dir), contextlib.closing(view):
        for model in layout.models:
            chosen = choose(model.values, view)
            view.say(f"model: {chosen}")
            model.values.update(chosen.options)
        layout.values.update(served_model_name=layout.models[0].name)
        return asyncio.run(Stack(layout, wanted, view).run())


def choose(values: Mapping[str, Any], view: StartView) -> Chosen:
    """A model fetched and converted if need be. StartError."""
    return choose_model(values, lambda stage, fraction: view.stage("model", stage, fraction), view.say)


# ------------------------------------------------------------------ running


class Stack:
    """One run of ``serve``: start, wait, drain."""

    def __init__(self, layout: Layout, wanted: Wanted, view: StartView) -> None:
        self.layout = layout
        self.wanted = wanted
        self.view = view
        self.fleet: Fleet
        self._reloading = asyncio.Lock()
        self._started = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self.interrupts = 0
        self.interrupted = asyncio.Event()
        self.supervisor: Supervisor

    async def run(self) -> int:
        self.supervisor = Supervisor(self.layout.run_dir, self._on_line, self.view.note)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._interrupt)
        if self.wanted.file is not None:
            loop.add_signal_handler(signal.SIGHUP, self._on_hangup)
        elif signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # ignored: nohup
            loop.add_signal_handler(signal.SIGHUP, self._interrupt)
        watching = [asyncio.create_task(work) for work in (self._end_with_make(), keep_watchdog())]
        starting: asyncio.Future[Any] = asyncio.create_task(self._start())
        stop: asyncio.Future[Any] = asyncio.create_task(self.interrupted.wait())
        try:
            await asyncio.wait({starting, stop, self.supervisor.failed}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
            if self.supervisor.failed.done():
                self.supervisor.failed.result()
            starting.cancel()
            return await self._drain()
        except StartError as error:
            return await self._fail(str(error), EX_CONFIG)
        except GaveUp as error:
            return await self._fail(str(error), 1)
        finally:
            self.view.close()
            starting.cancel()
            stop.cancel()
            for task in watching:
                task.cancel()
            self.supervisor.kill()
            await self.supervisor.ended()

    def _interrupt(self) -> None:
        self.interrupts += 1
        self.interrupted.set()
        if self.interrupts > 1:
            self.view.note("stopping at once")
            self.supervisor.kill()

    async def _end_with_make(self) -> None:
        """Under make, its end is ours: nobody else would end what it started. Any other parent may die."""
        make = make_above(os.getpid()) if "MAKELEVEL" in os.environ else None
        while make is not None:
            await asyncio.sleep(MAKE_POLL_S)
            if status_of(make) is None and not self.interrupted.is_set():
                self._interrupt()

    def _on_line(self, child: Child, line: str) -> None:
        if child.program.role != "redis":
            self.view.stage(child.name, "start", 1.0)  # its first line: it is up
        if (told := progress.parse(line)) is not None:
            self.view.stage(child.name, *told)
        elif IMPORTANT.match(line):
            self.view.note(f"{child.name} | {line}")

    # -------------------------------------------------------------- start

    async def _start(self) -> None:
        values, layout = self.layout.values, self.layout
        redis_url = values["redis_url"] or await self._start_server()
        env = options.child_environment(OPTIONS, redis_url, os.environ) | {
            progress.SUPERVISED: "1",
            "PYTHONUNBUFFERED": "1",
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),  # spinning would slow the others
        }
        await self._check_server(redis_url)
        if layout.data_dir is not None:
            await self._withdraw_other_models(redis_url)
            for model in layout.models:
                await self._release_dead_lead(redis_url, model.name)
        await self._apply_routing(redis_url, layout.models)
        self.fleet = Fleet(self.supervisor, layout, redis_url, env, self.view.note)
        self.fleet.on_waits = lambda: self._apply_routing(redis_url, self.fleet.models.values())
        for model in layout.models:
            await self.fleet.start(model)
        for index in range(values["gateways"]):
            name = f"gateway-{index}"
            own = {"name": name, "metrics_port": layout.metrics_ports.get(name), "port": layout.ports[index]}
            argv = [sys.executable, "-m", "headrace", "gateway"]
            argv += options.argv_of(options_of("gateway"), {**values, **own})
            self.supervisor.start(Program("gateway", name, argv, env))
        for child in self.supervisor.children.values():
            self.view.stage(child.name, "start", 0.0)
        async with Control(layout.run_dir, self._answer):
            await self._until_ready()
            for model in layout.models:
                await self.fleet.until_served(model)
            self.supervisor.served |= self.supervisor.children.keys()
            self.supervisor.on_failed = self.fleet.failed
            self._started.set()
            self.view.close()
            self._print_block()
            notify("READY=1")
            await self.fleet.watch_idle()  # until this task is cancelled

    async def _start_server(self) -> str:
        """Start the embedded server; returns its URL."""
        assert self.layout.data_dir is not None
        self.view.stage("server", "start", 0.0)
        data_dir = self.layout.data_dir
        try:
            embedded.claim(data_dir)
            argv = embedded.server_command(data_dir)
            self._data_lock = embedded.lock_data_dir(data_dir)  # held until this process ends
        except OSError as error:
            raise StartError(f"cannot write to {data_dir} ({error.strerror}); choose another --data-dir") from None
        child = self.supervisor.start(Program("redis", "redis", argv, dict(os.environ), lasting=True, umask=0o077))
        while not await asyncio.to_thread(embedded.answers, data_dir):  # noqa: ASYNC110 (another process)
            await asyncio.sleep(SERVER_POLL_S)
        child.was_up = True
        self.view.stage("server", "start", 1.0)
        return embedded.server_url(data_dir)

    async def _check_server(self, url: str) -> None:
        """StartError if the server cannot be reached or is too old; weaker settings of a foreign one are reported."""
        bus = GatewayBus(url, self.layout.values["served_model_name"], patience=5.0)
        try:
            await bus.connect()
        finally:
            await bus.close()
        if self.layout.data_dir is None:
            await check_durability(url, self.layout.values["strict_durability"], self.view.note)

    async def _withdraw_other_models(self, url: str) -> None:
        """What an earlier start in this data directory served, and nobody leads now, is no longer listed: clients that
        name no model mean the one of today."""
        for name in await GatewayBus.models(url):
            if name in {model.name for model in self.layout.models}:
                continue
            bus = LeaderBus(url, name, patience=5.0)
            await bus.connect()
            try:
                if not (await bus.read_leader()).owner:
                    await bus.withdraw_card()
            finally:
                await bus.close()

    async def _release_dead_lead(self, url: str, name: str) -> None:
        """Let the new scheduler lead at once where one of an earlier serve, which was killed, still holds the lead.

        Such a scheduler died with its serve, since this one has the data's lock and no process outlives its supervisor.
        Compare-and-set and fencing make it safe all the same."""
        store = ShardStore(url)
        try:
            tags = [shard.tag for shard in served(await store.read(name))]
        finally:
            await store.close()
        for tag in tags:
            await self._release_dead_lead_of(url, tag)

    async def _release_dead_lead_of(self, url: str, tag: str) -> None:
        bus = LeaderBus(url, tag, patience=5.0)
        await bus.connect()
        try:
            seen = await bus.read_leader()
            if OWN_SCHEDULER.fullmatch(seen.owner):
                await bus.release(seen.epoch, seen.owner)
        finally:
            await bus.close()

    async def _apply_routing(self, url: str, models: Iterable[Deployment]) -> None:
        """Write the file's table of routes, with the models that may sleep. What an earlier start wrote into our own
        server goes, if there is neither."""
        stated = self.wanted.routing or Routing()
        terms = dict(stated.models)
        for model in models:
            if model.values["keep_alive"] or model.values["card"]:
                own = terms.get(model.name, Terms())
                terms[model.name] = msgspec.structs.replace(own, sleeps=True, waits=model.waits)
        stated = msgspec.structs.replace(stated, models=terms)
        store = RoutingStore(url)
        try:
            if self.wanted.file is not None or terms:
                await store.change(lambda now: routed(now, stated))
            elif self.layout.data_dir is not None:
                await store.clear()
        finally:
            await store.close()

    async def _until_ready(self) -> None:
        import aiohttp

        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
            while True:
                with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                    async with session.get(self.layout.url + "/ready") as reply:
                        if reply.status == 200:
                            return
                await asyncio.sleep(POLL_S)

    def _print_block(self) -> None:
        metrics = "  ".join(f"{name} 127.0.0.1:{port}" for name, port in self.layout.metrics_ports.items())
        lines = {"metrics": metrics, "logs": str(self.layout.run_dir / "logs")}
        if len(self.layout.ports) > 1:
            lines = {"gateways": "ports " + ", ".join(map(str, self.layout.ports)), **lines}
        if self.layout.data_dir is not None:
            lines["queue"] = f"{embedded.server_url(self.layout.data_dir)}  (kept in {self.layout.data_dir})"
        names = [model.name for model in self.layout.models]
        if len(names) > 1:
            lines = {"models": ", ".join(names), **lines}
        print_block(self.view.console, self.layout.url, names[0], lines)

    # -------------------------------------------------------------- while it runs

    async def _answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """What `headrace models` and `headrace config` ask for. HeadraceError if it cannot be done."""
        match question:
            case {"do": "list"}:
                return {"models": await self.fleet.listed()}
            case {"do": "add", "name": str(name), "values": dict(values)}:
                return await self._add(name, values)
            case {"do": "remove", "name": str(name)}:
                return {"left": await self.fleet.remove(name)}
            case {"do": "diff", "file": str(file)}:
                return {"lines": (await self._difference(file))[1].lines()}
            case {"do": "alias", "name": str(name), "targets": dict(targets)}:
                return {"aliases": await self._alias(name, targets)}
            case {"do": "reload"}:
                return {"lines": await self.reload()}
        raise InvalidRequest("this serve does not know what was asked for")

    async def _add(self, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Start one more model: ``values`` are its options, all others are as at the start."""
        base = {**self.wanted.values, "model": None, "workers": 1, "schedulers": 1, "threads": None}
        own = {**base, **values, "served_model_name": name}
        await asyncio.to_thread(check_values, own)
        chosen = await asyncio.to_thread(choose, own, self.view)
        model = await self.fleet.add(own, chosen.options, by_hand=True)
        if own["keep_alive"] or own["card"]:
            await self._apply_routing(self.fleet.redis_url, self.fleet.models.values())
        if model.state == "failed":
            raise StartError(model.reason)
        self.view.note(f"model {name} is served")
        return {"model": name, "state": model.state}

    async def _alias(self, name: str, targets: dict[str, int]) -> dict[str, dict[str, int]]:
        """Move an alias, for all gateways at once; without targets it goes. All aliases, if ``name`` is empty."""
        store = RoutingStore(self.fleet.redis_url)

        def moved(now: Routing) -> Routing:
            aliases = {k: v for k, v in now.aliases.items() if k != name} | ({name: targets} if targets else {})
            table = msgspec.structs.replace(now, aliases=aliases)
            for keys, reason in faults(table, self.fleet.models):
                raise InvalidRequest(f"{'.'.join(map(str, keys))}: {reason}")
            return table

        try:
            return (decode(await store.read()) if not name else await store.change(moved)).aliases
        finally:
            await store.close()

    def _on_hangup(self) -> None:
        task = asyncio.create_task(self._reload_and_tell())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _reload_and_tell(self) -> None:
        await self._started.wait()
        try:
            await self.reload()
        except HeadraceError as error:
            self.view.note(f"not reloaded, nothing has changed: {error}")

    async def reload(self) -> list[str]:
        """Read the file again and do what it changes, line by line as told. HeadraceError: nothing has changed."""
        if self.wanted.file is None:
            raise StartError("this serve was started without --config: there is nothing to reload")
        async with self._reloading:
            new, found = await self._difference(str(self.wanted.file))
            models, chosen = new.models, {}
            for name in (*found.added, *found.changed):
                chosen[name] = (await asyncio.to_thread(choose, models[name], self.view)).options
            for line in found.lines() or ["nothing has changed"]:
                self.view.note(f"reload: {line}")
            fleet = self.fleet
            self.wanted = dataclasses.replace(self.wanted, routing=new.routing)
            work: list[Coroutine[Any, Any, Any]] = [fleet.remove(name) for name in found.removed]
            work += [fleet.add(models[name], chosen[name]) for name in found.added]
            work += [fleet.change(name, models[name], chosen[name]) for name in found.changed]
            await self._apply_routing(fleet.redis_url, fleet.models.values())  # before the first change is seen
            for end in await asyncio.gather(*work, return_exceptions=True):
                if isinstance(end, BaseException):
                    self.view.note(f"reload: {end}")
            await self._apply_routing(fleet.redis_url, fleet.models.values())
            self.view.note("reloaded")
            return found.lines()

    async def _difference(self, file: str) -> tuple[Wanted, Difference]:
        """What ``file`` asks for now, and how that differs from what runs."""
        new = await asyncio.to_thread(from_file, file, self.wanted.given)
        running = {m.name: m.asked for m in self.fleet.models.values() if m.state not in ("draining", "failed")}
        by_hand = {m.name for m in self.fleet.models.values() if m.by_hand} - new.models.keys()
        models = {name: own for name, own in running.items() if name not in by_hand}
        now = Wanted(self.wanted.values, models, routing=self.wanted.routing)
        return new, difference(now, new)

    # -------------------------------------------------------------- end

    async def _drain(self) -> int:
        notify("STOPPING=1")
        self.view.note("stopping: running requests may end (Ctrl-C again to stop at once)")
        patience = self.layout.values["drain_timeout"] + STOP_MARGIN_S
        for role, timeout in (
            ("gateway", patience),
            ("worker", patience),
            ("scheduler", STOP_MARGIN_S),
            ("redis", SERVER_STOP_S),
        ):
            await self.supervisor.stop(*self.supervisor.role(role), timeout=timeout)
        if self.interrupts > 1:
            return 130
        self.view.note("stopped")
        return 0

    async def _fail(self, message: str, code: int) -> int:
        self.view.close()
        with contextlib.suppress(OSError):  # nobody may read it any more
            print(f"headrace serve: {message}", file=sys.stderr)
        return code
