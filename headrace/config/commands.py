"""``headrace config`` and ``headrace models``: look at a configuration file, and at the models of a serve that runs."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headrace.config.file import MODEL_OPTIONS, read
from headrace.config.plan import from_file, routed
from headrace.option_table import options_of
from headrace.serve.control import ask
from headrace.serve.layout import run_dir_of
from protocol.errors import ServiceError, StartError
from protocol.routing.store import RoutingStore
from protocol.routing.table import Routing

USUAL_FILE = "headrace.toml"


def check(args: argparse.Namespace) -> int:
    """`headrace config check [--diff]` and `apply`: 0 if the file is fine; StartError says what is not."""
    file = usual_file(args.config)
    if file is None:
        raise StartError(f"no file: pass --config FILE, or make ./{USUAL_FILE}")
    if args.action == "apply":
        return asyncio.run(_apply(read(file).routing, args.redis_url))
    wanted = from_file(file, {})
    print(f"{file}: fine: {', '.join(wanted.models)}")
    if args.diff:
        place = {"run_dir": args.run_dir} if args.run_dir else {}  # a new port or run-dir in the file is not there yet
        told = ask(_run_dir({**wanted.values, **place}), {"do": "diff", "file": str(file.resolve())})["lines"]
        print("\n".join(told or ["nothing differs from what runs"]))
    return 0


async def _apply(stated: Routing, url: str | None) -> int:
    if not url:
        raise StartError("apply needs the --redis-url of the gateways' Redis")
    store = RoutingStore(url)
    try:
        table = await store.change(lambda now: routed(now, stated))
    except ServiceError as error:
        raise StartError(f"the table could not be written: {error.message}") from None
    finally:
        await store.close()
    print(f"written: {len(table.aliases)} aliases, {len(table.routes)} routes, {len(table.upstreams)} upstreams")
    return 0


def models(args: argparse.Namespace) -> int:
    """`headrace models list|add|remove|reload`."""
    file = usual_file(args.config) if args.run_dir is None and (args.config or args.port == 8000) else None
    values = from_file(file, {}).values if file else {"run_dir": args.run_dir, "port": args.port}
    run_dir = _run_dir(values)
    if args.action in ("add", "remove") and not args.name:
        raise StartError(f"models {args.action} needs the served name: headrace models {args.action} NAME")
    match args.action:
        case "list":
            print(_table(ask(run_dir, {"do": "list"})["models"]))
        case "reload":
            print("\n".join(ask(run_dir, {"do": "reload"})["lines"] or ["nothing has changed"]))
        case "add":
            own = {o.dest: getattr(args, o.dest) for o in MODEL_OPTIONS.values() if hasattr(args, o.dest)}
            if own.get("model") and Path(own["model"]).expanduser().exists():
                own["model"] = str(Path(own["model"]).expanduser().resolve())  # serve may run elsewhere
            ask(run_dir, {"do": "add", "name": args.name, "values": own})
            print(f"{args.name} is served (until it is removed or serve ends: a model in the file stays)")
        case "alias":
            aliases = ask(run_dir, {"do": "alias", "name": args.name or "", "targets": _targets(args.targets)})[
                "aliases"
            ]
            for name, targets in sorted(aliases.items()):
                print(f"{name} -> {', '.join(f'{model} {weight}' for model, weight in targets.items())}")
        case "remove":
            left = ask(run_dir, {"do": "remove", "name": args.name})["left"]
            print(f"{args.name} is removed" + (f"; {left} requests wait in the store for its return" if left else ""))
    return 0


def _targets(given: Sequence[str]) -> dict[str, int]:
    """``v2=9 v1=1`` as weights. StartError for one that is no whole number."""
    targets = {}
    for one in given:
        model, _, weight = one.partition("=")
        if weight and not weight.isdecimal():
            raise StartError(f"{one}: the weight must be a whole number, 0 or more")
        targets[model] = int(weight or 1)
    return targets


def usual_file(named: str | None) -> Path | None:
    """The file that is named, else ./headrace.toml if there is one."""
    if named:
        return Path(named)
    return Path(USUAL_FILE) if Path(USUAL_FILE).is_file() else None


def _run_dir(values: Mapping[str, Any]) -> Path:
    defaults = {option.dest: option.default for option in options_of("serve")}
    decided = {**defaults, **values}
    return run_dir_of(decided, decided["port"])


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Columns for a person."""
    names = ("model", "state", "workers", "requests", "path", "reason")
    lines = [tuple(name.upper() for name in names)]
    lines += [tuple("-" if row[name] is None else str(row[name]) for name in names) for row in rows]
    widths = [max(len(line[k]) for line in lines) for k in range(len(names))]
    shown = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join(line.rstrip() for line in shown)
