"""An engine that only keeps time: every step takes as long as a model of step times says, no arithmetic is done.

For tests, and to measure the scheduler, the server and the gateways without GPUs. Tokens are a hash of
(seed, choice, position), so a sequence gives the same tokens wherever and however often it runs. It checks
what an engine relies on: that plans follow each other, and that every computed token has a block.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from tokenizers import Tokenizer

from protocol.errors import StartError, StructureNotSupported
from protocol.messages import (
    ID_BYTES,
    Capacity,
    NewSequence,
    Plan,
    PoolCapacity,
    choice_seed,
    pack_ids,
    pack_seats,
    unpack_ids,
    unpack_seats,
)
from protocol.structures.grammar import Grammars, TokenVocabulary
from workers.detokenizer import Vocabulary
from workers.engines.base import Progress, Sampled, Scores
from workers.engines.checks import NON_FINITE, scores_prompt
from workers.fingerprint import fingerprint
from workers.masks import Masks, StepMasks

EOS = 256  # of the built-in byte vocabulary: ids 0 to 255 are bytes
SLICE_S = 0.05  # a long step beats this often
PRINTABLE = (32, 127)


@dataclass
class SimulatedConfig:
    """A step of t tokens in r rows lasts step_us + t * token_us + r * row_us microseconds."""

    step_us: float = 2000.0
    token_us: float = 20.0
    row_us: float = 10.0
    stages: int = 1  # of a pipeline, each of which takes its share of that
    link_us: float = 0.0  # from one stage to the next, and from the last to the first
    load_s: float = 0.0
    max_model_len: int = 4096
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    block_size: int = 16
    num_blocks: int = 8192
    host_blocks: int = 0  # behind them, for what is evicted from the prefix cache
    model: str | None = None  # its tokenizer makes the text; None: ids below 256 are bytes
    token_range: tuple[int, int] | None = None  # sampled ids lie in [low, high); default: printable ones
    eos_token_ids: tuple[int, ...] = (EOS,)
    eos_one_in: int = 0  # one sampled token in so many is an end; 0: never
    # for failure tests: token id in a prompt (text, as JSON has keys) -> "error": its logits are not finite; "drop":
    # the first two placements cannot be computed; "end": this process ends, as by a kernel's illegal address; "hang":
    # the step never ends
    fail_rows: dict[str, str] | None = None
    random: bool = False  # truly random tokens: one that is drawn twice shows (for failure tests)


def byte_vocabulary() -> Vocabulary:
    """Ids 0 to 255 are bytes, all others say nothing."""
    return Vocabulary(lambda token: bytes([token]) if 0 <= token < 256 else b"")


def read_tokenizer(model: str) -> tuple[Any, int, int | None]:
    """A directory's tokenizer, how many ids it has, and the one that ends a text. StartError.

    tokenizer.json is read without transformers, whose import takes longer than all else that a worker with this engine
    does at its start. A hub id and slow tokenizers need it.
    """
    directory = Path(model).expanduser()
    try:
        told = json.loads((directory / "tokenizer_config.json").read_bytes()).get("eos_token")
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    except FileNotFoundError:
        return _read_by_transformers(model)
    except Exception as error:  # tokenizers raises nothing narrower
        raise StartError(f"cannot load the tokenizer of {model}: {error}") from error
    end = told["content"] if isinstance(told, dict) else told
    return tokenizer, tokenizer.get_vocab_size(), tokenizer.token_to_id(end) if end else None


def _read_by_transformers(model: str) -> tuple[Any, int, int | None]:
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise StartError(f"cannot load the tokenizer of {model}: {error}") from error
    return getattr(found, "backend_tokenizer", found), len(found), found.eos_token_id


class SimulatedEngine:
    overlaps = True

    def __init__(self, config: SimulatedConfig, clock: Callable[[], float] = time.perf_counter) -> None:
        self.config = config
        self.stages = config.stages
        self.eos_token_ids: Sequence[int] = config.eos_token_ids
        self.path = "simulated"
        self.tokenizer: Any = None
        self._vocab_size = EOS + 1
        self._range = config.token_range or PRINTABLE
        self._clock = clock
        self._free_at = [0.0] * config.stages  # when each stage has done all submitted steps
        self.busy_s = 0.0  # of each stage, so far
        self._beats = 0
        self._hangs = False
        self.masks = Masks(self._make_grammars)
        self._failures = {int(token): kind for token, kind in (config.fail_rows or {}).items()}
        self._refused: Counter[tuple[str, int]] = Counter()  # (rid, choice) -> placements given up
        self.reset()

    def load(self, progress: Progress) -> Capacity:
        config = self.config
        if config.model is not None:
            self._load_tokenizer(config.model)
        for tenth in range(10):
            progress("load", tenth / 10)
            time.sleep(config.load_s / 10)
        progress("load", 1.0)
        return Capacity(
            model="", max_model_len=config.max_model_len, max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            pools=[PoolCapacity("full", config.block_size, config.num_blocks)]
            + ([PoolCapacity("host", config.block_size, config.host_blocks)] if config.host_blocks else []),
            vocab_size=self._vocab_size, engine="simulated", device="none", stages=self.stages,
            fingerprint=self._fingerprint(),
        )  # fmt: skip

    def _fingerprint(self) -> str:
        """Of what decides which tokens it gives."""
        config = self.config
        ends = sorted(self.eos_token_ids)
        computed = {"engine": "simulated", "tokens": f"{self._range} {ends} {config.eos_one_in} {config.random}"}
        directory = Path(config.model).expanduser() if config.model is not None else None
        return fingerprint(directory if directory is not None and directory.is_dir() else None, computed)

    def _load_tokenizer(self, model: str) -> None:
        self.tokenizer, self._vocab_size, end = read_tokenizer(model)
        self._range = self.config.token_range or (0, self._vocab_size)
        if end is not None:
            self.eos_token_ids = [end]

    def _make_grammars(self) -> Grammars:
        if self.tokenizer is None:
            tokens = [bytes([byte]) for byte in range(EOS)] + [b""] * (self._vocab_size - EOS)
            vocabulary: Any = TokenVocabulary(tokens, list(self.eos_token_ids))
        elif isinstance(self.tokenizer, Tokenizer):
            vocabulary = self.tokenizer.to_str()
        else:
            raise StructureNotSupported("this model's tokenizer has no tokenizer.json", param="structure")
        return Grammars(vocabulary, self._vocab_size, self.eos_token_ids)

    def reset(self) -> None:
        """All state is by seat, in arrays: a step of many rows costs few numpy calls."""
        seats = 2 * self.config.max_num_seqs
        self._known = np.zeros(seats, np.int64)  # tokens with an id; 0: nobody sits here
        self._computed = np.zeros(seats, np.int64)
        self._blocks = np.zeros(seats, np.int64)
        self._keys = np.zeros(seats, np.uint64)
        self._sampled_at = np.zeros(seats)  # when the first stage knows the id sampled last
        self._wants_logprobs: dict[int, int] = {}
        self._scored: dict[int, tuple[int, int]] = {}  # seat -> tokens of its prompt, alternatives
        self._failing: set[int] = set()  # seats
        self._given_up: set[int] = set()
        self.masks.clear()

    def beat(self) -> int:
        return self._beats

    def execute(self, plan: Plan) -> SimulatedOutput:
        if not self._failures:
            return self._execute(plan)
        plan, dropped = self._choose_failures(plan)
        output = self._execute(plan)
        failing = [seat for seat in output.sampled.seats.tolist() if seat in self._failing]
        output.sampled.failed |= dict.fromkeys(failing, NON_FINITE)
        output.sampled.dropped = dropped + failing
        return output

    def _choose_failures(self, plan: Plan) -> tuple[Plan, list[int]]:
        """``plan`` without what is given up, and the seats of its new sequences that are."""
        gone = {*plan.frees, *(new.seat for new in plan.new)}
        self._given_up -= gone
        self._failing -= gone
        dropped = []
        for new in plan.new:
            kinds = {self._failures.get(token) for token in unpack_ids(new.token_ids)[: new.prompt_len]}
            if "end" in kinds:
                os.kill(os.getpid(), signal.SIGKILL)
            self._hangs = self._hangs or "hang" in kinds
            if "drop" in kinds and self._refused[new.rid, new.choice] < 2:
                self._refused[new.rid, new.choice] += 1
                dropped.append(new.seat)
            elif "error" in kinds:
                self._failing.add(new.seat)
        self._given_up.update(dropped)
        kept = [k for k, seat in enumerate(unpack_seats(plan.seats)) if seat not in self._given_up]
        seats, counts = unpack_seats(plan.seats), unpack_ids(plan.counts)
        left = msgspec.structs.replace(
            plan,
            seats=pack_seats(seats[k] for k in kept),
            counts=pack_ids(counts[k] for k in kept) if counts else b"",
            samples=bytes(plan.samples[k] for k in kept) if plan.samples else b"",
            new=[new for new in plan.new if new.seat not in self._given_up],
            blocks=[(seat, ids) for seat, ids in plan.blocks if seat not in self._given_up],
        )
        return left, dropped

    def _execute(self, plan: Plan) -> SimulatedOutput:
        for seat in plan.frees:
            self._leave(seat)
        for new in plan.new:
            self._seat(new)
        for seat, ids in plan.blocks:
            self._blocks[seat] += len(ids) // ID_BYTES
        seats = np.frombuffer(plan.seats, "<u2")
        counts = np.frombuffer(plan.counts, "<i4") if plan.counts else np.ones(len(seats), np.int32)
        prompts = self._score(seats, counts) if self._scored else {}
        self._compute(seats, counts)
        sampling = seats[np.frombuffer(plan.samples, np.uint8) != 0] if plan.samples else seats
        sampled = self._sample(sampling)
        sampled.prompts = prompts
        for seat, _ in plan.ends:
            self._leave(seat)
        config = self.config
        busy = (config.step_us + config.token_us * int(counts.sum()) + config.row_us * len(seats)) * 1e-6
        done = self._pass_stages(seats, busy / self.stages)
        self._sampled_at[sampling] = done + config.link_us * 1e-6 * (self.stages > 1)
        sampled.exec_us = round(busy / self.stages * 1e6)
        return SimulatedOutput(self, sampled, done)

    def _pass_stages(self, seats: np.ndarray, busy: float) -> float:
        """When a step that takes each stage ``busy`` seconds is done. A stage computes one step after another; the
        first cannot begin before it knows the last id of each row."""
        known = self._sampled_at[seats].max(initial=0.0) if self.stages > 1 else 0.0
        at = max(self._clock(), float(known))
        for stage, free_at in enumerate(self._free_at):
            at = max(at, free_at) + busy
            self._free_at[stage] = at
            at += self.config.link_us * 1e-6
        self.busy_s += busy
        return self._free_at[-1]

    def _seat(self, new: NewSequence) -> None:
        seat = new.seat
        self._sampled_at[seat] = 0.0
        self.masks.add(new)
        self._known[seat] = len(unpack_ids(new.token_ids))
        self._computed[seat] = new.computed
        self._blocks[seat] = len(new.block_table) // ID_BYTES
        self._keys[seat] = choice_seed(new.seed, new.choice)
        if new.sampling.logprobs is not None:
            self._wants_logprobs[seat] = new.sampling.logprobs
        if scores_prompt(new):
            self._scored[seat] = (new.prompt_len, new.sampling.prompt_logprobs or 0)

    def _leave(self, seat: int) -> None:
        self._known[seat] = 0
        self._wants_logprobs.pop(seat, None)
        self._scored.pop(seat, None)
        self.masks.drop(seat)

    def _compute(self, seats: np.ndarray, counts: np.ndarray) -> None:
        if len(np.unique(seats)) != len(seats):
            raise ValueError("plan: two rows for one seat")
        self._computed[seats] += counts
        computed = self._computed[seats]
        if np.any(computed > self._known[seats]):
            raise ValueError("plan: a row computes tokens that are not known")
        if np.any(computed > self._blocks[seats] * self.config.block_size):
            raise ValueError("plan: a row has no block for its tokens")

    def _score(self, seats: np.ndarray, counts: np.ndarray) -> dict[int, Scores]:
        """Of each prompt token minus its position, and of its alternatives, ids 0, 1, ..., minus their rank."""
        found = {}
        for seat, count in zip(seats.tolist(), counts.tolist(), strict=True):
            size, k = self._scored.get(seat, (0, 0))
            first = int(self._computed[seat])
            if (told := min(count, size - 1 - first)) > 0:
                own = -1.0 - np.arange(first, first + told, dtype=np.float32)
                ids = np.tile(np.arange(k, dtype=np.int32), (told, 1))
                found[seat] = Scores(own, np.ones(told, np.int32), ids, -1.0 - ids.astype(np.float32))
        return found

    def _sample(self, seats: np.ndarray) -> Sampled:
        if np.any(self._computed[seats] != self._known[seats]):
            raise ValueError("plan: a row samples before all known tokens are computed")
        drawn = _mix(self._keys[seats] + self._known[seats].astype(np.uint64) * GOLDEN)
        if self.config.random:
            drawn = np.frombuffer(os.urandom(8 * len(seats)), np.uint64)
        low, high = self._range
        tokens = (low + drawn % np.uint64(high - low)).astype(np.int32)
        if self.config.eos_one_in and self.eos_token_ids:
            ending = (drawn >> np.uint64(32)) % np.uint64(self.config.eos_one_in) == 0
            tokens[ending] = self.eos_token_ids[0]
        masks = self.masks.take(seats) if self.masks else None
        if masks is not None:
            _constrain(tokens, drawn, masks)
            self.masks.drawn(seats, lambda: tokens)
        self._known[seats] += 1
        logprobs = {}
        for row, seat in enumerate(seats.tolist()) if self._wants_logprobs else ():
            if (top := self._wants_logprobs.get(seat)) is not None:
                ids = (tokens[row] + np.arange(top, dtype=np.int32)) % self._vocab_size
                logprobs[seat] = (-1.0, ids, -1.0 - np.arange(top, dtype=np.float32))
        sampled = Sampled(seats.astype(np.int32), tokens, logprobs)
        if masks is not None:
            sampled.failed, sampled.late = masks.failed, masks.late
            sampled.mask_us, sampled.mask_wait_us = masks.mask_us, masks.wait_us
        return sampled

    def _pass_time(self, until: float) -> None:
        while self._hangs:
            time.sleep(SLICE_S)
        while (left := until - self._clock()) > 0:
            time.sleep(min(left, SLICE_S))
            self._beats += 1
        self._beats += 1


@dataclass
class SimulatedOutput:
    engine: SimulatedEngine
    sampled: Sampled
    ready_at: float

    def wait(self) -> Sampled:
        self.engine._pass_time(self.ready_at)
        return self.sampled


def _constrain(tokens: np.ndarray, drawn: np.ndarray, masks: StepMasks) -> None:
    """Each constrained row takes one of the ids that its mask allows, by the same hash."""
    for row, mask in zip(masks.rows.tolist(), masks.masks, strict=True):
        allowed = np.flatnonzero(np.unpackbits(mask.bits.view(np.uint8), bitorder="little"))
        tokens[row] = allowed[int(drawn[row]) % len(allowed)]


GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed
