"""A weightless model (the scheduler needs no weights) and a real scheduler process's life inside the test's loop."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from protocol.messages import Frame, Job, decode_frames, new_rid
from protocol.preloaded import Preloaded
from protocol.sampling import SamplingParams
from scheduler.election import Timing
from scheduler.prompts.tokenizer_pool import MODULE
from scheduler.service import SchedulerConfig, run_scheduler
from tests.bus import Bus
from tests.conftest import MODEL
from tests.models import CONFIGS, EOS, VOCAB, byte_tokenizer
from tests.scheduler.scripted_worker import ScriptedWorker

PATIENCE_S = 60.0
# deaths are found in a fraction of a second, but a test machine's own pauses are no deaths
QUICK = Timing(beat_s=0.05, apart_s=0.1, slow_s=1.0, reads=30)
HASTY = Timing(beat_s=0.05, apart_s=0.1, slow_s=1.0, reads=5)  # where a death is what is wanted


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoConfig

    path = tmp_path_factory.mktemp("weightless")
    fields = dict(CONFIGS["llama"])
    AutoConfig.for_model(fields.pop("model_type"), vocab_size=VOCAB, eos_token_id=EOS, **fields).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@contextlib.contextmanager
def tokenizer_process(model_dir: Path) -> Iterator[Preloaded]:
    process = Preloaded(MODULE)
    process.start()
    process.load(str(model_dir), None, "guard")
    yield process
    process.close()


@pytest.fixture(scope="session")
def home(model_dir: Path) -> Iterator[Preloaded]:
    """The process that holds the model's tokenizer: one for all schedulers of the tests, since it takes seconds."""
    with tokenizer_process(model_dir) as running:
        yield running


class Stage:
    """What a test of the service needs: schedulers and workers that end with the test, and waits on conditions."""

    def __init__(self, bus: Bus, url: str, model_dir: Path, home: Preloaded) -> None:
        self.bus = bus
        self.url = url
        self._model_dir = model_dir
        self._home = home
        self._tasks: list[asyncio.Task[Any]] = []
        self._stops: list[asyncio.Event] = []

    def scheduler(self, **fields: Any) -> tuple[asyncio.Task[int], asyncio.Event]:
        """Start a scheduler; the task of its life and the event that ends it in order."""
        config = SchedulerConfig(
            model=str(self._model_dir), served_model_name=MODEL, redis_url=self.url, timing=fields.pop("timing", QUICK)
        )
        stop = asyncio.Event()
        config = dataclasses.replace(config, **fields)
        shared = config.model == str(self._model_dir) and config.max_model_len is None
        task = asyncio.ensure_future(run_scheduler(config, stop, self._home if shared else None))
        self._tasks.append(task)
        self._stops.append(stop)
        return task, stop

    def worker(self, **fields: Any) -> ScriptedWorker:
        worker = ScriptedWorker(self.bus, **fields)
        worker.task = asyncio.ensure_future(worker.run())
        self._tasks.append(worker.task)
        return worker

    def watch(self, task: asyncio.Task[Any]) -> None:
        """A task of the test's own, ended with the test."""
        self._tasks.append(task)

    async def accept(self, prompt: Any = None, *, job: dict[str, Any] | None = None, **sampling: Any) -> str:
        fields = {"sampling": SamplingParams(**{"seed": 7, **sampling}), **(job or {})}
        rid = new_rid()
        await self.bus.accept(Job(prompt=prompt, **fields), rid=rid)
        return rid

    async def frames(self, rid: str, choice: int = 0) -> list[Frame]:
        """The journal of a choice, once it has ended."""

        async def ended() -> bool:
            frames = decode_frames(await self.bus.read_journal(rid, choice))
            return bool(frames) and frames[-1].finish is not None

        await self.until(ended)
        return decode_frames(await self.bus.read_journal(rid, choice))

    async def tokens(self, rid: str, choice: int = 0) -> list[int]:
        return [f.token for f in await self.frames(rid, choice) if f.token is not None]

    async def until(self, condition: Callable[[], Awaitable[Any]]) -> Any:
        """Await a condition; a scheduler or worker that breaks meanwhile fails the test with its own error."""
        async with asyncio.timeout(PATIENCE_S):
            while not (value := await condition()):
                for task in self._tasks:
                    if task.done() and not task.cancelled() and task.exception():
                        task.result()
                await asyncio.sleep(0.01)
        return value

    async def at_rest(self) -> None:
        """Nothing is left of any request: not live, not pending, not waiting."""

        async def resting() -> bool:
            owed = await self.bus._link.command("EXISTS", self.bus.keys.prefix + "owed", self.bus.keys.prefix + "owing")
            return not await self.bus.scan_live() and not await self.bus.inbox_length() and not owed

        await self.until(resting)

    async def close(self) -> None:
        for stop in self._stops:
            stop.set()
        await asyncio.sleep(0)
        for task in self._tasks:
            if getattr(task.get_coro(), "__name__", "") == "run_scheduler":
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait_for(task, PATIENCE_S)
            else:
                task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@pytest.fixture
async def stage(bus: Bus, redis_url: str, model_dir: Path, home: Preloaded) -> AsyncIterator[Stage]:
    stage = Stage(bus, redis_url, model_dir, home)
    yield stage
    await stage.close()
