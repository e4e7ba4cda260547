"""Prompts and logprobs over the whole stack: what goes into a prompt, what is told of its tokens and of those drawn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from headrace import Client
from headrace.serve.embedded import server_url
from protocol.errors import RequestError
from protocol.sampling import SamplingParams
from tests.stack import Stack

MODEL = "demo"
TOKENIZER = AutoTokenizer.from_pretrained("examples/demo-model")


@pytest.fixture
def queue(stack: Stack) -> Iterator[Client]:
    with Client(server_url(stack.run_dir / "data")) as made:
        yield made


def complete(client: openai.OpenAI, prompt: Any = "def add(a, b):", **fields: Any) -> Any:
    extra = {name: fields.pop(name) for name in list(fields) if name in EXTRA}
    ask = {"model": MODEL, "prompt": prompt, "max_tokens": 12, "temperature": 0, **fields}
    return client.completions.create(**ask, extra_body=extra)


EXTRA = ("bad_words", "logprob_token_ids", "truncate_prompt_tokens", "return_token_ids", "allowed_token_ids",
         "prompt_logprobs", "add_special_tokens")  # fmt: skip


def test_bad_words_are_not_drawn_and_what_leaves_nothing_says_so(client: openai.OpenAI, queue: Client) -> None:
    free = complete(client, return_token_ids=True).choices[0].token_ids
    first = next([one] for one in free if TOKENIZER.encode(TOKENIZER.decode([one]), add_special_tokens=False) == [one])
    name = TOKENIZER.decode(first)
    kept = complete(client, return_token_ids=True, bad_words=[name]).choices[0].token_ids
    assert first[0] in free
    assert first[0] not in kept
    with pytest.raises(openai.BadRequestError) as refused:
        complete(client, bad_words=[name], allowed_token_ids=first)
    assert refused.value.code == "no_token_left"
    sampling = SamplingParams(max_tokens=3, bad_words=[name], allowed_token_ids=first)
    error = queue.result(queue.submit(prompt="a", sampling_params=sampling)).choices[0].error
    assert isinstance(error, RequestError)
    assert error.wire_code == "no_token_left"


def test_logprobs_of_named_ids(client: openai.OpenAI) -> None:
    (top,) = complete(client, logprobs=3, max_tokens=1).choices[0].logprobs.top_logprobs
    ids = [TOKENIZER.encode(text, add_special_tokens=False)[0] for text in ("a", "z")]
    (named,) = complete(client, logprobs=3, max_tokens=1, logprob_token_ids=ids).choices[0].logprobs.top_logprobs
    assert top.items() <= named.items()
    assert set(named) == set(top) | {TOKENIZER.decode([one]) for one in ids}


def test_a_prompt_cut_and_a_message_continued(client: openai.OpenAI, queue: Client) -> None:
    cut = complete(client, "one two three", truncate_prompt_tokens=2, return_token_ids=True).choices[0]
    assert cut.prompt_token_ids == TOKENIZER.encode("one two three")[-2:]
    chat = [{"role": "user", "content": "Count to four."}, {"role": "assistant", "content": "one, two,"}]
    extra = {"continue_final_message": True, "return_token_ids": True}
    answer = client.chat.completions.create(model=MODEL, messages=chat, max_tokens=3, extra_body=extra)
    expected = TOKENIZER.apply_chat_template(chat, continue_final_message=True, return_dict=False)
    assert answer.prompt_token_ids == expected
    pushed = queue.submit(messages=chat, continue_final_message=True, max_tokens=3)
    assert queue.result(pushed).prompt_token_ids == expected


# ------------------------------------------------------------------ logprobs of the prompt

TEXT = "def add(a, b):\n    return a + b\n\n\nclass Tree:\n"


@pytest.fixture(scope="module")
def own() -> Any:
    """(ids) -> logprobs [positions, vocabulary], as the model itself has them."""
    model = AutoModelForCausalLM.from_pretrained("examples/demo-model", dtype=torch.float32).eval()

    @torch.inference_mode()
    def logprobs(ids: list[int]) -> torch.Tensor:
        return torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)

    return logprobs


def check_echoed(choice: Any, ids: list[int], own: Any) -> None:
    """Lists of completions: the prompt's tokens ``ids``, then those drawn."""
    found, table = choice.logprobs, own(ids)
    assert found.token_logprobs[0] is None
    assert found.top_logprobs[0] is None
    assert found.tokens[: len(ids)] == [TOKENIZER.decode([one]) for one in ids]
    expected = [float(table[at, ids[at + 1]]) for at in range(len(ids) - 1)]
    assert found.token_logprobs[1 : len(ids)] == pytest.approx(expected, abs=1e-4)
    for at, top in enumerate(found.top_logprobs[1 : len(ids)]):
        assert max(top.values()) == pytest.approx(float(table[at].max()), abs=1e-4)
        assert found.tokens[at + 1] in top
    bos = len(TOKENIZER.decode(ids)) if not choice.text.startswith(TOKENIZER.decode(ids)) else 0
    bos -= len(TOKENIZER.decode(ids, skip_special_tokens=True)) if bos else 0  # it takes no place in the text
    offsets = [max(0, len(TOKENIZER.decode(ids[:at])) - bos) for at in range(len(ids))]
    assert found.text_offset[: len(ids)] == offsets


def test_echo_with_logprobs_whole_streamed_and_twice(client: openai.OpenAI, own: Any) -> None:
    """The second time the prompt is in the prefix cache, which has no logprobs."""
    ids = TOKENIZER.encode(TEXT)
    for _ in range(2):
        whole = complete(client, [TEXT, "import os"], echo=True, logprobs=2, max_tokens=2)
        for choice, text in zip(whole.choices, (TEXT, "import os"), strict=True):
            assert choice.text.startswith(text)
            assert len(choice.logprobs.tokens) == len(TOKENIZER.encode(text)) + 2
            check_echoed(choice, TOKENIZER.encode(text), own)
    pieces = list(complete(client, TEXT, echo=True, logprobs=2, max_tokens=2, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    lists = [piece.choices[0].logprobs for piece in pieces if piece.choices[0].logprobs]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        joined = [one for part in lists for one in getattr(part, name)]
        assert joined == getattr(whole.choices[0].logprobs, name)
    assert len(lists[0].tokens) == len(ids) + 1


def test_max_tokens_0_computes_the_prompt_and_ends(client: openai.OpenAI, own: Any) -> None:
    ids = TOKENIZER.encode(TEXT)
    whole = complete(client, ids, echo=True, logprobs=1, max_tokens=0)
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == (TOKENIZER.decode(ids), "length")
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(ids), 0)
    assert len(whole.choices[0].logprobs.tokens) == len(ids)
    check_echoed(whole.choices[0], ids, own)
    pieces = list(complete(client, TEXT, max_tokens=0, stream=True))
    assert [(piece.choices[0].text, piece.choices[0].finish_reason) for piece in pieces] == [("", "length")]
    chat = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "a"}], max_tokens=0)
    assert (chat.choices[0].message.content, chat.choices[0].finish_reason) == ("", "length")


def test_prompt_logprobs_in_vllms_form(client: openai.OpenAI, queue: Client, own: Any) -> None:
    answer = complete(client, TEXT, max_tokens=1, n=2, prompt_logprobs=2).choices
    told, ids = answer[1].prompt_logprobs, TOKENIZER.encode(TEXT)
    assert told == answer[0].prompt_logprobs
    table = own(ids)
    assert told[0] is None
    assert len(told) == len(ids)
    for at, position in enumerate(told[1:]):
        one = position[str(ids[at + 1])]
        assert one["logprob"] == pytest.approx(float(table[at, ids[at + 1]]), abs=1e-4)
        assert one["decoded_token"] == TOKENIZER.decode([ids[at + 1]])
        assert sorted(other["rank"] for other in position.values())[:2] == [1, 2]
        assert len(position) in (2, 3)
    chat = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "3"},
    ]
    body = {"prompt_logprobs": 0, "return_token_ids": True}
    shown = client.chat.completions.create(model=MODEL, messages=chat, max_tokens=1, extra_body=body)
    of_chat = [list(position or ()) for position in shown.prompt_logprobs]
    assert of_chat == [[], *([str(one)] for one in shown.prompt_token_ids[1:])]
    result = queue.result(queue.submit(prompt=TEXT, max_tokens=0, prompt_logprobs=2))
    assert result.prompt_logprobs is not None
    assert [
        None if position is None else {str(id): one.logprob for id, one in position.items()}
        for position in result.prompt_logprobs
    ] == [None if position is None else {id: one["logprob"] for id, one in position.items()} for position in told]


def test_what_is_too_much_to_journal_is_refused(client: openai.OpenAI, queue: Client) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        complete(client, [[5] * 300] * 64, max_tokens=0, prompt_logprobs=7)
    assert refused.value.param == "prompt_logprobs"
    error = queue.result(queue.submit(prompt=[5] * 1000, n=8, max_tokens=0, prompt_logprobs=20)).choices[0].error
    assert isinstance(error, RequestError)
    assert error.param == "prompt_logprobs"
    with pytest.raises(openai.BadRequestError) as refused:
        list(complete(client, TEXT, stream=True, prompt_logprobs=1))
    assert refused.value.param == "prompt_logprobs"
