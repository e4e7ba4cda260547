"""The one thread that owns the engine: tickets in, results out, each crossing between threads once per step.

A ticket carries its engine run: when the sequences of a run are given up (a new leader, a new session), the tickets
still queued are skipped and steps under way are thrown away, so what follows starts on an empty engine.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from queue import Empty, SimpleQueue
from typing import TypeVar

from protocol.messages import Plan
from workers.engines.base import Engine, Sampled, StepOutput

T = TypeVar("T")
AHEAD = 2  # steps submitted to an overlapping engine of one stage before the first of them is waited for


@dataclass(slots=True)
class Ticket:
    """One plan on its way to the engine. The queue has no bound of its own: the session's reader holds back."""

    engine_run: int
    plan_id: str  # of the plans stream
    plan: Plan


class Order(Enum):
    """What the queue holds beside tickets."""

    RESET = auto()  # finish the steps under way, then empty the engine
    STOP = auto()


Deliver = Callable[[Ticket, Sampled, int], None]  # (ticket, result, us that the device stood idle before the step)


class Device:
    """``deliver`` is called in the event loop, once per executed step, in order. ``failed`` settles with whatever
    the engine raised; the thread has ended then."""

    def __init__(self, engine: Engine, deliver: Deliver) -> None:
        self.engine = engine
        self.steps = 0  # executed, ever
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._loop = asyncio.get_running_loop()
        self._deliver = deliver
        self._queue: SimpleQueue[Ticket | Order] = SimpleQueue()
        self._engine_run = 0
        self._stopping = False
        self._submitted = 0
        self._finished = 0  # tickets that were executed or skipped
        self._ready: asyncio.Future[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether a plan is waiting or running."""
        return self._submitted != self._finished

    async def start(self, load: Callable[[], T]) -> T:
        """Start the thread; ``load`` is the first thing that it does. Raises what ``load`` raised."""
        loaded: asyncio.Future[T] = self._loop.create_future()
        threading.Thread(target=self._run, args=(load, loaded), name="device", daemon=True).start()
        return await loaded

    def submit(self, ticket: Ticket) -> None:
        self._submitted += 1
        self._queue.put(ticket)

    def reset(self, engine_run: int) -> None:
        """From here on only tickets of ``engine_run`` count; the engine is emptied before the first of them."""
        self._engine_run = engine_run
        self._queue.put(Order.RESET)

    def stop(self) -> None:
        """The thread ends after the step that it is in."""
        self._stopping = True
        self._queue.put(Order.STOP)

    # -------------------------------------------------------------- in the thread

    def _run(self, load: Callable[[], T], loaded: asyncio.Future[T]) -> None:
        try:
            value = load()
        except BaseException as error:
            self._post(_fail, loaded, error)
            return
        self._post(_succeed, loaded, value)
        try:
            self._execute()
        except BaseException as error:
            self._post(_fail, self.failed, error)

    def _execute(self) -> None:
        running: deque[tuple[Ticket, StepOutput, int]] = deque()
        ahead = AHEAD + self.engine.stages - 1 if self.engine.overlaps else 1
        stopped_at = time.perf_counter()  # when the device last ran out of steps
        while True:
            item = self._next(wait=not running)
            if self._stopping:
                return
            if isinstance(item, Ticket):
                idle_us = 0 if running else int((time.perf_counter() - stopped_at) * 1e6)
                if item.engine_run != self._engine_run:
                    self._finished += 1
                else:
                    running.append((item, self.engine.execute(item.plan), idle_us))
                if len(running) < ahead:
                    continue
                self._finish(*running.popleft())
            elif item is None:
                self._finish(*running.popleft())
            else:
                while running:
                    self._finish(*running.popleft())
                self.engine.reset()
            if not running:
                stopped_at = time.perf_counter()

    def _next(self, wait: bool) -> Ticket | Order | None:
        """What is queued next; None if that is nothing and it is not to be waited for."""
        try:
            return self._queue.get(block=wait)
        except Empty:
            return None

    def _finish(self, ticket: Ticket, output: StepOutput, idle_us: int) -> None:
        sampled = output.wait()
        self.steps += 1
        self._finished += 1
        if ticket.engine_run == self._engine_run and not self._stopping:
            self._post(self._deliver, ticket, sampled, idle_us)

    def _post(self, callback: Callable[..., None], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:  # the loop is closed: the process is ending, nobody waits for this
            pass


def _succeed(future: asyncio.Future[T], value: T) -> None:
    if not future.done():
        future.set_result(value)


def _fail(future: asyncio.Future[T], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
