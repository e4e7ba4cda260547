"""Backend: one way to run a model on one device. TorchEngine is handed one and knows no more of it than this.

A backend owns what depends on the device: which modules of the model are replaced by kernels, the attention and the KV
pool that it reads, how a plan becomes a step's inputs, how a pass over them is launched, and how tokens are drawn.
Beside this base are TorchBackend (plain/backend.py, any device), NativeBackend (cpu/backend.py) and CudaBackend
(cuda/backend.py); make.py chooses.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

import torch

from protocol.errors import ModelRefused
from protocol.messages import Plan
from workers.engines.base import Progress
from workers.engines.checks import Limits
from workers.torch_engine import loader
from workers.torch_engine.attention import PagedAttention, adopt
from workers.torch_engine.config import EngineConfig
from workers.torch_engine.draw import Draw
from workers.torch_engine.inputs import SampledRows, Seats
from workers.torch_engine.kv_pool import HostPool, KVPool, block_bytes
from workers.torch_engine.replace import FuseReport

Step = TypeVar("Step", bound=SampledRows)
Logits = tuple[
    torch.Tensor, torch.Tensor | None
]  # [k + s, vocabulary]; int64 [k + s]: the largest of each row, where known


class Backend(ABC, Generic[Step]):
    """Methods of the load are called in the order in which they stand here, all in the thread that runs the steps."""

    name: str  # as the log says it
    fallback_on: tuple[type[Exception], ...] = (ModelRefused,)  # what lets the next backend have a try
    attention: PagedAttention[Any]
    seats: Seats
    pool: KVPool
    kv_dtype: torch.dtype | None = None  # of keys and values in the pool; None: as they are computed
    host: HostPool | None = None  # behind the pool, where one is asked for
    model: Any

    def __init__(self, config: EngineConfig, device: torch.device, draw: Draw) -> None:
        self.config, self.device, self.draw = config, device, draw
        self.step_us: list[tuple[int, int]] = []  # (tokens, microseconds) of steps that were recorded and timed
        self.report = FuseReport()

    # ------------------------------------------------------------------ load

    def take(self, model: Any) -> None:
        """Own ``model``, freshly loaded: its attention layers now call this backend's attention."""
        self.model = model
        self.report = FuseReport()
        self.attention = self._make_attention()
        self._keeps_rows = "logits_to_keep" in inspect.signature(model.forward).parameters
        adopt(model, self.attention)

    @property
    def compares_original(self) -> bool:
        """Whether the untouched model gives the logits that the result is compared with.

        On a CPU 16-bit products take minutes, and int8 weights give other logits by design: such a model is compared
        with itself after its modules were replaced, by its own eager attention.
        """
        return self.device.type != "cpu" or (self.model.dtype == torch.float32 and self.config.quantization is None)

    def replace_modules(self) -> None:
        """Put kernels into the model, as far as that needs no KV pool."""

    def make_pool(self, tokens: int, longest: int) -> None:
        """A pool for ``tokens`` tokens and empty seats whose sequences have up to ``longest``. The probe has run."""
        size, attention = self.config.block_size, self.attention
        dtype = self.kv_dtype or attention.dtype
        self.pool = KVPool(attention.shapes, -(-tokens // size), size, dtype, self.device, attention.panel)
        attention.pool = self.pool
        self.seats = self._make_seats(longest)

    def make_host_pool(self, blocks: int, progress: Progress) -> None:
        """``blocks`` of host memory behind the pool that serves, the same as on the other ranks; 0: none."""
        self.host = self._make_host_pool(blocks, progress) if blocks else None

    def replace_layers(self, longest: int) -> None:
        """Put kernels into the model that need a pool to attend to. ``longest``: most tokens of a sequence."""

    @abstractmethod
    def warm_up(self) -> None:
        """Run the largest step there can be, all of it padding as far as the pool is concerned."""

    def shorten(self, longest: int) -> None:
        """Sequences will have no more than ``longest`` tokens, fewer than was said before."""
        loader.fix_rotary(self.model, longest)

    def ready(self, progress: Progress) -> None:
        """The pool that serves has been made: do what is left to do before the first step."""

    @abstractmethod
    def _make_attention(self) -> PagedAttention[Any]: ...

    def _make_host_pool(self, blocks: int, progress: Progress) -> HostPool:
        return HostPool(self.pool, blocks)

    def _make_seats(self, longest: int) -> Seats:
        return Seats(
            self.config.max_num_seqs, longest, self.config.block_size, self.vocab_size, self.device,
            self._limits(longest),
        )  # fmt: skip

    def _limits(self, longest: int) -> Limits:
        """What plans may name. Seats are below twice the number of sequences (protocol.messages.NewSequence)."""
        config = self.config
        return Limits(2 * config.max_num_seqs, self.vocab_size, self.pool.blocks, config.block_size, longest)

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of the pool, over all layers."""
        attention = self.attention
        dtype = self.kv_dtype or attention.dtype
        return block_bytes(attention.shapes, self.config.block_size, dtype, attention.panel)

    # ------------------------------------------------------------------ steps

    @abstractmethod
    def build(self, plan: Plan, every_token: bool = False) -> Step:
        """The inputs of ``plan``'s rows. Counts them as computed, and their samples as known. ``every_token``: logits
        are wanted of all tokens, not only of those that sample."""

    @abstractmethod
    def forward(self, step: Step) -> Logits:
        """Run the model over a step. The next call may overwrite what is returned."""

    def beat(self) -> int:
        """A counter that grows while layers are computed; read from another thread."""
        attention = getattr(self, "attention", None)  # none before a model is loaded
        return attention.calls if attention is not None else 0

    def _run_model(self, ids: torch.Tensor, positions: torch.Tensor, logit_rows: torch.Tensor) -> torch.Tensor:
        """Logits of ``logit_rows``, by the model's own forward."""
        kept = {"logits_to_keep": logit_rows} if self._keeps_rows else {}
        logits = self.model(input_ids=ids, position_ids=positions, use_cache=False, **kept).logits
        found: torch.Tensor = logits[0] if kept else logits[0, logit_rows]
        return found
