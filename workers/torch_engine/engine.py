"""TorchEngine: runs plans on a transformers model over a paged KV pool, and samples.

One step is: apply the plan to the seats, have the backend build its inputs and run the model over them, sample.
Everything that depends on the device is the backend's (backend.py). On a CPU ``execute`` returns when the step is
done; on a GPU it returns once the step is queued, and ``wait`` of its output blocks until the sampled ids are on the
host.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from protocol.errors import ModelRefused, StartError, StructureNotSupported
from protocol.messages import Capacity, Plan, PoolCapacity
from protocol.structures.grammar import Grammars
from workers.engines.base import ALONE, Place, Progress
from workers.fingerprint import fingerprint
from workers.masks import Masks
from workers.torch_engine import loader, verify
from workers.torch_engine.backend import Backend
from workers.torch_engine.config import EngineConfig
from workers.torch_engine.kv_pool import blocks_within
from workers.torch_engine.logits.prompt_scores import PromptScores
from workers.torch_engine.memory import (
    Card,
    alone_on,
    card_of,
    check_room,
    default_threads,
    host_blocks,
    kv_budget,
    token_bytes,
    weight_bytes,
)
from workers.torch_engine.parallel.group import make_group
from workers.torch_engine.sampler import Sampler, StepClock, TorchStepOutput

log = logging.getLogger(__name__)

FP8 = torch.float8_e4m3fn  # of keys and values

_NO_ROWS = np.zeros(0, np.int64)


class TorchEngine:
    """The Engine protocol on torch. ``tokenizer`` and ``eos_token_ids`` are there once ``load`` has returned."""

    stages = 1
    tokenizer: Any
    eos_token_ids: Sequence[int] = ()

    def __init__(
        self, config: EngineConfig, device: torch.device, backends: Sequence[Backend[Any]], place: Place = ALONE
    ) -> None:
        """``backends``: those that may serve, best first; the first that gives the model's own logits does."""
        self.config = config
        self.place = place
        self.device = device
        self.backend = backends[0]
        self.overlaps = device.type != "cpu"
        self.masks = Masks(self._make_grammars)
        self._others = list(backends[1:])
        self._prompt_tops: dict[int, int] = {}  # seat -> alternatives to each of its prompt's tokens

    @property
    def path(self) -> str:
        return self.backend.report.path

    # ------------------------------------------------------------------ load

    @torch.inference_mode()
    def load(self, progress: Progress) -> Capacity:
        self._take_device()
        self.group = make_group(self.place, self.device)
        with alone_on(self.device, self.place, lambda: progress("wait", 0.0)):
            return self._load(progress)

    def _load(self, progress: Progress) -> Capacity:
        config = self.config
        model_config = loader.load_config(config.model)
        self.max_model_len = loader.choose_max_model_len(config.max_model_len, model_config)
        host_blocks(config.kv_offload, 1, self.place.ranks)  # refused before anything is loaded
        card = card_of(self.device, config.gpu_memory_utilization)
        if card is not None:
            self._check_room(card, model_config)
        self._dtype = loader.choose_dtype(config.dtype, model_config, self.device)  # of the weights
        self._load_checked(model_config, progress)
        self.tokenizer = loader.load_tokenizer(config.model)
        self.eos_token_ids = loader.eos_token_ids(config.model, model_config)

        progress("warm-up", 0.0)
        backend = self.backend
        self._make_pool_within(
            kv_budget(config.kv_cache_memory, self.device, backend.warm_up, self.place, card)
        )  # fmt: skip
        vocab_size = backend.vocab_size
        self.sampler = Sampler(
            config.max_num_seqs, vocab_size, list(self.eos_token_ids), self.device, backend.draw, self._encode
        )  # fmt: skip
        if self.device.type != "cpu":
            self.sampler.warm_up(backend.model.dtype)
        self.masks.prepare()  # now, since it holds the interpreter
        progress("warm-up", 1.0)
        backend.ready(progress)
        self._make_host_pool(progress)
        return Capacity(
            model=config.served_name or config.model,
            max_model_len=self.max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            pools=self._pools(),
            vocab_size=vocab_size,
            engine="torch",
            dtype=config.quantization or str(backend.model.dtype).removeprefix("torch."),
            device=str(self.device),
            step_us=backend.step_us,
            stages=self.place.stages,
            fingerprint=self._fingerprint(),
        )

    def _make_host_pool(self, progress: Progress) -> None:
        found = host_blocks(self.config.kv_offload, self.backend.block_bytes, self.place.ranks)
        self.backend.make_host_pool(self.group.least(found), progress)

    def _pools(self) -> list[PoolCapacity]:
        backend = self.backend
        pools = [PoolCapacity("full", self.config.block_size, backend.pool.blocks)]
        return pools if backend.host is None else [*pools, backend.host.capacity]

    def _encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:  # transformers' own call changes settings of the object, which other threads use
            return list(backend.encode(text, add_special_tokens=False).ids)
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _fingerprint(self) -> str:
        """Of the checkpoint, and of all that decides what is computed from it."""
        config, pool = self.config, self.backend.pool
        computed = {
            "engine": "torch",
            "dtype": str(self._dtype),
            "quantization": (config.quantization or "") + (" of widened weights" if config.dequantize else ""),
            "kv_dtype": str(pool.keys[0].dtype) if pool.keys else "",
            "rotary": str(self.max_model_len) if self._rotary_fixed else "",  # tables that were chosen by the context
        }
        return fingerprint(loader.directory_of(config.model), computed)

    def _make_grammars(self) -> Grammars:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise StructureNotSupported("this model's tokenizer has no tokenizer.json", param="structure")
        return Grammars(backend.to_str(), self.backend.vocab_size, self.eos_token_ids)

    def _check_room(self, card: Card, model_config: Any) -> None:
        """What this rank will hold of weights and pool, against its share of the card."""
        config, ranks = self.config, self.place.ranks
        dtype = loader.choose_dtype(config.dtype, model_config, self.device)
        stored = weight_bytes(config.model, dtype, loader.stored_dtype(model_config))
        weights = int(stored * loader.growth(config, model_config)) // ranks
        kv_dtype = FP8 if config.kv_cache_dtype == "fp8" else dtype
        token = token_bytes(model_config.get_text_config(), kv_dtype) // ranks
        wanted = None if config.kv_cache_memory is None else config.kv_cache_memory // ranks
        check_room(card, weights, token, config.max_model_len, wanted)

    def _take_device(self) -> None:
        """Settings of the thread and the process that compute."""
        if self.device.type == "cpu":
            threads = self.config.threads or default_threads()
            torch.set_num_threads(max(1, threads // self.place.ranks))
        elif self.device.index is not None:
            torch.cuda.set_device(self.device)  # streams and kernels go to the current one

    def _load_checked(self, model_config: Any, progress: Progress) -> None:
        """The model on the first backend that serves it as the model itself would."""
        while (reason := self._refusal(model_config, progress)) is not None:
            name, self.backend = self.backend.name, self._others.pop(0)
            log.warning("not on %s: %s; %s serves, which is slower", name, reason, self.backend.name)
            gc.collect()  # the weights of the one that failed
        self._others = []

    def _refusal(self, model_config: Any, progress: Progress) -> str | None:
        """Load the model on the current backend. Why that failed, if there is another one to try; None: it has not."""
        try:
            self._load_on(self.backend, model_config, progress)
        except torch.OutOfMemoryError:
            raise
        except self.backend.fallback_on as error:
            refused = isinstance(error, ModelRefused)
            if not self._others or (isinstance(error, StartError) and not refused):
                raise
            if not refused:
                log.warning("the %s failed", self.backend.name, exc_info=True)
            self.group.least(0)
            return str(error) if refused else f"{type(error).__name__}: {error}"
        return None if self.group.least(1) else "another rank refused it"

    def _load_on(self, backend: Backend[Any], model_config: Any, progress: Progress) -> None:
        """Load the weights, put the kernels in, and check that what comes out is what the model itself says."""
        device, longest = self.device, max(self.max_model_len, verify.LENGTH)
        model = loader.load_model(self.config, model_config, device, progress, self.group)
        backend.take(model)
        self._rotary_fixed = loader.fix_rotary(model, self.max_model_len)
        progress("check", 0.0)
        own = verify.own_logits(model, device) if backend.compares_original else None
        backend.replace_modules()
        verify.probe(model, backend.attention, device)
        backend.make_pool(4 * verify.LENGTH, longest)
        own = own or verify.own_logits(model, device)
        backend.replace_layers(longest)
        log.info("%s: %s", backend.name, backend.report)
        verify.compare(backend, own)
        if self.config.kv_cache_dtype == "fp8":
            backend.kv_dtype = FP8
            backend.make_pool(4 * verify.LENGTH, longest)
            verify.tell_loss(backend, own)

    def _make_pool_within(self, budget: int) -> None:
        """Make the pool that serves. A longest context that the user left open is lowered to what fits."""
        config, length, size = self.config, self.max_model_len, self.config.block_size
        per_block = self.backend.block_bytes
        tokens = blocks_within(budget, per_block, size, config.max_num_seqs * (length + size)) * size
        tokens = self.group.least(tokens)  # a block has its part in each rank's pool
        if tokens < length:
            if config.max_model_len is not None:
                raise StartError(
                    f"--max-model-len {length} needs {(-(-length // size) + 1) * per_block} bytes of "
                    f"KV cache, and there are {budget}: raise --kv-cache-memory or --gpu-memory-utilization, or lower "
                    "--max-model-len"
                )
            self.max_model_len = tokens
            self.backend.shorten(tokens)
        self.backend.make_pool(tokens, self.max_model_len)

    # ------------------------------------------------------------------ steps

    @torch.inference_mode()
    def execute(self, plan: Plan) -> TorchStepOutput:
        clock = StepClock(self.device)
        seats, host = self.backend.seats, self.backend.host
        if host is not None:
            host.follow(plan)
        for seat in plan.frees:
            self._drop(seat)
        for new in plan.new:
            if seats.add(new) and self.group.samples:
                self.sampler.add(new)
                if new.sampling.prompt_logprobs is not None:
                    self._prompt_tops[new.seat] = new.sampling.prompt_logprobs
                self.masks.add(new)
        for seat, blocks in plan.blocks:
            seats.extend(seat, blocks)
        output = self._run(plan, clock)
        for seat, _ in plan.ends:
            self._drop(seat)
        return output

    def _run(self, plan: Plan, clock: StepClock) -> TorchStepOutput:
        backend, sampler, group = self.backend, self.sampler, self.group
        for seats, tokens in group.told(plan.seats):
            backend.seats.note_sampled(seats, tokens)
        step = backend.build(plan) if plan.seats else None
        refused = backend.seats.take_refusals()
        if step is None or not len(step.seats):
            return TorchStepOutput(_NO_ROWS, None, _NO_ROWS, clock, refused)
        if backend.host is not None:
            backend.host.await_blocks(step)
        logits, best = backend.forward(step)
        sampling, prompts = step.sampling_seats, None
        if step.scored and group.samples:
            prompts = PromptScores.of(logits[len(sampling) :], step.scored, self._prompt_tops)
            logits, best = logits[: len(sampling)], None if best is None else best[: len(sampling)]
        if not len(sampling):
            return TorchStepOutput(_NO_ROWS, None, _NO_ROWS, clock, refused, prompts=prompts)
        if not group.samples:
            group.expect(sampling)
            return TorchStepOutput(_NO_ROWS, None, _NO_ROWS, clock, refused)
        masks = self.masks.take(sampling) if self.masks else None
        drawn = sampler.sample(logits, sampling, step.sampling_positions, best, masks)
        group.tell(drawn.tokens)
        if not drawn.kept:
            backend.seats.note_sampled(sampling, drawn.tokens)
        output = TorchStepOutput(
            sampling, drawn, sampler.tops(sampling), clock, refused, masks, sampler.names(sampling), prompts
        )  # fmt: skip
        if masks is not None:
            self.masks.drawn(sampling, output.tokens)
        return output

    def _drop(self, seat: int) -> None:
        self.backend.seats.drop(seat)
        self.sampler.drop(seat)
        self._prompt_tops.pop(seat, None)
        self.masks.drop(seat)

    def reset(self) -> None:
        self.backend.seats.clear()
        self.sampler.clear()
        self.masks.clear()

    def beat(self) -> int:
        return self.backend.beat()
