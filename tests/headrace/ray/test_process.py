"""An actor's process, without Ray: started, asked, drained, and what is said of one that cannot start."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from headrace.option_table import options_of
from headrace.ray import process
from headrace.ray.plan import Program
from headrace.ray.process import Process, State, demand_in

HERE = ("node-1", "127.0.0.1")


def program(role: str, **own: Any) -> Program:
    values = {option.dest: option.default for option in options_of(role)}
    return Program(f"m {role}-0", role, {**values, "name": f"{role}-0", **own})


@pytest.fixture
def started() -> Iterator[Callable[[Program, str], Process]]:
    kept: list[Process] = []

    def start(what: Program, redis_url: str) -> Process:
        kept.append(Process(what, redis_url, HERE))
        return kept[-1]

    yield start
    for one in kept:
        one.drain(0.0)


def until(one: Process, holds: Callable[[State], object]) -> State:
    deadline = time.monotonic() + 120
    while not holds(state := one.state()):
        assert time.monotonic() < deadline, state
        time.sleep(0.1)
    return state


def test_a_scheduler_tells_its_demand_and_leaves(
    started: Callable[..., Process], redis_url: str, model_dir: Path
) -> None:
    one = started(program("scheduler", model=str(model_dir), served_model_name="on-ray"), redis_url)
    state = until(one, lambda state: state.demand is not None)
    assert (state.node, state.address, state.demand, state.failed, state.leaving) == (*HERE, 0, "", False)
    assert Path(f"/proc/{state.pid}").exists()
    one.drain(10.0)
    state = one.state()
    assert (state.pid, state.leaving, state.demand) == (None, True, None)


def test_a_gateway_gets_a_free_port(started: Callable[..., Process], redis_url: str) -> None:
    state = started(program("gateway", port=0), redis_url).state()
    assert state.port
    assert state.port != state.metrics_port


def test_a_configuration_that_cannot_work_is_not_tried_again(started: Callable[..., Process], redis_url: str) -> None:
    missing = program("scheduler", model="/there/is/no/model", served_model_name="x")
    assert "/there/is/no/model" in until(started(missing, redis_url), lambda state: state.failed).failed


def test_the_first_rank_says_where_it_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(*_: object) -> None:
        pass

    monkeypatch.setattr(process.Process, "_start", nothing)
    what = program("worker", tensor_parallel_size=2)
    first = Process(Program(what.name, "worker", what.values, ranks=2), "redis://x", HERE)
    assert first._values["rendezvous"].startswith("127.0.0.1:")
    assert first._values["local_ranks"] == 1


def test_only_a_leader_knows_the_demand() -> None:
    text = (
        '# TYPE headrace_is_leader gauge\nheadrace_is_leader{model="m"} %d.0\n'
        'headrace_num_requests_waiting{model="m"} 3.0\nheadrace_num_requests_running{model="m"} 4.0\n'
        'headrace_inbox_length{model="m"} 5.0\n'
    )
    assert demand_in(text % 1) == 12
    assert demand_in(text % 0) is None
