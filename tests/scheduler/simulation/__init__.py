"""A deterministic world for the scheduler's core: simulated workers, and a model of what the scripts promise.

    python -m tests.scheduler.simulation --seeds 5000

One seed is one history: arrivals, cancels, deadlines, workers that die, hang, drain and come back, late, lost and
repeated hints, schedulers replaced in mid-flight, requests that kill whoever runs them. It is a pure function of the
seed, so a failure can be replayed (``--seed N --verbose``).

What keeps the core honest is that the workers really keep a KV pool: every slot holds a hash of the whole prefix
that ended there, a token is drawn from that hash, and reading a slot that another sequence has overwritten, or that was
never written, fails at once. At the end every journal must be what an undisturbed run would have made of it.
"""

from __future__ import annotations

from tests.scheduler.simulation.server import Fenced, Violation
from tests.scheduler.simulation.service import SimScheduler
from tests.scheduler.simulation.world import World, simulate

__all__ = ["Fenced", "SimScheduler", "Violation", "World", "simulate"]
