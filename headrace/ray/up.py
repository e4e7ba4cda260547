"""``headrace ray``: start the controller, ask it, or let it end. It and all that it starts outlive this command."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

from headrace.config.plan import from_file
from headrace.ray.controller import Controller
from headrace.ray.plan import Fleet, fleet_of
from headrace.ray.process import State
from headrace.tools.show import table
from protocol.errors import HeadraceError, StartError

START_S = 180.0
ASK_S = 30.0
POLL_S = 0.5


def run(args: argparse.Namespace) -> int:
    if args.action == "up":
        given = {"redis_url": args.redis_url} if args.redis_url else {}
        fleet = fleet_of(from_file(args.config or "headrace.toml", given))
    with _connected(args.address):
        if args.action == "up":
            return _up(fleet)
        controller = _controller()
        if controller is None:
            raise StartError("no headrace is up in this Ray cluster")
        return _down(controller) if args.action == "down" else _status(controller, args.json)


@contextlib.contextmanager
def _connected(address: str) -> Iterator[None]:
    try:
        import ray
    except ImportError:
        raise StartError("Ray is not installed: pip install 'headrace[ray]'") from None
    from headrace.ray.cluster import NAMESPACE

    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as error:
        why = str(error).strip().partition("\n")[0]
        raise StartError(f"--address {address}: no Ray cluster answers there ({why})") from None
    try:
        yield
    finally:
        ray.shutdown()


def _controller() -> Any:
    import ray

    from headrace.ray.cluster import CONTROLLER

    with contextlib.suppress(ValueError):
        return ray.get_actor(CONTROLLER)
    return None


def _up(fleet: Fleet) -> int:
    import ray

    from headrace.ray.cluster import CONTROLLER

    if _controller() is not None:
        raise StartError("headrace is up in this Ray cluster already: `headrace ray down` ends it")
    options: dict[str, Any] = {"name": CONTROLLER, "lifetime": "detached", "max_restarts": -1, "num_cpus": 0}
    controller = ray.remote(Controller).options(**options).remote(fleet)
    states = _until_up(controller, fleet)
    for program in fleet.gateways:
        state = states[program.name]
        print(f"{program.name}: http://{state.address}:{state.port}")
    print(f"models: {', '.join(model.name for model in fleet.models)}; `headrace ray status` shows what runs")
    return 0


def _until_up(controller: Any, fleet: Fleet) -> dict[str, State]:
    """The states of gateways and schedulers, once all of them run. StartError for one that cannot."""
    names = {program.name for program in fleet.gateways}
    names |= {program.name for model in fleet.models for program in model.schedulers}
    deadline = time.monotonic() + START_S
    while True:
        states = _asked(controller)["actors"]
        for name, state in states.items():
            if state is not None and state.failed:
                raise StartError(f"{name}: {state.failed}; `headrace ray down` ends the others")
        up = {name: states[name] for name in names if states.get(name) is not None}
        if len(up) == len(names):
            return up
        if time.monotonic() > deadline:
            missing = ", ".join(sorted(names - up.keys()))
            raise HeadraceError(f"{missing}: no node has room for it after {START_S:g} s (`ray status` shows what is "
                                "free); it is started when there is")  # fmt: skip
        time.sleep(POLL_S)


def _asked(controller: Any) -> dict[str, Any]:
    import ray

    try:
        return dict(ray.get(controller.describe.remote(), timeout=ASK_S))
    except ray.exceptions.RayError as error:
        raise HeadraceError(f"the controller does not answer: {type(error).__name__}") from None


def _status(controller: Any, as_json: bool) -> int:
    told = _asked(controller)
    rows = [_row(name, state, name in told["leaving"]) for name, state in sorted(told["actors"].items())]
    if as_json:
        print(*(json.dumps(row) for row in rows), json.dumps({"demand": told["demand"]}), sep="\n")
        return 0
    cells = [["" if value is None else str(value) for value in row.values()] for row in rows]
    table(["process", "state", "node", "port:", "metrics:"], cells, "nothing runs")
    for model, demand in told["demand"].items():
        print(f"{model}: {'no scheduler leads' if demand is None else f'{demand} open requests'}")
    return 0


def _row(name: str, state: State | None, leaving: bool) -> dict[str, Any]:
    if state is None:
        return {"process": name, "state": "waits for a node", "node": None, "port": None, "metrics": None}
    how = state.failed or ("draining" if leaving else "running" if state.pid else "starting")
    return {"process": name, "state": how, "node": state.address, "port": state.port, "metrics": state.metrics_port}


def _down(controller: Any) -> int:
    import ray

    ray.get(controller.end.remote(), timeout=ASK_S)
    print("draining", file=sys.stderr)
    while _asked(controller)["actors"]:
        time.sleep(POLL_S)
    ray.kill(controller)
    return 0
