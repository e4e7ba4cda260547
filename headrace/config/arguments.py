"""The arguments of ``headrace config`` and ``headrace models`` that are no options of the table. Loads nothing."""

from __future__ import annotations

import argparse

from headrace.config.file import MODEL_OPTIONS
from headrace.options import add_option

HELP = (
    "check: whether a file can be served, else what is wrong; apply: write its table of routes (aliases, routes, "
    "upstreams, tenants, terms of models) into the Redis of --redis-url, for gateways that no serve has started"
)


def config_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", nargs="?", default="check", choices=("check", "apply"), help=HELP)
    parser.add_argument("--diff", action="store_true", help="also tell what a reload would change in what runs now")


def models_parser(parser: argparse.ArgumentParser) -> None:
    actions = ("list", "add", "remove", "alias", "reload")
    parser.add_argument("action", nargs="?", default="list", choices=actions, help="reload: as SIGHUP does")
    parser.add_argument("name", nargs="?", help="served name (add, remove), or name of an alias")
    weighted = "what an alias means: a model, or several with weights; without any the alias is removed"
    parser.add_argument("targets", nargs="*", metavar="MODEL[=WEIGHT]", help=weighted)
    group = parser.add_argument_group("which serve, if no --config tells it")
    group.add_argument("--run-dir", help="its run directory", metavar="DIR")
    group.add_argument("--port", type=int, default=8000, help="its port (default: 8000)")
    own = parser.add_argument_group("options of an added model, as for serve")
    for option in MODEL_OPTIONS.values():
        add_option(own, option, {}, explicit=True)
