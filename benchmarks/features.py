"""What router, cache of answers and traces cost: the same load on stacks that differ in one of them, in turn.

    python -m benchmarks.features                          w1, w2 and the gateway alone, off and with each on
    python -m benchmarks.features --sides off traces       two of them
    python -m benchmarks.features --tree ../earlier        and against another checkout, its features off ("before")

All stacks are up at once and take turns, so each meets the same noise; one that rests uses next to nothing. Told are
medians over rounds and the ratio to "off", pair by pair. Traces go by OTLP to a process that reads and forgets them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import Process
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import uvloop

from benchmarks import gateway, load, models
from benchmarks.report import middle, spread
from benchmarks.stack import Stack, end_on_sigterm, free_port, settle
from benchmarks.workloads import BODY, workload
from headrace.clients.bench import Target
from headrace.clients.workload import Vocabulary
from headrace.serve.embedded import FAST, EmbeddedServer
from protocol.routing.store import RoutingStore
from protocol.routing.table import Price, Route, Routing, Rule, Terms

SIDES = ("before", "off", "router", "cache", "traces")
NAME, ROUTE = "bench", "auto"
RULES = [
    Rule(models=[NAME], name="code", words=["SELECT", "def"]),
    Rule(models=[NAME], name="tools", tools=True),
    Rule(models=[NAME], name="long", min_prompt_tokens=100_000),
    Rule(models=[NAME], name="rest", choose="cheapest"),
]
TABLE = Routing(routes={ROUTE: Route(rules=RULES)}, models={NAME: Terms(price=Price(input=1, output=2))})
STREAMS, RATE = 500, 5000.0


class _Forgets(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _collect(port: int, up: Event) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", port), _Forgets)
    up.set()
    server.serve_forever()


@contextlib.contextmanager
def collector() -> Iterator[dict[str, str]]:
    """The variables that send all traces to a process of its own."""
    port, up = free_port(), multiprocessing.Event()
    process = Process(target=_collect, args=(port, up), daemon=True)
    process.start()
    up.wait()
    try:
        yield {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}"}
    finally:
        process.terminate()
        process.join()


async def state(url: str, table: Routing) -> None:
    store = RoutingStore(url)
    await store.change(lambda _: table)
    await store.close()


def stacks(
    sides: list[str], shape: str, cache: Path, traced: dict[str, str], tree: Path | None, held: contextlib.ExitStack
) -> dict[str, Stack]:
    path = models.checkpoint(shape, cache)
    limits = ["--max-model-len", "4096", "--kv-cache-memory", "1GiB", "--served-model-name", NAME]
    made = {}
    for side in sides:
        more = ["--response-cache"] if side == "cache" else []
        env = traced if side == "traces" else None
        stack = Stack("--model", str(path), *limits, *more, env=env, tree=tree if side == "before" else None)
        made[side] = held.enter_context(stack)
        if side == "router":
            uvloop.run(state(stack.redis_url, TABLE))
    return made


def over_http(made: dict[str, Stack], names: list[str], rounds: int, shape: str) -> dict[str, dict[str, list[float]]]:
    """load -> side -> its figure of each round: tokens per second, and CPU time of all processes for a token."""
    vocabulary = Vocabulary(size=models.SHAPES[shape]["vocab_size"])
    targets = {side: Target(stack.url, ROUTE if side == "router" else NAME, body=BODY) for side, stack in made.items()}
    for target in targets.values():
        load.warm_up(target, vocabulary)
    settle([pid for stack in made.values() for _, pid in stack.pids()])
    loads = [f"{name} {what}" for name in names for what in ("tokens/s", "CPU us/token")]
    found: dict[str, dict[str, list[float]]] = {load: {side: [] for side in made} for load in loads}
    for round_ in range(rounds):
        for name in names:
            order = list(made) if round_ % 2 == 0 else list(made)[::-1]
            for side in order:
                before = made[side].use()
                figures = load.figures(load.run(targets[side], workload(name, round_), vocabulary))
                if figures["failed"] or figures["short"]:
                    raise SystemExit(f"{side}: {figures['failed']} requests failed: {figures['errors']}")
                used = made[side].use().since(before, figures["output_tokens"])["cpu_us_per_token"]
                found[f"{name} tokens/s"][side].append(figures["tokens_per_s"])
                found[f"{name} CPU us/token"][side].append(sum(used.values()))
                print(f"{name} {side}: {figures['tokens_per_s']:.1f} tokens/s, {used}", file=sys.stderr, flush=True)
    return found


def gateways(
    sides: list[str], seconds: float, rounds: int, traced: dict[str, str], tree: Path | None
) -> dict[str, Any]:
    """side -> the gateway's microseconds of CPU per token, of each round. The cache of answers is not its affair."""
    found: dict[str, list[float]] = {side: [] for side in sides if side != "cache"}
    for _ in range(rounds):
        for side in found:
            with tempfile.TemporaryDirectory() as folder, EmbeddedServer(Path(folder), settings=FAST) as server:
                model = gateway.MODEL
                if side == "router":
                    model = ROUTE
                    rules = [Rule(models=[gateway.MODEL], name=rule.name, words=rule.words) for rule in RULES]
                    uvloop.run(state(server.url, Routing(routes={ROUTE: Route(rules=rules)})))
                env, code = traced if side == "traces" else None, tree if side == "before" else None
                told = uvloop.run(gateway.measure(server.url, STREAMS, RATE, seconds, model=model, env=env, tree=code))
            found[side].append(told["cpu_us_per_token"])
            print(f"gateway {side}: {told['cpu_us_per_token']} us/token", file=sys.stderr, flush=True)
    return found


def row(name: str, figures: dict[str, list[float]]) -> dict[str, Any]:
    told: dict[str, Any] = {"load": name}
    for side, values in figures.items():
        told[side] = round(middle(values), 1)
        if side != "off" and "off" in figures:
            pairs = [value / off for value, off in zip(values, figures["off"], strict=True)]
            told[f"{side}/off"] = round(middle(pairs), 3)
    return {**told, "noise": spread(figures.get("off", next(iter(figures.values()))))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES[1:]))
    parser.add_argument("--loads", nargs="+", choices=("w1", "w2", "gateway"), default=["w1", "w2", "gateway"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="of a gateway's run")
    parser.add_argument("--shape", default="135m", choices=sorted(models.SHAPES))
    parser.add_argument("--cache", type=Path, default=models.default_cache())
    parser.add_argument("--tree", type=Path, help='another checkout, the side "before"')
    args = parser.parse_args()
    end_on_sigterm()
    sides = [side for side in SIDES if side in args.sides and (side != "before" or args.tree)]
    with collector() as traced, contextlib.ExitStack() as held:
        rows = []
        if names := [name for name in args.loads if name != "gateway"]:
            made = stacks(sides, args.shape, args.cache, traced, args.tree, held)
            rows += [row(name, figures) for name, figures in over_http(made, names, args.rounds, args.shape).items()]
            held.close()
        if "gateway" in args.loads:
            rows.append(row("gateway us/token", gateways(sides, args.seconds, args.rounds, traced, args.tree)))
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
