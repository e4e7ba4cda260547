"""What an option is, and how a table of them becomes parsers, environment variables and command lines of children.

An option belongs to the commands named in its row. ``--block-size`` is a worker's; ``serve``
takes it too and passes it to the workers that it starts. Each option is also an environment variable:
``--max-model-len`` is ``HEADRACE_MAX_MODEL_LEN``. The command line wins over the environment.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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
    shown: str | None = None  # the default as the help text shows it
    scope: str = ""  # put before the name in the environment, where two commands mean different things by a flag

    @property
    def dest(self) -> str:
        return self.flag.removeprefix("--").replace("-", "_")

    @property
    def env(self) -> str:
        return "HEADRACE_" + self.scope + self.dest.upper()

    @property
    def described(self) -> str:
        """The help text, which always tells the default."""
        if "(default:" in self.help:
            return self.help
        default = ("on" if self.default else "off") if self.switch else self.shown or self.default
        return f"{self.help} (default: {'none' if default is None else default})"

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


def whole(text: str) -> int:
    """A whole number, 0 or more."""
    value = _whole(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is less than 0")
    return value


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


def rate(text: str) -> float:
    """A number above 0."""
    value = number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0")
    return value


def share(text: str) -> float:
    """A number above 0 and not above 1."""
    value = rate(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is above 1")
    return value


def number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no number")
    return value


def span(text: str) -> tuple[int, int]:
    """``64`` or ``32:256``: a range of whole numbers, both ends included."""
    low, _, high = text.partition(":")
    found = count(low), count(high or low)
    if found[0] > found[1]:
        raise argparse.ArgumentTypeError(f"{text!r}: the first number is the greater one")
    return found


def json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")
    return value


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


# ------------------------------------------------------------------ parsers and command lines


@dataclass(frozen=True)
class Unusable:
    """The default of an option whose environment variable is invalid: an error only for commands that use the
    option."""

    reason: str


def add_option(
    parser: argparse.ArgumentParser | argparse._ArgumentGroup,
    option: Option,
    environ: Mapping[str, str],
    *,
    explicit: bool = False,
) -> None:
    """``explicit``: one that is not given leaves nothing behind, not even its default."""
    text = f"{option.described} [{option.env}]".replace("%", "%%")
    default = option.default
    if raw := environ.get(option.env):
        try:
            default = option.kind(raw)
        except argparse.ArgumentTypeError as error:
            default = Unusable(f"{option.env}: {error}")
        if option.choices and raw not in option.choices:
            default = Unusable(f"{option.env}: {raw!r} is none of {', '.join(option.choices)}")
    if explicit:
        default = argparse.SUPPRESS
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


def argv_of(rows: Iterable[Option], values: Mapping[str, Any]) -> list[str]:
    """Command line that repeats ``values`` (by dest) of these options. None is left out, the URL as well: it may hold
    a password, and command lines are public; it travels in the environment."""
    argv: list[str] = []
    for option in rows:
        value = values.get(option.dest)
        if value is None or option.dest == "redis_url":
            continue
        if option.switch:
            argv.append(option.flag if value else "--no-" + option.flag.removeprefix("--"))
        else:
            argv += [option.flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    return argv


def child_environment(rows: Iterable[Option], redis_url: str, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of a child: ours without the options (its command line has them all), and the URL."""
    ours = {option.env for option in rows}
    return {k: v for k, v in environ.items() if k not in ours} | {"HEADRACE_REDIS_URL": redis_url}


# ------------------------------------------------------------------ places


def state_dir() -> Path:
    """The user's directory for persistent state (XDG base directories)."""
    return Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "headrace"


def demo_model() -> Path | None:
    """examples/demo-model beside the package (a checkout) or under the current directory."""
    for root in (Path(__file__).resolve().parents[1], Path.cwd()):
        found = root / "examples" / "demo-model"
        if (found / "config.json").is_file():
            return found
    return None


def served_name(model: str) -> str:
    """The name that clients use: the last part of a local path, without .gguf; a hub id as it stands."""
    path = Path(model).expanduser()
    if not path.exists():
        return model
    return path.stem if path.suffix == ".gguf" and path.is_file() else path.resolve().name
