"""``headrace.toml``: read, and checked key by key. What is wrong is told with file, line and key.

A key is an option of ``headrace serve`` without its dashes in front, in the table of what it configures::

    redis-url, data-dir, run-dir, ...     at the top: what all processes share
    [gateway]                             options of gateways;  gateways = N
    [auth]      api-keys-file
    [metrics]   port, host                --metrics-port, --metrics-host
    [defaults]                            options of models, for all of them
    [models."NAME"]                       one served model: its options, workers = N, schedulers = N; and its terms:
                                          price = {input, output}, tenants, max-waiting-requests, aliases
    [models."NAME".ray]                   how many workers on Ray (headrace/ray/rule.py)
    [aliases]                             prod = "v2", or {v2 = 90, v1 = 10}
    [routes.NAME] [[routes.NAME.rules]]   virtual models
    [upstreams.NAME]                      servers that are not ours
    [tenants.NAME]                        budgets

protocol/routing/table.py has the keys of the last five. Values are checked by the same functions as those of the
command line, so ``"2GiB"`` and ``"10m"`` are understood.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from headrace.config.toml_lines import Path as Keys
from headrace.config.toml_lines import key_lines, line_of, shown
from headrace.option_table import options_of
from headrace.options import Option
from headrace.ray.rule import Scaling
from protocol.errors import StartError
from protocol.keys import MODEL_NAME
from protocol.routing.table import Route, Routing, Tenant, Terms, Upstream, faults

MOST_MODELS = 256
MOST_BYTES = 1 << 20

T = TypeVar("T")
ROUTING_TABLES = ("aliases", "routes", "upstreams", "tenants")
TERMS = {"price", "tenants", "max-waiting-requests", "max-waiting-tokens", "aliases"}  # a model's, beside its options
NO_OPTIONS = TERMS | {"ray"}
_PATH = re.compile(r" - at `(?:key in )?\$([^`]*)`")
_STEP = re.compile(r"\[(\d+)\]|\.?([A-Za-z0-9_-]+)")

_SERVE = {option.dest: option for option in options_of("serve")}
_OWN_TABLE = {"api_keys_file": ("auth", "api-keys-file"), "metrics_port": ("metrics", "port"),
              "metrics_host": ("metrics", "host"), "gateways": ("gateway", "gateways")}  # fmt: skip
_NOT_IN_FILE = {"config", "served_model_name"}
_MODELS_TOO = {"workers", "schedulers", "model", "cache_dir", "keep_alive", "card"}


class ConfigError(StartError):
    """What is wrong in a configuration file: ``FILE:LINE: KEY: reason``."""


def table_of(option: Option) -> tuple[str, str]:
    """(table, key) of an option of ``serve``: table "" is the top of the file, "models" a model's own."""
    if option.dest in _OWN_TABLE:
        return _OWN_TABLE[option.dest]
    key = option.flag.removeprefix("--")
    if option.dest in _MODELS_TOO:
        return "models", key
    model, gateway = option.on("scheduler") or option.on("worker"), option.on("gateway")
    return ("" if model == gateway else "models" if model else "gateway"), key


OPTIONS_OF_TABLE: dict[str, dict[str, Option]] = {table: {} for table in ("", "gateway", "auth", "metrics", "models")}
for _option in _SERVE.values():
    if _option.dest not in _NOT_IN_FILE:
        _table, _key = table_of(_option)
        OPTIONS_OF_TABLE[_table][_key] = _option
MODEL_OPTIONS = OPTIONS_OF_TABLE["models"]


@dataclass(frozen=True)
class Config:
    """A file's values by the names of options (``max_model_len``), as the command line would have them."""

    file: Path
    values: dict[str, Any] = field(default_factory=dict)  # what is no model's own
    models: dict[str, dict[str, Any]] = field(default_factory=dict)  # served name -> its options, with the defaults
    routing: Routing = field(default_factory=Routing)
    scaling: dict[str, Scaling] = field(default_factory=dict)  # served name -> its workers on Ray


def read(path: str | Path) -> Config:
    """The configuration of this file. ConfigError names the first fault."""
    return _Reader(Path(path)).config()


class _Reader:
    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                raw = file.read(MOST_BYTES + 1)
        except OSError as error:
            raise ConfigError(f"--config {path}: {error.strerror}") from None
        if len(raw) > MOST_BYTES:
            raise ConfigError(f"{path}: the file has more than {MOST_BYTES} bytes")
        try:
            text = raw.decode()
            self.document = tomllib.loads(text)
        except ValueError as error:  # of the encoding, or TOML's own, which names line and column
            raise ConfigError(f"{path}: {error}") from None
        self.lines = key_lines(text.replace("\r\n", "\n"))

    def fault(self, keys: Keys, reason: str) -> ConfigError:
        line = line_of(self.lines, keys)
        return ConfigError(f"{self.path}:{line or 1}: {shown(keys)}: {reason}")

    def config(self) -> Config:
        document = dict(self.document)
        tables = {name: self._table((name,), document.pop(name, {})) for name in ("gateway", "auth", "metrics")}
        defaults = self._options(("defaults",), self._table(("defaults",), document.pop("defaults", {})), "models")
        models = self._table(("models",), document.pop("models", {}))
        routing = {name: self._table((name,), document.pop(name, {})) for name in ROUTING_TABLES}
        values = defaults | self._options((), document, "", "gateway", "auth", "metrics", "defaults", "models")
        for name, table in tables.items():
            values |= self._options((name,), table, name)
        if not models:
            raise ConfigError(f'{self.path}: no model: a table [models."NAME"] is needed for each')
        if len(models) > MOST_MODELS:
            raise self.fault(("models",), f"at most {MOST_MODELS} models")
        own = {name: self._model(name, models[name], defaults) for name in models}
        scaling = {name: self._scaling(("models", name, "ray"), models[name].get("ray", {})) for name in models}
        return Config(self.path, values, own, self._routing(routing, models), scaling)

    def _model(self, name: str, given: Any, defaults: Mapping[str, Any]) -> dict[str, Any]:
        keys = ("models", name)
        if not MODEL_NAME.fullmatch(name):
            raise self.fault(keys, "a served name must match [A-Za-z0-9._:/-]{1,128}")
        table = {key: value for key, value in self._table(keys, given).items() if key not in NO_OPTIONS}
        return {**defaults, **self._options(keys, table, "models", *NO_OPTIONS)}

    def _scaling(self, keys: Keys, given: Any) -> Scaling:
        scaling = self._converted(keys, self._table(keys, given), Scaling)
        if (fault := scaling.fault()) is not None:
            raise self.fault((*keys, fault[0]), fault[1])
        return scaling

    def _routing(self, tables: Mapping[str, Mapping[str, Any]], models: Mapping[str, Mapping[str, Any]]) -> Routing:
        """The table that gateways route by, checked."""
        aliases: dict[str, Any] = {}
        for name, model in models.items():
            for alias in self._converted(("models", name, "aliases"), model.get("aliases", []), list[str]):
                aliases.setdefault(alias, {})[name] = 1
        for name, targets in tables["aliases"].items():
            weights = {targets: 1} if isinstance(targets, str) else targets
            aliases[name] = self._converted(("aliases", name), weights, dict[str, int])
        terms = {}
        for name, model in models.items():
            own = {key: model[key] for key in TERMS & model.keys() - {"aliases"}}
            terms[name] = self._converted(("models", name), own, Terms)
        routing = Routing(
            aliases=aliases,
            models={name: one for name, one in terms.items() if one != Terms()},
            routes={k: self._converted(("routes", k), v, Route) for k, v in tables["routes"].items()},
            upstreams={k: self._converted(("upstreams", k), v, Upstream) for k, v in tables["upstreams"].items()},
            tenants={k: self._converted(("tenants", k), v, Tenant) for k, v in tables["tenants"].items()},
        )
        for keys, reason in faults(routing, models):
            raise self.fault(keys, reason)
        return routing

    def _converted(self, keys: Keys, value: Any, kind: type[T]) -> T:
        try:
            return msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            text = str(error)
            path = _PATH.search(text)
            inner = _STEP.findall(path.group(1)) if path else []
            reason = _PATH.sub("", text)
            if unknown := re.search(r"unknown field `([^`]*)`", reason):
                inner.append(("", unknown.group(1)))
                reason = "there is no such key"
            steps = tuple(int(index) if index else key for index, key in inner if index or key)
            raise self.fault((*keys, *steps), reason[:1].lower() + reason[1:]) from None

    # -------------------------------------------------------------- parts

    def _table(self, keys: Keys, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.fault(keys, "a table is expected")
        return value

    def _options(self, keys: Keys, table: Mapping[str, Any], kind: str, *tables: str) -> dict[str, Any]:
        """The options of a table by their names. ``tables`` are further names that could have been meant."""
        known = OPTIONS_OF_TABLE[kind]
        values = {}
        for key, value in table.items():
            if key not in known:
                raise self.fault((*keys, key), _unknown(key, [*known, *tables], kind))
            values[known[key].dest] = self._value((*keys, key), known[key], value)
        return values

    def _value(self, keys: Keys, option: Option, value: Any) -> Any:
        try:
            return option_value(option, value)
        except argparse.ArgumentTypeError as error:
            raise self.fault(keys, str(error)) from None


def option_value(option: Option, value: Any) -> Any:
    """A TOML or JSON value as the command line would have it. ArgumentTypeError says what is wrong."""
    if option.switch:
        if not isinstance(value, bool):
            raise argparse.ArgumentTypeError("true or false is expected")
        return value
    if isinstance(value, dict):
        value = json.dumps(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise argparse.ArgumentTypeError("a text or a number is expected")
    if option.kind is str and not isinstance(value, str):
        raise argparse.ArgumentTypeError("a text is expected")
    if option.choices and value not in option.choices:
        raise argparse.ArgumentTypeError(f"{value!r} is none of {', '.join(option.choices)}")
    return option.kind(str(value))


def _unknown(key: str, known: list[str], kind: str) -> str:
    """Where a key that is known elsewhere belongs, else the nearest one."""
    for table, options in OPTIONS_OF_TABLE.items():
        if table != kind and key in options:
            place = {"": "at the top", "models": 'in [models."NAME"] or [defaults]'}.get(table, f"in [{table}]")
            return f"it belongs {place}"
    near = difflib.get_close_matches(key.replace("_", "-"), known, 1)
    return f"there is no such key{f', did you mean {near[0]}?' if near else ''}"
