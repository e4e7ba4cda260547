"""The torch engine beyond greedy parity: seeded draws, logprobs, stored precision, faulty plans, reset and beat."""

from __future__ import annotations

from array import array

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from protocol.errors import StartError
from protocol.messages import NewSequence, Plan, pack_ids
from protocol.sampling import SamplingParams
from tests.models import CONFIGS, build, byte_tokenizer, tiny_model
from tests.workers.core_driver import CoreDriver
from tests.workers.plan_maker import PlanMaker, Sequence
from tests.workers.torch_engine.parity import (
    BLOCK,
    first_difference,
    make_engine,
    make_requests,
    reference_of,
)
from workers.native.library import KernelsUnavailable
from workers.torch_engine import loader, make
from workers.torch_engine.quantized.weights import int4_of

pytestmark = pytest.mark.usefixtures("one_thread")


def plan(*rows, new=(), **fields):
    """Rows are (seat, count, samples)."""
    seats, counts, samples = zip(*rows, strict=True) if rows else ((), (), ())
    return Plan(
        0, 0, 1, array("H", seats).tobytes(), pack_ids(counts), bytes(samples), new=list(new), **fields
    )  # fmt: skip


def sequence(seat=0, ids=range(20), blocks=range(4), computed=0, **fields):
    params = SamplingParams(**{"temperature": 0, "max_tokens": 8, **fields})
    ids = list(ids)
    return NewSequence(seat, "r", 0, 1, pack_ids(ids), len(ids), params, 0, 0, pack_ids(blocks), computed)


def test_the_same_request_draws_the_same_tokens_alone_and_in_a_crowd(tmp_path_factory):
    """Thirty-two sampled requests with penalties and filters, chunked and preempted; then every second one alone."""
    path = tiny_model(tmp_path_factory, "llama")

    def requests():
        made = make_requests(4, 40)
        for number, request in enumerate(made):
            request.seed = number
            request.sampling = SamplingParams(
                max_tokens=14,
                temperature=(0.7, 1.0, 1.4)[number % 3],
                top_p=(1.0, 0.9)[number % 2],
                top_k=(0, 20, 50)[number % 3],
                min_p=(0.0, 0.02)[number // 2 % 2],
                frequency_penalty=(0.0, 0.5)[number // 4 % 2],
                repetition_penalty=(1.0, 1.2)[number // 8 % 2],
                min_tokens=(0, 10)[number // 16],
            )
        return made

    together, alone = requests(), requests()
    engine = make_engine(path)
    counters = CoreDriver(engine, engine.capacity, 30, budget=24).run(together)
    assert counters.preemptions > 0
    engine.reset()
    for request in alone[::2]:
        PlanMaker(engine, blocks=16, block_size=BLOCK, budget=64).run([request])
        engine.reset()
    assert [request.output for request in together[::2]] == [request.output for request in alone[::2]]
    assert len({tuple(request.output) for request in together}) == 32


def test_logprobs_are_those_of_transformers(engine, tmp_path_factory):
    request = Sequence(list(range(40, 70)), SamplingParams(temperature=0.9, logprobs=5, max_tokens=12), seed=3)
    plain = Sequence(list(range(30)), SamplingParams(temperature=0, max_tokens=12))
    PlanMaker(engine, blocks=20, block_size=BLOCK, budget=16).run([request, plain])
    reference = reference_of(tiny_model(tmp_path_factory, "llama"))
    with torch.inference_mode():
        ids = torch.tensor([request.prompt + request.output])
        own = torch.log_softmax(reference(ids).logits[0, len(request.prompt) - 1 : -1], -1)
    assert plain.logprobs == [None] * 12
    for at, (token, (logprob, ids, tops)) in enumerate(zip(request.output, request.logprobs, strict=True)):
        assert logprob == pytest.approx(own[at, token].item(), abs=1e-4)
        np.testing.assert_allclose(tops, own[at].topk(5).values, atol=1e-4)
        np.testing.assert_allclose(tops, own[at, torch.from_numpy(ids).long()], atol=1e-4)


def test_a_bf16_checkpoint_is_served_as_its_weights_are(tmp_path):
    """Weights keep their stored precision, arithmetic is float32: exact against the rounded model."""
    model = build(CONFIGS["qwen2"])
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    engine = make_engine(tmp_path)
    requests = make_requests(4, 60)[:12]
    CoreDriver(engine, engine.capacity, 40, budget=24).run(requests)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    wrong = [text for text in (first_difference(reference, request) for request in requests) if text]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", ["llama", "phi3", "mixtral"])
def test_int8_serves_the_model_of_the_rounded_weights(tmp_path_factory, name):
    """Each row of a linear weight over 127 steps of its largest; a tied embedding is the rounded head's."""
    path = tiny_model(tmp_path_factory, name)
    engine = make_engine(path, quantization="int8")
    assert engine.capacity.dtype == "int8"
    requests = make_requests(4, 60)[:12]
    CoreDriver(engine, engine.capacity, 40, budget=24).run(requests)
    reference = reference_of(path)
    with torch.no_grad():
        weights = [module.weight for module in reference.modules() if isinstance(module, torch.nn.Linear)]
        weights += [parameter for parameter in reference.parameters() if parameter.dim() == 3]  # of experts
        for weight in weights:
            scale = (weight.abs().amax(dim=-1, keepdim=True) / 127).clamp_min(1e-12)
            weight.copy_((weight / scale).round() * scale)
    wrong = [text for text in (first_difference(reference, request) for request in requests) if text]
    assert not wrong, "\n".join(wrong)
    unrounded = reference_of(path)
    assert any(first_difference(unrounded, request) for request in requests)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_int4_serves_the_model_of_the_rounded_weights(tmp_path_factory, name):
    """Linear layers but the head, whose inputs groups of 32 divide; what they take is what their codes do."""
    path = tiny_model(tmp_path_factory, name)
    engine = make_engine(path, quantization="int4")
    assert engine.capacity.dtype == "int4"
    assert engine.backend.report.fused["linear (int4)"] > 0
    assert engine.backend.whole_pass is not None, "the layers are native as others are"
    requests = make_requests(4, 60)[:12]
    CoreDriver(engine, engine.capacity, 40, budget=24).run(requests)
    reference = reference_of(path)
    with torch.no_grad():
        for module in reference.model.modules():
            if isinstance(module, torch.nn.Linear) and module.in_features % 32 == 0:
                module.weight.copy_(int4_of(module.weight).dequantized())
    wrong = [text for text in (first_difference(reference, request) for request in requests) if text]
    assert not wrong, "\n".join(wrong)
    unrounded = reference_of(path)
    assert any(first_difference(unrounded, request) for request in requests)


def test_int8_is_refused_where_it_cannot_be_kept(tmp_path_factory, monkeypatch):
    def unavailable():
        raise KernelsUnavailable("not wanted here")

    monkeypatch.setattr(make, "load_kernels", unavailable)
    with pytest.raises(StartError, match="quantization int8 needs the native CPU kernels"):
        make_engine(tiny_model(tmp_path_factory, "llama"), quantization="int8")


NEIGHBOUR = sequence(9, ids=range(30, 40), blocks=range(20, 24))


def beside(*rows, new=(), **fields):
    return plan((9, 10, 1), *rows, new=[NEIGHBOUR, *new], **fields)


@pytest.mark.parametrize(
    ("faulty", "seats", "code"),
    [
        (beside((3, 1, 1)), [3], None),
        (beside((900, 1, 1)), [900], None),
        (beside((0, 4, 0), (0, 4, 0), new=[sequence()]), [0], None),
        (beside((0, 0, 0), new=[sequence()]), [0], None),
        (beside((0, 21, 1), new=[sequence()]), [0], None),
        (beside((0, 8, 1), new=[sequence()]), [0], None),
        (beside((0, 20, 1), new=[sequence(blocks=range(2))]), [0], None),
        (beside(new=[sequence(), sequence()]), [0], None),
        (beside(new=[sequence(64)]), [64], None),
        (beside(new=[sequence(-1)]), [-1], None),
        (beside(new=[sequence(blocks=range(90))]), [0], None),
        (beside(new=[sequence(blocks=[0, 1, 1])]), [0], None),
        (beside(new=[sequence(blocks=[0, -1, 1])]), [0], None),
        (beside(new=[sequence(blocks=[0, 1, 1 << 30])]), [0], None),
        (beside(new=[sequence(computed=20)]), [0], None),
        (beside(new=[sequence(computed=3)]), [0], None),
        (beside(new=[sequence(computed=-8)]), [0], None),
        (beside(new=[sequence(ids=[])]), [0], None),
        (beside(new=[sequence(ids=[7] * 400, blocks=range(40))]), [0], None),
        (beside(blocks=[(5, pack_ids([7]))]), [5], None),
        (beside(new=[sequence()], blocks=[(0, pack_ids([1 << 20]))]), [0], None),
        (beside(new=[sequence()], blocks=[(0, b"\1")]), [0], None),
        (beside(new=[sequence()], blocks=[(0, pack_ids(range(90)))]), [0], None),
        (beside((0, 2, 1), new=[sequence(ids=[5, 1 << 20])]), [0], "invalid_request"),
        (beside((0, 2, 1), new=[sequence(ids=[-1, 5])]), [0], "invalid_request"),
        (beside(new=[sequence(temperature=float("nan"))]), [0], "invalid_request"),
        (beside(new=[sequence(top_p=0.0)]), [0], "invalid_request"),
        (beside(new=[sequence(logit_bias={1 << 20: 1.0})]), [0], "invalid_request"),
        (beside(new=[sequence(logit_bias={1: float("inf")})]), [0], "invalid_request"),
        (beside(new=[sequence(stop_token_ids=[1 << 40], min_tokens=2)]), [0], "invalid_request"),
        (beside(new=[sequence(repetition_penalty=0.0)]), [0], "invalid_request"),
        (beside(new=[sequence(logprobs=1000)]), [0], "invalid_request"),
    ],
)
def test_a_row_that_cannot_be_computed_is_dropped_and_its_neighbour_goes_on(engine, faulty, seats, code):
    """Told once, in the step; later rows of it are passed over until its seat is freed and given again."""
    alone = [int(engine.execute(step).wait().tokens[0]) for step in (beside(), plan((9, 1, 1)))]
    engine.reset()
    sampled = engine.execute(faulty).wait()
    expected = dict.fromkeys(seats, code) if code else {}
    assert (sampled.dropped, {seat: why for seat, (why, _) in sampled.failed.items()}) == (seats, expected)
    assert (sampled.seats.tolist(), sampled.tokens.tolist()) == ([9], alone[:1])
    later = [(seat, 1, 1) for seat in seats if seat >= 0]
    sampled = engine.execute(plan((9, 1, 1), *later)).wait()
    assert (sampled.dropped, sampled.seats.tolist(), sampled.tokens.tolist()) == ([], [9], alone[1:])
    again = [seat for seat in seats if 0 <= seat < 64]
    sampled = engine.execute(plan(*((seat, 20, 1) for seat in again), new=map(sequence, again), frees=seats)).wait()
    assert (sampled.dropped, sampled.seats.tolist()) == ([], again)


def test_columns_of_unequal_length_drop_every_row_that_the_plan_names(engine):
    engine.execute(plan((0, 20, 1), new=[sequence()]))
    broken = Plan(0, 0, 2, array("H", [0]).tobytes(), pack_ids([1, 1]))
    assert engine.execute(broken).wait().dropped == [0]


def test_decodes_that_go_on_are_checked_for_blocks_too(engine):
    engine.execute(plan((0, 20, 1), (9, 10, 1), new=[sequence(blocks=range(3)), NEIGHBOUR]))
    decode = Plan(0, 0, 2, array("H", [0, 9]).tobytes())
    for _ in range(3 * BLOCK - 20):
        assert engine.execute(decode).wait().dropped == []
    sampled = engine.execute(decode).wait()
    assert (sampled.dropped, sampled.seats.tolist()) == ([0], [9])
    sampled = engine.execute(decode).wait()
    assert (sampled.dropped, sampled.seats.tolist()) == ([], [9])


def raise_unavailable():
    raise KernelsUnavailable("not wanted here")


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("native", [True, False])
def test_logits_that_are_no_numbers_end_their_row_alone(tmp_path, monkeypatch, native, temperature):
    """One embedding row is NaN. What it leaves in the pool reaches nobody, not even through a weight of zero."""
    model = build(CONFIGS["llama"])
    with torch.no_grad():
        model.get_input_embeddings().weight[250] = float("nan")
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    if not native:
        monkeypatch.setattr(make, "load_kernels", raise_unavailable)
    monkeypatch.setattr(loader, "_refuse_not_finite", lambda *_: None)  # which refuses such weights
    engine = make_engine(tmp_path)
    alone = [int(engine.execute(p).wait().tokens[0]) for p in (beside(), *[plan((9, 1, 1))] * 8)]
    engine.reset()
    bad = sequence(ids=[1, 250, 2], blocks=[0], temperature=temperature)
    steps = [beside((0, 3, 1), new=[bad]), *[plan((9, 1, 1), (0, 1, 1))] * 4]
    sampled = [engine.execute(step).wait() for step in steps]
    assert all((s.dropped, s.failed[0][0]) == ([0], "non_finite_logits") for s in sampled)
    fresh = sequence(1, ids=range(40, 44), blocks=[0])  # in the block that holds NaN
    sampled.append(engine.execute(plan((9, 1, 1), (1, 4, 1), new=[fresh], frees=[0])).wait())
    sampled += [engine.execute(plan((9, 1, 1), (1, 1, 1))).wait() for _ in range(3)]
    assert not any(s.dropped for s in sampled[5:])
    assert [int(s.tokens[0]) for s in sampled] == alone


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("native", [True, False])
def test_one_logit_that_is_no_number_ends_its_row_alone(tmp_path, monkeypatch, native, temperature):
    """Comparisons pass over it: it is neither the largest nor the drawn one. Two directions that nothing but the
    embedding of 250 writes overflow, with opposite signs, in one row of the head."""
    model = build(CONFIGS["llama"])
    with torch.no_grad():
        model.get_input_embeddings().weight[:, :2] = 0
        model.get_input_embeddings().weight[250, :2] = 1e6
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[:2] = layer.mlp.down_proj.weight[:2] = 0
        model.model.norm.weight[:2] = 1000
        model.lm_head.weight[77, :2] = torch.tensor([1e36, -1e36])
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    if not native:
        monkeypatch.setattr(make, "load_kernels", raise_unavailable)
    engine = make_engine(tmp_path)
    assert (getattr(engine.backend, "whole_pass", None) is not None) == native
    alone = [int(engine.execute(p).wait().tokens[0]) for p in (beside(), plan((9, 1, 1)))]
    engine.reset()
    bad = sequence(ids=[1, 2, 250], blocks=[0], temperature=temperature)
    sampled = [engine.execute(step).wait() for step in (beside((0, 3, 1), new=[bad]), plan((9, 1, 1), frees=[0]))]
    assert [s.dropped for s in sampled] == [[0], []]
    assert sampled[0].failed[0][0] == "non_finite_logits"
    assert [int(s.tokens[0]) for s in sampled] == alone


def test_a_step_may_be_queued_before_the_last_one_is_read(engine):
    """The id sampled last is the next input, whether or not the host has seen it."""
    first = engine.execute(plan((0, 20, 1), new=[sequence()]))
    second = engine.execute(plan((0, 1, 1)))
    ahead = [int(output.wait().tokens[0]) for output in (first, second)]
    engine.reset()
    read = [int(engine.execute(plan((0, 20, 1), new=[sequence()])).wait().tokens[0])]
    read.append(int(engine.execute(plan((0, 1, 1))).wait().tokens[0]))
    assert ahead == read


def test_ends_and_frees_empty_their_seats(engine):
    engine.execute(plan((0, 20, 1), (1, 20, 1), new=[sequence(0), sequence(1, blocks=range(4, 8))]))
    engine.execute(plan((1, 1, 1), ends=[(0, "abort")]))
    assert engine.execute(plan((0, 1, 1))).wait().dropped == [0]
    engine.execute(plan((0, 20, 1), new=[sequence(0)], frees=[1]))
    assert engine.execute(plan((1, 1, 1))).wait().dropped == [1]


def test_a_plan_without_rows_gives_an_empty_output(engine):
    engine.execute(plan(new=[sequence()]))
    sampled = engine.execute(plan(frees=[0])).wait()
    assert len(sampled.tokens) == len(sampled.seats) == 0


def test_a_chunk_that_does_not_sample_gives_no_token(engine):
    assert len(engine.execute(plan((0, 8, 0), new=[sequence()])).wait().tokens) == 0
    sampled = engine.execute(plan((0, 12, 1))).wait()
    assert sampled.seats.tolist() == [0]
    assert sampled.exec_us > 0


def test_the_beat_grows_with_each_layer(engine):
    before = engine.beat()
    engine.execute(plan((0, 20, 1), new=[sequence()]))
    assert engine.beat() >= before + CONFIGS["llama"]["num_hidden_layers"]
