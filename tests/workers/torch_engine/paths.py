"""Which path passes take for each of many architectures, on a CPU and, by Triton's interpreter, on CUDA.

    python -m tests.workers.torch_engine.paths          writes paths.md anew

The fast paths know modules by names inside transformers: after a rename there they would be lost in silence. The table
is of the transformers that constraints.txt pins.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from protocol.errors import ModelRefused
from tests.models import CONFIGS, SERVED, build, byte_tokenizer, liven
from tests.workers.torch_engine import test_sweep as sweep
from workers.torch_engine import loader
from workers.torch_engine.config import EngineConfig
from workers.torch_engine.replace import FuseReport

TABLE = Path(__file__).with_name("paths.md")
MORE = (
    "arcee", "cohere", "exaone4", "gemma", "glm4", "granite", "hunyuan_v1_dense", "olmo2", "olmoe", "phi",
    "seed_oss", "smollm3", "starcoder2",
)  # fmt: skip
ARCHITECTURES = (*SERVED, *MORE)
HEAD = """\
# Paths through each architecture

Written by `python -m tests.workers.torch_engine.paths`, checked by `test_paths.py`. On a CPU: what the engine chose at
load. On CUDA: what the Triton kernels replaced, in their interpreter. Numbers count modules of tiny models of 2 to 4
layers.

"""


def save(name: str, path: Path) -> None:
    """A tiny model of the architecture."""
    if name in CONFIGS:
        model = build(CONFIGS[name])
    else:
        config = sweep.tiny_config(CONFIG_MAPPING[name])
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        liven(model)
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)


def config_of(path: Path) -> EngineConfig:
    return EngineConfig(
        model=str(path), device="cpu", dtype="float32", max_model_len=64, max_num_seqs=2, max_num_batched_tokens=8,
        kv_cache_memory=1 << 20, block_size=8, threads=1, graphs=False,
    )  # fmt: skip


def silent(stage: str, fraction: float) -> None:
    pass


def on_cpu(path: Path) -> FuseReport:
    """What the engine chose."""
    from workers.torch_engine.make import make_engine

    engine = make_engine(config_of(path))
    engine.load(silent)
    return engine.backend.report


def on_cuda(path: Path) -> FuseReport:
    """What the Triton kernels replace. Whether logits are then the model's own is not asked here: that takes ten times
    as long in the interpreter, and test_graphs asks it of some."""
    from tests.workers.torch_engine.cuda.triton_device import short_samples
    from workers.torch_engine.cuda.backend import CudaBackend

    config, device = config_of(path), torch.device("cpu")
    backend = CudaBackend(config, device)
    backend.take(loader.load_model(config, loader.load_config(config.model), device, silent))
    loader.fix_rotary(backend.model, 64)
    with short_samples():
        backend.replace_modules()
    return backend.report


def row(name: str) -> str:
    """The architecture's line of the table."""
    with tempfile.TemporaryDirectory(prefix=f"path-{name}-") as place, torch.inference_mode():
        save(name, Path(place))
        try:
            found = [on_cpu(Path(place)), on_cuda(Path(place))]
        except ModelRefused as refused:
            return f"| {name} | refused: {str(refused).replace(place, name)} | |\n"
    return f"| {name} | {' | '.join(f'{report.path} ({report})' for report in found)} |\n"


def table(rows: Iterator[str]) -> str:
    versions = f"transformers {transformers.__version__}"
    return f"{HEAD}| {versions} | CPU | CUDA |\n|---|---|---|\n{''.join(rows)}"


def rows_of(text: str) -> dict[str, str]:
    """name -> line."""
    lines = [line for line in text.splitlines(keepends=True) if line.startswith("| ")]
    return {line.split("|")[1].strip(): line for line in lines}


def main() -> None:
    logging.disable(logging.WARNING)

    def shown() -> Iterator[Any]:
        for name in ARCHITECTURES:
            print(line := row(name), end="", flush=True)
            yield line

    TABLE.write_text(table(shown()))


if __name__ == "__main__":
    main()
