from __future__ import annotations

from prometheus_client import generate_latest

from scheduler.metrics import OLD_NAMES, Metrics


def test_a_renamed_metric_is_served_under_both_names():
    metrics = Metrics("m")
    metrics.admission_time.observe(0.2)
    told = generate_latest(metrics.registry).decode()
    for new, old in OLD_NAMES.items():
        ours = [line.replace(new, old) for line in told.splitlines() if line.startswith(f"headrace_{new}")]
        assert f'headrace_{new}_count{{model="m"}} 1.0' in told
        assert ours
        assert set(ours) <= set(told.splitlines())
