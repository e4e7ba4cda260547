"""Model directories that are broken, each in one way: name -> what makes it from a good one."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

Break = Callable[[Path], "Path | None"]  # changes the directory; may return another path to serve
CASES: dict[str, Break] = {}
WEIGHTS = "model.safetensors"


def case(name: str) -> Callable[[Break], Break]:
    def register(make: Break) -> Break:
        CASES[name] = make
        return make

    return register


def config(**changes: Any) -> Break:
    def make(path: Path) -> None:
        file = path / "config.json"
        found = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({k: v for k, v in found.items() if v is not Ellipsis}))

    return make


def text(name: str, content: str | bytes) -> Break:
    def make(path: Path) -> None:
        (path / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return make


def cut(name: str, keep: float) -> Break:
    def make(path: Path) -> None:
        whole = (path / name).read_bytes()
        (path / name).write_bytes(whole[: int(len(whole) * keep)])

    return make


def without(*names: str) -> Break:
    def make(path: Path) -> None:
        for name in names:
            (path / name).unlink()

    return make


def tensors(change: Callable[[dict[str, np.ndarray]], None]) -> Break:
    def make(path: Path) -> None:
        weights = load_file(path / WEIGHTS)
        change(weights)
        save_file(weights, path / WEIGHTS, {"format": "pt"})

    return make


def not_a_number(weights: dict[str, np.ndarray]) -> None:
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan


def another_shape(weights: dict[str, np.ndarray]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name][:-1].copy()


CASES |= {
    "weights cut off": cut(WEIGHTS, 0.7),
    "weights cut off in the header": cut(WEIGHTS, 0.0005),
    "weights empty": text(WEIGHTS, b""),
    "weights missing": without(WEIGHTS),
    "weights no safetensors": text(WEIGHTS, struct.pack("<Q", 8) + b"nonsense" * 9),
    "weights a git-lfs pointer": text(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"),
    "weights of wrong shape": tensors(another_shape),
    "weights with NaN": tensors(not_a_number),
    "a weight missing": tensors(lambda weights: weights.__delitem__("model.layers.1.mlp.up_proj.weight") or None),
    "no layer in the weights": tensors(lambda weights: [weights.pop(n) for n in list(weights) if ".2." in n] and None),
    "embeddings of another size": config(vocab_size=300),
    "zero heads": config(num_attention_heads=0),
    "heads no multiple of groups": config(num_key_value_heads=3),
    "hidden size negative": config(hidden_size=-64),
    "layers as text": config(num_hidden_layers="three"),
    "ten million layers": config(num_hidden_layers=10_000_000),
    "no positions": config(max_position_embeddings=0),
    "no model_type": config(model_type=...),
    "unknown architecture": config(model_type="llama99", architectures=["Llama99ForCausalLM"]),
    "code of its own": config(auto_map={"AutoModelForCausalLM": "modeling.Model"}),
    "unknown activation": config(hidden_act="none of them"),
    "config of a vision model": config(model_type="vit", architectures=["ViTModel"]),
    "config of an encoder-decoder": config(model_type="t5", architectures=["T5Model"]),
    "quantized by bitsandbytes": config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "quantized by gptq in 3 bits": config(quantization_config={"quant_method": "gptq", "bits": 3}),
    "quantized by an unknown way": config(quantization_config={"quant_method": "secret"}),
    "config.json broken": cut("config.json", 0.5),
    "config.json empty": text("config.json", ""),
    "config.json a list": text("config.json", "[1, 2]"),
    "config.json binary": text("config.json", b"\xff\xfe\x00"),
    "config.json missing": without("config.json"),
    "generation_config.json broken": text("generation_config.json", "{"),
    "tokenizer.json broken": cut("tokenizer.json", 0.5),
    "tokenizer.json another thing": text("tokenizer.json", '{"hello": 1}'),
    "tokenizer_config.json broken": text("tokenizer_config.json", '{"a": '),
    "tokenizer missing": without("tokenizer.json", "tokenizer_config.json"),
    "chat template broken": text("chat_template.jinja", "{% for m in messages %}{{ m.content }}"),
    "chat template unusable": text("chat_template.jinja", "{{ raise_exception('never') }}"),
    "chat template no text": text("chat_template.jinja", b"\xff\xfe\x00"),
}


@case("a shard missing")
def _shard(path: Path) -> None:
    (path / WEIGHTS).rename(path / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


@case("index of shards broken")
def _index(path: Path) -> None:
    (path / WEIGHTS).unlink()
    (path / "model.safetensors.index.json").write_text('{"weight_map": 3}')


@case("only pickled weights")
def _pickled(path: Path) -> None:
    (path / WEIGHTS).rename(path / "pytorch_model.bin")


@case("only an adapter")
def _adapter(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()
    (path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (path / "adapter_model.safetensors").write_bytes(b"")


@case("an empty directory")
def _empty(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()


@case("no directory")
def _nothing(path: Path) -> Path:
    return path / "nowhere"


@case("a file instead of a folder")
def _file(path: Path) -> Path:
    return path / "config.json"


@case("a dangling link")
def _dangling(path: Path) -> None:
    (path / WEIGHTS).unlink()
    (path / WEIGHTS).symlink_to(path / "blobs" / "gone")


@case("a truncated gguf")
def _gguf(path: Path) -> Path:
    (path / "m.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + b"\x05\x00\x00\x00")
    return path / "m.gguf"
