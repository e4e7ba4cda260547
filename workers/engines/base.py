"""What a worker asks of an engine. The torch engine and the simulated one keep this protocol.

One owner, one thread: all methods are called from the device thread. Steps are executed in the order
given. `execute` may return before the device is done; `StepOutput.wait` blocks until it is, so that the
inputs of the next step can be built meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from protocol.messages import Capacity, Plan

Progress = Callable[[str, float], None]  # (stage, fraction 0..1): "load", "warm-up", ...


@dataclass(frozen=True)
class Place:
    """Which of a worker's ranks an engine is: several compute one model together. By itself it is the only one.

    Ranks are numbered stage by stage; those of a stage hold parts of the same layers.
    """

    rank: int = 0
    ranks: int = 1
    stages: int = 1
    rendezvous: str = ""  # where the ranks meet: the path of a file that they share, or tcp://HOST:PORT, rank 0's
    device: int = 0  # which of its machine's visible GPUs is its own

    @property
    def parts(self) -> int:
        """Ranks of a stage."""
        return self.ranks // self.stages

    @property
    def stage(self) -> int:
        return self.rank // self.parts

    @property
    def part(self) -> int:
        return self.rank % self.parts

    @property
    def samples(self) -> bool:
        """Whether this is the one rank that draws tokens and reports: the first of the last stage."""
        return self.rank == self.ranks - self.parts


ALONE = Place()


@dataclass
class Scores:
    """What the model says of some prompt tokens that follow each other, the first one's successor first: m of them."""

    logprobs: np.ndarray  # float32 [m]
    ranks: np.ndarray  # int32 [m]: 1 for the most probable
    top_ids: np.ndarray  # int32 [m, k]: the most probable ids, best first
    top: np.ndarray  # float32 [m, k]


@dataclass
class Sampled:
    """What one step drew. Arrays have one entry per row of the plan that samples, in plan order."""

    seats: np.ndarray  # int32 [k]
    tokens: np.ndarray  # int32 [k]
    # only rows that asked for logprobs: seat -> (logprob of the drawn token, ids int32 [m], logprobs float32 [m])
    logprobs: dict[int, tuple[float, np.ndarray, np.ndarray]]
    exec_us: int = 0  # device time of the step
    # sequences that end here, their token counting for nothing: seat -> (error code, message)
    failed: dict[int, tuple[str, str]] = field(default_factory=dict)
    # seats whose sequences could not be computed: their blocks do not hold what the plans say. Those that are not among
    # ``failed`` are for the scheduler to place anew. No later step tells of them again
    dropped: list[int] = field(default_factory=list)
    # seats whose token counts for nothing, since no mask was there in time. Nothing that follows in them counts, and
    # the scheduler, which misses it, places the sequence anew
    late: list[int] = field(default_factory=list)
    mask_us: int = 0  # longest time that the mask of one of its constrained rows took
    mask_wait_us: int = 0  # time that the draw waited for masks
    # of sequences that ask for logprobs of their prompt, in steps that computed some of it: seat -> its next tokens
    prompts: dict[int, Scores] = field(default_factory=dict)


class StepOutput(Protocol):
    def wait(self) -> Sampled: ...


class Engine(Protocol):
    overlaps: bool  # execute returns before the device is done: the next step is submitted before this one's wait
    stages: int  # steps that are computed at once, at least 1

    @property
    def eos_token_ids(self) -> Sequence[int]:
        """Ids that end a sequence, known after load."""

    @property
    def path(self) -> str:
        """Known after load: how the model is computed, for the log and a metric."""

    def load(self, progress: Progress) -> Capacity:
        """Load the model, size the pool, warm up. StartError / ModelRefused say what to do."""

    def execute(self, plan: Plan) -> StepOutput:
        """Apply plan.frees, plan.new, plan.blocks, then compute its rows. ``plan.ends`` are the caller's to
        write; their seats are freed here too, after the step."""

    def reset(self) -> None:
        """Forget every seat and all KV (a new epoch or gen)."""

    def beat(self) -> int:
        """A counter that grows with progress inside a step (layers run): read from another thread."""
