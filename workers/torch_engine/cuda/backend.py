"""TorchEngine on a GPU: Triton kernels, steps in tables, CUDA graphs. The protocol and the seats are the same.

What it cannot serve so, because a comparison at load fails, it serves as TorchEngine does: torch alone, launch by
launch, said in the log.
"""

from __future__ import annotations

import gc
import inspect
import logging
from array import array
from typing import Any

import numpy as np
import torch

from protocol.errors import ModelRefused, StartError
from protocol.messages import Capacity, NewSequence, Plan, pack_ids
from protocol.sampling import SamplingParams
from workers.engines.base import Progress
from workers.native.library import Kernels
from workers.torch_engine import loader, verify
from workers.torch_engine.attention import adopt
from workers.torch_engine.config import EngineConfig
from workers.torch_engine.cuda.attention import TableAttention
from workers.torch_engine.cuda.graphs import Bucket, CudaRecorder, Rerun, TableSteps, choose_buckets
from workers.torch_engine.cuda.modules import fuse
from workers.torch_engine.cuda.step_tables import StepTables, TableSeats
from workers.torch_engine.cuda.triton_attention import tile_tokens
from workers.torch_engine.cuda.work_list import WorkShape
from workers.torch_engine.engine import TorchEngine
from workers.torch_engine.inputs import HostStep

log = logging.getLogger(__name__)


class CudaEngine(TorchEngine):
    """``steps`` is None where torch serves alone."""

    attention: Any
    seats: Any

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.steps: TableSteps | None = None
        self._tables = True
        self._executed = 0

    # ------------------------------------------------------------------ load

    @torch.inference_mode()
    def load(self, progress: Progress) -> Capacity:
        if self.device.index is not None:
            torch.cuda.set_device(self.device)  # streams and kernels go to the current one
        capacity = super().load(progress)
        if self.steps is not None and self.config.graphs:
            self._record(self.steps, progress)
        return capacity

    def _load_checked(self, model_config: Any, progress: Progress) -> None:
        try:
            self._load_model(model_config, None, progress)
            return
        except torch.OutOfMemoryError:
            raise
        except StartError as error:
            if not isinstance(error, ModelRefused):
                raise
            reason = str(error)
        except Exception as error:  # a kernel that does not compile for these sizes
            log.warning("the Triton kernels failed", exc_info=True)
            reason = f"{type(error).__name__}: {error}"
        log.warning("not on Triton kernels: %s; torch alone serves, which is slower", reason)
        self._tables, self.steps = False, None
        del self.model
        gc.collect()
        super()._load_model(model_config, None, progress)

    def _load_model(self, model_config: Any, kernels: Kernels | None, progress: Progress) -> None:
        self.kernels = kernels
        self.model = loader.load_model(self.config, model_config, self.device, progress)
        self.attention = TableAttention(self.device)
        self._keeps_rows = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        adopt(self.model, self.attention)
        loader.fix_rotary(self.model, self.max_model_len)
        progress("check", 0.0)
        own = verify.own_logits(self.model, self.device)
        _group_experts(self.model)
        report = fuse(self.model, self.attention)
        verify.probe(self.model, self.attention, self.device)
        self._make_pool(4 * verify.LENGTH, max(self.max_model_len, verify.LENGTH))
        verify.compare(self.model, self._paged_logits, own, self.device)
        log.info("Triton kernels: %s", report)

    def _make_pool(self, tokens: int, longest: int) -> None:
        super()._make_pool(tokens, longest)
        if not self._tables:
            return
        # Plans name seats below twice the number of sequences (protocol.messages.NewSequence)
        vocab_size = self.model.config.get_text_config().vocab_size
        self.seats = TableSeats(2 * self.config.max_num_seqs, longest, self.config.block_size, vocab_size, self.device)
        self.steps = TableSteps(self._pass, self._shape, self.seats, self.device)
        for bucket in (Bucket(1, 1, True), Bucket(1, 1, False)):
            for layer, group in zip(self.attention.shapes, self.attention.groups, strict=True):
                self.attention.kernels.reserve(self._shape(bucket), layer.kv_heads, group, layer.value_size)

    def _shape(self, bucket: Bucket) -> WorkShape:
        """Bounds of the attention's work. Few key heads leave more room to cut contexts into pieces."""
        extra = max(8, self.attention.kernels.programs // min(layer.kv_heads for layer in self.attention.shapes))
        tile = 1 if bucket.single else tile_tokens(max(self.attention.groups), self.attention.dtype.itemsize)
        return WorkShape.of(bucket.tokens, bucket.rows, tile, extra)

    def _warm_up(self) -> None:
        """The largest step there can be, all of it padding as far as the pool is concerned, and what graphs keep."""
        if self.steps is None:
            super()._warm_up()
            return
        config = self.config
        tokens = config.max_num_batched_tokens if self.device.type == "cuda" else 4
        length = max(min(tokens, self.max_model_len), -(-tokens // config.max_num_seqs))
        counts = np.array([min(length, tokens - at) for at in range(0, tokens, length)], np.int64)
        starts = np.concatenate([[0], np.cumsum(counts)])
        wanted = np.arange(min(tokens, config.max_num_seqs))
        none = np.zeros(0, np.int64)
        step = HostStep(
            np.arange(len(counts)), counts, np.full(len(counts), 1 << 40), counts, starts,  # beyond all given ids
            np.concatenate([np.arange(n) for n in counts]), np.full(tokens, -1), wanted, none, none,
        )  # fmt: skip
        rows = sum(bucket.rows for bucket in self._buckets()) if config.graphs and self.device.type == "cuda" else 0
        vocab_size = self.model.config.get_text_config().vocab_size
        kept = torch.empty(rows * vocab_size, dtype=self.model.dtype, device=self.device)  # each graph's logits
        self.steps.run(step)
        del kept

    # ------------------------------------------------------------------ graphs

    def _buckets(self) -> list[Bucket]:
        return choose_buckets(self.config.max_num_batched_tokens, self.config.max_num_seqs)

    def _record(self, steps: TableSteps, progress: Progress) -> None:
        recorder = CudaRecorder(self.device) if self.device.type == "cuda" else Rerun
        steps.record(self._buckets(), recorder, progress)
        if steps.buckets and (worst := self._replay_differs(steps)) > verify.TOLERANCE.get(self.model.dtype, 2e-3):
            log.warning("this model runs without CUDA graphs: replayed logits differ by %.1f%%", 100 * worst)
            steps.forget()

    def _replay_differs(self, steps: TableSteps) -> float:
        """Largest difference, relative to the largest logit, between replayed steps and the same ones run at once.

        A model that keeps something of a step outside of the tables would show it here.
        """
        size, count = self.config.block_size, min(20, self.max_model_len - 1)
        width = -(-(count + 1) // size)
        rows = max(1, min(3, self.config.max_num_seqs, self.pool.blocks // width))
        params = SamplingParams()
        for seat in range(rows):
            ids = [(7 * seat + 13 * at) % 97 for at in range(count)]
            blocks = pack_ids(range(seat * width, (seat + 1) * width))
            self.seats.add(NewSequence(seat, "", 0, 0, pack_ids(ids), count, params, 0, 0, blocks, 0))
        worst = 0.0
        seats = array("H", range(rows)).tobytes()
        for counts in (pack_ids([count] * rows), b""):
            step = self.seats.build(Plan(0, 0, 0, seats, counts))
            plain = steps.run(step, replay=False).float().clone()
            replayed = steps.run(step).float()
            worst = max(worst, float((plain - replayed).abs().max() / plain.abs().max().clamp_min(1e-6)))
        self.seats.clear()
        return worst

    # ------------------------------------------------------------------ steps

    def _pass(self, tables: StepTables) -> torch.Tensor:
        """Logits [R, vocabulary] of the tables' logit rows. Reads tensors alone: this is what is recorded."""
        self.attention.begin(tables)
        kept = {"logits_to_keep": tables.logit_rows} if self._keeps_rows else {}
        logits: torch.Tensor = self.model(
            input_ids=tables.input_ids(), position_ids=tables.positions[None], use_cache=False, **kept
        ).logits
        self.attention.end()
        return logits[0] if kept else logits[0, tables.logit_rows]

    def _forward(self, step: Any) -> torch.Tensor:
        if self.steps is None:
            return super()._forward(step)
        if isinstance(step.logit_rows, torch.Tensor):
            step.logit_rows = step.logit_rows.cpu().numpy()
        self._executed += 1
        return self.steps.run(step)

    def beat(self) -> int:
        return int(self.attention.calls) + self._executed


def _group_experts(model: Any) -> None:
    """Experts as one grouped product, which can be recorded; eager loops over those that were hit, which cannot."""
    try:
        model.set_experts_implementation("grouped_mm")
    except (AttributeError, ValueError, KeyError, RuntimeError, ImportError) as error:
        log.debug("experts stay as they are: %s", error)
