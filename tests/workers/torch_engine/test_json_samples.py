"""Random samples of every schema through the real core and engine: nine in ten end by themselves, and all of those
validate by another implementation. Nightly: five of each, on the demo model's tokens too."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from transformers import AutoTokenizer

from protocol.sampling import SamplingParams
from protocol.structures.structure import Structure
from tests.models import tiny_model
from tests.protocol.json_schemas import schemas
from tests.workers.core_driver import CoreDriver
from tests.workers.plan_maker import Sequence
from workers.torch_engine.config import EngineConfig
from workers.torch_engine.make import make_engine

MAX_TOKENS = 384
DEMO = "examples/demo-model"


def sample(path: str, each: int) -> tuple[int, int, list[str]]:
    """(samples, those that ended by themselves, what is wrong with any of these)."""
    engine: Any = make_engine(
        EngineConfig(
            model=path, dtype="float32", device="cpu", max_model_len=512, max_num_seqs=64, max_num_batched_tokens=512,
            block_size=16, kv_cache_memory=1 << 28,
        )
    )  # fmt: skip
    capacity = engine.load(lambda stage, fraction: None)
    ends = frozenset(engine.eos_token_ids)
    rng, wanted = random.Random(0), []
    for name, schema in schemas():
        for number in range(each):
            prompt = [rng.randrange(200) for _ in range(4)]
            params = SamplingParams(
                max_tokens=MAX_TOKENS, temperature=(1.0, 0.7, 1.5)[number % 3], top_p=(1.0, 0.95)[number % 2],
                structure=Structure(json=schema),
            )  # fmt: skip
            wanted.append((name, schema, Sequence(prompt, params, seed=rng.randrange(1 << 30), end_ids=ends)))
    CoreDriver(engine, capacity, capacity.pools[0].units, budget=512).run([one for *_, one in wanted])
    tokenizer = AutoTokenizer.from_pretrained(path)
    wrong, ended = [], 0
    for name, schema, sequence in wanted:
        if sequence.output[-1] not in ends:
            continue
        ended += 1
        text = tokenizer.decode(sequence.output[:-1], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        try:
            value = json.loads(text)
            Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER).validate(value)
        except Exception as error:
            wrong.append(f"{name}: {text[:200]!r}: {str(error)[:200]}")
    return len(wanted), ended, wrong


def check(found: tuple[int, int, list[str]]) -> None:
    samples, ended, wrong = found
    assert not wrong
    assert ended >= 0.9 * samples, f"{ended} of {samples} ended by themselves"


def test_a_sample_of_each_schema_validates(tmp_path_factory: pytest.TempPathFactory) -> None:
    check(sample(str(tiny_model(tmp_path_factory, "llama")), 1))


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("model", ["tiny", DEMO])
def test_five_samples_of_each_schema_validate(tmp_path_factory: pytest.TempPathFactory, model: str) -> None:
    check(sample(str(tiny_model(tmp_path_factory, "llama")) if model == "tiny" else model, 5))
