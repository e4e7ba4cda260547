"""From publications to readers: one subscription per model, fanned out inside the process.

The journal is the stream; pub/sub only saves polling it. A follower has the byte cursor up to which it has read each
journal: a row that begins there is taken, an earlier one is ignored, and a later one shows that rows were missed, so
the journal is read from the cursor on. For silent followers the journals' lengths are compared once a second, which
finds a lost last row. The dispatcher takes rows and writes to sockets without switching tasks; the task of a follower
wakes only when it has to wait for something.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

import msgspec

from gateway.metrics import RESYNCS
from gateway.openai.render import Tally, split_frames
from protocol.bus import GatewayBus
from protocol.errors import Expired, HeadraceError, ServiceError, StoreFailed, StreamDiverged, Unavailable
from protocol.messages import ID_BYTES, Admitted, Row
from protocol.records import RequestRecord

log = logging.getLogger("headrace.gateway")

SILENCE_S = 1.0  # how often the lengths of silent journals are compared
LENGTHS_AT_ONCE = 512
KEEP_ALIVE_LOOKS = 15  # looks (one each SILENCE_S) after which a silent stream sends a comment: proxies keep the link
RECORD_CHECK_S = 32.0  # longest pause between reads of the record of a silent request

_admitted_decoder = msgspec.msgpack.Decoder(Admitted)


class Moved(Unavailable):
    """The request that was followed goes on at another model, to which its record points."""


class Follower:
    """One reader of one request. Subclasses define in ``take`` what is done with the frames.

    ``news`` is set when its task has to check: admitted, ended, failed, or ``behind`` (rows were missed or could
    not be taken; ``catch_up`` reads the journals). ``failed`` ends it early.
    """

    def __init__(self, rid: str, tally: Tally) -> None:
        self.rid = rid
        self.tally = tally
        self.cursors = tally.cursors
        self.news = asyncio.Event()
        self.behind = False
        self.failed: HeadraceError | None = None
        self.accepted = True  # False while accept is under way: a missing record then means nothing
        self.silent_looks = 0  # since the last news; a look is taken every SILENCE_S
        self.record_check_s = SILENCE_S
        self.dirty = False
        self.awaited = False  # its task wants to know of the first token

    @property
    def silent_s(self) -> float:
        return self.silent_looks * SILENCE_S

    @property
    def over(self) -> bool:
        return self.tally.open == 0 or self.failed is not None

    @property
    def begun(self) -> bool:
        """Whether it is known that the request was admitted, or has ended without."""
        return self.tally.prompt_tokens is not None or self.tally.completion_tokens > 0 or self.over

    @property
    def begun_to_speak(self) -> bool:
        """Whether a token was journaled, or all is over."""
        return self.tally.completion_tokens > 0 or self.over

    def take(self, choice: int, raw: bytes) -> None:
        """Count and keep the frames ``raw``, which begin at the cursor of ``choice``."""
        raise NotImplementedError

    def flush(self) -> None:
        """Called once after all rows of a publication."""

    def nudge(self) -> None:
        """Called every KEEP_ALIVE_LOOKS looks while no row arrives."""

    def feed(self, row: Row) -> None:
        choice = row.choice
        if choice < 0:
            notice = _admitted_decoder.decode(row.frames)
            if self.tally.awaits_record:
                self.fall_behind()  # the record tells more
            else:
                self.admit(notice.prompt_tokens, notice.thinking, notice.cache)
            return
        if self.tally.awaits_admission and self.tally.prompt_tokens is None:
            self.fall_behind()  # the notice of admission was missed: the record tells it
            return
        if self.behind or self.over or choice >= self.tally.choices:
            return
        position = self.cursors[choice]
        if row.cursor == position:
            self.silent_looks = 0
            self.take(choice, row.frames)
            if self.tally.open == 0 or self.tally.prompt_tokens is None or self.awaited:
                self.news.set()
        elif row.cursor > position:
            self.fall_behind()

    def admit(self, prompt_tokens: int, thinking: bool = False, cache: str = "") -> None:
        if self.tally.prompt_tokens is None:
            self.tally.cache = cache
            self.tally.prompt_tokens = prompt_tokens
            self.tally.thinking = thinking
            self.news.set()

    def fall_behind(self) -> None:
        self.behind = True
        self.news.set()

    def fail(self, error: HeadraceError) -> None:
        if self.failed is None and self.tally.open:
            self.failed = error
        self.news.set()

    async def catch_up(self, bus: GatewayBus) -> None:
        """Read what was missed from the journals. After a lost connection it stays ``behind`` and is tried again."""
        self.behind = False
        try:
            if self.tally.prompt_tokens is None or not any(self.cursors):
                self.learn(await bus.read_request(self.rid))
            open_choices = [c for c in range(self.tally.choices) if self.tally.ends[c] is None]
            before = list(self.cursors)  # publications advance them while the lengths are read
            lengths = await bus.journal_lengths([(self.rid, c) for c in open_choices])
            for choice, length in zip(open_choices, lengths, strict=True):
                if length < before[choice]:
                    raise StreamDiverged("the journal is shorter than what was read of it")
                position = self.cursors[choice]
                if length > position:
                    raw = await bus.read_journal(self.rid, choice, position)
                    # publications may have arrived meanwhile
                    if fresh := raw[self.cursors[choice] - position :]:
                        self.take(choice, fresh)
        except Unavailable:
            self.behind = True
            await asyncio.sleep(SILENCE_S)
        except HeadraceError as error:
            self.fail(error)
        self.flush()
        if self.tally.open == 0 or self.behind:
            self.news.set()

    def learn(self, record: RequestRecord | None) -> None:
        """Take from the record what is in no journal. Expired if there is no record any more."""
        if record is None:
            if self.accepted:
                self.fail(Expired("the request is not there any more"))
        elif record.moved is not None:
            self.fail(Moved("another model answers this request; ask for it again", retry_after=0.0))
        elif record.prompts or record.open == 0:
            self.tally.prompts_of_record = record.prompts
            self.admit(sum(len(prompt) // ID_BYTES for prompt in record.prompts), record.thinking, record.cache)


class Collector(Follower):
    """Keeps the bytes of whole journals, for an answer in one piece."""

    def __init__(self, rid: str, choices: int) -> None:
        super().__init__(rid, Tally(choices))
        self.journals: list[list[bytes]] = [[] for _ in range(choices)]

    def take(self, choice: int, raw: bytes) -> None:
        for piece, frame in split_frames(raw):
            if self.tally.ends[choice] is not None:
                return
            self.tally.count(choice, piece, frame)
            self.journals[choice].append(piece)


class Outlet:
    """The rows of one model, for every follower of this process."""

    def __init__(self, bus: GatewayBus, name: str) -> None:
        self.bus = bus
        self.name = name
        self.attached: dict[str, int] = {}  # rid -> attach count seen here, while it has a follower here
        self._followers: dict[str, list[Follower]] = {}
        self._subscription = bus.subscribe(name)
        self._tasks: list[asyncio.Task[None]] = []
        self._dirty: list[Follower] = []  # followers with something to write
        self._flush_soon = False

    async def start(self) -> None:
        """Returns once SUBSCRIBE is acknowledged: no row of a request accepted from now on is missed."""
        await self._subscription.start()
        self._tasks = [asyncio.create_task(self._dispatch()), asyncio.create_task(self._watch())]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._subscription.close()

    def add(self, follower: Follower, attached: int = 0) -> None:
        self._followers.setdefault(follower.rid, []).append(follower)
        self.saw(follower.rid, attached)

    def saw(self, rid: str, attached: int) -> None:
        self.attached[rid] = max(attached, self.attached.get(rid, 0))

    def remove(self, follower: Follower) -> None:
        followers = self._followers.get(follower.rid)
        if followers and follower in followers:
            followers.remove(follower)
            if not followers:
                del self._followers[follower.rid]
                del self.attached[follower.rid]

    def follows(self, rid: str) -> bool:
        return rid in self._followers

    def everyone(self) -> list[Follower]:
        return [f for followers in self._followers.values() for f in followers]

    async def _dispatch(self) -> None:
        """Deliver for ever. After the subscription was lost and is back, all followers read their journals."""
        while True:
            try:
                async for rows in self._subscription:
                    if rows:
                        self.deliver(rows)
                    else:  # it was lost and is back: rows may have been missed
                        self._all_behind()
                return
            except ServiceError:
                await asyncio.sleep(SILENCE_S)
            except Exception:
                log.exception("a publication could not be read")
            self._all_behind()

    def _all_behind(self) -> None:
        for follower in self.everyone():
            follower.fall_behind()

    def deliver(self, rows: Iterable[Row]) -> None:
        """Deliver one publication. Each follower writes once, after all publications at hand were read."""
        for row in rows:
            for follower in self._followers.get(row.rid, ()):
                try:
                    follower.feed(row)
                except Exception as error:  # one malformed row must not end every stream
                    _torn(follower, error)
                if not follower.dirty:
                    follower.dirty = True
                    self._dirty.append(follower)
        if self._dirty and not self._flush_soon:
            self._flush_soon = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_soon = False
        dirty, self._dirty = self._dirty, []
        for follower in dirty:
            follower.dirty = False
            try:
                follower.flush()
            except Exception as error:
                _torn(follower, error)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(SILENCE_S)
            try:
                await self._check_silent()
            except ServiceError:
                continue  # Redis is unreachable; the subscription reconnects, and this loop tries again in a second
            except Exception:
                log.exception("the check of silent streams failed")

    async def _check_silent(self) -> None:
        silent = []
        for follower in self.everyone():
            follower.silent_looks += 1
            if follower.silent_looks % KEEP_ALIVE_LOOKS == 0:
                follower.nudge()
            if follower.silent_looks > 1 and not follower.behind and not follower.over:
                silent.append(follower)
        asked = [(f, c) for f in silent for c in range(f.tally.choices) if f.tally.ends[c] is None]
        for at in range(0, len(asked), LENGTHS_AT_ONCE):
            part = asked[at : at + LENGTHS_AT_ONCE]
            before = [f.cursors[c] for f, c in part]
            try:
                lengths = await self.bus.journal_lengths([(f.rid, c) for f, c in part])
            except StoreFailed:  # one key has a wrong type: let each follower read its own
                for follower, _ in part:
                    follower.fall_behind()
                continue
            for (follower, choice), cursor, length in zip(part, before, lengths, strict=True):
                if follower.over or follower.cursors[choice] != cursor or length == cursor:
                    continue
                RESYNCS.inc()
                follower.fall_behind()
        for follower in silent:
            if follower.silent_s >= follower.record_check_s and not follower.behind:
                await self._check_record(follower)

    async def _check_record(self, follower: Follower) -> None:
        """Read the record of a silent request: one that was never admitted, or has expired, has no journal to
        compare."""
        follower.record_check_s = min(2 * follower.record_check_s, follower.silent_s + RECORD_CHECK_S)
        record = await self.bus.read_request(follower.rid)
        follower.learn(record)
        if record is not None and record.open == 0:
            follower.fall_behind()


def _torn(follower: Follower, error: Exception) -> None:
    log.error("a row could not be read: %s", type(error).__name__)
    follower.fail(StreamDiverged("a frame of the journal could not be read"))
