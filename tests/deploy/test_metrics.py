"""docs/metrics.md says what the roles export: every name, kind, role and label, and nothing else."""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from scheduler.core.lifecycle import Counters
from scheduler.core.scheduler import Stats
from scheduler.metrics import OLD_NAMES
from tests.deploy.exported import MODEL, WORKER, expositions, registries, scheduler_metrics
from tests.deploy.promtool import promtool

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"\| `(\w+)` \| (\w+) \| (\w+) \| ([\w, ]*)\|")
ROLES = ("gateway", "scheduler", "worker")
NOT_OF_A_TABLE = {"le"}


def documented() -> dict[tuple[str, str], tuple[str, frozenset[str]]]:
    """(role, name) -> (kind, labels)."""
    rows = {}
    for name, kind, of, labels in ROW.findall((ROOT / "docs" / "metrics.md").read_text()):
        for role in ROLES if of == "all" else (of,):
            assert (role, name) not in rows, f"{name} has two rows"
            rows[role, name] = kind, frozenset(re.findall(r"\w+", labels))
    return rows


def exported(role: str, registry: CollectorRegistry) -> dict[tuple[str, str], tuple[str, frozenset[str]]]:
    suffix = {"counter": "_total", "info": "_info"}
    found = {}
    for family in registry.collect():
        labels = {label for sample in family.samples for label in sample.labels} - NOT_OF_A_TABLE
        found[role, family.name + suffix.get(family.type, "")] = family.type, frozenset(labels)
    return found


def test_the_table_is_what_the_roles_export() -> None:
    told = documented()
    real = {key: value for role, registry in registries().items() for key, value in exported(role, registry).items()}
    assert len(told) > 60
    assert told.keys() - real.keys() == set(), "documented, not exported"
    assert real.keys() - told.keys() == set(), "exported, not documented"
    assert {key: real[key] for key in told if told[key] != real[key]} == {}


def test_no_two_roles_export_the_same_figure() -> None:
    """A sum over jobs would count it twice."""
    roles = defaultdict(set)
    for role, name in documented():
        roles[name].add(role)
    shared = {name for name, of in roles.items() if len(of) > 1}
    assert {name for name in shared if not name.startswith(("process_", "python_"))} == {"headrace_build_info"}


@pytest.mark.parametrize("role", ROLES)
def test_promtool_finds_no_fault(role: str) -> None:
    """But for names that are leaving."""
    ran = subprocess.run([promtool(), "check", "metrics"], input=expositions()[role], capture_output=True, timeout=60)
    faults = [line for line in ran.stdout.decode().splitlines() + ran.stderr.decode().splitlines() if line]
    leaving = {f"headrace_{name}" for name in OLD_NAMES.values()}
    assert [fault for fault in faults if fault.split()[0] not in leaving] == []


def test_a_worker_that_has_gone_takes_its_series_along() -> None:
    metrics = scheduler_metrics()

    def workers() -> set[str]:
        families = text_string_to_metric_families(generate_latest(metrics.registry).decode())
        return {s.labels["worker"] for family in families for s in family.samples if "worker" in s.labels}

    assert workers() == {WORKER}
    metrics.observe(Stats(0, 0, 0, 0, {}, {}, Counters()), 0.0, 0, 0.0)
    assert workers() == set()


@pytest.mark.parametrize(("silent", "count"), [(False, 0.0), (True, 1.0)])
def test_a_takeover_is_one_only_from_a_silent_leader(silent: bool, count: float) -> None:
    metrics = scheduler_metrics()
    metrics.leads(2, silent)
    labels = {"model": MODEL}
    assert metrics.registry.get_sample_value("headrace_takeovers_total", labels) == count
    assert metrics.registry.get_sample_value("headrace_is_leader", labels) == 1.0
