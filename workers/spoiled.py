"""Blocks of KV that do not hold what the plans say, and who would read them.

A plan gives a new sequence the blocks of others as soon as the step that fills them is planned. If that step's row then
cannot be computed, what shares its blocks would read what was never written. So whoever does is dropped too, in the
same step or when it arrives, and so on: until a plan hands a block out to be written anew. A copy of such a block, in
host memory or back from there, is no better. Only the worker can tell this in time, since several plans are under way
before the scheduler learns of a drop.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, islice

from protocol.messages import ID_BYTES, Plan, pack_ids, unpack_ids, unpack_pairs


@dataclass(slots=True)
class _Table:
    shared: int  # leading blocks that others have filled
    parts: list[bytes]  # packed ids, as they came

    def ids(self) -> list[int]:
        return list(chain.from_iterable(map(_ids, self.parts)))

    def read(self) -> set[int]:
        """Blocks that it reads and does not write."""
        return set(islice(self.ids(), self.shared))


@dataclass(slots=True)
class Drops:
    """``others``: seats that are dropped because they read spoiled blocks. ``blocks``: of all that are dropped."""

    others: set[int]
    blocks: bytes


class SpoiledBlocks:
    """Block tables by seat. A step in which nothing fails costs nothing but to note what its plan hands out."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._tables: dict[int, _Table] = {}
        self._spoiled: set[int] = set()  # neither written nor handed out since
        self._spoiled_host: set[int] = set()  # host blocks that are copies of such

    def follow(self, plan: Plan, dropped: Iterable[int] = ()) -> Drops | None:
        """Take one executed plan, in which the rows of ``dropped`` seats could not be computed; None if nothing is
        dropped. Their blocks, shared ones too, are named, so that no other sequence is given them."""
        tables = self._tables
        for seat in plan.frees:
            tables.pop(seat, None)
        if self._spoiled or self._spoiled_host:
            self._copy(plan)
        todo: list[int] = []
        for new in plan.new:
            table = tables[new.seat] = _Table(max(0, new.computed) // self._block_size, [new.block_table])
            if self._spoiled:
                self._spoiled.difference_update(table.ids()[table.shared :])
                if not self._spoiled.isdisjoint(table.read()):
                    todo.append(new.seat)
        for seat, packed in plan.blocks:
            if seat in tables:
                tables[seat].parts.append(packed)
            if self._spoiled:
                self._spoiled.difference_update(_ids(packed))
        others = set(todo)
        todo += dropped
        drops = self._spread(todo, others) if todo else None
        for seat, _ in plan.ends:
            tables.pop(seat, None)
        return drops

    def _copy(self, plan: Plan) -> None:
        for block, host in unpack_pairs(plan.copies_out):
            (self._spoiled_host.add if block in self._spoiled else self._spoiled_host.discard)(host)
        for host, block in unpack_pairs(plan.copies_in):
            (self._spoiled.add if host in self._spoiled_host else self._spoiled.discard)(block)

    def _spread(self, todo: list[int], others: set[int]) -> Drops:
        """Tables go last: what is dropped by itself may read from another that is."""
        tables, blocks = self._tables, set[int]()
        seen: set[int] = set()
        while todo:
            seat = todo.pop()
            if seat in seen or seat not in tables:
                continue
            seen.add(seat)
            ids = tables[seat].ids()
            blocks.update(ids)
            unwritten = set(ids[tables[seat].shared :])
            self._remember(unwritten)
            readers = [other for other, table in tables.items() if not unwritten.isdisjoint(table.read())]
            others.update(readers)
            todo += readers
        for seat in seen:
            del tables[seat]
        return Drops(others, pack_ids(sorted(blocks)))

    def _remember(self, unwritten: set[int]) -> None:
        """For those that arrive later: the scheduler does not know yet."""
        self._spoiled |= unwritten


def _ids(packed: bytes) -> list[int]:
    return unpack_ids(packed[: len(packed) // ID_BYTES * ID_BYTES]).tolist()
