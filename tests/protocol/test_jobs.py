"""Jobs from outside: what is taken, what is refused and by which name, and that only our own errors come out."""

from __future__ import annotations

import json
import pickle
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import HeadraceError, InvalidRequest, TooLarge
from protocol.jobs import check_job, decode_job
from protocol.levels import job_level, plainer
from protocol.messages import MAX_JOB_BYTES, Job, encode
from protocol.sampling import SamplingParams

SECRET = "the quick brown secret"
DEEP = "[" * 40 + "]" * 40
USER = {"role": "user", "content": "hi"}
CALL = {"id": "1", "function": {"name": "f"}}


def pack(job: dict[str, Any]) -> bytes:
    return msgpack.packb({"v": 1, **job})


def text(body: str) -> bytes:
    return body.encode()


GOOD = [
    pack({"prompt": "hi"}),
    pack({"prompt": [1, 2, 3]}),
    pack({"prompt": ["a", "b"]}),
    pack({"prompt": [[1], [2, 3]]}),
    pack({"messages": [USER]}),
    pack({"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}),
    pack(
        {
            "messages": [
                USER,
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
            ]
        }
    ),
    pack(
        {
            "prompt": "hi",
            "id": "a-1",
            "tenant": "t",
            "priority": "batch",
            "timeout_s": 3,
            "reply_to": "me",
            "results": "r",
        }
    ),
    pack({"prompt": "hi", "sampling": {"logit_bias": {5: 1.5}, "n": 8, "stop": ["x"], "seed": -(2**63)}}),
    text('{"v": 1, "prompt": "hi", "sampling": {"logit_bias": {"5": 1}}}'),
    text('  \n{"prompt": "hi"}'),
    json.dumps({"prompt": "\U0001f600 é"}).encode(),
    b"\xde\x00\x01" + msgpack.packb("prompt") + msgpack.packb("hi"),
]

BAD = [  # payload, param
    (b"", None),
    (b"hello", None),
    (b"[1]", None),
    (b"null", None),
    (b"{", None),
    (b"\x80", "prompt"),
    (pickle.dumps({"prompt": SECRET}), None),
    (b'{"prompt": "\xff\xfe"}', None),
    (b"\x81\xa6prompt\xa1\xff", None),
    (b"\x81\xa6prompt\xa3\xed\xa0\x80", None),  # a lone surrogate
    (text('{"prompt": "\\ud800"}'), None),
    (text('{"prompt": "hi", "timeout_s": NaN}'), None),
    (text('{"prompt": "hi", "sampling": {"temperature": Infinity}}'), None),
    (text('{"prompt": "hi", "sampling": {"temperature": 1e400}}'), "temperature"),
    (text('{"prompt": ' + "[" * 5000 + "]" * 5000 + "}"), None),
    (text('{"messages": [{"role": "user", "content": ""}], "chat_template_kwargs": {"a": ' + DEEP + "}}"),
     "chat_template_kwargs"),
    (pack({"prompt": "hi", "v": 2}), "v"),
    (pack({"prompt": "hi", "v": "1"}), "v"),
    (pack({"prompt": "hi", "colour": "red"}), "colour"),
    (pack({"prompt": "hi", "sampling": {"colour": SECRET}}), "colour"),
    (pack({"prompt": "hi", "messages": [USER]}), "prompt"),
    (pack({}), "prompt"),
    (pack({"prompt": ""}), "prompt"),
    (pack({"prompt": []}), "prompt"),
    (pack({"prompt": [[]]}), "prompt"),
    (pack({"prompt": ["a", ""]}), "prompt"),
    (pack({"prompt": ["a", [1]]}), "prompt"),
    (pack({"prompt": [1, True]}), "prompt"),
    (pack({"prompt": [1, -1]}), "prompt"),
    (pack({"prompt": [1, 2**31]}), "prompt"),
    (pack({"prompt": [1.0]}), "prompt"),
    (pack({"prompt": {"text": SECRET}}), "prompt"),
    (pack({"prompt": ["a"] * 65}), "prompt"),
    (pack({"prompt": ["a"] * 17, "sampling": {"n": 8}}), "n"),
    (pack({"messages": []}), "messages"),
    (pack({"messages": [SECRET]}), "messages[0]"),
    (pack({"messages": [{"content": "hi"}]}), "messages[0].role"),
    (pack({"messages": [{"role": "wizard", "content": "hi"}]}), "messages[0].role"),
    (pack({"messages": [{"role": "user", "content": None}]}), "messages[0].content"),
    (pack({"messages": [{"role": "user"}]}), "messages[0].content"),
    (pack({"messages": [{"role": "user", "content": 5}]}), "messages[0].content"),
    (pack({"messages": [{"role": "user", "content": []}]}), "messages[0].content"),
    (pack({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": SECRET}}]}]}),
     "messages[0].content[0].type"),
    (pack({"messages": [{"role": "user", "content": [{"type": "file"}]}]}), "messages[0].content[0].type"),
    (pack({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}), "messages[0].content[0].text"),
    (pack({"messages": [{**USER, "prefix": True}]}), "messages[0].prefix"),
    (pack({"messages": [{**USER, "ignored": 2**64 - 1}]}), "messages"),
    (pack({"messages": [{**USER, "name": 5}]}), "messages[0].name"),
    (pack({"messages": [USER], "chat_template_kwargs": {"chat_template": SECRET}}),
     "chat_template_kwargs.chat_template"),
    (pack({"messages": [USER], "chat_template_kwargs": {"x": float("nan")}}), "chat_template_kwargs"),
    (pack({"messages": [USER], "chat_template_kwargs": {"x": 2**63}}), "chat_template_kwargs"),
    (pack({"messages": [USER], "chat_template_kwargs": {"x": b"raw"}}), "chat_template_kwargs"),
    (pack({"prompt": "hi", "chat_template_kwargs": {}}), "chat_template_kwargs"),
    (pack({"prompt": "hi", "id": "a b"}), "id"),
    (pack({"prompt": "hi", "id": "x" * 65}), "id"),
    (pack({"prompt": "hi", "tenant": "a:b"}), "tenant"),
    (pack({"prompt": "hi", "reply_to": ""}), "reply_to"),
    (pack({"prompt": "hi", "results": "../x"}), "results"),
    (pack({"prompt": "hi", "priority": "urgent"}), "priority"),
    (pack({"prompt": "hi", "timeout_s": 0}), "timeout_s"),
    (pack({"prompt": "hi", "timeout_s": float("nan")}), "timeout_s"),
    (pack({"prompt": "hi", "timeout_s": 1e9}), "timeout_s"),
    (pack({"prompt": "hi", "cache_salt": ""}), "cache_salt"),
    *((pack({"prompt": "hi", "sampling": {name: value}}), name) for name, value in [
        ("n", 0), ("n", 9), ("n", True), ("n", 1.5), ("max_tokens", -1), ("max_tokens", 1.0),
        ("max_tokens", True), ("min_tokens", -1), ("temperature", -0.1), ("temperature", 2.1), ("temperature", "hot"),
        ("temperature", float("nan")), ("temperature", float("inf")), ("top_p", 0), ("top_p", 1.1), ("top_k", -2),
        ("min_p", 1.1), ("frequency_penalty", 2.1), ("presence_penalty", -2.1), ("repetition_penalty", 0),
        ("seed", 2**63), ("logprobs", 21), ("logprobs", -1), ("stop", ["a"] * 17), ("stop", [""]),
        ("stop", ["x" * 257]), ("stop", "x"), ("stop_token_ids", [-1]), ("stop_token_ids", [1] * 65),
        ("logit_bias", {5: 101.0}), ("logit_bias", {-1: 1.0}), ("logit_bias", {"x": 1.0}),
        ("logit_bias", dict.fromkeys(range(1025), 1.0)),
    ]),
    (text('{"prompt": "hi", "sampling": {"max_tokens": ' + "9" * 400 + "}}"), "max_tokens"),
    (text('{"prompt": "hi", "sampling": {"seed": ' + "9" * 30 + "}}"), "seed"),
    (pack({"prompt": "hi", "sampling": {"min_tokens": 5, "max_tokens": 4}}), "min_tokens"),
    (pack({"prompt": "hi", "sampling": None}), "sampling"),
    (pack({"prompt": "hi", "sampling": {"stop": [5]}}), "stop[0]"),
    (pack({"prompt": "hi", "sampling": {"stop_token_ids": [True]}}), "stop_token_ids[0]"),
]  # fmt: skip


@pytest.mark.parametrize("payload", GOOD)
def test_good_jobs_are_taken_and_can_be_stored(payload: bytes) -> None:
    job = decode_job(payload)
    assert decode_job(encode(job)) == job


@pytest.mark.parametrize(("payload", "param"), BAD)
def test_bad_jobs_are_refused_by_name(payload: bytes, param: str | None) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode_job(payload)
    assert caught.value.param == param
    assert SECRET not in str(caught.value)
    assert param is None or param in str(caught.value)


def test_an_oversized_job_is_refused_unread() -> None:
    with pytest.raises(TooLarge):
        decode_job(b"{" * (MAX_JOB_BYTES + 1))


def test_token_ids_are_checked_against_the_vocabulary() -> None:
    check_job(Job(prompt=[99]), vocab_size=100)
    for job in (
        Job(prompt=[100]),
        Job(prompt=[[1], [100]]),
        Job(prompt="x", sampling=SamplingParams(stop_token_ids=[100])),
        Job(prompt="x", sampling=SamplingParams(logit_bias={100: 1.0})),
    ):
        with pytest.raises(InvalidRequest):
            check_job(job, vocab_size=100)


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8)
)
trees = st.recursive(scalars, lambda t: st.lists(t, max_size=4) | st.dictionaries(st.text(max_size=8), t, max_size=4))
job_fields = st.sampled_from([*Job.__struct_fields__, "colour"])
sampling_fields = st.sampled_from([*SamplingParams.__struct_fields__, "colour"])
messages = st.lists(
    st.dictionaries(
        st.sampled_from(["role", "content", "name", "tool_calls", "x"]), st.just("user") | trees, max_size=4
    ),
    max_size=3,
)
bodies = st.dictionaries(job_fields, trees | st.dictionaries(sampling_fields, trees, max_size=4) | messages, max_size=5)


def only_our_errors(payload: bytes) -> None:
    try:
        job = decode_job(payload)
    except HeadraceError as error:
        str(error).encode()
    else:
        encode(job)


@settings(max_examples=100, deadline=None)
@given(bodies)
def test_fuzzed_maps_raise_only_our_errors(body: dict[str, Any]) -> None:
    only_our_errors(msgpack.packb(body, unicode_errors="surrogatepass"))
    try:
        dumped = json.dumps(body).encode()
    except TypeError:  # bytes
        return
    only_our_errors(dumped)


@settings(max_examples=100, deadline=None)
@given(
    st.binary(max_size=64)
    | st.sampled_from(GOOD).flatmap(lambda good: st.integers(0, len(good)).map(lambda k: good[:k]))
)
def test_fuzzed_bytes_raise_only_our_errors(payload: bytes) -> None:
    only_our_errors(payload)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(GOOD), st.integers(0, 200), st.integers(0, 255))
def test_flipped_bytes_raise_only_our_errors(good: bytes, at: int, byte: int) -> None:
    mutable = bytearray(good)
    mutable[at % len(good)] = byte
    only_our_errors(bytes(mutable))


def test_what_ends_at_admission_and_what_has_a_suffix_need_a_newer_scheduler() -> None:
    asks = Job(messages=[{"role": "user", "content": "x"}], tokenize=True, sampling=SamplingParams(max_tokens=1))
    assert (job_level(asks), job_level(plainer(asks)), plainer(asks).tokenize) == (3, 0, False)
    filled = Job(prompt="a", suffix="b")
    assert (job_level(filled), plainer(filled).suffix) == (3, "b")  # it cannot be left out
    for payload in (b'{"prompt": "a", "tokenize": true}', b'{"prompt": [1], "suffix": "b"}'):
        with pytest.raises(InvalidRequest) as refused:
            decode_job(payload)
        assert refused.value.param in ("tokenize", "suffix")
    assert decode_job(b'{"prompt": "a", "suffix": "b"}').suffix == "b"
