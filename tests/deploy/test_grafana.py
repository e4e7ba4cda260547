"""deploy/grafana: every query of the dashboard is PromQL, and asks for metrics and labels that the roles export."""

from __future__ import annotations

import json
import re
from pathlib import Path

import promql_parser
import pytest
import yaml

from tests.deploy.exported import sample_names
from tests.deploy.promql import metrics_of

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "overview.json").read_text())
PANELS = {panel["title"]: panel for panel in DASHBOARD["panels"]}
EXPRESSIONS = [target["expr"] for panel in PANELS.values() for target in panel["targets"]]


def test_the_four_panels_that_people_know_come_first() -> None:
    top = [panel["title"] for panel in DASHBOARD["panels"] if panel["gridPos"]["y"] == 0]
    assert top == ["Requests per second", "P95 latency", "Error rate", "Active requests"]


def test_panels_have_titles_of_their_own_and_do_not_overlap() -> None:
    assert len(PANELS) == len(DASHBOARD["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_a_query_asks_for_what_is_exported(expression: str) -> None:
    """Grafana puts its variables in before Prometheus sees the query."""
    query = expression.replace("$__rate_interval", "1m").replace("$model", ".*")
    assert "$" not in query
    found = metrics_of(promql_parser.parse(query))
    assert found
    assert found <= sample_names()


def test_its_variables_exist() -> None:
    names = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z]\w*)", json.dumps(DASHBOARD["panels"])))
    assert used == names
    (asked,) = [v["query"]["query"] for v in DASHBOARD["templating"]["list"] if v["type"] == "query"]
    assert re.findall(r"label_values\((\w+), (\w+)\)", asked) == [("llm_active_requests", "model")]


def test_compose_mounts_what_is_there_and_scrapes_its_services() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    for name in ("prometheus", "grafana"):
        assert services[name]["profiles"] == ["metrics"]
        for volume in services[name]["volumes"]:
            assert (ROOT / volume.split(":")[0]).exists(), volume
    scraped = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    listed = [target for job in scraped for one in job.get("static_configs", ()) for target in one["targets"]]
    found = [name for job in scraped for one in job.get("dns_sd_configs", ()) for name in one["names"]]
    assert {target.split(":")[0] for target in (*listed, *found)} == {
        name for name in services if name.split("-")[0] in ("gateway", "scheduler", "worker")
    }
