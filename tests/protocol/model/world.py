"""One run of the model: the agents' turns, the faults, the history and its judgement."""

from __future__ import annotations

import collections
import random
from collections.abc import Callable, Coroutine
from typing import Any

import redis

from protocol import messages
from protocol.errors import Fenced
from protocol.keys import Keys
from protocol.messages import Job, Terminal, decode_frames
from tests.bus import Bus
from tests.conftest import leaked_keys
from tests.protocol.model.link import FAULT_RATES, FAULTS, OTHER_FAULT_RATE, Crash, ModelLink, Turn, load_scripts

MODEL = "model"
ELSEWHERE = "another"  # to which requests are moved; nothing runs there
PAUSES = (60, 120, 200, 600)  # turns; the longest is longer than it takes to be declared dead


def link_bits(token: int) -> int:
    """What the token after ``token`` carries in its low bits."""
    return (token * 2654435761 >> 7) & 0x3FF


def next_token(rng: random.Random, before: int) -> int:
    return rng.getrandbits(20) << 10 | link_bits(before)


FIRST = 12345  # the last prompt token of every request
PROMPT = [1, 2, 3, 4, FIRST]  # of every request: its first blocks are shared by all
BLOCK = 2  # positions of a block of KV


class World:
    """One run: agents, faults, history and its judgement."""

    def __init__(self, url: str, seed: int, mutation: str | None = None) -> None:
        self.rng = random.Random(seed)
        self.client = redis.Redis.from_url(url, protocol=2, decode_responses=False)
        self.client.response_callbacks.clear()
        self.plain = redis.Redis.from_url(url)
        self.plain.config_set("maxmemory", 0)
        self.plain.flushall()
        self.scripts = load_scripts(mutation)
        self.mutation = mutation
        self.faults = True
        self.calls = 0
        self.stats: collections.Counter[str] = collections.Counter()
        self.ghosts: list[Callable[[], Any]] = []
        self.accepted: dict[str, Job] = {}  # rid -> job: accept returned
        self.pushed: dict[str, Job] = {}  # producer id -> job: XADD returned
        self.seen: list[tuple[str, int, int, bytes]] = []  # (rid, choice, cursor, frames) that anybody was shown
        self.known: list[tuple[str, int, int, list[int]]] = []  # (rid, choice, cursor, tokens) that a plan said
        self.epochs: list[int] = []
        self.deaths: collections.defaultdict[str, set[int]] = collections.defaultdict(set)
        self.wrong: collections.Counter[str] = collections.Counter()
        self.moves: list[tuple[str, str, bool]] = []  # rid, rid there, what `move` said
        self.clients_left = 0
        self.agents: list[Coroutine[Any, Any, None]] = []

    def bus(self, model: str = MODEL) -> Bus:
        made = Bus("unix:///model", model)
        made._link = ModelLink(self)  # type: ignore[assignment]
        made._scripts = self.scripts
        return made

    def draw_fault(self, name: str) -> str | None:
        if not self.faults or self.rng.random() >= FAULT_RATES.get(name, OTHER_FAULT_RATE):
            return None
        fault = self.rng.choice(FAULTS)
        self.stats[fault] += 1
        return fault

    def add_client(self, agent: Coroutine[Any, Any, None]) -> None:
        async def counted() -> None:
            await agent
            self.clients_left -= 1

        self.clients_left += 1
        self.agents.append(counted())

    async def process(self, run: Callable[[World, str], Coroutine[Any, Any, None]], name: str) -> None:
        """A supervised process: whatever kills it, it comes back."""
        while True:
            try:
                await run(self, name)
                self.stats[f"{run.__name__} left"] += 1
            except Crash:
                self.stats[f"{run.__name__} died"] += 1
            except Fenced as fenced:
                self.stats[f"{run.__name__} fenced {fenced.cause}"] += 1
            for _ in range(self.rng.randrange(60)):
                await Turn()

    async def maybe_pause(self, chance: float) -> None:
        """SIGSTOP and SIGCONT: everything stays in memory."""
        if self.faults and self.rng.random() < chance:
            self.stats["pauses"] += 1
            for _ in range(self.rng.choice(PAUSES)):
                await Turn()

    def step(self) -> None:
        if self.ghosts and self.rng.random() < 0.02:
            self.ghosts.pop(self.rng.randrange(len(self.ghosts)))()
        agent = self.rng.choice(self.agents)
        try:
            agent.send(None)
        except StopIteration:
            self.agents.remove(agent)

    def at_rest(self) -> bool:
        prefix = f"headrace:{{{MODEL}}}:"
        return (
            self.clients_left == 0 and not self.plain.exists(prefix + "live") and not self.plain.xlen(prefix + "jobs")
        )

    def run(self, most_steps: int = 200_000) -> None:
        """Faults until every client has been served, then none until all is at rest; then the judgement."""
        for number in range(most_steps):
            self.step()
            if number % 200 == 0 and self.at_rest():
                break
            if number == most_steps // 2:
                self.calm()
        self.calm()
        for number in range(most_steps):
            if number % 200 == 0 and self.at_rest():
                break
            self.step()
        for _ in range(2000):  # readers catch up, schedulers trim
            self.step()
        self.judge()
        for agent in self.agents:
            agent.close()
        self.client.close()
        self.plain.close()

    def calm(self) -> None:
        self.faults = False
        self.plain.config_set("maxmemory", 0)
        while self.ghosts:
            self.ghosts.pop()()

    # ------------------------------------------------------------ judgement

    def judge(self) -> None:
        keys = self.bus().keys
        owners = dict(self.accepted)
        for producer_id, job in self.pushed.items():
            value = self.plain.get(keys.idempotency("default", producer_id))
            if value is None:
                self.wrong["push without a request"] += 1
            else:
                owners[value.split()[0].decode()] = job
        results = collections.Counter(
            (t.rid, t.choice)
            for _, entry in self.plain.xrange(keys.results("res"))
            for t in [messages.msgspec.msgpack.decode(entry[b"result"], type=Terminal)]
        )
        journals: dict[tuple[str, int], bytes] = {}
        for rid, job in owners.items():
            record = self.plain.hgetall(keys.request(rid))
            if record.get(b"open") != b"0":
                self.wrong["open choices miscounted or unfinished"] += 1
            if b"moved" in record:
                self._judge_moved(rid, record[b"moved"].decode())
                continue
            if int(record.get(b"attempts", 0)) > len(self.deaths[rid]):
                self.wrong["a death counted twice"] += 1
            for choice in range(job.choices):
                journal = self.plain.get(keys.journal(rid, choice)) or b""
                journals[rid, choice] = journal
                self._judge_journal(journal, record.get(b"e%d" % choice, b"").decode())
                if results[rid, choice] != (job.results is not None):
                    self.wrong[f"{results[rid, choice]} results"] += 1
        if self.plain.exists(keys.prefix + "flights"):
            self.wrong["an answer that nobody makes"] += 1
        if set(results) - set(journals):
            self.wrong["results of requests that nobody made"] += 1
        self._judge_history(journals)
        pending = self.plain.xpending(keys.jobs, "scheduler")
        if pending["pending"] or self.plain.xlen(keys.jobs) or self.plain.exists(keys.live):
            self.wrong["inbox or live not empty"] += 1
        for key in self.plain.scan_iter(f"headrace:{{{ELSEWHERE}}}:*"):
            self.plain.delete(key)  # nobody runs it
        if leaked_keys(self.plain, MODEL):
            self.wrong["leaked keys"] += 1
        if self.epochs != sorted(set(self.epochs)):
            self.wrong["an epoch led twice"] += 1

    def _judge_moved(self, rid: str, to: str) -> None:
        """Nothing of it was ever said here, and where it went it is; whoever was told so was told the truth."""
        if any(self.plain.scan_iter(f"{self.bus().keys.prefix}j:{rid}:*")):
            self.wrong["moved and said here"] += 1
        there = self.plain.hmget(Keys(ELSEWHERE).request(to.split()[1]), "open", "cancel")
        if there[0] is None or there[1] is not None:
            self.wrong["moved to where it is not"] += 1
        if any(one == rid and said != (f"{ELSEWHERE} {there}" == to) for one, there, said in self.moves):
            self.wrong["told another move"] += 1

    def _judge_journal(self, journal: bytes, end: str) -> None:
        """One terminal frame, the last; the chain of tokens unbroken; the record agrees."""
        try:
            frames = decode_frames(journal) if journal else []
        except ValueError:
            self.wrong["torn journal"] += 1
            return
        finishes = [f.finish for f in frames if f.finish is not None]
        if len(finishes) != 1 or frames[-1].finish is None:
            self.wrong[f"{len(finishes)} terminal frames"] += 1
        elif finishes[0] != end:
            self.wrong["record and journal disagree"] += 1
        before = FIRST
        for token in (f.token for f in frames if f.token is not None):
            if token & 0x3FF != link_bits(before):
                self.wrong["a token follows another context"] += 1
            before = token

    def _judge_history(self, journals: dict[tuple[str, int], bytes]) -> None:
        """Whatever anybody was shown stands in the journal, at its place: no token had two values."""
        for rid, choice, cursor, frames in self.seen:
            if journals.get((rid, choice), b"")[cursor : cursor + len(frames)] != frames:
                self.wrong["shown and not in the journal"] += 1
        for rid, choice, cursor, tokens in self.known:
            journal = journals.get((rid, choice), b"")[:cursor]
            try:
                journaled = [f.token for f in decode_frames(journal) if f.token is not None] if journal else []
            except ValueError:
                journaled = []
            if journaled != tokens:  # outdated it may be (its rows are then stale), but never false
                self.wrong["a plan from false knowledge"] += 1
