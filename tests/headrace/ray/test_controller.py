"""What the controller asks of a cluster, with one that is only a table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from headrace.ray.controller import Control
from headrace.ray.plan import Program
from headrace.ray.process import State
from tests.headrace.ray.test_plan import fleet

FILE = """
[gateway]
gateways = 2
[models.a]
model = "o/a"
schedulers = 2
[models.a.ray]
max-workers = 4
requests-per-worker = 10
scale-down-after = 5
step-down-every = 2
"""
SERVICES = ["a scheduler-0", "a scheduler-1", "gateway-0", "gateway-1"]


class Table:
    """Actors that answer at once; those told to drain leave when `let_go` is called."""

    def __init__(self) -> None:
        self.programs: dict[str, Program] = {}
        self.states: dict[str, State | None] = {}
        self.draining: set[str] = set()
        self.doomed: set[str] = set()
        self.groups: list[str] = []
        self.node = "n1"

    def start(self, program: Program) -> None:
        assert program.name not in self.programs
        self.programs[program.name] = program
        address = program.values.get("rendezvous") or (f"{self.node}:7000" if program.ranks > 1 else "")
        self.states[program.name] = State(self.node, self.node, 1, False, "", None, None, address, None)

    def look(self) -> dict[str, State | None]:
        return dict(self.states)

    def leaving(self) -> set[str]:
        return set(self.draining)

    def drain(self, name: str) -> None:
        assert name in self.states
        self.draining.add(name)

    def kill(self, name: str) -> None:
        del self.states[name], self.programs[name]

    def forget_group(self, name: str) -> None:
        self.groups.append(name)

    def doomed_nodes(self) -> set[str]:
        return self.doomed

    def let_go(self) -> list[str]:
        gone = sorted(self.draining)
        self.draining.clear()
        for name in gone:
            self.kill(name)
        return gone

    def demand(self, count: int | None) -> None:
        state = self.states["a scheduler-0"]
        assert state is not None
        self.states["a scheduler-0"] = replace(state, demand=count)

    @property
    def workers(self) -> list[str]:
        return [name for name in sorted(self.states) if "worker" in name and name not in self.draining]


@pytest.fixture
def table() -> Table:
    return Table()


@pytest.fixture
def control(table: Table, tmp_path: Path) -> Control:
    return Control(fleet(tmp_path, FILE), table)


def test_services_come_first_and_workers_follow_the_demand(table: Table, control: Control) -> None:
    control.tick(0)
    assert sorted(table.states) == sorted([*SERVICES, "a worker-0"])
    table.demand(35)
    control.tick(1)
    assert table.workers == [f"a worker-{k}" for k in range(4)]
    table.demand(0)
    for now in range(2, 30):
        control.tick(now)
        table.let_go()
    assert table.workers == ["a worker-0"]


def test_the_highest_number_goes_and_the_lowest_free_one_comes(table: Table, control: Control) -> None:
    control.tick(0)
    table.demand(25)
    control.tick(1)
    table.demand(15)
    for now in range(2, 9):
        control.tick(now)
    assert table.draining == {"a worker-2"}
    table.demand(35)
    control.tick(10)
    assert table.workers == ["a worker-0", "a worker-1", "a worker-3", "a worker-4"]


def test_what_has_gone_is_started_again(table: Table, control: Control) -> None:
    control.tick(0)
    table.kill("a scheduler-1")
    control.tick(1)
    assert "a scheduler-1" in table.states


def test_while_no_scheduler_answers_the_number_stays(table: Table, control: Control) -> None:
    control.tick(0)
    table.demand(25)
    control.tick(1)
    table.states["a scheduler-0"] = None
    for now in range(2, 50):
        control.tick(now)
    assert len(table.workers) == 3
    assert control.demand == {"a": None}


def test_a_node_that_will_go_is_left_and_replaced_at_once(table: Table, control: Control) -> None:
    control.tick(0)
    table.node, table.doomed = "n2", {"n1"}
    control.tick(1)
    assert table.workers == ["a worker-1"]
    assert table.let_go() == sorted([*SERVICES, "a worker-0"])
    control.tick(2)
    assert sorted(table.states) == sorted([*SERVICES, "a worker-1"])
    assert {state.node for state in table.states.values() if state} == {"n2"}


RANKS = '[models.a]\nmodel = "o/a"\ntensor-parallel-size = 2\npipeline-parallel-size = 2\n'


def test_ranks_follow_their_worker(table: Table, tmp_path: Path) -> None:
    control = Control(fleet(tmp_path, RANKS), table)
    control.tick(0)
    control.tick(1)
    ranks = [f"a worker-0.{rank}" for rank in (1, 2, 3)]
    assert table.workers == ["a worker-0", *ranks]
    state = table.states["a worker-0"]
    assert state is not None
    table.states["a worker-0"] = replace(state, rendezvous="n2:7001")  # it was started again elsewhere
    control.tick(2)
    control.tick(3)
    assert {table.programs[name].values["rendezvous"] for name in ranks} == {"n2:7001"}
    table.kill("a worker-0")
    control.tick(4)  # a new one takes its name, when all of the old one has gone
    assert (table.workers, table.groups) == (["a worker-0"], ["a worker-0"])
    control.tick(5)
    assert table.workers == ["a worker-0", *ranks]


def test_a_worker_leaves_whole_when_the_node_of_one_rank_goes(table: Table, tmp_path: Path) -> None:
    control = Control(fleet(tmp_path, RANKS), table)
    control.tick(0)
    table.node = "n2"
    control.tick(1)
    table.node, table.doomed = "n3", {"n2"}
    control.tick(2)
    assert table.draining == {"a worker-0"}
    table.let_go()
    control.tick(3)
    assert table.groups == ["a worker-0"]
    assert [name for name in table.states if "worker-0" in name] == []


def test_the_end_drains_gateways_then_workers_then_schedulers(table: Table, control: Control) -> None:
    control.tick(0)
    control.ending = True
    order = []
    for now in range(1, 5):
        control.tick(now)
        order.append(table.let_go())
    assert order == [["gateway-0", "gateway-1"], ["a worker-0"], ["a scheduler-0", "a scheduler-1"], []]
    assert table.states == {}
