from __future__ import annotations

import re

from prometheus_client import generate_latest

from protocol.messages import Plan
from scheduler.core.lifecycle import Counters
from scheduler.core.scheduler import Stats
from scheduler.metrics import MOST_TENANTS, OLD_NAMES, Metrics


def test_a_renamed_metric_is_served_under_both_names():
    metrics = Metrics("m")
    metrics.admission_time.observe(0.2)
    metrics.planned("w0", Plan(epoch=1, gen=1, step=1))
    labels = {"admission_time_seconds": '{model="m"}', "iteration_tokens": '{model="m",worker="w0"}'}
    told = generate_latest(metrics.registry).decode()
    for new, old in OLD_NAMES.items():
        one = re.compile(rf"headrace_{new}(?=_(bucket|sum|count|created)\b)")
        ours = [one.sub(f"headrace_{old}", line) for line in told.splitlines() if one.match(line)]
        assert f"headrace_{new}_count{labels[new]} 1.0" in told
        assert ours
        assert set(ours) <= set(told.splitlines())


def test_tenants_that_wait_have_a_bounded_number_of_series() -> None:
    metrics = Metrics("m")
    tenants = {f"t{k:03}": (k + 1, 1) for k in range(MOST_TENANTS + 20)}
    metrics.observe(Stats(0, 0, 0, 0, tenants, {}, Counters()), 0.0, 0, 0.0)
    (family,) = [f for f in metrics.registry.collect() if f.name == "headrace_waiting_by_tenant"]
    told = {sample.labels["tenant"]: sample.value for sample in family.samples}
    assert len(told) == MOST_TENANTS + 1
    assert told["t069"] == 70
    assert told["other"] == sum(range(1, 21))
