from __future__ import annotations

import re
import tomllib
from pathlib import Path

import msgspec
import pytest
import yaml

from headrace.config.file import ConfigError
from headrace.config.plan import from_file
from headrace.ray.plan import Fleet, fleet_of, worker_of
from headrace.ray.rule import Scaling
from protocol.errors import StartError

ROOT = Path(__file__).parents[3]
HEAD = 'redis-url = "redis://queue:6379/0"\n'


def fleet(folder: Path, text: str, head: str = HEAD) -> Fleet:
    file = folder / "headrace.toml"
    file.write_text(head + text)
    return fleet_of(from_file(file, {}))


def test_what_a_file_asks_for(tmp_path: Path) -> None:
    found = fleet(tmp_path, """
[gateway]
port = 9000
gateways = 2
[models."org/llama-3.1"]
model = "org/llama-3.1"
schedulers = 2
tensor-parallel-size = 4
[models."org/llama-3.1".ray]
max-workers = 3
cpus = 2
[models.small]
model = "org/small"
device = "cpu"
threads = 6
""")  # fmt: skip
    assert [(g.name, g.values["port"]) for g in found.gateways] == [("gateway-0", 9000), ("gateway-1", 9001)]
    large, small = found.models
    assert [s.values["name"] for s in large.schedulers] == ["scheduler-0", "scheduler-1"]
    assert large.scaling.max_workers == 3
    worker = large.worker(7)
    assert (worker.name, worker.values["name"]) == ("org/llama-3.1 worker-7", "worker-7")
    assert (worker.cpus, worker.gpus, worker.ranks, worker.group) == (2.0, 1.0, 4, worker.name)
    assert worker.values["threads"] == 8
    rank = worker.as_rank(2, "10.0.0.1:7000")
    assert (rank.group, rank.rank, rank.cpus, rank.gpus) == (worker.group, 2, 2.0, 1.0)
    assert rank.values == {"rank": 2, "rendezvous": "10.0.0.1:7000", "log_level": "info", "log_format": "text"}
    one = small.worker(0)
    assert (one.cpus, one.gpus, one.group, one.values["threads"]) == (6.0, 0.0, "", 6)


def test_names_lead_back_to_workers(tmp_path: Path) -> None:
    (model,) = fleet(tmp_path, '[models."a-1.5"]\nmodel = "o/a"\npipeline-parallel-size = 2\n').models
    worker = model.worker(12)
    assert model.number_of(worker.name) == 12
    assert model.number_of(worker.as_rank(1, "h:1").name) is None
    assert model.number_of(model.schedulers[0].name) is None
    assert worker_of(worker.as_rank(1, "h:1").name) == worker_of(worker.name) == worker.name
    assert worker_of("gateway-0") == "gateway-0"


def test_a_server_of_this_machine_alone_will_not_do(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="redis-url is needed"):
        fleet(tmp_path, '[models.a]\nmodel = "o/a"\n', head="")


def test_a_model_of_several_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="a: shards = 2: on Ray a model has one shard"):
        fleet(tmp_path, '[models.a]\nmodel = "o/a"\nshards = 2\n')


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("min-workers = 9", r"headrace.toml:5: models.a.ray.min-workers: 9 is more than max-workers = 8"),
        ("requests-per-worker = 0", r"headrace.toml:5: models.a.ray.requests-per-worker: expected `int` >= 1"),
        ("most-workers = 3", r"headrace.toml:\d: models.a.ray.most-workers: there is no such key"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, line: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        fleet(tmp_path, f'[models.a]\nmodel = "o/a"\n[models.a.ray]\n{line}\n')


def test_the_example_is_one() -> None:
    found = fleet_of(from_file(ROOT / "deploy" / "ray" / "headrace.toml", {}))
    assert [(model.ranks, model.worker(0).gpus) for model in found.models] == [(1, 1.0), (4, 1.0)]
    assert {gateway.values["host"] for gateway in found.gateways} == {"0.0.0.0"}


def test_the_application_that_ray_serve_is_told_of_is_there() -> None:
    (application,) = yaml.safe_load((ROOT / "deploy" / "ray" / "serve.yaml").read_text())["applications"]
    module, name = application["import_path"].split(":")
    assert f"def {name}(" in (ROOT / f"{module.replace('.', '/')}.py").read_text()


def test_the_page_tells_the_defaults() -> None:
    shown = re.search(r'\[models."NAME".ray\]\n(.*?)```', (ROOT / "docs" / "ray.md").read_text(), re.DOTALL)
    assert shown is not None
    told = msgspec.convert(tomllib.loads(shown[1]), Scaling)
    assert msgspec.structs.replace(told, cpus=None, gpus=None) == Scaling()
