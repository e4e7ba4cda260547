"""The models of one ``serve``: started, scaled, restarted and removed while the others go on.

Each has schedulers and workers of its own under the one supervisor. A model that is removed drains: it leaves the
registry, so that gateways take nothing new for it; what it had accepted ends; then its processes leave. If a process of
one model cannot be kept alive while others serve, that model alone has failed.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import sys
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any

from headrace import options
from headrace.option_table import options_of
from headrace.serve.layout import ROLES, Deployment, Layout, deployment, unique_prefixes
from headrace.serve.machine import choose_ports, gpus_of
from headrace.serve.supervisor import Child, Program, Supervisor
from headrace.serve.turns import Guest, decide
from protocol.bus import GatewayBus, LeaderBus
from protocol.errors import HeadraceError, InvalidRequest, ServiceError, StartError
from protocol.routing.shards import ShardStore, served

POLL_S = 0.2
IDLE_POLL_S = 0.5  # how often models with --keep-alive are looked at
REGISTRY_S = 3.5  # by then every gateway has seen that a model left the registry
IDLING = ("serving", "asleep")  # states of models that are well
STOP_MARGIN_S = 15.0  # beyond --drain-timeout, before a process that does not exit is killed


class Fleet:
    def __init__(
        self,
        supervisor: Supervisor,
        layout: Layout,
        redis_url: str,
        env: Mapping[str, str],
        note: Callable[[str], None],
    ) -> None:
        self.supervisor = supervisor
        self.layout = layout
        self.redis_url = redis_url
        self.env = env
        self.note = note
        self.models: dict[str, Deployment] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._turns: dict[str, int] = {}  # worker -> its turn when GPUs were shared out; it keeps its GPU
        self._tasks: set[asyncio.Task[None]] = set()
        self._moving: set[str] = set()  # cards on which a model comes or leaves
        self._told: dict[str, str] = {}  # what gateways know of who waits
        self.on_waits: Callable[[], Awaitable[None]] = _nothing

    # -------------------------------------------------------------- start

    async def start(self, model: Deployment) -> None:
        """Start a model's processes. They are kept alive from now on. StartError where its workers cannot serve all
        its shards."""
        model.shards = await self._shards(model)
        self.models[model.name] = model
        model.reason, full = "", self._card_is_full(model)
        model.state = "asleep" if full else "starting"
        model.loaded_at = asyncio.get_running_loop().time()
        for role in ROLES if not full else ("scheduler",):
            for name in model.processes(role):
                self._start_process(model, role, name)

    async def _shards(self, model: Deployment) -> list[int]:
        """The shards that need workers: those that are open, and those that drain and have not ended yet."""
        store = ShardStore(self.redis_url)
        try:
            wanted = model.values.get("shards")
            shards = await (store.read(model.name) if wanted is None else store.create(model.name, wanted))
        except InvalidRequest as error:
            raise StartError(f"--shards: {error}") from None
        except ServiceError as error:
            if wanted is not None:
                raise StartError(f"--shards: {error}") from None
            return [0]  # the model's own processes say what is wrong with the server
        finally:
            await store.close()
        needed = [s.number for s in served(shards) if s.open or await self._unfinished(s.tag)]
        if len(needed) > model.values["workers"]:
            raise StartError(f"{model.name} has {len(needed)} shards with work: --workers must be as many at least")
        return needed

    def _start_process(self, model: Deployment, role: str, name: str) -> None:
        own: dict[str, Any] = {"name": f"{role}-{name.rpartition('-')[2]}", "metrics_port": self._metrics_port(name)}
        own["shard"] = model.shard(name)
        argv = [sys.executable, "-m", "headrace", role, *options.argv_of(options_of(role), {**model.values, **own})]
        env = dict(self.env)
        if role == "worker":
            card, number = model.values.get("card"), name.rpartition("-")[2]
            turn = self._turns.setdefault(f"{card} {number}" if card else name, len(self._turns))
            workers = len({(m.values.get("card") or m.name, k) for m in self.models.values()
                           for k in range(m.values["workers"])})  # fmt: skip
            ranks = model.values["tensor_parallel_size"] * model.values["pipeline_parallel_size"]
            gpus = gpus_of(turn, max(workers, turn + 1), ranks, model.values["device"])
            env |= {} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus}
        self.supervisor.start(Program(role, name, argv, env))

    def _metrics_port(self, name: str) -> int:
        """Decided at the start, or for what is added later the next free port behind those."""
        ports = self.layout.metrics_ports
        if name not in ports:
            host, first = self.layout.values["metrics_host"], self.layout.values["metrics_port"] or 0
            ports[name] = choose_ports(host, first and max(ports.values(), default=first) + 1, 1, "--metrics-port")[0]
        return ports[name]

    async def until_served(self, model: Deployment) -> None:
        """Returns when a worker of the model serves and gateways know the model by its scheduler, which may come later;
        or when it has failed or is removed. One whose card is taken only has to be known."""
        while model.state == "asleep" and not await self._is_listed(model.name):  # noqa: ASYNC110 (another process)
            await asyncio.sleep(POLL_S)
        bus = GatewayBus(self.redis_url, model.name, patience=None)
        first: dict[str, tuple[int, int]] = {}  # records of workers that died in an earlier run say "serving" as well
        try:
            while model.state == "starting":
                try:
                    workers = await bus.list_workers()
                except ServiceError:  # the server refuses: the model's own processes say so, and end
                    workers = []
                first = {w.wid: first.get(w.wid, (w.gen, w.beat)) for w in workers}
                serve = any(w.state == "serving" and first[w.wid] != (w.gen, w.beat) for w in workers)
                if serve and await self._is_listed(model.name):
                    model.state = "serving"
                    model.loaded_at = asyncio.get_running_loop().time()
                    self.supervisor.served |= {name for role in ROLES for name in model.processes(role)}
                    return
                await asyncio.sleep(POLL_S)
        finally:
            await bus.close()

    async def add(self, values: Mapping[str, Any], chosen: Mapping[str, str], *, by_hand: bool = False) -> Deployment:
        """Start one more model and wait until it serves or has failed. ``chosen``: what its checkpoint is.
        InvalidRequest for a name that is there already."""
        name = str(values["served_model_name"])
        if name in self.models and self.models[name].state != "failed":
            raise InvalidRequest(f"{name} is served already", param="model")
        self.models.pop(name, None)
        first = prefix = unique_prefixes([name])[0]
        taken = [model.prefix for model in self.models.values()]
        while prefix in taken:
            prefix = f"{first}{len(taken)}-"
            taken.append("")
        model = deployment(values, prefix, self.workers + values["workers"])
        model.values.update(chosen)
        model.by_hand = by_hand
        await self.start(model)
        await self.until_served(model)
        return model

    @property
    def workers(self) -> int:
        return sum(model.values["workers"] for model in self.models.values())

    # -------------------------------------------------------------- memory

    async def watch_idle(self) -> None:
        """Let models sleep that nobody has asked anything for their keep_alive, and wake those that have work; those
        that share a card take turns."""
        while True:
            now = asyncio.get_running_loop().time()
            for model in [m for m in self.models.values() if m.state in IDLING]:
                if model.values.get("keep_alive") or model.values.get("card"):
                    await self._look(model, now)
            for card in {m.values["card"] for m in self.models.values() if m.values.get("card")} - self._moving:
                self._spawn(self._take_turns(card, now))
            await self._tell_waits()
            await asyncio.sleep(IDLE_POLL_S)

    async def _look(self, model: Deployment, now: float) -> None:
        try:
            unfinished = await self._unfinished_of(model.name)
        except ServiceError:
            return  # nothing is known: nothing changes
        model.busy_at = now if unfinished else model.busy_at or now
        asleep = model.state == "asleep"
        model.waits_since = (model.waits_since or now) if unfinished and asleep else None
        if asleep:
            if unfinished and not model.values.get("card"):
                await self._wake(model)
        elif model.values.get("keep_alive") and now - max(model.busy_at, model.loaded_at) > model.values["keep_alive"]:
            await self._sleep(model, "was idle and has given its memory back")

    async def _take_turns(self, card: str, now: float) -> None:
        """One move on a card: who leaves is gone before who comes is started."""
        self._moving.add(card)
        try:
            models = [m for m in self.models.values() if m.values.get("card") == card and m.state != "failed"]
            holds, least = (self.layout.values[key] for key in ("card_models", "least_stay"))
            decision = decide(card, [_guest(model) for model in models], holds, least, now)
            for model in models:
                model.waits = (decision.reasons or {}).get(model.name, "")
            if decision.leaves:
                leaves = self.models[decision.leaves]
                await self._sleep(leaves, f"gives its place on {card} to {decision.comes}")
                if leaves.state != "asleep":
                    return
            if decision.comes:
                await self._wake(self.models[decision.comes])
        finally:
            self._moving.discard(card)

    def _card_is_full(self, model: Deployment) -> bool:
        card = model.values.get("card")
        there = [m for m in self.models.values() if m is not model and m.values.get("card") == card and _loaded(m)]
        return bool(card) and len(there) >= self.layout.values["card_models"]

    async def _tell_waits(self) -> None:
        """Gateways tell who waits why."""
        told = {model.name: model.waits for model in self.models.values() if model.waits}
        if told != self._told:
            try:
                await self.on_waits()
            except HeadraceError as error:
                self.note(f"who waits for a card could not be told: {error}")
            else:
                self._told = told

    async def _sleep(self, model: Deployment, why: str) -> None:
        """Stop the workers: memory and device are free. The schedulers stay, so requests are taken and wait."""
        async with self._locks.setdefault(model.name, asyncio.Lock()):
            if model.state == "serving":
                model.state = "asleep"
                await self._stop_processes(model.processes("worker"), model.values["drain_timeout"])
                self.note(f"model {model.name} {why}")

    async def _wake(self, model: Deployment) -> None:
        async with self._locks.setdefault(model.name, asyncio.Lock()):
            if model.state == "asleep":
                model.state, model.waits = "starting", ""
                model.loaded_at = asyncio.get_running_loop().time()
                self.note(f"model {model.name} is loaded again")
                for name in model.processes("worker"):
                    self._start_process(model, "worker", name)
                self._spawn(self.until_served(model))

    async def _is_listed(self, name: str) -> bool:
        try:
            return name in await GatewayBus.models(self.redis_url)
        except ServiceError:
            return False

    async def _unfinished_of(self, model: str) -> int:
        """In all its shards."""
        store = ShardStore(self.redis_url, patience=2.0)
        try:
            return sum([await self._unfinished(shard.tag) for shard in served(await store.read(model))])
        finally:
            await store.close()

    async def _unfinished(self, tag: str) -> int:
        bus = GatewayBus(self.redis_url, tag, patience=2.0)
        try:
            return await bus.unfinished()
        finally:
            await bus.close()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -------------------------------------------------------------- change and end

    async def remove(self, name: str) -> int:
        """Drain a model and stop its processes. Returns how many of its requests have not ended: they stay in the
        store. InvalidRequest if there is no such model."""
        async with self._locks.setdefault(name, asyncio.Lock()):
            model = self.models.get(name)
            if model is None:
                raise InvalidRequest(f"{name} is not served here", param="model")
            idle = model.state in ("failed", "asleep")
            model.state = "draining"
            await self._withdraw(name)
            left = 0 if idle else await self._until_ended(name, model.values["drain_timeout"])
            await self._stop(model)
            await self._withdraw(name)  # a scheduler that took over meanwhile has entered it again
            self.models.pop(name, None)
            return left

    async def change(self, name: str, values: Mapping[str, Any], chosen: Mapping[str, str]) -> None:
        """Let a model run with other options. Numbers of processes change in place. Any other option restarts its
        processes, while its requests wait in the queue; another checkpoint begins when the old one has drained."""
        model = self.models[name]
        if values["model"] != model.asked["model"]:
            await self.remove(name)
            await self.add(values, chosen)
            return
        async with self._locks.setdefault(name, asyncio.Lock()):
            new = deployment(values, model.prefix, self.workers - model.values["workers"] + values["workers"])
            new.values.update(chosen)
            counts = {f"{role}s" for role in ROLES}
            if all(model.asked[key] == new.asked[key] for key in new.asked if key not in counts):
                await self._scale(model, new)
            else:
                await self._stop(model)
                await self.start(new)
        await self.until_served(new)

    async def _scale(self, model: Deployment, new: Deployment) -> None:
        if len(model.shards) > new.values["workers"]:
            raise InvalidRequest(f"{model.name} has {len(model.shards)} shards: as many workers at least are needed")
        new.state, new.shards = model.state, model.shards
        self.models[model.name] = new
        for role in ROLES:
            before, after = model.processes(role), new.processes(role)
            for name in [n for n in after if n not in before]:
                self._start_process(new, role, name)
            await self._stop_processes([n for n in before if n not in after], new.values["drain_timeout"])

    async def _stop(self, model: Deployment) -> None:
        """Workers first, which let running requests end or hand them back; then the schedulers."""
        for role in reversed(ROLES):
            await self._stop_processes(model.processes(role), model.values["drain_timeout"])

    async def _stop_processes(self, names: list[str], drain_s: float) -> None:
        children = [self.supervisor.children[name] for name in names if name in self.supervisor.children]
        await self.supervisor.stop(*children, timeout=drain_s + STOP_MARGIN_S)
        for name in names:
            self.supervisor.forget(name)

    async def _withdraw(self, name: str) -> None:
        bus = LeaderBus(self.redis_url, name, patience=5.0)
        try:
            await bus.withdraw_card()
        finally:
            await bus.close()

    async def _until_ended(self, name: str, patience_s: float) -> int:
        """Wait until nothing that the model accepted is unfinished, for ``patience_s`` at most; how much is left."""
        await asyncio.sleep(min(REGISTRY_S, patience_s))
        deadline = asyncio.get_running_loop().time() + patience_s
        while True:
            left = await self._unfinished_of(name)
            if not left or asyncio.get_running_loop().time() > deadline:
                return left
            await asyncio.sleep(POLL_S)

    # -------------------------------------------------------------- state

    def failed(self, child: Child, error: Exception) -> bool:
        """A child that is not started again. True: its model alone has failed, the others go on."""
        model = next((m for m in self.models.values() if child.name in m.processes(child.program.role)), None)
        others = [m for m in self.models.values() if m is not model and m.state in IDLING]
        if model is None or not others:
            return False
        if model.state != "failed":
            model.state, model.reason = "failed", str(error)
            self.note(f"model {model.name} has failed, the others go on: {error}")
            self._spawn(self._give_up(model))
        return True

    async def _give_up(self, model: Deployment) -> None:
        try:
            await self._stop(model)
            await self._withdraw(model.name)
        except HeadraceError as error:
            self.note(f"model {model.name}: {error}")

    async def listed(self) -> list[dict[str, Any]]:
        """Each model as a person wants to see it."""
        rows = []
        for model in list(self.models.values()):
            unfinished: int | None = None
            with contextlib.suppress(ServiceError):
                unfinished = await self._unfinished_of(model.name)
            rows.append(
                {
                    "model": model.name,
                    "state": model.state,
                    "workers": model.values["workers"] if _loaded(model) else 0,
                    "requests": unfinished,
                    "path": model.values["model"],
                    "reason": model.reason or model.waits,
                }
            )
        return rows


def _loaded(model: Deployment) -> bool:
    """Whether it has workers, or is getting them."""
    return model.state not in ("asleep", "failed")


def _guest(model: Deployment) -> Guest:
    waits = model.waits_since is not None
    since = model.loaded_at if model.state == "serving" else math.inf  # one that is still loading does not leave
    since = model.waits_since if model.waits_since is not None else since
    return Guest(model.name, _loaded(model), since, max(model.busy_at, model.loaded_at), waits)


async def _nothing() -> None:
    """Nobody is told."""
