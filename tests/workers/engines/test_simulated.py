"""The simulated engine: deterministic tokens, its model of time, and its refusal of impossible plans."""

from __future__ import annotations

import json
from array import array

import pytest
from transformers import AutoTokenizer

from protocol.errors import StartError
from protocol.messages import NewSequence, Plan, pack_ids
from protocol.sampling import SamplingParams
from protocol.structures.structure import Structure
from tests.models import byte_tokenizer
from workers.engines.simulated import EOS, SimulatedConfig, SimulatedEngine, read_tokenizer


def engine(**fields: object) -> SimulatedEngine:
    made = SimulatedEngine(SimulatedConfig(step_us=0, token_us=0, row_us=0, **fields))  # type: ignore[arg-type]
    made.load(lambda stage, fraction: None)
    return made


def sequence(seat: int, ids: list[int], *, prompt_len: int | None = None, choice: int = 0, **sampling: object):
    return NewSequence(
        seat=seat, rid="r", choice=choice, placement=1, token_ids=pack_ids(ids), prompt_len=prompt_len or len(ids),
        sampling=SamplingParams(max_tokens=100, **sampling), seed=5, cursor=0, block_table=pack_ids(range(4)),
        computed=0,
    )  # fmt: skip


def plan(step: int, rows: dict[int, int], samples: list[int] | None = None, **fields: object) -> Plan:
    return Plan(
        1, 1, step, seats=array("H", rows).tobytes(), counts=pack_ids(rows.values()),
        samples=bytes(samples) if samples is not None else b"", **fields,
    )  # fmt: skip


def test_a_sequence_gives_the_same_tokens_wherever_it_runs_and_however_it_is_cut() -> None:
    alone = engine()
    first = alone.execute(plan(1, {0: 3}, new=[sequence(0, [1, 2, 3])])).wait().tokens.tolist()
    first += [alone.execute(plan(step, {0: 1})).wait().tokens[0].item() for step in (2, 3, 4)]

    crowded = engine()
    news = [sequence(5, [1, 2, 3]), sequence(2, [9], choice=1)]
    crowded.execute(plan(1, {2: 1, 5: 2}, [1, 0], new=news)).wait()
    second = crowded.execute(plan(2, {5: 1, 2: 1})).wait().tokens.tolist()
    assert second[0] == first[0]

    moved = engine()
    rest = moved.execute(plan(1, {1: 5}, new=[sequence(1, [1, 2, 3, *first[:2]], prompt_len=3)])).wait().tokens
    assert rest.tolist() == [first[2]]
    assert all(32 <= token < 127 for token in first)


def test_choices_and_seeds_differ() -> None:
    made = engine()
    news = [sequence(seat, [1, 2, 3], choice=seat) for seat in range(8)]
    tokens = made.execute(plan(1, dict.fromkeys(range(8), 3), new=news)).wait().tokens
    assert len(set(tokens.tolist())) > 1


def test_ends_are_drawn() -> None:
    made = engine(eos_one_in=4)
    news = [sequence(seat, [1], choice=seat) for seat in range(200)]
    tokens = made.execute(plan(1, dict.fromkeys(range(200), 1), new=news)).wait().tokens.tolist()
    assert 20 <= tokens.count(256) <= 90


def test_logprobs_for_those_who_ask() -> None:
    made = engine()
    sampled = made.execute(plan(1, {0: 1, 1: 1}, new=[sequence(0, [1]), sequence(1, [1], logprobs=3)])).wait()
    assert list(sampled.logprobs) == [1]
    logprob, ids, values = sampled.logprobs[1]
    assert len(ids) == len(values) == 3
    assert logprob == values[0]


def test_time_is_that_of_the_model() -> None:
    now = [10.0]
    made = SimulatedEngine(SimulatedConfig(step_us=1000, token_us=100, row_us=10), clock=lambda: now[0])
    output = made.execute(plan(1, {0: 4}, new=[sequence(0, [1, 2, 3, 4])]))
    assert output.ready_at == pytest.approx(10.00141)
    behind = made.execute(plan(2, {0: 1}))
    assert behind.ready_at == pytest.approx(10.00141 + 0.00111)
    before = made.beat()
    now[0] = 11.0
    assert output.wait().exec_us == 1410
    assert made.beat() > before


@pytest.mark.parametrize(
    ("rows", "samples", "message"),
    [
        ({0: 4}, None, "not known"),
        ({0: 2}, [1], "samples before"),
        ({3: 1}, None, "not known"),
    ],
)
def test_impossible_plans_are_refused(rows: dict[int, int], samples: list[int] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine().execute(plan(1, rows, samples, new=[sequence(0, [1, 2, 3])]))


def test_tokens_without_a_block_are_refused_until_a_block_comes() -> None:
    ids = list(range(1, 64))
    made = engine()
    made.execute(plan(1, {0: 63}, new=[sequence(0, ids)]))
    made.execute(plan(2, {0: 1}))
    made.execute(plan(3, {0: 1}, blocks=[(0, pack_ids([9]))]))
    full = engine()
    full.execute(plan(1, {0: 63}, new=[sequence(0, ids)]))
    full.execute(plan(2, {0: 1}))
    with pytest.raises(ValueError, match="no block"):
        full.execute(plan(3, {0: 1}))


def test_a_seat_is_empty_after_frees_ends_and_reset() -> None:
    for leave in ({"frees": [0]}, {"ends": [(0, "abort")]}):
        made = engine()
        made.execute(plan(1, {0: 1}, new=[sequence(0, [1])]))
        made.execute(plan(2, {}, **leave))
        with pytest.raises(ValueError, match="not known"):
            made.execute(plan(3, {0: 1}))
    made = engine()
    made.execute(plan(1, {0: 1}, new=[sequence(0, [1])]))
    made.reset()
    with pytest.raises(ValueError, match="not known"):
        made.execute(plan(2, {0: 1}))


def test_constrained_sequences_keep_their_grammar_and_go_on_the_same_when_moved() -> None:
    schema = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 2, "maxItems": 5}
    structure = Structure(json=schema)
    alone = engine()
    ids = alone.execute(plan(1, {0: 3}, new=[sequence(0, [1, 2, 3], structure=structure)])).wait().tokens.tolist()
    while ids[-1] != EOS:
        ids += alone.execute(plan(len(ids) + 1, {0: 1})).wait().tokens.tolist()
    assert 2 <= len(json.loads(bytes(ids[:-1]))) <= 5
    moved = engine()
    new = sequence(1, [1, 2, 3, *ids[:4]], prompt_len=3, structure=structure)
    rest = moved.execute(plan(1, {1: 7}, new=[new])).wait().tokens.tolist()
    while rest[-1] != EOS:
        rest += moved.execute(plan(len(rest) + 1, {1: 1})).wait().tokens.tolist()
    assert ids[:4] + rest == ids


def test_its_tokenizer_is_what_transformers_reads(tmp_path):
    """With its end token as a string, as an entry with its properties, and with none; and where there is no file."""
    for number, end in enumerate(("<|eos|>", {"content": "<|eos|>", "__type": "AddedToken"}, None)):
        path = tmp_path / str(number)
        byte_tokenizer().save_pretrained(path)
        config = json.loads((path / "tokenizer_config.json").read_text()) | {"eos_token": end}
        (path / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer, size, found = read_tokenizer(str(path))
        theirs = AutoTokenizer.from_pretrained(path)
        assert (size, found) == (len(theirs), theirs.eos_token_id)
        assert tokenizer.decode(range(size)) == theirs.decode(range(size), skip_special_tokens=True)
    with pytest.raises(StartError, match="cannot load the tokenizer"):
        read_tokenizer(str(tmp_path))
    (path / "tokenizer.json").write_text("{}")
    with pytest.raises(StartError, match="cannot load the tokenizer"):
        read_tokenizer(str(path))
