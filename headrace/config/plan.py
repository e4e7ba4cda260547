"""From a file, a command line and the environment to what ``serve`` runs; and what a changed file would change.

The command line wins over the environment, that over the file. An option of models that is given there holds for all.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from headrace.config.file import MODEL_OPTIONS, Config, ConfigError, read, table_of
from headrace.option_table import options_of
from headrace.options import add_option
from headrace.ray.rule import Scaling
from headrace.serve.layout import check_values
from protocol.errors import StartError
from protocol.routing.table import Routing

SCALED = {"workers", "schedulers"}  # may change without a restart of the processes that stay


@dataclass(frozen=True)
class Wanted:
    """What is to run. ``values`` are all options of ``serve``; each model's are the same with its own."""

    values: dict[str, Any]
    models: dict[str, dict[str, Any]]  # served name -> options
    file: Path | None = None
    given: dict[str, Any] = field(default_factory=dict)  # by command line and environment
    routing: Routing | None = None  # None: no file says anything of it
    scaling: dict[str, Scaling] = field(default_factory=dict)  # served name -> its workers on Ray


def given_on(argv: Sequence[str], environ: Mapping[str, str]) -> dict[str, Any]:
    """Options of ``serve`` that the command line or the environment names, by name."""
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, add_help=False)
    rows = options_of("serve")
    for option in rows:
        add_option(parser, option, {}, explicit=True)
    on_line = vars(parser.parse_known_args(list(argv))[0])
    return {o.dest: o.kind(environ[o.env]) for o in rows if environ.get(o.env)} | on_line


def from_file(path: str | Path, given: Mapping[str, Any]) -> Wanted:
    """What this file and ``given`` ask for. ConfigError or StartError names the first fault."""
    config = read(path)
    for name in ("model", "served_model_name"):
        if name in given:
            flag = "--" + name.replace("_", "-")
            raise StartError(f"{flag} and --config exclude each other: models are named in {path}")
    defaults = {option.dest: option.default for option in options_of("serve")}
    values = {**defaults, **config.values, **given}
    models = {name: {**values, **own, **given, "served_model_name": name} for name, own in config.models.items()}
    _check(config, values, models)
    return Wanted(values, models, config.file, dict(given), config.routing, config.scaling)


def _check(config: Config, values: Mapping[str, Any], models: Mapping[str, Mapping[str, Any]]) -> None:
    """What is known to fail, before anything is started: each fault with the model at fault."""
    check_values(values)
    for name, own in models.items():
        try:
            check_values(own)
        except StartError as error:
            raise ConfigError(f'{config.file}: [models."{name}"]: {error}') from None


def routed(now: Routing, stated: Routing) -> Routing:
    """The table that follows when a file states ``stated`` while ``now`` is in force. An alias that was moved by hand
    stays where it is until the file states something else of it than before."""
    aliases = {name: targets for name, targets in now.aliases.items() if name in stated.aliases}
    for name, targets in stated.aliases.items():
        if now.stated.get(name) != targets:
            aliases[name] = targets
    by_hand = now.aliases.keys() - now.stated.keys() - stated.aliases.keys()
    aliases |= {name: now.aliases[name] for name in by_hand}
    return replace(stated, aliases=aliases, stated=stated.aliases, service=now.service)


# ------------------------------------------------------------------ differences


@dataclass(frozen=True)
class Difference:
    """What lies between what runs and what a file asks for."""

    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    changed: dict[str, list[str]] = field(default_factory=dict)  # model -> keys
    routing: list[str] = field(default_factory=list)  # what of the table of routes: "aliases.prod", ...
    restart: list[str] = field(default_factory=list)  # keys that only a new start of serve reads

    def lines(self) -> list[str]:
        """One a line, for a person; empty if nothing differs."""
        told = [f"{name}: added" for name in self.added] + [f"{name}: removed" for name in self.removed]
        for name, keys in self.changed.items():
            how = "scaled" if set(keys) <= SCALED else "restarted"
            told.append(f"{name}: {how} ({', '.join(keys)})")
        told += [f"{name}: changed" for name in self.routing]
        return told + [f"{key}: needs a restart of serve" for key in self.restart]


def difference(now: Wanted, new: Wanted) -> Difference:
    changed = {}
    for name in sorted(now.models.keys() & new.models.keys()):
        keys = [k for k, o in MODEL_OPTIONS.items() if now.models[name].get(o.dest) != new.models[name].get(o.dest)]
        if keys:
            changed[name] = sorted(keys)
    restart = []
    for option in options_of("serve"):
        table, key = table_of(option)
        if table == "models" or option.dest in ("config", "served_model_name"):
            continue
        if now.values.get(option.dest) != new.values.get(option.dest):
            restart.append(f"{table}.{key}" if table else key)
    return Difference(
        added=sorted(new.models.keys() - now.models.keys()),
        removed=sorted(now.models.keys() - new.models.keys()),
        changed=changed,
        routing=_routing_difference(now.routing or Routing(), new.routing or Routing()),
        restart=sorted(restart),
    )


def _routing_difference(now: Routing, new: Routing) -> list[str]:
    found = []
    for kind in ("aliases", "models", "routes", "upstreams", "tenants"):
        before, after = getattr(now, kind), getattr(new, kind)
        shown = "terms" if kind == "models" else kind
        found += [f"{shown}.{name}" for name in sorted(before.keys() | after) if before.get(name) != after.get(name)]
    return found
