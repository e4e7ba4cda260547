"""deploy/prometheus: each alert has a section in operations.md, fires on what it is for, and on nothing less."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import promql_parser
import pytest
import yaml

from tests.deploy.exported import sample_names
from tests.deploy.promql import metrics_of
from tests.deploy.promtool import promtool

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yml"
RULES = {rule["alert"]: rule for rule in yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]}
M, B, W, G = '{model="m"}', '{model="m",instance="b"}', '{model="m",worker="w0"}', '{instance="g"}'


class Case(NamedTuple):
    """Series in promtool's notation, one value each 15 s, and the labels of the alert that they raise."""

    firing: dict[str, str]
    quiet: dict[str, str]
    labels: dict[str, str] = {"model": "m"}  # noqa: RUF012


def requests(status: int) -> str:
    return f'llm_requests_total{{model="m",status="{status}"}}'


BOTH = {"model": "m", "worker": "w0"}
INSTANCE = {"instance": "g"}
STEP = {f"headrace_step_seconds_count{W}": "0+10x80", f"headrace_step_seconds_sum{W}": "0+1x80"}  # 0.1 s each
CASES = {
    "HeadraceNoLeader": Case(
        {f"headrace_is_leader{M}": "0x80"},
        {f"headrace_is_leader{B}": "1x80", f"headrace_is_leader{M}": "0x80"}
    ),
    "HeadraceTwoLeaders": Case(
        {f"headrace_is_leader{B}": "1x80", f"headrace_is_leader{M}": "1x80"},
        {f"headrace_is_leader{B}": "0x80", f"headrace_is_leader{M}": "1x80"},
    ),
    "HeadraceNoWorkers": Case(
        {f"headrace_ready_workers{M}": "0x80", f"headrace_is_leader{M}": "1x80"},
        {f"headrace_ready_workers{B}": "0x80", f"headrace_ready_workers{M}": "1x80"},
    ),
    "HeadraceTargetDown": Case(
        {'up{job="headrace-worker"}': "0x80"}, {'up{job="node"}': "0x80", 'up{job="headrace-worker"}': "1x80"},
        {"job": "headrace-worker"},
    ),
    "HeadraceTakeover": Case({f"headrace_takeovers_total{M}": "0x40 1x40"}, {f"headrace_takeovers_total{M}": "1x80"}),
    "HeadraceWorkerDied": Case(
        {f"headrace_worker_deaths_total{M}": "0x40 1x40"}, {f"headrace_worker_deaths_total{M}": "3x80"}
    ),
    "HeadraceWorkerReplaced": Case(
        {f"headrace_worker_fenced_total{W}": "0x40 1x40"}, {f"headrace_worker_fenced_total{W}": "1x80"}, BOTH
    ),
    "HeadraceRowsRefused": Case(
        {f"headrace_refused_rows_total{W}": "0+30x80"}, {f"headrace_refused_rows_total{W}": "0+3x80"}, BOTH
    ),
    "HeadraceInbox": Case({f"headrace_inbox_length{M}": "1001x80"}, {f"headrace_inbox_length{M}": "1000x80"}),
    "HeadraceWaiting": Case(
        {f"headrace_oldest_waiting_seconds{M}": "31x80"}, {f"headrace_oldest_waiting_seconds{M}": "29x80"}
    ),
    "HeadraceKvFull": Case(
        {f"headrace_kv_cache_usage_perc{W}": "0.97x80", f"headrace_num_preemptions_total{M}": "0+3x80"},
        {f"headrace_kv_cache_usage_perc{W}": "0.97x80", f"headrace_num_preemptions_total{M}": "5x80"},
    ),
    "HeadraceServerMemory": Case(
        {f"headrace_server_memory_bytes{M}": "91x80", f"headrace_server_max_memory_bytes{M}": "100x80"},
        {f"headrace_server_memory_bytes{M}": "91x80", f"headrace_server_max_memory_bytes{M}": "0x80"},
    ),
    "HeadraceServerLog": Case(
        {f"headrace_server_log_seconds_total{M}": "0+12x80"}, {f"headrace_server_log_seconds_total{M}": "0+9x80"}
    ),
    "HeadraceCommitSlow": Case(
        {f"headrace_commit_seconds_count{W}": "0+10x80", f"headrace_commit_seconds_sum{W}": "0+1.5x80", **STEP},
        {f"headrace_commit_seconds_count{W}": "0+10x80", f"headrace_commit_seconds_sum{W}": "0+0.5x80", **STEP},
        BOTH,
    ),
    "HeadraceDeviceIdle": Case(
        {f"headrace_device_idle_seconds_total{W}": "0+6x80", f"headrace_num_requests_waiting{M}": "3x80"},
        {f"headrace_device_idle_seconds_total{W}": "0+6x80", f"headrace_num_requests_waiting{M}": "0x80"},
        BOTH,
    ),
    "HeadraceMaskWaits": Case(
        {f"headrace_mask_wait_seconds_total{W}": "0+0.2x80", **STEP},
        {f"headrace_mask_wait_seconds_total{W}": "0+0.05x80", **STEP},
        BOTH,
    ),
    "HeadracePublicationsLost": Case(
        {f"headrace_stream_resyncs_total{G}": "0+30x80"}, {f"headrace_stream_resyncs_total{G}": "0+1x80"}, INSTANCE
    ),
    "HeadraceReadersDropped": Case(
        {f"headrace_readers_dropped_total{G}": "0+1x80"}, {f"headrace_readers_dropped_total{G}": "0x70 3x10"}, INSTANCE
    ),
    "HeadraceErrors": Case(
        {requests(503): "0+1x80", requests(200): "0+9x80"},
        {requests(400): "0+1x80", requests(200): "0+9x80"},
    ),
    "HeadraceOverloaded": Case(
        {requests(429): "0+1x80", requests(200): "0+9x80"},
        {requests(429): "0+1x80", requests(200): "0+99x80"},
    ),
    "HeadraceKeysRefused": Case(
        {'headrace_gateway_errors_total{instance="g",status="401",code="invalid_api_key"}': "0+30x80"},
        {'headrace_gateway_errors_total{instance="g",status="404",code="model_not_found"}': "0+30x80"},
        INSTANCE,
    ),
    "HeadraceSpecialTokensRefused": Case(
        {f"headrace_special_tokens_refused_total{M}": "0+1x80"}, {f"headrace_special_tokens_refused_total{M}": "7x80"}
    ),
}  # fmt: skip


def test_every_alert_has_a_section_and_a_case() -> None:
    operations = (ROOT / "docs" / "operations.md").read_text()
    assert RULES.keys() == CASES.keys()
    for name, rule in RULES.items():
        assert f"\n### {name}\n" in operations, name
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{name.lower()}"
        assert rule["labels"]["severity"] in ("warning", "critical")


@pytest.mark.parametrize("name", RULES)
def test_its_metrics_exist(name: str) -> None:
    found = metrics_of(promql_parser.parse(RULES[name]["expr"]))
    assert found
    assert found <= sample_names() | {"up"}


def test_prometheus_takes_the_files() -> None:
    ran = subprocess.run(
        [promtool(), "check", "config", str(ALERTS.with_name("prometheus.yml"))], capture_output=True, timeout=60
    )
    assert ran.returncode == 0, ran.stderr.decode()


def alert_test(name: str, series: dict[str, str], raised: list[dict[str, str]]) -> dict[str, Any]:
    rule = RULES[name]
    alerts = [{"exp_labels": {**rule["labels"], **labels}, "exp_annotations": rule["annotations"]} for labels in raised]
    return {
        "interval": "15s",
        "input_series": [{"series": one, "values": values} for one, values in series.items()],
        "alert_rule_test": [{"eval_time": "19m", "alertname": name, "exp_alerts": alerts}],
    }


def test_each_fires_on_its_fault_and_not_otherwise(tmp_path: Path) -> None:
    tests = []
    for name, case in CASES.items():
        tests += [alert_test(name, case.firing, [case.labels]), alert_test(name, case.quiet, [])]
    no_scheduler_at_all = {f"headrace_ready_workers{M}": "1x80"}
    tests.append(alert_test("HeadraceNoLeader", no_scheduler_at_all, [{"model": "m"}]))
    path = tmp_path / "alerts_test.yml"
    path.write_text(yaml.safe_dump({"rule_files": [str(ALERTS)], "tests": tests}))
    ran = subprocess.run([promtool(), "test", "rules", str(path)], capture_output=True, timeout=60)
    assert ran.returncode == 0, (ran.stdout + ran.stderr).decode()
