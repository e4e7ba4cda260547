"""TorchEngine: runs plans on a transformers model over a paged KV pool, and samples.

One step is: apply the plan to the seats, build the flat batch, run the model (whose attention layers find
this engine's PagedAttention), sample. On a CPU ``execute`` returns when the step is done; on a GPU it returns
once the step is queued, and ``wait`` of its output blocks until the sampled ids are on the host.
"""

from __future__ import annotations

import inspect
import logging
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from protocol.errors import ModelRefused, StartError, StructureNotSupported
from protocol.grammar import Grammars
from protocol.messages import Capacity, NewSequence, Plan, PoolCapacity, pack_ids
from protocol.sampling import SamplingParams
from workers.engines.base import Progress
from workers.masks import Masks
from workers.native.library import Kernels, KernelsUnavailable, load_kernels
from workers.torch_engine import loader, verify
from workers.torch_engine.attention import PagedAttention, adopt
from workers.torch_engine.config import EngineConfig
from workers.torch_engine.cpu.attention import NativeAttention
from workers.torch_engine.cpu.layers import fuse_layers
from workers.torch_engine.cpu.modules import fuse
from workers.torch_engine.cpu.whole_pass import WholePass, whole_pass_of
from workers.torch_engine.inputs import Seats, StepInputs
from workers.torch_engine.kv_pool import KVPool, block_bytes, blocks_within
from workers.torch_engine.memory import default_threads, kv_budget
from workers.torch_engine.replace import FuseReport, agrees
from workers.torch_engine.sampler import Sampler
from workers.torch_engine.step_output import StepClock, TorchStepOutput
from workers.torch_engine.torch_attention import TorchAttention

log = logging.getLogger(__name__)

_NOBODY = np.zeros(0, np.int64)


class TorchEngine:
    """The Engine protocol on torch. ``tokenizer`` and ``eos_token_ids`` are there once ``load`` has returned."""

    tokenizer: Any
    eos_token_ids: Sequence[int] = ()

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.device = loader.choose_device(config.device)
        self.overlaps = self.device.type != "cpu"
        self.attention = PagedAttention(TorchAttention())
        self.kernels: Kernels | None = None
        self.whole_pass: WholePass | None = None
        self.masks = Masks(self._make_grammars)
        self._best: torch.Tensor | None = None  # int64 [k] beside the logits of the last pass, where it is known

    # ------------------------------------------------------------------ load

    @torch.inference_mode()
    def load(self, progress: Progress) -> Capacity:
        config = self.config
        if self.device.type == "cpu":
            torch.set_num_threads(config.threads or default_threads())
        model_config = loader.load_config(config.model)
        self.max_model_len = loader.choose_max_model_len(config.max_model_len, model_config)
        self._load_checked(model_config, progress)
        self.tokenizer = loader.load_tokenizer(config.model)
        self.eos_token_ids = loader.eos_token_ids(config.model, model_config)

        progress("warm-up", 0.0)
        budget = kv_budget(config.kv_cache_memory, self.device, self._warm_up)
        self._make_pool_within(budget)
        vocab_size = self.model.config.get_text_config().vocab_size
        self.sampler = Sampler(config.max_num_seqs, vocab_size, list(self.eos_token_ids), self.device, self.kernels)
        self.masks.prepare()  # now, since it holds the interpreter
        progress("warm-up", 1.0)
        return Capacity(
            model=config.served_name or config.model,
            max_model_len=self.max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            pools=[PoolCapacity("full", config.block_size, self.pool.blocks)],
            vocab_size=vocab_size,
            engine="torch",
            dtype=config.quantization or str(self.model.dtype).removeprefix("torch."),
            device=str(self.device),
        )

    def _make_grammars(self) -> Grammars:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise StructureNotSupported("this model's tokenizer has no tokenizer.json", param="structure")
        vocab_size = self.model.config.get_text_config().vocab_size
        return Grammars(backend.to_str(), vocab_size, self.eos_token_ids)

    def _load_checked(self, model_config: Any, progress: Progress) -> None:
        """The model, on native kernels where they serve it as torch would, else on torch alone."""
        kernels, int8 = None, self.config.quantization is not None
        if int8 and self.device.type != "cpu":
            raise StartError("--quantization int8 is served on a CPU only: leave it out, or say --device cpu")
        if self.device.type == "cpu":
            try:
                kernels = load_kernels()
                kernels.set_threads(torch.get_num_threads())
            except KernelsUnavailable as reason:
                if int8:
                    raise StartError(f"--quantization int8 needs the native CPU kernels: {reason}") from reason
                log.warning("native CPU kernels %s; torch serves alone, more slowly", reason)
        try:
            self._load_model(model_config, kernels, progress)
        except ModelRefused as refused:
            if kernels is None or int8:
                raise
            log.warning("not on native CPU kernels: %s; trying torch alone, which is slower", refused)
            self._load_model(model_config, None, progress)

    def _load_model(self, model_config: Any, kernels: Kernels | None, progress: Progress) -> None:
        """Load the weights, put the kernels in, and check that what comes out is what the model itself says."""
        self.kernels, self.whole_pass = kernels, None
        self.model = loader.load_model(self.config, model_config, self.device, progress)
        self.attention = PagedAttention(TorchAttention())
        self._keeps_rows = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        adopt(self.model, self.attention)
        loader.fix_rotary(self.model, self.max_model_len)
        progress("check", 0.0)
        if self.device.type == "cpu" and kernels is None:
            self.model.float()
        # 16-bit products take minutes on a CPU, and rounded weights give other logits: such a model is compared with
        # itself as it is on the kernels
        int8 = self.config.quantization is not None
        early = kernels is None or (self.model.dtype == torch.float32 and not int8)
        own = verify.own_logits(self.model, self.device) if early else None
        if kernels is not None:
            report = fuse(self.model, kernels, int8=int8)
            self.attention.backend = NativeAttention(kernels)
        verify.probe(self.model, self.attention, self.device)
        self._make_pool(4 * verify.LENGTH, max(self.max_model_len, verify.LENGTH))
        own = own or verify.own_logits(self.model, self.device)
        if kernels is not None:
            text = torch.arange(verify.LENGTH, device=self.device)
            fuse_layers(self.model, kernels, self.attention, lambda: self._paged_logits([text]), report)
            self._take_whole_pass(text, report)
            log.info("native CPU kernels (%s): %s", kernels.instruction_set, report)
        verify.compare(self.model, self._paged_logits, own, self.device)

    def _take_whole_pass(self, text: torch.Tensor, report: FuseReport) -> None:
        """Leave the model's own code out of its passes if the same comes out."""
        (own,) = self._paged_logits([text])
        self.whole_pass = whole_pass_of(self.model, max(self.max_model_len, verify.LENGTH))
        if self.whole_pass is None:
            return
        if agrees(self._paged_logits([text])[0], own):
            report.fused["pass"] += 1
        else:
            self.whole_pass = None
            report.kept["pass"] += 1

    def _make_pool_within(self, budget: int) -> None:
        """Make the pool that serves. A longest context that the user left open is lowered to what fits."""
        config, length = self.config, self.max_model_len
        per_block = block_bytes(
            self.attention.shapes, config.block_size, self.attention.dtype, self.attention.backend.panel
        )
        most = config.max_num_seqs * (length + config.block_size)
        tokens = blocks_within(budget, per_block, config.block_size, most) * config.block_size
        if tokens < length:
            if config.max_model_len is not None:
                raise StartError(
                    f"--max-model-len {length} needs {(-(-length // config.block_size) + 1) * per_block} bytes of "
                    f"KV cache, and there are {budget}: raise --kv-cache-memory or lower --max-model-len"
                )
            self.max_model_len = tokens
            loader.fix_rotary(self.model, tokens)
            self.whole_pass = self.whole_pass and whole_pass_of(self.model, tokens)  # its angles may be others
        self._make_pool(tokens, self.max_model_len)
        if self.kernels is not None:
            self.pool.touch(self.kernels)

    def _make_pool(self, tokens: int, longest: int) -> None:
        size = self.config.block_size
        attention = self.attention
        self.pool = KVPool(
            attention.shapes, -(-tokens // size), size, attention.dtype, self.device, attention.backend.panel
        )
        self.attention.pool = self.pool
        vocab_size = self.model.config.get_text_config().vocab_size
        self.seats = Seats(self.config.max_num_seqs, longest, size, vocab_size, self.device)

    def _paged_logits(self, texts: list[torch.Tensor]) -> list[torch.Tensor]:
        """Logits of every token of ``texts``, run side by side: two chunks each, then token by token."""
        size = self.config.block_size
        width = -(-verify.LENGTH // size)
        new = [
            NewSequence(
                seat, "", 0, 0, pack_ids(text.tolist()), len(text), SamplingParams(), 0, 0,
                pack_ids(range(seat * width, (seat + 1) * width)), 0,
            )
            for seat, text in enumerate(texts)
        ]  # fmt: skip
        done = [0] * len(texts)
        pieces: list[list[torch.Tensor]] = [[] for _ in texts]
        for sequence in new:
            self.seats.add(sequence)
        while any(at < len(text) for at, text in zip(done, texts, strict=True)):
            rows = [seat for seat, text in enumerate(texts) if done[seat] < len(text)]
            counts = [
                min((9, 4)[done[seat] > 0] if done[seat] < 13 else 1, len(texts[seat]) - done[seat]) for seat in rows
            ]
            step = self.seats.build(Plan(0, 0, 0, array("H", rows).tobytes(), pack_ids(counts), bytes(len(rows))))
            step.logit_rows = torch.arange(sum(counts), device=self.device)
            for seat, logits in zip(rows, torch.split(self._forward(step).float(), counts), strict=True):
                pieces[seat].append(logits)
                done[seat] += len(logits)
        self.seats.clear()
        return [torch.cat(piece) for piece in pieces]

    def _warm_up(self) -> None:
        """The largest step there can be, all of it padding as far as the pool is concerned."""
        tokens = self.config.max_num_batched_tokens if self.device.type == "cuda" else 32
        length = min(tokens, self.max_model_len)
        counts = np.array([min(length, tokens - at) for at in range(0, tokens, length)], np.int64)
        row_starts = np.concatenate([[0], np.cumsum(counts)])
        step = StepInputs(
            input_ids=torch.zeros(1, tokens, dtype=torch.int64, device=self.device),
            positions=torch.cat([torch.arange(n, device=self.device) for n in counts])[None],
            slots=torch.full((tokens,), -1, device=self.device),
            logit_rows=torch.arange(min(tokens, self.config.max_num_seqs), device=self.device),
            seats=np.arange(len(counts)),
            counts=counts,
            contexts=counts,
            row_starts=row_starts,
            block_tables=np.zeros((len(counts), -(-length // self.config.block_size)), np.int32),
            block_size=self.config.block_size,
            sampling_seats=np.zeros(0, np.int64),
            sampling_positions=np.zeros(0, np.int64),
        )
        self._forward(step)

    # ------------------------------------------------------------------ steps

    @torch.inference_mode()
    def execute(self, plan: Plan) -> TorchStepOutput:
        clock = StepClock(self.device)
        for seat in plan.frees:
            self._drop(seat)
        for new in plan.new:
            self.seats.add(new)
            self.sampler.add(new)
            self.masks.add(new)
        for seat, blocks in plan.blocks:
            self.seats.extend(seat, blocks)
        output = self._run(plan, clock)
        for seat, _ in plan.ends:
            self._drop(seat)
        return output

    def _run(self, plan: Plan, clock: StepClock) -> TorchStepOutput:
        if not plan.seats:
            return TorchStepOutput(_NOBODY, None, _NOBODY, clock)
        step = self.seats.build(plan)
        logits = self._forward(step)
        if not len(step.sampling_seats):
            return TorchStepOutput(_NOBODY, None, _NOBODY, clock)
        seats = step.sampling_seats
        masks = self.masks.take(seats) if self.masks else None
        drawn = self.sampler.sample(logits, seats, step.sampling_positions, self._best, masks)
        self.seats.note_sampled(seats, drawn.tokens)
        output = TorchStepOutput(seats, drawn, self.sampler.tops(seats), clock, masks)
        if masks is not None:
            self.masks.drawn(seats, output.tokens)
        return output

    def _forward(self, step: StepInputs) -> torch.Tensor:
        """Logits [k, vocabulary] of the rows that are wanted."""
        self.attention.begin(step)
        if self.whole_pass is not None:
            logits, self._best = self.whole_pass.logits(step)
            self.attention.end()
            return logits
        kept = {"logits_to_keep": step.logit_rows} if self._keeps_rows else {}
        logits = self.model(input_ids=step.input_ids, position_ids=step.positions, use_cache=False, **kept).logits
        self.attention.end()
        found: torch.Tensor = logits[0] if kept else logits[0, step.logit_rows]
        return found

    def _drop(self, seat: int) -> None:
        self.seats.drop(seat)
        self.sampler.drop(seat)
        self.masks.drop(seat)

    def reset(self) -> None:
        self.seats.clear()
        self.sampler.clear()
        self.masks.clear()

    def beat(self) -> int:
        return self.attention.calls + (self.kernels.progress.value if self.kernels else 0)
