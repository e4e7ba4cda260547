"""Every role's calls in one: for tests and benchmarks that play several roles at once."""

from protocol.bus import GatewayBus, LeaderBus, WorkerBus
from protocol.scripts import NAMES


class Bus(GatewayBus, LeaderBus, WorkerBus):
    SCRIPTS = NAMES
