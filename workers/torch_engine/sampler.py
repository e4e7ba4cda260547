"""Sampling: from logits to one token id per row, in batch, on the device, without waiting for it.

Order, per row: logprobs are read off the model's own logits; then penalties, logit_bias, allowed_token_ids,
min_tokens, bad_words, the masks of constrained rows; then the draw (draw.py), which the engine's backend hands in. A
row in which all this leaves nothing ends with an error.

What no row of a step asks for is not computed. Counts of earlier tokens exist only for seats with penalties.

Over 400 lines: a token goes from the logits to the host in one file.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from protocol.messages import NewSequence, choice_seed, pack_ids
from protocol.sampling import SamplingParams
from protocol.structures.grammar import MaskRow
from workers.engines.base import Sampled
from workers.engines.checks import NO_TOKEN_LEFT, NON_FINITE, Refusals
from workers.masks import StepMasks
from workers.torch_engine.draw import DRAW_FIELDS, Draw, OwnDraw, RuleOut, rule_out
from workers.torch_engine.logits.bad_words import BadWords, Encode
from workers.torch_engine.logits.penalties import Penalties
from workers.torch_engine.logits.prompt_scores import PromptScores
from workers.torch_engine.staging import DEVICES, Returned, main_stream, to_device

WARM_UP: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0, "logprobs": 5}, {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
    {"temperature": 0.8, "repetition_penalty": 1.2, "frequency_penalty": 0.3, "presence_penalty": 0.1, "min_tokens": 9},
    {"temperature": 0.8, "logit_bias": {0: 1.0}}, {"temperature": 0.8, "allowed_token_ids": [0, 1]},
)  # fmt: skip
COLDEST = 1e-5  # temperatures below are greedy: dividing by them overflows


@dataclass
class Drawn:
    """Tensors on the device, one entry per sampling row. Logprob fields cover only ``lp_rows`` (host)."""

    tokens: torch.Tensor  # int64 [k]
    finite: torch.Tensor  # bool [k]: whether the largest of the model's own logits is a number
    lp_rows: np.ndarray | None = None  # int64 [m]: indices into the k rows
    lp_drawn: torch.Tensor | None = None  # float32 [m]
    lp_top_ids: torch.Tensor | None = None  # int64 [m, most]
    lp_top: torch.Tensor | None = None  # float32 [m, most]
    lp_named: torch.Tensor | None = None  # float32 [m, most named]: of the ids that rows name
    ruled_rows: np.ndarray | None = None  # int64 [r]: indices of the rows from which ids were ruled out
    left: torch.Tensor | None = None  # bool [r]: whether any id is left there
    kept: bool = False  # the tokens stand as their seats' next inputs already


class Sampler:
    """Keeps what sampling needs by seat: parameters in arrays, penalty counts on the device."""

    def __init__(
        self, seats: int, vocab_size: int, eos_token_ids: list[int], device: torch.device, draw: Draw,
        encode: Encode | None = None,
    ) -> None:  # fmt: skip
        """``encode``: ids of the text of bad words."""
        self.vocab_size = vocab_size
        self.eos_token_ids = eos_token_ids
        self.device = device
        self.draw = draw
        self.rule_out: RuleOut = getattr(draw, "rule_out", rule_out)
        self._of_model: Callable[..., OwnDraw] | None = getattr(draw, "of_model", None)
        self.penalties = Penalties(vocab_size, device)
        self.bias: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # seat -> ids, values
        self.banned: dict[int, tuple[int, np.ndarray]] = {}  # seat -> position of the first free token, banned ids
        self.allowed: dict[int, np.ndarray] = {}  # seat -> the only ids that may be drawn
        self.named: dict[int, np.ndarray] = {}  # seat -> ids whose logprobs are told
        self.bad_words = BadWords(vocab_size, device, encode)
        self._fields = np.zeros(0, DRAW_FIELDS)
        self._grow(seats)

    def _grow(self, seats: int) -> None:
        self._fields = np.concatenate([self._fields, np.zeros(seats - len(self._fields), DRAW_FIELDS)])

    def add(self, new: NewSequence) -> None:
        """Take up the parameters of ``new``; its earlier outputs count as if they had been drawn here."""
        if new.seat >= len(self._fields):
            self._grow(max(new.seat + 1, 2 * len(self._fields)))
        params = new.sampling
        self.drop(new.seat)
        self._fields[new.seat] = (
            choice_seed(new.seed, new.choice),
            params.temperature if params.temperature >= COLDEST else 0.0,
            params.top_p,
            params.min_p,
            max(params.top_k, 0),
            -1 if params.logprobs is None else params.logprobs,
        )
        if params.penalized:
            self.penalties.add(new.seat, params, np.frombuffer(new.token_ids, "<i4").astype(np.int64), new.prompt_len)
        if params.logit_bias:
            ids = np.fromiter(params.logit_bias.keys(), np.int64)
            self.bias[new.seat] = (ids, np.fromiter(params.logit_bias.values(), np.float32))
        if params.min_tokens > 0 and (params.structure is None or params.structure.kind is None):  # a grammar wins
            ids = np.unique(np.array([*self.eos_token_ids, *params.stop_token_ids], np.int64))
            self.banned[new.seat] = (new.prompt_len + params.min_tokens, ids)
        if params.allowed_token_ids is not None:
            self.allowed[new.seat] = np.unique(np.array(params.allowed_token_ids, np.int64))
        if params.logprob_token_ids is not None:
            self.named[new.seat] = np.array(list(dict.fromkeys(params.logprob_token_ids)), np.int64)
        if params.bad_words:
            drawn = np.frombuffer(new.token_ids, "<i4")[new.prompt_len :].astype(np.int64)
            self.bad_words.add(new.seat, params.bad_words, drawn)

    def warm_up(self, dtype: torch.dtype) -> None:
        """Draw once with every option, from logits of ``dtype``, so that no request is the first to compile a kernel or
        to load one. No seat may be taken."""
        cases = [
            [SamplingParams(temperature=0.0)],
            [SamplingParams(temperature=0.5)],
            [SamplingParams(**kind) for kind in WARM_UP],
        ]
        mask = MaskRow(-(-self.vocab_size // 32))
        mask.bits.fill(-1)
        for case in cases:
            for masks in (None, StepMasks(np.zeros(1, np.int64), [mask])):
                for seat, params in enumerate(case):
                    self.add(NewSequence(seat, "", 0, 0, pack_ids([0, 0]), 1, params, 0, 0, b"", 0))
                rows = np.arange(len(case))
                logits = torch.zeros(len(case), self.vocab_size, dtype=dtype, device=self.device)
                self.sample(logits, rows, np.ones_like(rows), None, masks)
                self.clear()
        for seat in range(len(WARM_UP)):
            self._fields[seat] = np.zeros((), DRAW_FIELDS)

    def drop(self, seat: int) -> None:
        """Forget a seat; no error if it is unknown."""
        self.penalties.drop(seat)
        self.bias.pop(seat, None)
        self.banned.pop(seat, None)
        self.allowed.pop(seat, None)
        self.named.pop(seat, None)
        self.bad_words.drop(seat)

    def clear(self) -> None:
        for seat in {
            *self.penalties.slots, *self.bias, *self.banned, *self.allowed, *self.named, *self.bad_words.seats
        }:  # fmt: skip
            self.drop(seat)

    def sample(
        self, logits: torch.Tensor, seats: np.ndarray, positions: np.ndarray, best: torch.Tensor | None = None,
        masks: StepMasks | None = None,
    ) -> Drawn:  # fmt: skip
        """Draw one token per row of ``logits`` [k, vocabulary]. ``best`` (int64 [k]): the largest of each, if known.

        ``seats`` [k] names the rows' seats, ``positions`` [k] the position that each token takes in its sequence.
        What ``masks`` rule out is drawn by no row of theirs; it may be written into ``logits``, in these rows alone.
        """
        fields = self._fields[seats]
        lp_rows = np.flatnonzero(fields["logprobs"] >= 0)
        if self._of_model is not None and not self._has_processors:
            tokens, finite, kept = self._of_model(logits, fields, positions, masks, seats)
            if not len(lp_rows):
                return Drawn(tokens, finite, kept=kept)
            of_rows = torch.log_softmax(logits[self._index(lp_rows)].float(), dim=-1)
            return self._with_logprobs(Drawn(tokens, finite, kept=kept), of_rows, seats, lp_rows)
        masked = masks is not None and len(masks.rows) > 0
        plain = not len(lp_rows) and not self._has_processors and not (masked and self.draw.takes_masks)
        if plain and not (fields["temperature"] > 0).any():
            largest, best = _top(logits, best)
            finite = torch.isfinite(largest)
            return Drawn(self._largest(logits, best, masks), finite)  # 16-bit logits order as if widened
        # amax takes a NaN for the largest, wherever it stands
        finite = torch.isfinite(logits.amax(-1) if best is None else _top(logits, best)[0])
        logprobs = torch.log_softmax(logits[self._index(lp_rows)].float(), dim=-1) if len(lp_rows) else None
        if self._has_processors:
            logits = self._process_logits(logits.float(), seats, positions)
        ruled = self._ruled_rows(seats)
        if masks is not None and (ruled is not None or not self.draw.takes_masks):
            self.rule_out(logits, masks)
        left = logits[self._index(ruled)].amax(-1) > -torch.inf if ruled is not None else None
        tokens = self.draw(logits, fields, positions, masks if self.draw.takes_masks else None)
        self.penalties.count(seats, tokens)
        self.bad_words.count(seats, tokens)
        found = Drawn(tokens, finite, ruled_rows=ruled, left=left)
        return found if logprobs is None else self._with_logprobs(found, logprobs, seats, lp_rows)

    def _with_logprobs(self, drawn: Drawn, logprobs: torch.Tensor, seats: np.ndarray, rows: np.ndarray) -> Drawn:
        """``drawn`` with what its ``rows`` asked for: ``logprobs`` [m, vocabulary] are theirs."""
        top = logprobs.topk(int(self._fields["logprobs"][seats].max()), dim=-1)
        drawn.lp_rows, drawn.lp_top_ids, drawn.lp_top = rows, top.indices, top.values
        drawn.lp_drawn = logprobs.gather(-1, drawn.tokens[self._index(rows)][:, None])[:, 0]
        drawn.lp_named = self._of_named(logprobs, seats[rows]) if self.named else None
        return drawn

    def _ruled_rows(self, seats: np.ndarray) -> np.ndarray | None:
        """int64 [r]: indices of the rows from which ids may be ruled out by the request's own parameters."""
        if not (self.allowed or self.bad_words.seats):
            return None
        rows = [r for r, seat in enumerate(seats.tolist()) if seat in self.allowed or seat in self.bad_words.seats]
        return np.array(rows, np.int64) if rows else None

    def _of_named(self, logprobs: torch.Tensor, seats: np.ndarray) -> torch.Tensor | None:
        """float32 [m, most named]: logprobs of the ids that each seat names, then of id 0."""
        names = [self.named.get(seat, _NO_IDS) for seat in seats.tolist()]
        if not (most := max(map(len, names))):
            return None
        ids = np.stack([np.pad(own, (0, most - len(own))) for own in names])
        return logprobs.gather(-1, self._index(ids))

    def _largest(self, logits: torch.Tensor, best: torch.Tensor, masks: StepMasks | None) -> torch.Tensor:
        """int64 [k]: the largest of each row, once what is ruled out is out. ``best``: those before."""
        if masks is None or not len(masks.rows):
            return best
        self.rule_out(logits, masks)
        rows = self._index(masks.rows)
        return best.index_copy(0, rows, logits[rows].argmax(dim=-1))

    def tops(self, seats: np.ndarray) -> np.ndarray:
        """How many alternatives each seat asked for; -1: no logprobs at all."""
        return np.asarray(self._fields["logprobs"][seats])

    def names(self, seats: np.ndarray) -> dict[int, np.ndarray]:
        """The ids that seats name, of those that name any."""
        return {seat: self.named[seat] for seat in seats.tolist() if seat in self.named} if self.named else {}

    def _process_logits(self, logits: torch.Tensor, seats: np.ndarray, positions: np.ndarray) -> torch.Tensor:
        """Penalties, then logit_bias, allowed_token_ids, min_tokens and bad_words. Copies before it changes anything;
        only bad words are written in place: the logprobs have been read."""
        rows = {int(seat): row for row, seat in enumerate(seats)} if self._has_processors else {}
        processed = self.penalties.apply(logits, rows)
        biased = [(row, *self.bias[seat]) for seat, row in rows.items() if seat in self.bias]
        banned = [
            (row, ids)
            for seat, row in rows.items()
            for until, ids in (self.banned.get(seat, _NEVER),)
            if positions[row] < until
        ]
        allowed = [(row, self.allowed[seat]) for seat, row in rows.items() if seat in self.allowed]
        if (biased or banned or allowed) and processed is logits:
            processed = logits.clone()
        if biased:
            values = to_device(np.concatenate([b[2] for b in biased]), self.device)
            processed.index_put_(self._places([b[:2] for b in biased]), values, accumulate=True)
        for row, ids in allowed:
            index = self._index(ids)
            kept = processed[row, index]
            processed[row].fill_(-torch.inf).index_copy_(0, index, kept)
        if banned:
            out = torch.full((), -torch.inf, device=self.device)  # torch.tensor() would wait
            processed.index_put_(self._places(banned), out)
        self.bad_words.rule_out(processed, rows)
        return processed

    @property
    def _has_processors(self) -> bool:
        return bool(self.penalties.slots or self.bias or self.banned or self.allowed or self.bad_words.seats)

    def _places(self, ids: list[tuple[int, np.ndarray]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Index of the ids of each row: int64 [all of them] rows, and ids."""
        rows = np.repeat([row for row, _ in ids], [len(own) for _, own in ids])
        return self._index(rows), self._index(np.concatenate([own for _, own in ids]))

    def _index(self, array: np.ndarray) -> torch.Tensor:
        return to_device(np.ascontiguousarray(array), self.device)


def _top(logits: torch.Tensor, best: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest of each row [k], and where it stands (``best``, if that is known)."""
    if best is None:
        largest = logits.max(dim=-1)
        return largest.values, largest.indices
    return logits.gather(-1, best[:, None])[:, 0], best


_NO_IDS = np.zeros(0, np.int64)
_NEVER: tuple[int, np.ndarray] = (-1, _NO_IDS)


# ------------------------------------------------------------------ the way to the host


class StepClock:
    """Device time of one step: from its making to ``stop``. On a GPU both are marks in the stream."""

    def __init__(self, device: torch.device) -> None:
        self._marks = None
        self._took_us = 0
        if device.type == "cuda":
            self._stream = main_stream(device)
            self._marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
            self._marks[0].record(self._stream)
        self._began = time.perf_counter()

    def stop(self) -> None:
        """Everything of the step has been queued (GPU) or done (CPU)."""
        self._took_us = int((time.perf_counter() - self._began) * 1e6)
        if self._marks is not None:
            self._marks[1].record(self._stream)

    def wait(self) -> int:
        """Block until the device is there; microseconds that the step took it."""
        if self._marks is None:
            return self._took_us
        self._marks[1].synchronize()
        return int(self._marks[0].elapsed_time(self._marks[1]) * 1e3)


class OnHost:
    """Results that lie on the host already; what Returned is for those of a GPU."""

    def __init__(self, results: tuple[torch.Tensor | None, ...]) -> None:
        self._results = results

    def wait(self) -> list[np.ndarray | None]:
        return [None if tensor is None else tensor.numpy() for tensor in self._results]

    def release(self) -> None:
        pass


def _to_host(results: tuple[torch.Tensor | None, ...]) -> Returned | OnHost:
    elsewhere = [t.device for t in results if t is not None and t.device.type in DEVICES]
    return Returned(results, elsewhere[0]) if elsewhere else OnHost(results)


class TorchStepOutput:
    """Holds one step's draws (None where no row samples). On a GPU their copy to pinned memory is queued here.

    ``wait`` is called once."""

    def __init__(
        self, seats: np.ndarray, drawn: Drawn | None, tops: np.ndarray, clock: StepClock, refused: Refusals,
        masks: StepMasks | None = None, names: dict[int, np.ndarray] | None = None,
        prompts: PromptScores | None = None,
    ) -> None:  # fmt: skip
        """``tops`` and ``names``: what each row's seat asked for, as the sampler tells it."""
        self._prompts = prompts
        self._of_prompts = _to_host(prompts.tensors) if prompts is not None else None
        self._refused = refused
        self._names = names or {}
        self._seats = seats
        self._masks = masks
        self._tops = tops
        self._clock = clock
        self._lp_rows = drawn.lp_rows if drawn else None
        self._ruled_rows = drawn.ruled_rows if drawn else None
        clock.stop()
        results: tuple[torch.Tensor | None, ...] = ()
        if drawn is not None:
            logprobs = drawn.lp_drawn, drawn.lp_top_ids, drawn.lp_top, drawn.lp_named
            results = (drawn.tokens, *logprobs, drawn.finite, drawn.left)
        self._results = _to_host(results) if results else None
        self._tokens: np.ndarray | None = None  # once they have been read
        self._reading = threading.Lock()

    def tokens(self) -> np.ndarray:
        """int64 [k]: the ids drawn. Blocks until they are on the host; any thread may ask."""
        with self._reading:
            if self._tokens is None:
                assert self._results is not None
                (tokens, *_) = self._results.wait()
                assert tokens is not None
                self._tokens = tokens.copy()
        return self._tokens

    def wait(self) -> Sampled:
        """Block until the step's ids are on the host."""
        of_prompts = {}
        if self._prompts is not None and self._of_prompts is not None:
            of_prompts = self._prompts.by_seat(self._of_prompts.wait())
            self._of_prompts.release()
        if self._results is None:
            none, failed, dropped = self._seats.astype(np.int32), self._refused.failed, self._refused.dropped
            return Sampled(none, none, {}, self._clock.wait(), failed, dropped, prompts=of_prompts)
        tokens = self.tokens()
        _, drawn, top_ids, top, named, finite, left = self._results.wait()
        exec_us = self._clock.wait()
        logprobs = {} if drawn is None else self._logprobs(drawn, top_ids, top, named)
        sampled = Sampled(self._seats.astype(np.int32), tokens.astype(np.int32), logprobs, exec_us, prompts=of_prompts)
        assert finite is not None
        if self._refused.dropped or not finite.all():
            sampled.failed |= self._refused.failed
            sampled.dropped += self._refused.dropped
            for seat in self._seats[~finite].tolist():
                sampled.failed[seat] = NON_FINITE
                sampled.dropped.append(seat)
        if left is not None and self._ruled_rows is not None and not left.all():
            sampled.failed |= dict.fromkeys(self._seats[self._ruled_rows[~left]].tolist(), NO_TOKEN_LEFT)
        self._results.release()
        if self._masks is not None:
            sampled.failed |= self._masks.failed
            sampled.late = self._masks.late
            sampled.mask_us = self._masks.mask_us
            sampled.mask_wait_us = self._masks.wait_us
        return sampled

    def _logprobs(
        self, drawn: np.ndarray, top_ids: Any, top: Any, named: np.ndarray | None
    ) -> dict[int, tuple[float, np.ndarray, np.ndarray]]:
        """By seat, as Sampled has them: the most probable ids, then those that the request names."""
        assert self._lp_rows is not None
        found = {}
        for at, row in enumerate(self._lp_rows.tolist()):
            asked, seat = int(self._tops[row]), int(self._seats[row])
            ids, values = top_ids[at, :asked].astype(np.int32), top[at, :asked].copy()
            if named is not None and (names := self._names.get(seat)) is not None:
                other = ~np.isin(names, ids)
                ids = np.concatenate([ids, names[other].astype(np.int32)])
                values = np.concatenate([values, named[at, : len(names)][other]])
            found[seat] = (float(drawn[at]), ids, values)
        return found
