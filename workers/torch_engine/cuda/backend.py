"""CudaBackend: a model on a GPU by Triton kernels, with steps as tables in device memory and passes as CUDA graphs."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch

from protocol.messages import NewSequence, Plan, pack_ids
from protocol.sampling import SamplingParams
from workers.engines.base import Progress
from workers.torch_engine import verify
from workers.torch_engine.attention import PagedAttention
from workers.torch_engine.backend import Backend, Logits
from workers.torch_engine.config import EngineConfig
from workers.torch_engine.cuda import compiles
from workers.torch_engine.cuda.attention import TableAttention
from workers.torch_engine.cuda.graphs import Bucket, CudaRecorder, Rerun, TableSteps, choose_buckets
from workers.torch_engine.cuda.host_copies import HostCopies
from workers.torch_engine.cuda.modules import fuse
from workers.torch_engine.cuda.step_tables import StepTables, TableSeats
from workers.torch_engine.cuda.triton_attention import tile_tokens
from workers.torch_engine.cuda.triton_sampling import TritonDraw
from workers.torch_engine.cuda.work_list import WorkShape
from workers.torch_engine.inputs import HostStep
from workers.torch_engine.kv_pool import HostPool

log = logging.getLogger(__name__)


class CudaBackend(Backend[HostStep]):
    """``steps`` runs the model's passes, recorded ones where there are any. The device may be a CPU where the kernels
    are interpreted (tests): passes are then called again instead of being replayed."""

    name = "Triton kernels"
    fallback_on = (Exception,)  # also a kernel that does not compile for the model's sizes
    attention: TableAttention
    seats: TableSeats
    steps: TableSteps

    def __init__(self, config: EngineConfig, device: torch.device) -> None:
        self._draw = TritonDraw()
        super().__init__(config, device, self._draw)
        self._executed = 0

    # ------------------------------------------------------------------ load

    def _make_attention(self) -> PagedAttention[Any]:
        return TableAttention(self.device)

    def _make_seats(self, longest: int) -> TableSeats:
        limits = self._limits(longest)
        return TableSeats(
            limits.seats, longest, self.config.block_size, self.vocab_size, self.device, limits
        )  # fmt: skip

    def replace_modules(self) -> None:
        fuse(self.model, self.attention, self.report)

    def make_pool(self, tokens: int, longest: int) -> None:
        super().make_pool(tokens, longest)
        self._draw.last_id = self.seats.last_id
        self.steps = TableSteps(self._pass, self._shape, self.seats, self.device)
        for bucket in (Bucket(1, 1, True), Bucket(1, 1, False)):
            for layer, group in zip(self.attention.shapes, self.attention.groups, strict=True):
                self.attention.kernels.reserve(self._shape(bucket), layer.kv_heads, group, layer.value_size)

    def _make_host_pool(self, blocks: int, progress: Progress) -> HostPool:
        return HostCopies(self.pool, blocks, self.seats.limits.seats, progress)

    def _shape(self, bucket: Bucket) -> WorkShape:
        """Bounds of the attention's work. Few key heads leave more room to cut contexts into pieces."""
        extra = max(8, self.attention.kernels.programs // min(layer.kv_heads for layer in self.attention.shapes))
        tile = 1 if bucket.single else tile_tokens(max(self.attention.groups), self.attention.dtype.itemsize)
        return WorkShape.of(bucket.tokens, bucket.rows, tile, extra)

    def warm_up(self) -> None:
        """The largest step, beside as much memory as the logits of all graphs will keep."""
        config = self.config
        tokens = config.max_num_batched_tokens if self.device.type == "cuda" else 4
        rows = sum(bucket.rows for bucket in self._buckets()) if config.graphs and self.device.type == "cuda" else 0
        kept = torch.empty(rows * self.vocab_size, dtype=self.model.dtype, device=self.device)
        self.steps.run(self._padding(tokens))
        del kept

    def _padding(self, tokens: int) -> HostStep:
        """A step of ``tokens`` tokens whose keys and values go nowhere."""
        length = max(min(tokens, self.seats.max_model_len), -(-tokens // self.config.max_num_seqs))
        counts = np.array([min(length, tokens - at) for at in range(0, tokens, length)], np.int64)
        starts = np.concatenate([[0], np.cumsum(counts)])
        wanted, none = np.arange(min(tokens, self.config.max_num_seqs)), np.zeros(0, np.int64)
        computed = np.full(len(counts), 1 << 40)  # beyond all ids that the host knows
        positions = np.concatenate([np.arange(n) for n in counts])
        return HostStep(
            np.arange(len(counts)), counts, computed, counts, starts, positions, np.full(tokens, -1), wanted, none, none
        )

    # ------------------------------------------------------------------ graphs

    def ready(self, progress: Progress) -> None:
        """Record the graphs, and see to it that a replay gives what the same step gives launch by launch."""
        if not self.config.graphs:
            return
        steps, recorder = self.steps, CudaRecorder(self.device) if self.device.type == "cuda" else Rerun
        steps.record(self._buckets(), recorder, progress)
        if steps.buckets and (worst := self._replay_differs()) > verify.TOLERANCE.get(self.model.dtype, 2e-3):
            log.warning("this model runs without CUDA graphs: replayed logits differ by %.1f%%", 100 * worst)
            steps.forget()
        self.step_us = steps.time_steps(self._filled)
        self.seats.clear()
        if self.step_us:
            told = ", ".join(f"{tokens} in {us / 1e3:.1f}" for tokens, us in self.step_us)
            log.info("steps of so many tokens in so many ms: %s", told)
        if self.device.type == "cuda":
            compiles.watch()

    def _buckets(self) -> list[Bucket]:
        return choose_buckets(self.config.max_num_batched_tokens, self.config.max_num_seqs)

    def _replay_differs(self) -> float:
        """Largest difference, relative to the largest logit, between replayed steps and the same ones run at once.

        A model that keeps something of a step outside of the tables would show it here. Those run at once are not run
        as decodes, so that what only these do is compared too.
        """
        steps, size, count = self.steps, self.config.block_size, min(verify.LENGTH, self.seats.max_model_len) - 1
        width = -(-(count + 1) // size)
        rows = max(1, min(3, self.config.max_num_seqs, self.pool.blocks // width))
        params = SamplingParams()
        for seat in range(rows):
            ids = [(7 * seat + 13 * at) % 97 for at in range(count)]
            blocks = pack_ids(range(seat * width, (seat + 1) * width))
            self.seats.add(NewSequence(seat, "", 0, 0, pack_ids(ids), count, params, 0, 0, blocks, 0))
        worst = 0.0
        seats = np.arange(rows, dtype="<u2").tobytes()
        for counts in (pack_ids([count] * rows), b""):
            step = self.build(Plan(0, 0, 0, seats, counts))
            plain = steps.run(step, replay=False, single=False).float().clone()
            replayed = steps.run(step).float()
            worst = max(worst, float((plain - replayed).abs().max() / plain.abs().max().clamp_min(1e-6)))
        self.seats.clear()
        return worst

    def _filled(self, bucket: Bucket) -> HostStep:
        """A step of prompts that fill ``bucket``, as far as sequences may be so long. Nobody is served yet, so their
        keys may overwrite each other."""
        self.seats.clear()
        size, pool = self.config.block_size, self.pool.blocks
        rows = min(bucket.rows, bucket.tokens, self.config.max_num_seqs)
        most = min(self.seats.max_model_len, pool * size)
        counts = [min(most, (bucket.tokens + row) // rows) for row in range(rows)]
        drawn = np.random.default_rng(0).integers(0, self.vocab_size, max(counts) + rows)
        for seat, count in enumerate(counts):
            blocks = [(seat + at) % pool for at in range(-(-count // size))]
            ids = pack_ids(drawn[seat : seat + count].tolist())
            self.seats.add(NewSequence(seat, "", 0, 0, ids, count, SamplingParams(), 0, 0, pack_ids(blocks), 0))
        return self.build(Plan(0, 0, 0, np.arange(rows, dtype="<u2").tobytes(), pack_ids(counts)))

    # ------------------------------------------------------------------ steps

    def build(self, plan: Plan, every_token: bool = False) -> HostStep:
        step = self.seats.arrange(plan)
        if every_token:
            step.logit_rows = np.arange(step.row_starts[-1])
        return step

    def forward(self, step: HostStep) -> Logits:
        self._executed += 1
        return self.steps.run(step), None

    def _pass(self, tables: StepTables) -> torch.Tensor:
        """Logits [R, vocabulary] of the tables' logit rows. Reads tensors alone: this is what is recorded."""
        self.attention.begin(tables)
        logits = self._run_model(tables.input_ids(), tables.positions[None], tables.logit_rows)
        self.attention.end()
        return logits

    def beat(self) -> int:
        return super().beat() + self._executed
