"""``headrace``: the command line. Services are imported inside their own subcommand, so that ``headrace gateway``
never loads torch and ``headrace --help`` loads nothing at all.

Exit codes: 0 a clean end; 1 a failure; 2 a wrong command line; 78 (EX_CONFIG) a start that cannot succeed with this
configuration, which ``serve`` never repeats; 130 ended by a second Ctrl-C.

Over 400 lines: most are the help that each command shows, beside what it runs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import logging
import os
import re
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from headrace import contracts, early
from headrace.config.arguments import config_parser, models_parser
from headrace.option_table import options_of
from headrace.options import Unusable, add_option, state_dir
from protocol.errors import EX_CONFIG, HeadraceError, StartError

DEFAULT_REDIS = "redis://127.0.0.1:6379/0"

Config = TypeVar("Config")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script. Returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    if argv is None:
        early.end_cleanly()
    try:
        for variable, value in contracts.defaults(given, os.environ).items():
            os.environ.setdefault(variable, value)
    except HeadraceError as error:
        return _say(given[0], error)
    parser = build_parser()
    args, unknown = parser.parse_known_args(given)
    if unknown:
        return _unknown_option(args.command, unknown[0])
    for value in vars(args).values():
        if isinstance(value, Unusable):
            parser.error(value.reason)
    args.argv = given[1:]
    try:
        return int(args.run(args) or 0)
    except HeadraceError as error:
        return _say(args.command, error)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `headrace submit ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


# ------------------------------------------------------------------ commands

COMMANDS: dict[str, tuple[str, str, Callable[[argparse.Namespace], int]]] = {}
EXTRA: dict[str, Callable[[argparse.ArgumentParser], None]] = {  # arguments that are no options of the table
    "config": config_parser,
    "models": models_parser,
}


def command(
    name: str, summary: str, epilog: str
) -> Callable[[Callable[[argparse.Namespace], int]], Callable[[argparse.Namespace], int]]:
    """Register a subcommand: its one-line summary and the examples at the end of its help."""

    def register(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
        COMMANDS[name] = (summary, epilog, run)
        return run

    return register


@command(
    "serve",
    "start everything on this machine: server, gateway, scheduler, worker",
    """
examples:
  headrace serve                                  a small chat model on http://127.0.0.1:8000
  headrace serve --model ./llama-3.2-1b.Q8_0.gguf
  headrace serve --model Qwen/Qwen2.5-0.5B-Instruct --port 9000
  headrace serve --model ./my-model --workers 2 --schedulers 2 --redis-url redis://queue:6379/0
  headrace serve --config headrace.toml           any number of models; SIGHUP reads the file again

Ctrl-C lets running requests end, then stops; a second Ctrl-C stops at once. What was queued is kept in
--data-dir and goes on at the next start.
""",
)
def serve(args: argparse.Namespace) -> int:
    from headrace.config.plan import given_on
    from headrace.serve.service import serve as run

    return run(vars(args), given_on(args.argv, os.environ) if args.config else None)


@command(
    "config",
    "check a configuration file, and what a reload of it would change",
    """
examples:
  headrace config check                           ./headrace.toml
  headrace config check --config headrace.toml --diff
  headrace config apply --config headrace.toml --redis-url redis://queue:6379/0

Exit code 78 and one line with file, line and key if something is wrong.
""",
)
def config(args: argparse.Namespace) -> int:
    from headrace.config.commands import check

    return check(args)


@command(
    "models",
    "list, add, remove and reload the models of a serve that runs here",
    """
examples:
  headrace models list
  headrace models add small --model ./small-model --workers 2
  headrace models remove small
  headrace models alias prod v2=9 v1=1            one request of ten goes to v1, over all gateways
  headrace models reload                          reads the configuration file again, as SIGHUP does

A removed model drains: it takes nothing new, what it has accepted ends. Clients of other models notice nothing.
""",
)
def models(args: argparse.Namespace) -> int:
    from headrace.config.commands import models as run

    return run(args)


@command(
    "ray",
    "the same file on a Ray cluster: processes as actors, workers by demand",
    """
examples:
  headrace ray up --config headrace.toml --address auto     then it runs by itself
  headrace ray status
  headrace ray down                                         drains, then ends

The file names a server that every node reaches (redis-url), and in [models."NAME".ray] how many workers a model has.
""",
)
def ray(args: argparse.Namespace) -> int:
    from headrace.ray.up import run

    return run(args)


@command(
    "gateway",
    "the HTTP front alone: OpenAI-compatible API over the queue",
    """
example:
  headrace gateway --redis-url redis://queue:6379/0 --host 0.0.0.0 --port 8000

A gateway learns the served models from the queue; it needs no model and no GPU. Run as many as you like.
""",
)
def gateway(args: argparse.Namespace) -> int:
    _start_logging(args.log_level, args.log_format)
    from gateway.app import GatewayConfig, run_gateway

    values = vars(args) | {"redis_url": args.redis_url or _default_redis()}
    _run("gateway", checked(values, run_gateway(config_of(GatewayConfig, values))))


@command(
    "scheduler",
    "the scheduler alone: tokenizes, queues and plans every step",
    """
example:
  headrace scheduler --model Qwen/Qwen2.5-0.5B-Instruct --redis-url redis://queue:6379/0

Needs the model's tokenizer and config, no weights. Start two for failover: one leads, the other stands by.
""",
)
def scheduler(args: argparse.Namespace) -> int:
    _start_logging(args.log_level, args.log_format)
    values = _with_model(vars(args)) | {"redis_url": args.redis_url or _default_redis()}
    from scheduler.service import SchedulerConfig, run_scheduler

    config = config_of(SchedulerConfig, values | {"retention_s": args.retention})
    _run("scheduler", checked(values, run_scheduler(config)))


@command(
    "worker",
    "one worker alone: loads the model and runs the steps",
    """
example:
  headrace worker --model Qwen/Qwen2.5-0.5B-Instruct --name gpu0 --device cuda:0 --redis-url redis://queue:6379/0

Every worker of a model needs a name of its own. A restarted worker takes its old name again.

  headrace worker --model M --tensor-parallel-size 2 --rendezvous 10.0.0.1:7000    on one machine
  headrace worker --rank 1 --rendezvous 10.0.0.1:7000                               on another
""",
)
def worker(args: argparse.Namespace) -> int:
    _start_logging(args.log_level, args.log_format)
    if args.rank is not None:
        from workers.engines.remote import address_of, join

        if args.rendezvous is None:
            raise StartError("--rank needs --rendezvous HOST:PORT, where its worker listens")
        join(address_of(args.rendezvous), args.rank, logging.getLogger().getEffectiveLevel())
    values = _with_model(vars(args)) | {"redis_url": args.redis_url or _default_redis()}
    from headrace.serve.progress import reporter
    from workers.service import WorkerConfig, run_worker

    config = config_of(WorkerConfig, values | {"retention_s": args.retention})
    _run("worker", checked(values, run_worker(config, progress=reporter())))


@command(
    "submit",
    "put jobs on the queue and get their results, without HTTP",
    """
examples:
  headrace submit --prompt 'def add(a, b):' --max-tokens 64 --follow
  headrace submit --file jobs.jsonl --out results.jsonl

jobs.jsonl has a job on each line, such as
  {"id": "a1", "prompt": "def add(a, b):", "sampling": {"max_tokens": 64, "temperature": 0}}
  {"id": "a2", "messages": [{"role": "user", "content": "Hello"}]}
A line without an id gets one from its content and place, so a run that was broken off goes on where it was:
nothing is run twice.
""",
)
def submit(args: argparse.Namespace) -> int:
    from headrace.clients.submit import run

    return run(vars(args) | {"redis_url": _served_redis(args.redis_url)})


@command(
    "bench",
    "measure any OpenAI-compatible server as its users feel it",
    """
examples:
  headrace bench --concurrency 8 --ignore-eos             8 users, one request after the other
  headrace bench --rate 2 --requests 100 --json out.json  2 requests a second, at random moments
  headrace bench                                          everything at once

Latencies count from the moment a request was due, not from when it could be sent.
""",
)
def bench(args: argparse.Namespace) -> int:
    from headrace.clients.bench import run

    return run(vars(args))


@command(
    "top",
    "what a running service does now: models, workers, queue, tenants",
    """
examples:
  headrace top                          of the service on this machine, every second
  headrace top --requests 20            with its oldest requests
  headrace top --once --json            one look, a JSON line for each model

Read from the server alone; --redis-url names one elsewhere. Ctrl-C ends it.
""",
)
def top(args: argparse.Namespace) -> int:
    from headrace.tools.top import run

    return run(vars(args) | {"redis_url": _served_redis(args.redis_url)})


@command(
    "doctor",
    "look at this machine and a running installation, and say what to do",
    """
examples:
  headrace doctor                                    versions, kernels, GPU, disk, ports, the service that runs here
  headrace doctor --model ./my-model                 and whether these files can be served
  headrace doctor --redis-url redis://queue:6379/0   an installation elsewhere

Exit code 1 if anything must be mended; warnings do not count.
""",
)
def doctor(args: argparse.Namespace) -> int:
    from headrace.tools.doctor import run

    return run(vars(args))


@command(
    "requests",
    "list, show, cancel or follow the requests of a running service",
    """
examples:
  headrace requests ls --tenant acme        what has not ended, oldest first
  headrace requests show 4f1c               what is stored of it, but no prompt and no answer
  headrace requests cancel 4f1c 9be2
  headrace requests tail 4f1c               its answer, as it comes

An id may be cut short where it is clear; ended requests are found by their whole id, for --retention.
""",
)
def requests(args: argparse.Namespace) -> int:
    from headrace.tools.requests import run

    return run(vars(args) | {"redis_url": _served_redis(args.redis_url)})


@command(
    "dead",
    "list dead letters, try them again or drop them",
    """
examples:
  headrace dead ls
  headrace dead retry 1785326400000-0       as a new request, while the old one is kept
  headrace dead drop all

A letter holds a hash of its job, not the job: after --retention its producer has to send it again.
""",
)
def dead(args: argparse.Namespace) -> int:
    from headrace.tools.dead import run

    return run(vars(args) | {"redis_url": _served_redis(args.redis_url)})


@command(
    "shards",
    "list, add, drain and retire the shards of a model",
    """
examples:
  headrace shards ls
  headrace shards add                        one more; then start workers with --shard K
  headrace shards drain 2                    takes nothing new, ends what it has; `open` takes that back
  headrace shards retire 2                   once it has ended all: a push there is an error from now on

The first shard stays. Other tools see another shard by --model TAG, as ls shows it.
""",
)
def shards(args: argparse.Namespace) -> int:
    from headrace.tools.shards import run

    return run(vars(args) | {"redis_url": _served_redis(args.redis_url)})


@command(
    "completion",
    "print what a shell needs to complete this command",
    """
examples:
  source <(headrace completion bash)
  headrace completion zsh > ~/.zfunc/_headrace
  headrace completion fish > ~/.config/fish/completions/headrace.fish
""",
)
def completion(args: argparse.Namespace) -> int:
    from headrace.tools.completion import script

    summaries = {name: summary for name, (summary, _, _) in COMMANDS.items()}
    actions = {name: words for name, (words, _) in ACTIONS.items()}
    print(script(args.action, summaries, actions, options_of), end="")
    return 0


@command("version", "print the version and what it runs on", "")
def version(args: argparse.Namespace) -> int:
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    for package in ("headrace", "torch", "transformers", "redis", "aiohttp"):
        try:
            print(package, installed(package))
        except PackageNotFoundError:
            print(package, "not installed")
    print("python", sys.version.split()[0])
    return 0


# What stands after a command, before its options: the words (the first is the default), and what follows them.
ACTIONS: dict[str, tuple[tuple[str, ...], str | None]] = {
    "requests": (("ls", "show", "cancel", "tail"), "ID"),
    "dead": (("ls", "retry", "drop"), "ENTRY"),
    "shards": (("ls", "add", "drain", "open", "retire"), "SHARD"),
    "completion": (("bash", "zsh", "fish"), None),
    "ray": (("status", "up", "down"), None),
}


# ------------------------------------------------------------------ parts


def _unknown_option(command: str, given: str) -> int:
    """One line: the nearest option, and how the command is used. Exit code 2, as for every wrong command line."""
    import difflib

    flags = [option.flag for option in options_of(command)]
    near = difflib.get_close_matches(given.partition("=")[0], flags, 1)
    hint = f", did you mean {near[0]}?" if near else ";"
    print(
        f"headrace {command}: there is no option {given}{hint} usage: headrace {command} [OPTION VALUE]..., "
        f"`headrace {command} --help` lists them",
        file=sys.stderr,
    )
    return 2


class _Version(argparse.Action):
    """Reads the version only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import version as installed

        print("headrace", installed("headrace"))
        parser.exit()


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with a command line; argparse would put it under all options."""

    def error(self, message: str) -> NoReturn:
        import difflib

        wrong = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        near = difflib.get_close_matches(wrong[1], re.findall(r"[\w-]+", wrong[2]), 1) if wrong else []
        hint = f", did you mean {near[0]}?" if near else ";"
        self.exit(2, f"{self.prog}: {message}{hint} `{self.prog} --help` explains it\n")


def build_parser(environ: Mapping[str, str] = os.environ) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="headrace",
        description="An LLM inference service that loses no accepted request and sends no token twice.",
        epilog="Start here: `headrace serve`, then open the URL that it prints. "
        "Each command has its own help: `headrace serve --help`.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (summary, epilog, run) in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=epilog.strip("\n"),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name in ACTIONS:
            words, more = ACTIONS[name]
            sub.add_argument("action", nargs="?", choices=words, default=words[0], help="(default: %(default)s)")
            if more is not None:
                sub.add_argument("id", nargs="*", metavar=more)
        for option in options_of(name):
            add_option(sub, option, environ)
        if name in EXTRA:
            EXTRA[name](sub)
        sub.set_defaults(run=run)
    return parser


def config_of(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """Fill a service's config dataclass from the options of the same name; None keeps the service's own default."""
    names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    return cls(**{k: v for k, v in values.items() if k in names and v is not None})


def _with_model(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in --model and --served-model-name, a model fetched or converted if need be. StartError says why not."""
    from headrace.model import choose
    from headrace.serve.progress import reporter
    from protocol.connection import check_url

    if values["redis_url"]:
        check_url(values["redis_url"])

    def tell(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    return {**values, **choose(values, reporter(), tell).options}


def checked(values: Mapping[str, Any], service: Coroutine[Any, Any, int]) -> Coroutine[Any, Any, int]:
    """The service, with its server's durability checked; under ``serve``, which has done that, just the service.
    StartError for an invalid URL."""
    from headrace.serve.durability import with_check
    from headrace.serve.progress import SUPERVISED
    from protocol.connection import check_url

    try:
        check_url(values["redis_url"])
    except StartError:
        service.close()
        raise
    if SUPERVISED in os.environ:
        return service
    return with_check(values["redis_url"], values["strict_durability"], service)


def _default_redis() -> str:
    """The embedded server of a `headrace serve` that runs on this machine, else a Redis on its usual port."""
    from headrace.serve import embedded

    data_dir = state_dir() / "data"
    return embedded.server_url(data_dir) if embedded.answers(data_dir) else DEFAULT_REDIS


def _served_redis(given: str | None) -> str:
    """For a command that asks a running service. StartError where none is named and none is found here."""
    import socket
    from urllib.parse import urlsplit

    url = given or _default_redis()
    if url == DEFAULT_REDIS and not given:
        usual = urlsplit(DEFAULT_REDIS)
        try:
            socket.create_connection((usual.hostname, usual.port), timeout=5.0).close()
        except OSError:
            raise StartError(
                f"no `headrace serve` runs here as this user, and nothing answers at {DEFAULT_REDIS}: "
                "start it, or name the service's queue by --redis-url"
            ) from None
    return url


def _start_logging(level: str, form: str) -> None:
    """Everything to stderr; only the line about each ended request, JSON as it stands, goes to stdout."""
    from protocol.telemetry.logs import handler

    logging.basicConfig(level=level.upper(), handlers=[handler(sys.stderr, form)], force=True)
    for library in ("asyncio", "aiohttp", "urllib3", "httpx", "filelock"):  # debug is about what we do
        logging.getLogger(library).setLevel(max(logging.INFO, logging.getLogger().level))
    lines = logging.StreamHandler(sys.stdout)
    lines.setFormatter(logging.Formatter("%(message)s"))
    for name in ("headrace.requests", "headrace.gateway.requests"):
        requests = logging.getLogger(name)
        requests.handlers, requests.propagate = [lines], False


def _run(role: str, service: Coroutine[Any, Any, int]) -> NoReturn:
    """Run a service to its end and exit at once: the teardown of an interpreter with torch takes seconds, and a thread
    that hangs in a device must not keep the process alive."""
    runner: Any = asyncio
    with contextlib.suppress(ImportError):  # not on every platform
        import uvloop as runner
    try:
        code = runner.run(service)
    except HeadraceError as error:
        code = _say(role, error)
    except BaseException:
        logging.getLogger(f"headrace.{role}").critical("ended by a fault", exc_info=True)
        code = 1
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _say(role: str, error: HeadraceError) -> int:
    """One line for a person; returns the exit code."""
    print(f"headrace {role}: {error}", file=sys.stderr, flush=True)
    return EX_CONFIG if isinstance(error, StartError) else 1


if __name__ == "__main__":
    raise SystemExit(main())
