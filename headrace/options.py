"""Every command-line option, once: a table that the parsers, the environment and ``serve`` read.

The one idea: an option belongs to the commands named in its row. ``--block-size`` is a worker's; ``serve``
takes it too and hands it on to the workers that it starts. Each option is also an environment variable:
``--max-model-len`` is ``HEADRACE_MAX_MODEL_LEN``. The command line wins over the environment.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROLES = ("gateway", "scheduler", "worker")


@dataclass(frozen=True)
class Option:
    """One row. ``default`` None means that the service chooses (the help text says what)."""

    flag: str
    commands: str  # the commands that take it, space separated
    help: str
    kind: Callable[[str], Any] = str
    default: Any = None
    metavar: str | None = None
    choices: tuple[str, ...] | None = None

    @property
    def dest(self) -> str:
        return self.flag.removeprefix("--").replace("-", "_")

    @property
    def env(self) -> str:
        return "HEADRACE_" + self.dest.upper()

    @property
    def switch(self) -> bool:
        """Takes no value on the command line; 1/true/yes/on in the environment."""
        return self.kind is boolean

    def on(self, command: str) -> bool:
        return command in self.commands.split()


# ------------------------------------------------------------------ kinds of values


def boolean(text: str) -> bool:
    lowered = text.strip().lower()
    if lowered in ("1", "true", "yes", "on"):
        return True
    if lowered in ("", "0", "false", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def count(text: str) -> int:
    """A whole number, at least 1."""
    value = _whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is less than 1")
    return value


def port(text: str) -> int:
    """A TCP port; 0 lets the system choose a free one."""
    value = _whole(text)
    if not 0 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port number (0 to 65535)")
    return value


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None


def seconds(text: str) -> float:
    """A duration: ``30``, ``30s``, ``500ms``, ``10m``, ``2h``. In seconds."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|m|h)?\s*", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration (write 30, 500ms, 10m or 2h)")
    return float(found[1]) * {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}[found[2] or "s"]


def size(text: str) -> int:
    """A number of bytes: ``2GiB``, ``512M`` (= MiB), ``1.5GB`` (decimal) or plain bytes."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)(B?)\s*", text, re.IGNORECASE)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no size (write 2GiB, 512MiB or 1500000000)")
    number, unit, binary, byte = found[1], found[2].upper(), found[3], found[4]
    base = 1000 if byte and not binary else 1024
    return int(float(number) * base ** " KMGT".index(unit or " "))


# ------------------------------------------------------------------ the table

OPTIONS: tuple[Option, ...] = (
    # what is served
    Option(
        "--model",
        "serve scheduler worker",
        "the model: a local directory or a Hugging Face hub id of a causal language model (default: the demo model)",
        metavar="PATH|ID",
    ),
    Option(
        "--served-model-name",
        "serve scheduler worker",
        "the name that clients put in `model` (default: the last part of the path, or the hub id)",
        metavar="NAME",
    ),
    # where
    Option("--host", "serve gateway", "address to listen on; 0.0.0.0 for every interface", default="127.0.0.1"),
    Option("--port", "serve gateway", "port of the HTTP API; 0 picks a free one", port, 8000),
    Option(
        "--redis-url",
        "serve gateway scheduler worker submit",
        "Redis or Valkey, as redis://[user:password@]host:port/db, rediss://... or unix:///path "
        "(serve: the embedded server, started and kept by serve itself; others: redis://127.0.0.1:6379/0)",
        metavar="URL",
    ),
    Option(
        "--data-dir",
        "serve",
        "where the embedded server keeps its append-only file; a restart finds its jobs again "
        "(default: ~/.local/state/headrace/data)",
        metavar="DIR",
    ),
    Option(
        "--run-dir",
        "serve",
        "where logs/ and processes.json go (default: ~/.local/state/headrace/run-PORT)",
        metavar="DIR",
    ),
    # how many
    Option("--workers", "serve", "worker processes", count, 1, metavar="N"),
    Option("--schedulers", "serve", "scheduler processes; one leads, the others stand by", count, 1, metavar="N"),
    Option("--gateways", "serve", "gateway processes, on PORT, PORT+1, ...", count, 1, metavar="N"),
    # the engine
    Option(
        "--engine",
        "serve worker",
        "torch, or a simulated one that only keeps time",
        default="torch",
        choices=("torch", "simulated"),
    ),
    Option(
        "--dtype",
        "serve worker",
        "precision of the weights (default: float32 on a CPU, the checkpoint's on a GPU)",
        choices=("auto", "float32", "bfloat16", "float16"),
    ),
    Option("--device", "serve worker", "cpu, cuda, cuda:1, ... (default: a GPU if there is one)"),
    Option("--max-model-len", "serve worker", "longest prompt + output, in tokens (default: the model's)", count),
    Option("--max-num-seqs", "serve worker", "most sequences that run at once on a worker", count),
    Option("--max-num-batched-tokens", "serve worker", "most tokens that one step computes on a worker", count),
    Option(
        "--kv-cache-memory",
        "serve worker",
        "memory of a worker's KV cache, as 2GiB (default: a share of what is free)",
        size,
        metavar="SIZE",
    ),
    Option("--block-size", "serve worker", "tokens in one block of the KV cache", count),
    Option("--threads", "serve worker", "CPU threads of a worker (default: its share of the cores)", count),
    # life of requests and processes
    Option("--api-keys-file", "serve gateway", "JSON file of hashed API keys (default: no key is asked for)"),
    Option(
        "--resume-grace",
        "serve gateway",
        "how long a stream whose client has gone away may be picked up again",
        seconds,
        0.0,
        metavar="SECONDS",
    ),
    Option(
        "--drain-timeout",
        "serve gateway worker",
        "how long running requests may take to end when a process is asked to leave",
        seconds,
        60.0,
        metavar="SECONDS",
    ),
    # single services
    Option("--name", "gateway scheduler worker", "name of this process among its kind (default: made up)"),
    Option(
        "--metrics-port",
        "serve scheduler worker",
        "port of /metrics on 127.0.0.1 (default: none; serve: the first of several, free ones by default)",
        port,
    ),
    Option(
        "--log-level",
        "serve gateway scheduler worker",
        "least level that is logged",
        default="info",
        choices=("debug", "info", "warning", "error"),
    ),
)


def options_of(command: str) -> list[Option]:
    return [o for o in OPTIONS if o.on(command)]


def add_options(parser: argparse.ArgumentParser, command: str, environ: Mapping[str, str] = os.environ) -> None:
    """Put the command's options on ``parser``, with defaults from the environment where it names them."""
    for option in options_of(command):
        add_option(parser, option, environ)


def add_option(parser: argparse.ArgumentParser, option: Option, environ: Mapping[str, str] = os.environ) -> None:
    shown = "" if option.default is None or option.switch else f" (default: {option.default})"
    text = f"{option.help}{shown} [{option.env}]".replace("%", "%%")
    default = option.default
    if (raw := environ.get(option.env)) is not None and raw != "":
        try:
            default = option.kind(raw)
        except argparse.ArgumentTypeError as error:
            parser.error(f"{option.env}: {error}")
        if option.choices and default not in option.choices:
            parser.error(f"{option.env}: {raw!r} is none of {', '.join(option.choices)}")
    if option.switch:
        parser.add_argument(option.flag, action=argparse.BooleanOptionalAction, default=default, help=text)
        return
    parser.add_argument(
        option.flag,
        type=option.kind,
        default=default,
        help=text,
        metavar=option.metavar or (None if option.choices else option.dest.rsplit("_", 1)[-1].upper()),
        choices=option.choices,
    )


def argv_of(role: str, values: Mapping[str, Any]) -> list[str]:
    """Command line of one ``role`` that repeats ``values`` (by dest). None is left out, the URL as well: it may
    hold a password, and command lines are public; it travels in the environment."""
    argv: list[str] = []
    for option in options_of(role):
        value = values.get(option.dest)
        if value is None or option.dest == "redis_url":
            continue
        if option.switch:
            argv.append(option.flag if value else "--no-" + option.flag.removeprefix("--"))
        else:
            argv += [option.flag, str(value)]
    return argv


def environment(redis_url: str, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of a child: ours without the options (its command line has them all), and the URL."""
    ours = {option.env for option in OPTIONS}
    kept = {k: v for k, v in environ.items() if k not in ours}
    return kept | {"HEADRACE_REDIS_URL": redis_url}


# ------------------------------------------------------------------ places


def state_dir() -> Path:
    """Where a user's programs keep what outlives them (XDG base directories)."""
    return Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "headrace"


def demo_model() -> Path | None:
    """examples/demo-model beside the package (a checkout) or under the current directory."""
    for root in (Path(__file__).resolve().parents[1], Path.cwd()):
        found = root / "examples" / "demo-model"
        if (found / "config.json").is_file():
            return found
    return None


def served_name(model: str) -> str:
    """The name that clients use: the last part of a local path, a hub id as it stands."""
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else model
