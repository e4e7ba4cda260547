"""What goes into the scheduler's core and what comes out: frozen events and effects, nothing else.

The service turns Redis into events and effects into Redis calls; the simulation in the tests does the
same without Redis. Times are seconds of one monotonic clock, given by the caller.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from protocol.messages import Capacity, HintRow, Plan, Priority
from protocol.sampling import SamplingParams

# ------------------------------------------------------------------ events


@dataclass(frozen=True)
class ChoiceState:
    """The state of one choice's journal when the core takes the choice up (again)."""

    output: array[int] = field(default_factory=lambda: array("i"))  # journaled token ids
    cursor: int = 0  # journal length in bytes
    placement: int = 0  # last placement recorded; the next one is higher
    finish: str | None = None


@dataclass(frozen=True)
class Arrive:
    """A request that was admitted, new or recovered. ``sampling.max_tokens`` may still be None: then it has as many as
    the context leaves, and no more than ``default_max_tokens``."""

    rid: str
    tenant: str
    priority: Priority
    prompts: list[array[int]]  # choice i continues prompts[i // sampling.n]
    sampling: SamplingParams
    seed: int
    arrived: float  # monotonic seconds; when accept made it durable
    deadline: float | None = None  # monotonic seconds
    id: str | None = None
    wants_result: bool = False
    cache_salt: str = ""  # within the tenant's own salt
    attempts: int = 0  # worker deaths that it was present at
    choices: list[ChoiceState] | None = None  # None: all fresh
    default_max_tokens: int | None = None
    fingerprint: str = ""  # of the worker that it was placed on last; "": none, or unknown


@dataclass(frozen=True)
class WorkerServing:
    """A worker registered or became ready. A gen other than the known one implies WorkerLost of that."""

    wid: str
    gen: int
    capacity: Capacity


@dataclass(frozen=True)
class WorkerDraining:
    """Its sequences move to other workers at once, or finish here if there is no other; then ReleaseWorker."""

    wid: str
    gen: int


@dataclass(frozen=True)
class WorkerLost:
    """The worker was retired. ``journals`` has the journaled state of its sequences; late hints are ignored.
    ``died``: counts as a death of the sequences in its uncommitted plans (False: it was drained)."""

    wid: str
    gen: int
    journals: dict[tuple[str, int], ChoiceState] = field(default_factory=dict)
    died: bool = True


@dataclass(frozen=True)
class StepDone:
    """All steps of this worker up to ``step`` are committed. ``rows`` are the hint's own, in its order; ``verdicts``
    has one letter a row (LANDED, CLOSED, STALE), or is empty where all landed."""

    wid: str
    gen: int
    step: int
    rows: list[HintRow]
    exec_us: int = 0
    idle_us: int = 0
    verdicts: str = ""
    dropped: list[int] = field(default_factory=list)  # seats that the worker has given up
    spoiled: bytes = b""  # blocks that do not hold what their hashes say


@dataclass(frozen=True)
class Cancel:
    rid: str
    reason: str = "abort"


@dataclass(frozen=True)
class ChoiceEnded:
    """A FinishChoice effect landed (or found the choice closed already). Where it found the journal longer or the
    placement another, the service answers with Resynced instead and gets a new FinishChoice."""

    rid: str
    choice: int


@dataclass(frozen=True)
class Resynced:
    """The answer to a Resync: the state of this choice by its journal and request."""

    rid: str
    choice: int
    state: ChoiceState


@dataclass(frozen=True)
class ServedElsewhere:
    """Tokens that tenants were served in other shards of the model. ``most``: by so many they may be ahead for it."""

    tokens: dict[str, float]
    most: float


Event = (
    Arrive | WorkerServing | WorkerDraining | WorkerLost | StepDone | Cancel | ChoiceEnded | Resynced | ServedElsewhere
)

# ------------------------------------------------------------------ effects


@dataclass(frozen=True)
class SendPlan:
    wid: str
    plan: Plan  # its gen; the service sets the epoch


@dataclass(frozen=True)
class FinishChoice:
    """End a choice that no worker runs: one terminal frame at ``cursor``."""

    rid: str
    choice: int
    placement: int
    cursor: int
    reason: str  # abort, deadline, error, length
    error_code: str | None = None
    error_message: str | None = None
    error_param: str | None = None
    dead: bool = False  # also write a dead letter (it killed workers)


@dataclass(frozen=True)
class RequestDone:
    """All choices ended. Figures for metrics and the log line; times in seconds."""

    rid: str
    tenant: str
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    finish_reasons: list[str]
    queued_s: float  # arrival to first plan
    prefill_s: float  # first plan to first token
    decode_s: float  # first token to end
    preemptions: int = 0
    load_s: float = 0.0  # of queued_s: until the model was loaded, where no worker served it when the request came


@dataclass(frozen=True)
class ReleaseWorker:
    """A draining worker holds no sequence any more and may exit."""

    wid: str
    gen: int


@dataclass(frozen=True)
class Resync:
    """The core lost track of this choice (a gap in the hints, a stale row): read its journal and request, and answer
    with Resynced. No worker runs it any more."""

    rid: str
    choice: int


Effect = SendPlan | FinishChoice | RequestDone | ReleaseWorker | Resync
