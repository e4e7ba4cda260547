"""EngineConfig: what a user may choose about the torch engine. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineConfig:
    """``model`` is a local directory or a hub id. None and "auto" leave the choice to the engine."""

    model: str
    served_name: str = ""  # the name clients use; default: the model's own
    dtype: str = "auto"  # auto, float32, bfloat16, float16
    quantization: str | None = None  # what weights of linear layers are rounded to: fp8 (GPU), int8, int4
    dequantize: bool = False  # widen the weights of a quantized checkpoint as they are loaded
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    max_model_len: int | None = None  # most tokens of one sequence, prompt and output together
    max_num_seqs: int = 256  # most sequences in one step
    max_num_batched_tokens: int = 2048  # token budget of one step
    kv_cache_memory: int | None = None  # bytes for keys and values; default: a share of what is free
    kv_cache_dtype: str = "auto"  # of keys and values: auto, as they are computed; fp8 (GPU)
    kv_offload: int | None = None  # bytes of host memory for blocks that are evicted from the prefix cache
    gpu_memory_utilization: float = 0.9  # share of a GPU's whole memory: weights, activations and pool together
    block_size: int = 16  # tokens per KV block
    threads: int | None = None  # CPU threads of the forward pass
    kernel_cache: str | None = None  # folder where compiled kernels are kept between starts
    graphs: bool = True  # on a GPU: record steps as CUDA graphs
