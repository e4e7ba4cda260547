"""Request and Sequence: what the core knows of one generation, and the table of its states.

    waiting ──start──► running ──end───────────────────────────► ended
       ▲                │  │                                        ▲
       │              leave └──cancel──► ending (its worker ends it)─┤
       │                ▼                                           │
       ├───settle─── leaving (planned steps not hinted yet)         │
       └──resynced── resyncing (journal asked for) ──► finishing ───┘
                                             (no worker runs it: FinishChoice)

A transition that the table lacks raises and changes nothing.
"""

from __future__ import annotations

import enum
import sys
from array import array
from collections.abc import Callable
from typing import NamedTuple

from protocol.errors import RequestError, ServiceError
from protocol.levels import sampling_level
from protocol.messages import unpack_ids
from scheduler.core.blocks import BlockManager, chain_hashes
from scheduler.core.events import Arrive, ChoiceState, FinishChoice


def _append_swapped(ids: array[int], raw: bytes) -> None:
    ids.extend(unpack_ids(raw))


# Append packed ids to an array of ids. Called for every row of every step: on most machines the array's own method.
append_ids: Callable[[array[int], bytes], None] = array.frombytes if sys.byteorder == "little" else _append_swapped


class State(enum.Enum):
    WAITING = "waiting"  # in the queue, or assigned to a worker that has not been told
    RUNNING = "running"  # has a seat; steps are planned
    LEAVING = "leaving"  # its blocks are given back; the hint of its last planned step is still to come
    RESYNCING = "resyncing"  # on no worker; its journal has been asked for
    ENDING = "ending"  # its worker is told to write the terminal frame
    FINISHING = "finishing"  # on no worker; the scheduler writes the terminal frame
    ENDED = "ended"


TRANSITIONS: dict[State, frozenset[State]] = {
    State.WAITING: frozenset({State.RUNNING, State.FINISHING, State.ENDED}),
    State.RUNNING: frozenset({State.LEAVING, State.ENDING, State.ENDED}),
    State.LEAVING: frozenset({State.WAITING, State.RESYNCING, State.FINISHING, State.ENDED}),
    State.ENDING: frozenset({State.LEAVING, State.ENDED}),
    State.RESYNCING: frozenset({State.WAITING, State.FINISHING, State.ENDED}),
    State.FINISHING: frozenset({State.ENDED}),
    State.ENDED: frozenset(),
}


class IllegalTransition(Exception):
    """A bug in the scheduler: the table has no such transition."""


class Request:
    """What the choices of one request share, and the figures for its RequestDone."""

    __slots__ = (
        "arrived",
        "attempts",
        "deadline",
        "default_max_tokens",
        "fingerprint",
        "first_planned",
        "first_token",
        "id",
        "level",
        "open",
        "preemptions",
        "prompts",
        "rid",
        "salt",
        "sampling",
        "seed",
        "sequences",
        "tenant",
        "waiting",
        "wants_result",
    )

    def __init__(self, event: Arrive, level: int) -> None:
        self.rid = event.rid
        self.tenant = event.tenant
        self.level = level  # index into PRIORITIES
        self.sampling = event.sampling
        self.default_max_tokens = event.default_max_tokens
        self.seed = event.seed
        self.arrived = event.arrived
        self.deadline = event.deadline
        self.id = event.id
        self.wants_result = event.wants_result
        self.salt = f"{event.tenant}\0{event.cache_salt}"
        self.attempts = event.attempts
        self.prompts = event.prompts
        self.fingerprint = event.fingerprint  # of the worker that a choice was placed on last; "": unknown
        count = len(event.prompts) * event.sampling.n
        states = event.choices or [ChoiceState()] * count
        self.sequences = [
            Sequence(self, choice, event.prompts[choice // event.sampling.n], states[choice]) for choice in range(count)
        ]
        self.open = count  # choices not ended
        self.waiting = 0  # choices in the queue
        self.first_planned: float | None = None
        self.first_token: float | None = None
        self.preemptions = 0

    @property
    def begun(self) -> bool:
        """Whether a choice has a token, or may get one: it is on a worker."""
        return any(s.cursor or s.seat >= 0 or s.state is State.ENDED for s in self.sequences)

    def may_run_at(self, fingerprint: str) -> bool:
        """Whether a worker with these weights may run it: what has begun goes on with what it has begun with. Older
        workers do not tell ("") and are trusted."""
        known = self.fingerprint
        return fingerprint == known or not (known and fingerprint and self.begun)

    def place_at(self, fingerprint: str) -> None:
        """One of its choices starts on a worker with these weights."""
        if fingerprint or not self.begun:
            self.fingerprint = fingerprint


class PrefixHits(NamedTuple):
    """How many leading blocks of a waiting sequence a worker held when its pool's hashes were at ``version``."""

    blocks: BlockManager
    version: int
    known: int  # tokens of the sequence then
    hits: int


class Sequence:
    """One choice. ``output`` and ``cursor`` say what is journaled; ``computed`` what is planned to have its KV."""

    __slots__ = (
        "blocks",
        "cached_tokens",
        "choice",
        "cleared",
        "computed",
        "cursor",
        "dead",
        "dropped_at",
        "drops",
        "end_reason",
        "entry",
        "error",
        "final",
        "finish_reason",
        "hash_size",
        "hashes",
        "known",
        "last_step",
        "level",
        "lost_track",
        "max_tokens",
        "output",
        "placement",
        "prefix_hits",
        "prompt",
        "ready_s",
        "request",
        "sampling",
        "seat",
        "served",
        "state",
        "stranded",
        "top_placement",
        "uncached",
        "waiting_level",
    )

    def __init__(self, request: Request, choice: int, prompt: array[int], state: ChoiceState) -> None:
        self.request = request
        self.choice = choice
        self.prompt = prompt
        self.output: array[int] = array("i", state.output)
        self.cursor = state.cursor
        self.placement = state.placement  # as recorded
        self.top_placement = state.placement  # highest that was ever planned
        self.state = State.WAITING
        self.finish_reason: str | None = None
        self.end_reason: str | None = None  # why it is to be ended: abort, deadline
        self.error: RequestError | ServiceError | None = None  # what its terminal frame reports
        self.dead = False  # its end is also a dead letter
        self.final: FinishChoice | None = None  # asked for, not confirmed
        self.sampling = request.sampling
        self.level = sampling_level(request.sampling)  # least level of a worker that can read it
        self.max_tokens: int | None = request.sampling.max_tokens

        self.seat = -1
        self.blocks: list[int] = []
        self.known = 0  # tokens known, or sampled by planned steps; kept while it prefills
        self.computed = 0  # of them computed by planned steps; while it decodes, the worker's counter says it
        self.uncached = 0  # tokens that the prefill of this placement computes, in all
        self.ready_s = 0.0  # planned work of its worker after which blocks that it has copied in are there
        self.last_step = 0  # once it leaves or its rows are all planned: the last step that may mention it
        self.lost_track = False  # the hints had a gap: its journal has to be read

        self.hashes: list[bytes] = []  # one per full block of the known tokens
        self.hash_size = 0  # block size they were made for
        self.prefix_hits: dict[str, PrefixHits] = {}  # by worker, while it waits
        self.cached_tokens: int | None = None  # prefix-cache hits at its first placement
        self.drops = 0  # placements in a row that a worker gave up without a token
        self.dropped_at = 0  # known tokens at the last of them
        self.stranded: float | None = None  # since when only workers with other weights are left
        self.served = False  # its prompt has been charged to its tenant
        self.cleared = 0  # attempts of the request when it last completed a step alone
        self.waiting_level = request.level  # its class, raised by waiting
        self.entry = 0  # its newest entry in the queue; older ones are ignored

    @property
    def needs_quarantine(self) -> bool:
        """Present at two deaths or more since it last ran a step alone."""
        return self.request.attempts >= 2 and self.cleared < self.request.attempts

    @property
    def target(self) -> int:
        """Tokens at which it ends by length: prompt + max_tokens."""
        assert self.max_tokens is not None
        return len(self.prompt) + self.max_tokens

    @property
    def scores_prompt(self) -> bool:
        """Logprobs of its prompt are still to be journaled, so all of it has to be computed."""
        return self.sampling.prompt_logprobs is not None and self.cursor == 0

    @property
    def known_tokens(self) -> int:
        return len(self.prompt) + len(self.output)

    def move(self, state: State) -> None:
        """Make a transition of the table. Raises IllegalTransition, changing nothing, if there is none."""
        if state not in TRANSITIONS[self.state]:
            raise IllegalTransition(f"{self.state.value} -> {state.value} of {self.request.rid}:{self.choice}")
        self.state = state

    def adopt(self, state: ChoiceState) -> None:
        """Take over the journaled state."""
        self.output = array("i", state.output)
        self.cursor = state.cursor
        self.placement = state.placement
        self.top_placement = max(self.top_placement, state.placement)
        self.lost_track = False

    def prefix_hashes(self, block_size: int) -> list[bytes]:
        """Hashes of the full blocks of prompt + output, made once and extended as the output grows."""
        if self.hash_size != block_size:
            twin = self.request.sequences[self.choice - self.choice % self.request.sampling.n]  # same prompt
            shared = twin.hashes[: len(self.prompt) // block_size] if twin.hash_size == block_size else []
            self.hashes, self.hash_size = shared, block_size
        if len(self.hashes) < self.known_tokens // block_size:
            chain_hashes(self.request.salt, self.prompt + self.output, block_size, self.hashes)
        return self.hashes
