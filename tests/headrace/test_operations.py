"""docs/operations.md speaks of options, metrics, files and users that exist."""

from __future__ import annotations

import re
from pathlib import Path

from headrace.option_table import OPTIONS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "operations.md").read_text()


def test_its_options_exist() -> None:
    named = set(re.findall(r"`(?:[^`]* )?(--[a-z-]+)", TEXT))
    assert len(named) > 10
    assert named <= {option.flag for option in OPTIONS} | {"--help", "--profile", "--diff"}


def test_its_metrics_exist() -> None:
    source = "".join((ROOT / part / "metrics.py").read_text() for part in ("gateway", "scheduler", "workers"))
    named = set(re.findall(r"`(?:headrace|llm)_([a-z_]+)`", TEXT))
    assert len(named) > 10
    for name in named:
        stem = name.removesuffix("_total")
        assert re.search(rf'"(?:headrace_|llm_)?{stem}"', source), name


def test_its_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)", TEXT):
        assert (ROOT / "docs" / target).exists(), target


def test_its_users_are_those_of_the_file() -> None:
    users = {line.split()[1] for line in (ROOT / "deploy" / "users.acl").read_text().splitlines()} - {"default"}
    told = TEXT[TEXT.index("| user | may |") :].split("\n\n")[0]
    assert set(re.findall(r"(?m)^\| `([a-z]+)`", told)) == users
