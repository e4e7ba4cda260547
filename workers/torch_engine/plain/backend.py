"""TorchBackend: torch alone, on any device, for models and machines that no kernels serve. It is slower."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from protocol.messages import Plan
from workers.torch_engine.attention import PagedAttention
from workers.torch_engine.backend import Backend, Logits
from workers.torch_engine.inputs import StepInputs
from workers.torch_engine.plain.attention import TorchAttention

CPU_WARM_UP = 32  # tokens: a CPU's memory does not depend on the largest step


class TorchBackend(Backend[StepInputs]):
    name = "torch alone"

    def _make_attention(self) -> PagedAttention[Any]:
        return TorchAttention()

    def replace_modules(self) -> None:
        if self.device.type == "cpu":  # where 16-bit products are slow
            self.model.float()

    def warm_up(self) -> None:
        tokens = CPU_WARM_UP if self.device.type == "cpu" else self.config.max_num_batched_tokens
        self.forward(self._padding(tokens))

    def _padding(self, tokens: int) -> StepInputs:
        """A step of ``tokens`` tokens whose keys and values go to the padding block, in rows as long as can be."""
        length = min(tokens, self.seats.max_model_len)
        counts = np.array([min(length, tokens - at) for at in range(0, tokens, length)], np.int64)
        size, none = self.config.block_size, np.zeros(0, np.int64)
        return StepInputs(
            input_ids=torch.zeros(1, tokens, dtype=torch.int64, device=self.device),
            positions=torch.cat([torch.arange(n, device=self.device) for n in counts])[None],
            slots=torch.full((tokens,), -1, device=self.device),
            logit_rows=torch.arange(min(tokens, self.config.max_num_seqs), device=self.device),
            seats=np.arange(len(counts)),
            counts=counts,
            contexts=counts,
            row_starts=np.concatenate([[0], np.cumsum(counts)]),
            block_tables=np.zeros((len(counts), -(-length // size)), np.int32),
            block_size=size,
            sampling_seats=none,
            sampling_positions=none,
        )

    def build(self, plan: Plan, every_token: bool = False) -> StepInputs:
        step = self.seats.build(plan)
        if every_token:
            step.logit_rows = torch.arange(step.input_ids.shape[1], device=self.device)
        return step

    def forward(self, step: StepInputs) -> Logits:
        self.attention.begin(step)
        logits = self._run_model(step.input_ids, step.positions, step.logit_rows)
        self.attention.end()
        return logits, None
