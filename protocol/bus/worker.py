"""What a worker may do: register, send heartbeats, read its plans and commit what it computed."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from protocol.bus.base import Base
from protocol.connection import Argument
from protocol.keys import check_name
from protocol.messages import WIRE, Capacity, CommitRow, Hint, Plan, commit_arguments, encode, next_id

MOST_COMMIT_ROWS = 256  # rows in one script call

_plan_decoder = msgspec.msgpack.Decoder(Plan)


class WorkerBus(Base):
    """The calls of a worker."""

    SCRIPTS = ("commit", "heartbeat", "register")

    async def register(self, wid: str, capacity: Capacity | None, state: str) -> int:
        """Draw a gen and write `w:<wid>`. Plans are then read from 0-0; those of another (epoch, gen) are skipped."""
        packed = encode(capacity) if capacity is not None else b""
        gen: int = await self._run("register", check_name(wid, "name"), state, packed, WIRE)
        return gen

    async def heartbeat(self, wid: str, gen: int, state: str | None = None, capacity: Capacity | None = None) -> int:
        """A beat that no commit carries; changes state if given (within a gen only forward: loading, warming, serving,
        draining). Returns the current epoch. Fenced("gen")."""
        packed = encode(capacity) if capacity is not None else b""
        epoch: int = await self._run("heartbeat", wid, gen, state or "", packed)
        return epoch

    async def read_plans(self, wid: str, after: str, block_ms: int) -> list[tuple[str, Plan]]:
        """Plans after stream id ``after``, in order."""
        entries = await self._read_stream(self.keys.plans(wid), after, 64, block_ms)
        return [(entry_id.decode(), _plan_decoder.decode(flat[1])) for entry_id, flat in entries]

    async def commit(
        self,
        wid: str,
        epoch: int,
        gen: int,
        rows: Sequence[CommitRow],
        hint: Hint,
        *,
        executed: str | None = None,
    ) -> str:
        """Journal and publish rows, hint once, beat, trim plans up to stream id ``executed``. Returns one verdict per
        row. More than 256 rows go as several calls, the hint in the last. Fenced("epoch") or Fenced("gen")."""
        trim = next_id(executed) if executed else ""
        script, verdicts, packed_hint = self._scripts["commit"], "", encode(hint)
        for start in range(0, max(len(rows), 1), MOST_COMMIT_ROWS):
            part = rows[start : start + MOST_COMMIT_ROWS]
            last = start + MOST_COMMIT_ROWS >= len(rows)
            tail: list[Argument] = [packed_hint, verdicts, trim] if last else ["", "", ""]
            head: list[Argument] = [self.keys.prefix, epoch, wid, gen, self._retention_ms]
            reply = await self._link.script(script, self.keys.leader, [*head, *tail, *commit_arguments(part)])
            verdicts += str(reply, "ascii")
        return verdicts
