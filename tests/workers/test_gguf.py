"""A GGUF file becomes a directory that computes what the original did; what is not understood is refused by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from transformers import AutoModelForCausalLM, AutoTokenizer

from protocol.errors import StartError
from tests.gguf_files import write_gguf
from tests.models import CONFIGS, IM_END, SMALL, VOCAB, build, byte_tokenizer
from workers.gguf.convert import convert
from workers.gguf.file import GgufFile
from workers.gguf.model import MODEL_TYPES, tokenizer_of
from workers.gguf.once import convert_once

SIZES = {**SMALL, "vocab_size": VOCAB}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
GEMMA3 = {"num_hidden_layers": 7, "layer_types": None, "query_pre_attn_scalar": 16}
CASES: dict[str, tuple[str, dict[str, Any]]] = {  # name: architecture of the file, config of the original
    "llama": ("llama", CONFIGS["llama"]),
    "llama, tied": ("llama", {**CONFIGS["llama"], "tie_word_embeddings": True}),
    "llama, wide heads": ("llama", {**CONFIGS["llama"], "head_dim": 32}),
    "llama 3.1": ("llama", {**CONFIGS["llama"], "max_position_embeddings": 32_768, "rope_parameters": LLAMA3_ROPE}),
    "qwen2": ("qwen2", CONFIGS["qwen2"]),
    "qwen3": ("qwen3", CONFIGS["qwen3"]),
    "gemma2": ("gemma2", {**CONFIGS["gemma2"], "query_pre_attn_scalar": 16, "tie_word_embeddings": True}),
    "gemma3": ("gemma3", {**CONFIGS["gemma3"], **GEMMA3}),
    "phi3": ("phi3", CONFIGS["phi3"]),
}


def no_report(stage: str, fraction: float) -> None:
    pass


def converted(source: Path) -> Path:
    directory = source.with_suffix(".dir")
    directory.mkdir()
    convert(source, directory, no_report)
    return directory


def rope_factors(model: Any) -> np.ndarray:
    """rope_freqs.weight as the converter computes it: plain frequencies over the scaled ones."""
    head = model.config.hidden_size // model.config.num_attention_heads
    plain = 500_000.0 ** -(torch.arange(0, head, 2) / head)
    return (plain / model.model.rotary_emb.inv_freq).float().numpy()


@torch.no_grad()
def logits(model: Any, length: int = 60) -> torch.Tensor:
    ids = torch.randint(0, 256, (2, length), generator=torch.Generator().manual_seed(3))
    return model(ids).logits


@pytest.mark.parametrize("case", CASES)
def test_the_directory_computes_what_the_original_does(tmp_path: Path, case: str) -> None:
    arch, fields = CASES[case]
    original = build({**fields})
    extra = {"rope_freqs.weight": rope_factors(original)} if case == "llama 3.1" else {}
    source = write_gguf(tmp_path / "model.gguf", original, arch, tensors=extra)
    directory = converted(source)
    loaded, found = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    for name, weight in original.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], weight, rtol=0, atol=3e-7)  # gemma's norms: w + 1 - 1
    torch.testing.assert_close(logits(loaded.eval()), logits(original), rtol=1e-4, atol=1e-4)


def test_every_architecture_that_is_read_is_tested() -> None:
    assert {arch for arch, _ in CASES.values()} == set(MODEL_TYPES)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("F16", torch.float16),
        ("BF16", torch.bfloat16),
        ("Q8_0", torch.bfloat16),
        ("Q4_0", torch.bfloat16),
        ("Q4_1", torch.bfloat16),
        ("Q5_0", torch.bfloat16),
    ],
)
def test_quantized_blocks_become_numbers_near_the_original(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    original = build(CONFIGS["llama"])
    source = write_gguf(tmp_path / "model.gguf", original, "llama", GGMLQuantizationType[kind])
    loaded = AutoModelForCausalLM.from_pretrained(converted(source))
    assert loaded.dtype == dtype
    levels = {"F16": 2**11, "BF16": 2**8, "Q8_0": 2**7, "Q4_0": 2**3, "Q4_1": 2**4, "Q5_0": 2**4}[kind]
    for name, weight in original.state_dict().items():
        step = weight.abs().max() / levels
        assert (loaded.state_dict()[name].float() - weight).abs().max() <= 1.2 * step, name


def test_shards_and_their_index_are_those_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.gguf.convert.SHARD_BYTES", 100_000)
    original = build(CONFIGS["qwen2"])
    directory = converted(write_gguf(tmp_path / "model.gguf", original, "qwen2"))
    assert len(list(directory.glob("model-*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert all(torch.equal(loaded.state_dict()[n], w) for n, w in original.state_dict().items())


# ------------------------------------------------------------------ tokenizer


TEXTS = ["", "hello", "  12 hello   3\n\n4 a", "naïve \U0001f600 über", "<|im_start|>user\nhi<|im_end|>"]


def test_the_tokenizer_and_template_are_the_originals(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "model.gguf", build(CONFIGS["llama"]), "llama")
    loaded, original = AutoTokenizer.from_pretrained(converted(source)), byte_tokenizer()
    chat = [{"role": "user", "content": "Hi"}]
    for text in TEXTS:
        assert loaded.encode(text) == original.encode(text)
        assert loaded.decode(loaded.encode(text)) == text
    assert loaded.apply_chat_template(chat, add_generation_prompt=True) == original.apply_chat_template(
        chat, add_generation_prompt=True
    )
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == ("<|bos|>", "<|eos|>", "<|pad|>")


def test_digits_stand_alone_where_the_file_says_so(tmp_path: Path) -> None:
    """SmolLM's rule; GPT-2's would take the blank before a digit along with it."""
    merges = ["Ġ Ġ"]
    plain = {"tokenizer.ggml.merges": merges}
    tokens = [*byte_tokenizer().convert_ids_to_tokens(range(VOCAB - 1)), "ĠĠ"]
    keys = {**plain, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [1] * VOCAB}
    model = build(CONFIGS["llama"])
    pieces = {}
    for rule in ("gpt-2", "smollm"):
        path = write_gguf(tmp_path / f"{rule}.gguf", model, "llama", metadata={**keys, "tokenizer.ggml.pre": rule})
        pieces[rule] = tokenizer_of(GgufFile(path)).tokenize("a  12")
    assert pieces == {"gpt-2": ["a", "Ġ", "Ġ", "1", "2"], "smollm": ["a", "ĠĠ", "1", "2"]}


def test_sequences_end_at_every_token_that_ends_a_turn(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        converted(write_gguf(tmp_path / "model.gguf", build(CONFIGS["llama"]), "llama"))
    )
    assert model.generation_config.eos_token_id == [257, IM_END]


# ------------------------------------------------------------------ refusals


def refusal(source: Path) -> str:
    """The sentence with which a conversion ends."""
    target = source.with_suffix(".dir")
    with pytest.raises(StartError) as caught:
        convert_once(source, target, no_report)
    assert not target.exists()
    assert str(source) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", build(CONFIGS["llama"]), "llama")
    return path.read_bytes()


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.0001, 0.003, 0.01, 0.02, 0.5, 0.999])
def test_a_file_that_is_cut_off_is_named(tmp_path: Path, whole: bytes, share: float) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[: int(len(whole) * share)])
    said = refusal(path)
    assert "cut off" in said or "empty" in said or "begin with GGUF" in said


def test_bytes_that_lie_are_refused_and_never_believed(tmp_path: Path, whole: bytes) -> None:
    """A byte of the header changed: a sentence or a directory, never another exception, nor memory without end."""
    rng = np.random.default_rng(5)
    header = whole.index(b"token_embd.weight") + 2000
    outcomes = set()
    for at in [*range(4, 24), *rng.integers(24, header, 60)]:
        damaged = bytearray(whole)
        damaged[at] ^= int(rng.integers(1, 256))
        path = tmp_path / f"{at}.gguf"
        path.write_bytes(damaged)
        try:
            convert_once(path, path.with_suffix(".dir"), no_report)
            outcomes.add("converted")
        except StartError:
            outcomes.add("refused")
    assert outcomes == {"converted", "refused"}


REFUSALS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {  # metadata, tensors, what the sentence holds
    "architecture": ({"general.architecture": "falcon"}, {}, "its architecture is 'falcon'"),
    "a part of several": ({"split.count": 3}, {}, "llama-gguf-split"),
    "a key nobody knows": ({"llama.attention.scale": 0.5}, {}, "llama.attention.scale = 0.5 is not understood"),
    "experts": ({"llama.expert_count": 8}, {}, "llama.expert_count = 8 is not understood"),
    "a scaling nobody knows": ({"llama.rope.scaling.type": "longrope"}, {}, "none, linear and yarn"),
    "partial rotary": ({"llama.rope.dimension_count": 8, "llama.attention.key_length": 16}, {}, "where a head has 16"),
    "no layers": ({"llama.block_count": 0}, {}, "llama.block_count is missing or no number above 0"),
    "ten million layers": ({"llama.block_count": 10_000_000}, {}, "names 10000000 layers"),
    "other heads": ({"llama.attention.head_count_kv": 1}, {}, "blk.0.attn_k.weight has the shape [32, 64]"),
    "a weight too many": ({}, {"blk.0.attn_q.bias": np.zeros(64, np.float32)}, "blk.0.attn_q.bias has no place"),
    "a weight too few": ({}, {"blk.1.ffn_up.weight": None}, "model.layers.1.mlp.up_proj.weight among them"),
    "a wrong shape": ({}, {"output_norm.weight": np.ones(63, np.float32)}, "output_norm.weight has the shape [63]"),
    "strange frequencies": ({}, {"rope_freqs.weight": np.full(8, 3.0, np.float32)}, "scaling of Llama 3.1"),
    "a rule nobody knows": ({"tokenizer.ggml.pre": "mine"}, {}, "cuts texts by the rule 'mine'"),
    "a tokenizer nobody knows": ({"tokenizer.ggml.model": "rwkv"}, {}, "tokenizer cannot be built"),
    "no tokenizer": (dict.fromkeys(["tokenizer.ggml.tokens", "tokenizer.ggml.model"]), {}, "tokenizer cannot be built"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_not_understood_is_refused_by_name(tmp_path: Path, case: str) -> None:
    metadata, tensors, said = REFUSALS[case]
    arch = metadata.pop("general.architecture", "llama")
    source = tmp_path / "model.gguf"
    model = build(CONFIGS["llama"])
    write_gguf(source, model, "llama", metadata=metadata, tensors=tensors)
    if arch != "llama":
        source.write_bytes(
            source.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x06\0\0\0\0\0\0\0" + arch.encode(), 1)
        )
    assert said in refusal(source)


def test_a_missing_package_is_named_with_the_command_that_brings_it() -> None:
    hidden = "import sys; sys.modules['gguf'] = None; from workers.gguf.__main__ import main; sys.exit(main('a', 'b'))"
    ended = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 78
    assert ended.stderr.count("\n") == 1
    assert "pip install 'headrace[gguf]'" in ended.stderr


def test_of_several_processes_one_converts(tmp_path: Path, whole: bytes) -> None:
    source, target = tmp_path / "model.gguf", tmp_path / "cache" / "made"
    source.write_bytes(whole)
    command = [sys.executable, "-m", "workers.gguf", str(source), str(target)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate(timeout=200)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert sum("progress convert" in text for text in told) == 1
    assert (target / "model.safetensors").is_file()
    assert [p.name for p in target.parent.iterdir() if "unfinished" in p.name] == []
