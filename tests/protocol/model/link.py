"""The model's way to the server: the project's scripts, perhaps with one check taken out, under drawn faults."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

import redis

from protocol import scripts
from protocol.connection import checked

if TYPE_CHECKING:
    from tests.protocol.model.world import World

FAULTS = [
    "crash before",
    "crash after",
    "crash, executed late",
    "lost reply",
    "lost reply",
    "late repeat",
    "delay",
    "delay",
]
# chance that a call meets a fault; the plain reads, of which there are most, meet few
FAULT_RATES = {
    "commit": 0.1,
    "plan": 0.03,
    "finish": 0.05,
    "admit": 0.03,
    "accept": 0.05,
    "join": 0.05,
    "move": 0.1,
    "retire": 0.1,
    "register": 0.1,
    "claim": 0.1,
    "unclaim": 0.05,
    "void": 0.1,
    "reserve": 0.05,
    "unreserve": 0.05,
    "collect": 0.03,
    "settle": 0.05,
    "divert": 0.1,
    "receive": 0.2,
}
OTHER_FAULT_RATE = 0.002

# what the tests take out, to see that the model notices: script, text, replacement
MUTATIONS: dict[str, tuple[str, str, str]] = {
    "fence": (
        "commit",
        "if not is_leader(epoch) then return fenced('epoch') end\n"
        "if not is_worker(wid, gen) then return fenced('gen') end\n",
        "",
    ),
    "lockstep": (
        "_rows",
        "if v[2] or redis.call('STRLEN', journal) ~= cursor then return set_free(rid, record, ARGV[i]) end",
        "",
    ),
    "placement": ("_rows", "if not ours then return 's' end", ""),
    "move": (
        "move",
        "if redis.call('EXISTS', P .. 'j:' .. rid .. ':' .. choice) == 1 then return 'stays' end",
        "",
    ),
    "void": ("accept", "if redis.call('EXISTS', P .. 'void:' .. rid) == 1 then return {'void'} end\n", ""),
    "settled": (
        "settle",
        "if tonumber(redis.call('HGET', settled, ARGV[2]) or 0) >= tonumber(ARGV[3]) then return 0 end",
        "",
    ),
    "received": ("receive", "if ms < last_ms or (ms == last_ms and seq <= last_seq) then return 0 end", ""),
    "cursor": (
        "_rows",
        "if redis.call('STRLEN', journal) ~= cursor then return holds(journal, cursor, frames) and 'l' or 's' end",
        "",
    ),
}

# and what they take out of the agents: a worker that drops nobody for another's sake, a scheduler that goes on finding
# blocks by their hashes whatever a hint says of them
AGENT_MUTATIONS = ("followers", "spoiled")


def load_scripts(mutation: str | None) -> dict[str, scripts.Script]:
    """The project's scripts; with a mutation, one check is gone."""
    if mutation is None or mutation in AGENT_MUTATIONS:
        return scripts.load()
    part, text, replacement = MUTATIONS[mutation]
    loaded = scripts.load()
    for name, script in loaded.items():
        source = script.source.decode()
        if name == part or part in scripts.INCLUDES.get(name, ()):
            if text not in source:
                raise AssertionError(f"mutation {mutation} does not find its text")
            loaded[name] = scripts.from_source(name, source.replace(text, replacement))
    return loaded


class Crash(Exception):
    """The process dies here."""


class Turn:
    """Awaiting this lets the world run other agents."""

    def __await__(self) -> Generator[None, None, None]:
        yield


class ModelLink:
    """Stands in for protocol.connection.Link: same calls, one thread, faults drawn from the seed."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.losses = 0

    async def close(self) -> None: ...

    async def command(self, *args: Any, block_s: float = 0.0) -> Any:
        plain = list(args)
        if "BLOCK" in plain:
            at = plain.index("BLOCK")
            del plain[at : at + 2]
        return await self._call(str(args[0]), lambda: self.world.client.execute_command(*plain))

    async def pipeline(self, commands: Sequence[tuple[Any, ...]], *, tolerant: bool = False) -> list[Any]:
        return [await self._call(str(c[0]), lambda c=c: self.world.client.execute_command(*c)) for c in commands]  # type: ignore[misc]

    async def script(self, script: scripts.Script, key: str, args: Sequence[Any]) -> Any:
        def execute() -> Any:
            try:
                return self.world.client.execute_command("EVALSHA", script.sha, 1, key, *args)
            except redis.exceptions.NoScriptError:
                return self.world.client.execute_command("EVAL", script.source, 1, key, *args)

        return await self._call(script.name, execute)

    async def script_each(self, script: scripts.Script, key: str, calls: Sequence[Sequence[Any]]) -> list[Any]:
        """One by one: a connection may be lost between any two."""
        return [await self.script(script, key, args) for args in calls]

    async def _call(self, name: str, execute: Callable[[], Any]) -> Any:
        world = self.world
        await Turn()
        world.calls += 1
        fault = world.draw_fault(name)
        if fault == "crash before":
            raise Crash
        if fault == "crash, executed late":
            world.ghosts.append(lambda: self._execute(execute))
            raise Crash
        if fault == "delay":
            for _ in range(world.rng.randrange(300)):
                await Turn()
        reply = self._execute(execute)
        if fault == "crash after":
            raise Crash
        if fault == "lost reply":
            self.losses += 1
            for _ in range(world.rng.randrange(20)):
                await Turn()
            reply = self._execute(execute)
        elif fault == "late repeat":
            self.losses += 1
            world.ghosts.append(lambda: self._execute(execute))
        await Turn()
        return checked(reply)

    def _execute(self, execute: Callable[[], Any]) -> Any:
        try:
            return execute()
        except redis.exceptions.ResponseError as error:
            return error
