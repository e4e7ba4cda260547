"""A configuration file: every option in it, what is wrong named with line and key, what a change of it means."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from headrace import cli
from headrace.config.file import OPTIONS_OF_TABLE, ConfigError, read
from headrace.config.plan import difference, from_file, given_on, routed
from headrace.config.toml_lines import key_lines, line_of
from headrace.option_table import options_of
from headrace.options import Option
from protocol.errors import EX_CONFIG, StartError
from protocol.keys import ROUTING
from protocol.routing.store import decode
from protocol.routing.table import Routing
from tests.headrace.test_cli import SAMPLES

ROOT = Path(__file__).parents[3]
SHORT = '[models.a]\nmodel = "a/b"\n'


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "headrace.toml"
    path.write_text(text)
    return path


def sample(option: Option) -> Any:
    """A value as a file has it: what the command line takes as text, but for what TOML has a type of its own for."""
    if option.choices:
        return option.choices[-1]
    text = SAMPLES[option.kind.__name__]
    return True if option.switch else json.loads(text) if option.kind.__name__ == "json_object" else text


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {toml(v)}" for k, v in value.items()) + "}"
    return ("true" if value else "false") if isinstance(value, bool) else repr(value).replace("'", '"')


def test_every_option_of_serve_can_stand_in_the_file(tmp_path: Path) -> None:
    """And means the same as on the command line."""
    text = ""
    for table, options in OPTIONS_OF_TABLE.items():
        text += {"": "", "models": '[models."org/a"]\n'}.get(table, f"[{table}]\n")
        text += "".join(f"{key} = {toml(sample(option))}\n" for key, option in options.items())
    config = read(written(tmp_path, text))
    seen = config.values | config.models["org/a"]
    for option in options_of("serve"):
        if option.dest in ("config", "served_model_name"):
            continue
        value = sample(option)
        assert seen[option.dest] == (value if isinstance(value, bool | dict) else option.kind(str(value))), option.flag


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("port = 1\n" + SHORT, r":1: port: it belongs in \[gateway\]"),
        ("[gateway]\n\nprot = 1\n" + SHORT, r":3: gateway.prot: there is no such key, did you mean port\?"),
        ("[gateway]\nport = 70000\n" + SHORT, r":2: gateway.port: '70000' is no port number"),
        ("[gateway]\nport = true\n" + SHORT, r":2: gateway.port: a text or a number is expected"),
        ("strict-durability = 1\n" + SHORT, r":1: strict-durability: true or false is expected"),
        ('[models.a]\nmodel = "a/b"\nworkers = 0\n', r":3: models.a.workers: '0' is less than 1"),
        ('[models.a]\nmodel = "a/b"\nengine = "fast"\n', r":3: models.a.engine: 'fast' is none of torch, simulated"),
        ('[models.a]\nmodel = """\n[models.b]\n"""\n\nworker = 1\n', r":6: models.a.worker: .*did you mean workers\?"),
        ('[models."two words"]\n', r':1: models."two words": a served name must match'),
        ('[defaults]\nport = 1\n' + SHORT, r":2: defaults.port: it belongs in \[gateway\]"),
        (SHORT + 'price = {inputs = 1}\n', r":3: models.a.price.inputs: there is no such key"),
        (SHORT + 'price = {input = "x"}\n', r":3: models.a.price.input: expected `float`, got `str`"),
        (SHORT + "[aliases]\nprod = 'b'\n", r":4: aliases.prod: nothing has the name b"),
        (SHORT + "[aliases]\np = 'q'\nq = {p = 1}\n", r":4: aliases.p: it leads back to itself: p -> q -> p"),
        (SHORT + "[[routes.r.rules]]\nmodels = ['a']\nword = ['x']\n", r":5: routes.r.rules\[1\].word: there is no"),
        (SHORT + "[[routes.r.rules]]\nmodels = ['a']\nhours = '9'\n", r":5: routes.r.rules\[1\].hours: write it as"),
        (SHORT + "[upstreams.u]\nurl = 'x'\n", r":4: upstreams.u.url: an http or https address"),
        (SHORT + "[tenants.t]\nbudget = -1\n", r":4: tenants.t.budget: it is less than 0"),
        ("models = 3\n", r":1: models: a table is expected"),
        ("[gateway]\n", r"no model: a table"),
        ("[models.a\n", r"line 1"),
        ('[models.a]\nmodel = "/nowhere/at/all"\n', r'\[models."a"\]: --model /nowhere/at/all: no such directory'),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_line_and_key(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"headrace\.toml:? ?.*{says}"):
        from_file(written(tmp_path, text), {})


def test_keys_are_found_on_their_lines() -> None:
    text = (
        "a = [1, # ]\n  \"]\",\n]\nb.c = 1\n[t.\"x.y\"]\nd = '''\ne = 1\n'''\nf = {g = 1}\n"
        "[[r]]\nh = 1\n[[r]]\nh = 2\n[[r.s]]\ni = 1\n[r.u]\nj = 1\n"
    )
    tomllib.loads(text)
    lines = key_lines(text)
    assert lines == {
        ("a",): 1, ("b", "c"): 4, ("t", "x.y"): 5, ("t", "x.y", "d"): 6, ("t", "x.y", "f"): 9, ("r", 0): 10,
        ("r", 0, "h"): 11, ("r", 1): 12, ("r", 1, "h"): 13, ("r", 1, "s", 0): 14, ("r", 1, "s", 0, "i"): 15,
        ("r", 1, "u"): 16, ("r", 1, "u", "j"): 17,
    }  # fmt: skip
    assert line_of(lines, ("t", "x.y", "f", "g")) == 9
    assert line_of(lines, ("nowhere",)) is None


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "[gateway]\nport = 1\nhost = '0.0.0.0'\n[defaults]\nworkers = 2\nblock-size = 8\n" + SHORT)
    given = given_on(["--port", "3", "--config", str(path)], {"HEADRACE_PORT": "2", "HEADRACE_BLOCK_SIZE": "32"})
    wanted = from_file(path, given)
    assert (wanted.values["port"], wanted.values["host"], wanted.values["gateways"]) == (3, "0.0.0.0", 1)
    (model,) = wanted.models.values()
    assert (model["served_model_name"], model["workers"], model["block_size"]) == ("a", 2, 32)
    with pytest.raises(StartError, match="--model and --config exclude each other"):
        from_file(path, {"model": "x"})


def test_a_difference_says_what_a_reload_does(tmp_path: Path) -> None:
    before = "[models.a]\nmodel='a/b'\n[models.b]\nmodel='a/b'\n[models.c]\nmodel='a/b'\n"
    after = "[gateway]\nport=1\n[models.a]\nmodel='a/b'\nworkers=2\n[models.b]\nmodel='a/b'\nblock-size=8\n[models.d]\n"
    old = from_file(written(tmp_path, before), {})
    new = from_file(written(tmp_path, after), {})
    assert difference(old, old).lines() == []
    assert difference(old, new).lines() == [
        "d: added", "c: removed", "a: scaled (workers)", "b: restarted (block-size)",
        "gateway.port: needs a restart of serve",
    ]  # fmt: skip


def test_an_alias_that_was_moved_stays_until_the_file_says_something_else() -> None:
    def stating(**aliases: dict[str, int]) -> Routing:
        return Routing(aliases=aliases)

    first = routed(Routing(service="s"), stating(prod={"v1": 1}, old={"v1": 1}))
    assert (first.aliases, first.service) == ({"prod": {"v1": 1}, "old": {"v1": 1}}, "s")
    moved = replace(first, aliases={**first.aliases, "prod": {"v2": 1}, "hand": {"v2": 1}})
    again = routed(moved, stating(prod={"v1": 1}))
    assert again.aliases == {"prod": {"v2": 1}, "hand": {"v2": 1}}
    assert routed(again, stating(prod={"v3": 1})).aliases == {"prod": {"v3": 1}, "hand": {"v2": 1}}


def test_the_example_is_fine(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["config", "check", "--config", str(ROOT / "deploy" / "headrace.toml")]) == 0
    assert "fine: small, large-v2, large-v1" in capsys.readouterr().out
    broken = written(tmp_path, SHORT + "workers = 'two'\n")
    assert cli.main(["config", "check", "--config", str(broken)]) == EX_CONFIG
    assert f"{broken}:3: models.a.workers: 'two' is no whole number" in capsys.readouterr().err


def test_a_table_is_applied_to_gateways_that_no_serve_has_started(
    redis_url: str, raw: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, SHORT + "[aliases]\nprod = 'a'\n")
    assert cli.main(["config", "apply", "--config", str(path), "--redis-url", redis_url]) == 0
    assert "1 aliases, 0 routes" in capsys.readouterr().out
    stored = decode(raw.get(ROUTING))
    assert (stored.aliases, len(stored.service)) == ({"prod": {"a": 1}}, 16)
    assert cli.main(["config", "apply", "--config", str(path)]) == EX_CONFIG
