"""What answers are counted under."""

from __future__ import annotations

from gateway.metrics import REGISTRY
from gateway.models import Models
from gateway.routing.money import MOST_TENANTS, Money
from protocol.bus import HomeBus
from protocol.routing.table import Price, Routing, Terms

MODEL = "counted/model"


async def test_tenants_have_a_bounded_number_of_series() -> None:
    home = HomeBus("unix:///none")
    models = Models("unix:///none", "g", home)
    models.routing = Routing(models={MODEL: Terms(price=Price(input=1e6, output=2e6))})
    money = Money(models, home)
    for number in range(MOST_TENANTS + 30):
        assert money.count(MODEL, f"tenant-{number}", "", "", 1, 2) == 5
    assert money.count("without/price", "tenant-0", "", "", 1, 2) is None
    (family,) = [f for f in REGISTRY.collect() if f.name == "headrace_routed_requests"]
    told = {s.labels["tenant"]: s.value for s in family.samples if s.labels["model"] == MODEL and "total" in s.name}
    assert len(told) == MOST_TENANTS + 1
    assert told["other"] == 30
    cost = {"model": MODEL, "tenant": "other", "rule": ""}
    assert REGISTRY.get_sample_value("headrace_cost_total", cost) == 150
    await models.close()
    await home.close()
