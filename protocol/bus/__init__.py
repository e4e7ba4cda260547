"""All atomic operations, reads and the live tail of one model on Redis, cut by role as deploy/users.acl cuts them.

Each operation of the design is one method here and one Lua file in protocol/lua. Every script is safe to repeat, so a
lost reply is answered by asking again (protocol/connection.py).
"""

from protocol.bus.gateway import GatewayBus
from protocol.bus.home import HomeBus
from protocol.bus.leader import LeaderBus
from protocol.bus.producer import ProducerBus
from protocol.bus.virtual import VirtualBus
from protocol.bus.worker import WorkerBus

__all__ = ["GatewayBus", "HomeBus", "LeaderBus", "ProducerBus", "VirtualBus", "WorkerBus"]
