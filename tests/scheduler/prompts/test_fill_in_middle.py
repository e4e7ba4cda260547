"""A prompt with a suffix: the model's own control tokens around texts that are encoded as they are."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from protocol.errors import ContextLengthExceeded, InvalidRequest
from protocol.messages import Job
from protocol.sampling import SamplingParams
from scheduler.prompts.fill_in_middle import FORMS, PREFIX, SUFFIX, FillInMiddle
from scheduler.prompts.tokenization import Prompts
from tests.models import EOS, VOCAB, byte_tokenizer


def tokenizer_with(tokens: list[str]) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer().backend_tokenizer.__class__.from_str(
            byte_tokenizer().backend_tokenizer.to_str()
        ),
        eos_token="<|eos|>",
    )
    made.add_tokens(tokens, special_tokens=True)
    return made


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form[0])
def test_each_form_is_found_by_its_tokens(form: tuple[str, ...]) -> None:
    controls = [part for part in form if part not in (PREFIX, SUFFIX)]
    tokenizer = tokenizer_with(controls)
    prompts = Prompts(tokenizer, VOCAB + len(controls), 64, [EOS])
    (ids,) = prompts.ids(Job(prompt="a b", suffix="é<|eos|>", sampling=SamplingParams(max_tokens=4)))
    texts = {PREFIX: list(b"a b"), SUFFIX: [*"é".encode(), EOS]}  # texts of completions are raw
    expected = [token for part in form for token in texts.get(part) or [tokenizer.convert_tokens_to_ids(part)]]
    assert list(ids) == expected


def test_without_its_tokens_a_suffix_is_refused_by_name() -> None:
    prompts = Prompts(byte_tokenizer(), VOCAB, 64, [EOS])
    with pytest.raises(InvalidRequest) as refused:
        prompts.ids(Job(prompt="a", suffix="b"))
    assert (refused.value.param, refused.value.wire_code) == ("suffix", "unsupported_parameter")
    controls = [part for part in FORMS[0] if part not in (PREFIX, SUFFIX)]
    assert FillInMiddle.of(tokenizer_with(controls), VOCAB) is None, "the model has no embeddings for them"


def test_bounds_count_both_parts() -> None:
    controls = [part for part in FORMS[0] if part not in (PREFIX, SUFFIX)]
    prompts = Prompts(tokenizer_with(controls), VOCAB + 3, 64, [EOS])
    with pytest.raises(ContextLengthExceeded):
        prompts.ids(Job(prompt="a" * 40, suffix="b" * 40))
    for job in (Job(prompt=[5], suffix="b"), Job(messages=[{"role": "user", "content": "x"}], suffix="b")):
        with pytest.raises(InvalidRequest) as refused:
            prompts.ids(job)
        assert refused.value.param == "suffix"
