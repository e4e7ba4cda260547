"""Steps in tables: the GPU's path of the engine, on a CPU with interpreted kernels, against transformers' own greedy.

What a graph replays is the same function over the same buffers, here called again instead (graphs.Rerun). It is given
no host arrays at all, so it cannot depend on any.
"""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.models.llama import modeling_llama

from protocol.messages import NewSequence, Plan, pack_ids
from protocol.sampling import SamplingParams
from tests.models import CONFIGS, build, byte_tokenizer, tiny_model
from tests.workers.plan_maker import PlanMaker, Sequence
from tests.workers.torch_engine.cuda.launches import counted, of_a_layer
from tests.workers.torch_engine.cuda.triton_device import DEVICE, short_samples
from tests.workers.torch_engine.parity import first_difference, reference_of
from tests.workers.torch_engine.paths import save
from workers.torch_engine import staging
from workers.torch_engine.config import EngineConfig
from workers.torch_engine.cuda import triton_sampling
from workers.torch_engine.cuda.backend import CudaBackend
from workers.torch_engine.cuda.graphs import Bucket, choose_buckets
from workers.torch_engine.engine import FP8, TorchEngine
from workers.torch_engine.make import torch_alone
from workers.torch_engine.sampler import Sampler

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCK = 8
BUDGET = 16


def make_engine(path, **fields):
    given = {
        "device": str(DEVICE), "dtype": "float32", "max_model_len": 96, "max_num_seqs": 4,
        "max_num_batched_tokens": BUDGET, "kv_cache_memory": 1 << 20, "block_size": BLOCK, "threads": 1,
    }  # fmt: skip
    config = EngineConfig(model=str(path), **{**given, **fields})
    engine = TorchEngine(config, DEVICE, [CudaBackend(config, DEVICE), torch_alone(config, DEVICE)])
    engine.stages = []
    engine.load(lambda stage, fraction: engine.stages.append((stage, fraction)))
    return engine


def requests(count=4, output=6):
    rng = np.random.default_rng(3)
    params = SamplingParams(temperature=0, max_tokens=output)
    return [
        Sequence(rng.integers(0, 256, 5 + 9 * k).tolist(), params, joins=(0, 0, 3, 5)[k % 4]) for k in range(count)
    ]  # fmt: skip


def serve(engine, **fields):
    served = requests(**fields)
    PlanMaker(engine, blocks=40, block_size=BLOCK, budget=BUDGET, seats=8).run(served)
    return served


def wrong(path, served):
    reference = reference_of(path)
    return [text for text in (first_difference(reference, request) for request in served) if text]


def small_llama(path, layers):
    """Interpreted kernels are slow: no more layers and heads than a test needs."""
    small = {"num_hidden_layers": layers, "num_attention_heads": 2, "num_key_value_heads": 1}
    build(CONFIGS["llama"] | small).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(autouse=True, scope="module")
def quick():
    with short_samples():
        yield


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    path = small_llama(tmp_path_factory.mktemp("llama"), 2)
    return path, make_engine(path)


def test_replayed_steps_give_what_transformers_gives(llama):
    path, engine = llama
    assert engine.backend.steps.buckets
    replays = []
    for recorded in engine.backend.steps._recorded:
        run = recorded.recording.replay
        recorded.recording.replay = lambda run=run, bucket=recorded.bucket: (replays.append(bucket), run())
    served = serve(engine, count=3, output=4)
    engine.reset()
    assert not wrong(path, served)
    assert {bucket.single for bucket in replays} == {True, False}


def test_recorded_steps_are_timed_within_their_time(llama, monkeypatch):
    monkeypatch.setattr("workers.torch_engine.cuda.graphs.REPLAYS", 1)
    _, engine = llama
    steps = engine.backend.steps
    times = steps.time_steps(engine.backend._filled, most_s=3600.0)
    sizes = sorted({bucket.tokens for bucket in steps.buckets if not bucket.single})
    assert [tokens for tokens, _ in times] == sizes
    assert all(us > 0 for _, us in times)
    assert steps.time_steps(engine.backend._filled, most_s=0.0) == [], "half a table would mislead"
    for bucket in steps.buckets:
        step = engine.backend._filled(bucket)
        assert int(step.row_starts[-1]) == bucket.tokens
        assert (step.slots >= 0).all(), "not padding, which is quicker"
    engine.reset()


def test_a_steady_step_pins_no_host_memory(llama, monkeypatch):
    """Counted on a CPU too, by taking it for a device with memory of its own."""
    _, engine = llama
    monkeypatch.setattr(staging, "DEVICES", {"cpu", "cuda"})
    kinds = (
        {"temperature": 0.0, "logprobs": 2},
        {"temperature": 0.8, "repetition_penalty": 1.2},
        {"logit_bias": {5: 2.0}},
    )
    new = [
        NewSequence(
            seat, "", seat, 1, pack_ids(range(3)), 3, SamplingParams(max_tokens=40, **kind), 0, 0,
            pack_ids(range(2 * seat, 2 * seat + 2)), 0,
        )
        for seat, kind in enumerate(kinds)
    ]  # fmt: skip
    seats = np.arange(len(new), dtype="<u2").tobytes()
    running = [engine.execute(Plan(0, 0, 1, seats, pack_ids([3] * len(new)), b"", new))]
    counted = []
    for step in range(2, 8):
        running.append(engine.execute(Plan(0, 0, step, seats)))
        assert len(running.pop(0).wait().tokens) == len(new)
        counted.append(staging.made)
    running.pop().wait()
    engine.reset()
    assert counted[0] > 0
    assert counted[-1] == counted[2], "from the third step on"


def test_memory_is_pinned_in_one_place():
    root = Path(staging.__file__).parents[1]
    assert [path.name for path in root.rglob("*.py") if "pin_memory" in path.read_text()] == ["staging.py"]


def test_every_option_is_tried_before_the_first_request(llama, monkeypatch):
    """Launches differ by the logits' type alone: 16 bits as the model gives them, float32 once they were changed."""
    _, engine = llama
    seen = []
    real = triton_sampling.launch_draw
    monkeypatch.setattr(
        triton_sampling, "launch_draw", lambda logits, *rest: (seen.append(logits.dtype), real(logits, *rest))[1]
    )
    sampler = Sampler(8, 60, [7], DEVICE, engine.backend.draw)
    sampler.warm_up(torch.bfloat16)
    assert set(seen) == {torch.bfloat16, torch.float32}


def test_the_kernels_are_in(llama):
    _, engine = llama
    layers = engine.backend.model.config.num_hidden_layers
    names = [type(module).__name__ for module in engine.backend.model.modules()]
    assert names.count("FusedNorm") == 2 * layers + 1
    assert names.count("FusedMLP") == layers
    assert names.count("MergedSlice") == 3 * layers
    assert engine.backend.attention._defers


def test_the_beat_grows_with_replayed_steps(llama):
    _, engine = llama
    before = engine.beat()
    serve(engine, count=1, output=3)
    engine.reset()
    assert engine.beat() >= before + 3


def test_capture_reports_its_progress(llama):
    _, engine = llama
    told = [fraction for stage, fraction in engine.stages if stage == "capture"]
    assert told[0] == 0
    assert told[-1] == 1
    assert told == sorted(told)


MORE = ("mistral", "qwen3", "deepseek_v3", "phi3", "gpt2", "mixtral")
EXPERTS = ("qwen3_moe", "gpt_oss", "deepseek_v3", "glm4_moe", "olmoe")


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", *(pytest.param(n, marks=pytest.mark.sweep) for n in MORE)])
def test_every_rule_of_attention_launch_by_launch(tmp_path_factory, name):
    path = tiny_model(tmp_path_factory, name)
    engine = make_engine(path, graphs=False)
    assert type(engine.backend) is CudaBackend, "the kernels refused"
    served = serve(engine, count=3, output=4)
    assert not wrong(path, served)


@pytest.mark.parametrize("name", ["mixtral", *(pytest.param(n, marks=pytest.mark.sweep) for n in EXPERTS)])
def test_experts_are_recorded(tmp_path, name):
    """With whole buckets of padding beside the rows, which choose no expert."""
    save(name, tmp_path)
    engine = make_engine(tmp_path)
    assert type(engine.backend) is CudaBackend, "the kernels refused"
    assert engine.backend.report.fused["experts"] > 0
    assert engine.backend.steps.buckets
    served = serve(engine, count=3, output=4)
    assert not wrong(tmp_path, served)


@pytest.mark.parametrize(("name", "most"), [("llama", 7), ("mixtral", 12)])
def test_launches_of_a_layer_in_a_step_of_decodes(tmp_path, name, most):
    """What each launch costs the device and the host besides its work: some microseconds."""
    found = []
    for layers in (1, 2):
        path = tmp_path / str(layers)
        build({**CONFIGS[name], "num_hidden_layers": layers}).save_pretrained(path)
        byte_tokenizer().save_pretrained(path)
        engine = make_engine(path, graphs=False)
        with torch.inference_mode(), counted() as launches:
            engine.backend.steps.run(engine.backend._padding(1))
        found.append(launches)
    layer = of_a_layer(*found, layers=1)
    assert sum(layer.values()) <= most, layer
    assert layer["attend_items"] == 1


def test_a_model_that_cannot_be_recorded_runs_launch_by_launch(tmp_path, monkeypatch, caplog):
    def fails(run):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr("workers.torch_engine.cuda.backend.Rerun", fails)
    monkeypatch.setattr("workers.torch_engine.cuda.backend.CudaRecorder", lambda device: fails)
    path = small_llama(tmp_path, 1)
    engine = make_engine(path)
    assert not engine.backend.steps.buckets
    assert "without CUDA graphs" in caplog.text
    served = serve(engine, count=2, output=3)
    assert not wrong(path, served)
    assert gc.get_freeze_count() == 0


def test_a_replay_that_differs_is_noticed(tmp_path, monkeypatch, caplog):
    """A model that keeps something of the recorded step on the host gives other logits when replayed."""
    monkeypatch.setattr("workers.torch_engine.cuda.backend.Rerun", Stuck)
    monkeypatch.setattr("workers.torch_engine.cuda.backend.CudaRecorder", lambda device: Stuck)
    path = small_llama(tmp_path, 1)
    engine = make_engine(path)
    assert not engine.backend.steps.buckets
    assert "replayed logits differ" in caplog.text


class Stuck:
    def __init__(self, run):
        self.output = run()

    def replay(self):
        pass


def test_where_the_kernels_fail_torch_serves_alone(tmp_path, monkeypatch, caplog):
    def broken(self, *args, **kwargs):
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr("workers.torch_engine.cuda.triton_attention.TritonAttention.attend", broken)
    path = small_llama(tmp_path, 1)
    engine = make_engine(path)
    assert type(engine.backend).__name__ == "TorchBackend"
    assert "torch alone serves" in caplog.text
    served = serve(engine, count=2, output=4)
    assert not wrong(path, served)


def test_buckets_hold_every_step():
    for max_tokens, max_rows in ((2048, 256), (512, 4), (16, 16), (8192, 512), (100, 300)):
        buckets = choose_buckets(max_tokens, max_rows)
        assert len(buckets) == len(set(buckets)) < 64
        assert buckets == sorted(buckets, key=lambda b: -b.tokens)
        assert Bucket(1, 1, True) in buckets
        rows = min(max_rows, max_tokens)
        assert max(b.rows for b in buckets if b.single) == min(rows, 512)
        most = min(max_tokens, 2048)
        assert any(b.tokens == most and b.rows >= min(max_rows, most) for b in buckets if not b.single)


def test_keys_and_values_in_fp8_give_what_the_model_gives_with_them_rounded(llama, caplog, monkeypatch):
    path, other = llama
    with caplog.at_level("INFO"):
        engine = make_engine(path, kv_cache_dtype="fp8", graphs=False)
    assert {tensor.dtype for tensor in (*engine.backend.pool.keys, *engine.backend.pool.values)} == {FP8}
    assert "keys and values in FP8 move logits by" in caplog.text
    assert engine.backend.block_bytes * 4 == other.backend.block_bytes
    served = serve(engine, count=3, output=6)
    reference = reference_of(path)
    for layer in reference.model.layers:
        layer.self_attn.v_proj.register_forward_hook(lambda module, given, out: out.to(FP8).float())
    own = modeling_llama.apply_rotary_pos_emb

    def rounded(*given, **named):
        query, key = own(*given, **named)
        return query, key.to(FP8).float()

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rounded)
    assert not [text for text in (first_difference(reference, request) for request in served) if text]
