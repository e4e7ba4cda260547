"""What is refused at load, and how it is said; precision, lengths and memory; progress; rotary tables."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig

from protocol.errors import ModelRefused, StartError
from tests.models import CONFIGS, EOS, VOCAB, build, byte_tokenizer, tiny_model
from workers.torch_engine import loader
from workers.torch_engine.config import EngineConfig
from workers.torch_engine.cpu import backend as cpu_backend
from workers.torch_engine.make import make_engine


def load(path, **fields):
    given = {"device": "cpu", "threads": 1, "max_num_seqs": 4, "kv_cache_memory": 4 << 20, "max_num_batched_tokens": 64}
    engine = make_engine(EngineConfig(model=str(path), **{**given, **fields}))
    stages = []
    capacity = engine.load(lambda stage, fraction: stages.append((stage, fraction)))
    return engine, capacity, stages


def copy_with(path, target, **changes):
    """A copy of a checkpoint with its config changed."""
    shutil.copytree(path, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


def test_capacity_and_progress(tmp_path_factory):
    engine, capacity, stages = load(tiny_model(tmp_path_factory, "llama"), served_name="tiny", max_model_len=100)
    assert (capacity.model, capacity.max_model_len, capacity.vocab_size) == ("tiny", 100, VOCAB)
    assert (capacity.dtype, capacity.device) == ("float32", "cpu")
    (pool,) = capacity.pools
    assert (pool.kind, pool.unit_tokens) == ("full", 16)
    assert 100 <= pool.units * 16 <= 4 * (100 + 16)  # enough for one, no more than all seats can use
    assert list(engine.eos_token_ids) == [EOS]
    assert engine.tokenizer.decode([104, 105]) == "hi"
    assert {stage for stage, _ in stages} >= {"load", "warm-up"}
    assert all(0 <= fraction <= 1 for _, fraction in stages)
    assert len([fraction for stage, fraction in stages if stage == "load"]) > 5


@pytest.mark.parametrize(("name", "reason"), [("falcon", "interface"), ("bloom", "interface"), ("mamba", "recurrent")])
def test_models_outside_are_refused_by_name(tmp_path_factory, name, reason):
    with pytest.raises(ModelRefused, match=name) as refused:
        load(tiny_model(tmp_path_factory, name))
    assert reason in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model_type": "t5"}, "encoder-decoder"),
        ({"model_type": "llama4_text"}, "chunks"),
        ({"model_type": "jamba"}, "recurrent"),
        ({"model_type": "qwen3_next"}, "recurrent"),
        ({"model_type": "vit"}, "no causal language model"),
    ],
)
def test_refused_from_the_config_alone(fields, reason):
    with pytest.raises(ModelRefused, match=reason):
        loader.refuse_by_config("some/model", AutoConfig.for_model(**fields))


def test_code_in_the_checkpoint_is_refused(tmp_path_factory, tmp_path):
    path = copy_with(
        tiny_model(tmp_path_factory, "llama"), tmp_path / "m", auto_map={"AutoModelForCausalLM": "modeling_x.X"}
    )
    (path / "modeling_x.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelRefused, match="auto_map"):
        load(path)


def test_pickled_weights_are_not_read(tmp_path_factory, tmp_path):
    path = tmp_path / "m"
    shutil.copytree(tiny_model(tmp_path_factory, "llama"), path)
    (path / "model.safetensors").unlink()
    torch.save(build(CONFIGS["llama"]).state_dict(), path / "pytorch_model.bin")
    with pytest.raises(StartError, match="safetensors"):
        load(path)


def test_a_checkpoint_with_missing_weights_is_refused(tmp_path_factory, tmp_path):
    path = copy_with(tiny_model(tmp_path_factory, "llama"), tmp_path / "m", num_hidden_layers=4)
    with pytest.raises(StartError, match=r"layers\.3"):
        load(path)


def test_a_missing_directory_is_told(tmp_path):
    with pytest.raises(StartError, match="nowhere"):
        load(tmp_path / "nowhere")


def test_too_long_or_too_large_is_told(tmp_path_factory):
    path = tiny_model(tmp_path_factory, "llama")
    with pytest.raises(StartError, match="512 positions"):
        load(path, max_model_len=513)
    with pytest.raises(StartError, match="kv-cache-memory"):
        load(path, max_model_len=512, kv_cache_memory=100_000)
    with pytest.raises(StartError, match="kv-cache-memory"):
        load(path, kv_cache_memory=1000)


def test_keys_and_values_in_fp8_are_refused_on_a_cpu(tmp_path_factory):
    with pytest.raises(StartError, match="--kv-cache-dtype fp8 is served on a GPU"):
        load(tiny_model(tmp_path_factory, "llama"), kv_cache_dtype="fp8")


def test_a_length_left_open_shrinks_to_the_pool(tmp_path_factory):
    _, capacity, _ = load(tiny_model(tmp_path_factory, "llama"), kv_cache_memory=100_000)
    assert capacity.max_model_len == capacity.pools[0].units * 16 < 512


def test_a_layer_that_does_not_attend_is_found(tmp_path_factory, monkeypatch):
    """The calls are really counted: a layer that skips the attention function is refused."""
    from transformers.models.llama.modeling_llama import LlamaAttention

    original = LlamaAttention.forward

    def skip(self, hidden_states, *args, **kwargs):
        if self.layer_idx == 1:
            return hidden_states, None
        return original(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(LlamaAttention, "forward", skip)
    with pytest.raises(ModelRefused, match="2 of its 3 layers"):
        load(tiny_model(tmp_path_factory, "llama"))


def test_state_beside_the_cache_is_found(tmp_path_factory, monkeypatch):
    """A model that mixes neighbours outside attention gives other logits when cut into pieces."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    original = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: original(self, x + x.roll(1, dims=1)))
    with pytest.raises(ModelRefused, match="other logits"):
        load(tiny_model(tmp_path_factory, "llama"))


def test_dtype_of_the_checkpoint():
    stored = SimpleNamespace(dtype=torch.bfloat16)
    stored.get_text_config = lambda: stored
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert loader.choose_dtype("auto", stored, cuda) == torch.bfloat16
    assert loader.choose_dtype("float32", stored, cuda) == torch.float32
    with pytest.raises(StartError, match="int8"):
        loader.choose_dtype("int8", stored, cpu)
    with pytest.raises(StartError, match="tpu"):
        loader.choose_device("tpu")


@pytest.mark.parametrize(("length", "factor"), [(64, "short_factor"), (65, "long_factor")])
def test_longrope_is_fixed_by_the_longest_context(length, factor):
    """Whatever positions a batch holds, one frequency set serves."""
    model = build(CONFIGS["phi3_longrope"])
    loader.fix_rotary(model, 200)
    loader.fix_rotary(model, length)
    rotary = model.model.rotary_emb
    scale = torch.tensor(CONFIGS["phi3_longrope"]["rope_parameters"][factor])
    expected = 1.0 / (scale * 10000.0 ** (torch.arange(0, 16, 2) / 16))
    for longest in (3, 300):
        rotary(torch.zeros(1, 1, 16), torch.tensor([[longest]]))
        torch.testing.assert_close(rotary.inv_freq, expected)


def test_byte_tokenizer_round_trip():
    text = "naïve 日本 \n\t"
    tokenizer = byte_tokenizer()
    assert tokenizer(text).input_ids == list(text.encode())
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_kernels_that_change_the_model_are_not_used(tmp_path_factory, monkeypatch, caplog):
    """Whatever a replacement gets wrong is seen in the logits, and torch serves alone."""
    real = cpu_backend.fuse

    def faulty(model, kernels, report, **options):
        real(model, kernels, report, **options)
        model.model.norm.weight.data[:8] *= 3

    monkeypatch.setattr(cpu_backend, "fuse", faulty)
    engine, _, _ = load(tiny_model(tmp_path_factory, "llama"))
    assert type(engine.backend).__name__ == "TorchBackend"
    assert "other logits" in caplog.text
