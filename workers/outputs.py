"""From sampled ids to journal rows: text, stop checks, frames, terminal results.

A sequence's output state follows the *executed* steps, one by one, in order. While a commit is under way rows gather;
the next commit takes them all. A token after a sequence's end is thrown away here: it is
never journaled, published or hinted.

Over 400 lines: one idea, whose parts share the state of a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from protocol.formats.message import ParsedMessage, parsed_message
from protocol.formats.parser import Parser
from protocol.messages import (
    LANDED,
    LOGPROB_FLOOR,
    CommitRow,
    HintRow,
    NewSequence,
    Plan,
    Terminal,
    encode,
    pack_ids,
    unpack_ids,
)
from protocol.prompt_logprobs import PromptLogprobs
from workers.detokenizer import TextStream, Vocabulary, WindowVocabulary
from workers.engines.base import Sampled, Scores
from workers.engines.checks import scores_prompt
from workers.spoiled import Drops, SpoiledBlocks


class StopStrings:
    """Looks for stop strings in text that comes in pieces, wherever the borders lie.

    The string that is complete first wins, then the longer one: so the outcome depends on the text alone.
    """

    __slots__ = ("_first", "_include", "_stops", "held")

    def __init__(self, stops: list[str], include: bool) -> None:
        self._stops = stops
        self._first = frozenset(stop[0] for stop in stops)
        self._include = include
        self.held = ""  # text that may become a stop string

    def feed(self, text: str) -> tuple[str, str | None]:
        """(text that is safe to show, the stop string that was found or None)."""
        if not self.held and self._first.isdisjoint(text):
            return text, None
        text = self.held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            end, start, stop = min(found)
            self.held = ""
            return text[: end if self._include else start], stop
        keep = max(_overlap(text, stop) for stop in self._stops)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep], None


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that ``stop`` begins with, short of all of it."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0 and not stop.startswith(text[at:]):
        at = text.find(stop[0], at + 1)
    return len(text) - at if at >= 0 else 0


class Output:
    """The output of one sequence under one placement."""

    __slots__ = (
        "awaited", "count", "cursor", "dropped", "end_ids", "eos", "min_tokens", "new", "parser", "plain", "row",
        "scores", "seat", "shown", "steady_until", "stops", "stream", "tail", "unsure",
    )  # fmt: skip

    def __init__(self, new: NewSequence, vocabulary: Vocabulary | WindowVocabulary, eos: frozenset[int]) -> None:
        sampling = new.sampling
        ids = unpack_ids(new.token_ids)
        self.new = new
        self.seat = new.seat
        self.cursor = new.cursor  # journal length with all frames made so far
        self.count = len(ids) - new.prompt_len  # output tokens
        structure = sampling.structure
        ruled = sampling.ruled  # a grammar says where it ends, nothing else does
        self.eos = frozenset() if sampling.ignore_eos and not ruled else eos
        self.end_ids = self.eos.union(sampling.stop_token_ids)
        self.min_tokens = 0 if ruled else sampling.min_tokens
        content = sampling.content if sampling.stop else None  # stops are searched in plain content alone
        self.parser = (
            Parser(content.format, dict.fromkeys(content.functions), thinking=content.thinking) if content else None
        )
        searched = sampling.stop and (self.parser is not None or not ruled)
        self.stops = StopStrings(sampling.stop, sampling.include_stop_str_in_output) if searched else None
        self.unsure = ""  # text that may begin a thought or a call, so is not searched yet
        # ids that content begins after, where no parser knows that
        self.awaited = structure.after if structure is not None and self.parser is None else []
        self.tail: list[int] = []  # the last ids while they are awaited
        self.stream: TextStream = vocabulary.stream(ids[: new.prompt_len], sampling.skip_special_tokens)
        # tokens and their texts, for the terminal entry
        self.shown: list[tuple[int | None, str]] | None = [] if new.wants_result else None
        self.plain = self.stops is None and self.shown is None and sampling.logprobs is None
        self.steady_until = sampling.max_tokens if sampling.max_tokens is not None else 2**63
        # of the prompt, piece by piece as it is computed; None where they are not asked for, or are journaled
        self.scores: list[Scores] | None = [] if scores_prompt(new) else None
        self.row: OutputRow | None = None  # gathers frames for the next commit
        self.dropped = False  # journal closed or no longer ours: nothing more of it is committed
        for at, token in enumerate(islice(ids, new.prompt_len, None), 1):
            self._show(token, self.stream.push(token), at)
            self._await(token)

    def _await(self, token: int) -> None:
        if self.awaited:
            self.tail = [*self.tail, token][-len(self.awaited) :]
            if self.tail == self.awaited:
                self.awaited = []

    def _show(self, token: int, text: str, count: int) -> tuple[str, str | None]:
        """Pass text of the output's ``count``-th token through the stop check; what may be shown, the stop found."""
        content = True
        if self.parser is not None:
            content, text = self._in_content(self.parser, token, text)
        text, found = self._searched(text, content and count > self.min_tokens and not self.awaited)
        if self.shown is not None:
            self.shown.append((token, text))
        return text, found

    def _searched(self, text: str, search: bool) -> tuple[str, str | None]:
        found = None
        if self.stops is not None and search:
            text, found = self.stops.feed(text)
            self.unsure = "" if found is not None else self.unsure
        elif self.stops is not None and self.stops.held:  # no stop string runs into a thought or a call
            text, self.stops.held = self.stops.held + text, ""
        return text, found

    def _in_content(self, parser: Parser, token: int, text: str) -> tuple[bool, str]:
        """Whether ``token`` is part of plain content, and begins neither a thought nor a call; the text up to there of
        which that is known."""
        before = parser.in_content
        parser.feed(token, text)
        content, text = before and parser.in_content, self.unsure + text
        sure = max(0, len(text) - parser.unsure) if content else len(text)
        self.unsure = text[sure:]
        return content, text[:sure]

    def settle(self) -> tuple[str, str | None]:
        """At the end, what may begin something begins nothing: its text, and a stop string in it."""
        text, self.unsure = self.unsure, ""
        if not text:
            return "", None
        text, found = self._searched(text, self.count > self.min_tokens and not self.awaited)
        if self.shown is not None:
            self.shown.append((None, text))
        return text, found

    @property
    def held(self) -> str:
        return (self.stops.held if self.stops is not None else "") + self.unsure + self.stream.held


@dataclass(slots=True)
class OutputRow:
    """Frames of one sequence that go into one commit."""

    output: Output
    cursor: int
    frames: list[bytes] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    finish: str | None = None
    result: bytes | None = None


@dataclass
class Batch:
    """What one commit takes: the steps up to ``step``."""

    rows: list[OutputRow] = field(default_factory=list)
    steps: int = 0
    step: int = 0
    executed: str | None = None  # stream id of the last step's plan
    exec_us: int = 0
    idle_us: int = 0
    dropped: list[int] = field(default_factory=list)  # seats of sequences that could not be computed
    spoiled: bytes = b""  # packed ids of their blocks

    def commit_rows(self) -> list[CommitRow]:
        return [
            CommitRow(
                rid=(new := row.output.new).rid, choice=new.choice, placement=new.placement, cursor=row.cursor,
                frames=b"".join(row.frames), finish=row.finish, result=row.result, id=new.id,
            )
            for row in self.rows
        ]  # fmt: skip

    def hint_rows(self) -> list[HintRow]:
        return [
            HintRow(row.output.seat, pack_ids(row.tokens), row.cursor + sum(map(len, row.frames)), row.finish)
            for row in self.rows
        ]


class Outputs:
    """All sequences of a worker, by seat. Where a sequence has ended its seat stays, empty, until it is freed."""

    def __init__(self, vocabulary: Vocabulary | WindowVocabulary, eos: frozenset[int], block_size: int = 1) -> None:
        self._vocabulary = vocabulary
        self._eos = eos
        self._tables = SpoiledBlocks(block_size)
        self._seats: dict[int, Output | None] = {}
        self._batch = Batch()

    @property
    def live(self) -> int:
        """Sequences that have not ended here."""
        return sum(output is not None for output in self._seats.values())

    def step(self, plan: Plan, sampled: Sampled, executed: str, idle_us: int = 0) -> int:
        """Take the result of one executed plan (``executed``: its stream id). Returns the tokens that count."""
        seats = self._seats
        for seat in plan.frees:
            seats.pop(seat, None)
        for new in plan.new:
            seats.pop(new.seat, None)
            if new.seat not in sampled.dropped or new.seat in sampled.failed:
                seats[new.seat] = Output(new, self._vocabulary, self._eos)
        seats |= dict.fromkeys(sampled.late)  # what comes of them later is nobody's concern either
        # what has ended, or was dropped before, is in its seat as None: nobody asks what became of later rows
        dropped = [seat for seat in sampled.dropped if seat not in seats or seats[seat] is not None]
        if (drops := self._tables.follow(plan, dropped)) is not None:
            self._drop(drops, dropped, sampled.failed)
        for seat, scores in sampled.prompts.items():
            if (output := seats.get(seat)) is not None and output.scores is not None:
                output.scores.append(scores)
        tokens = 0
        for seat, token in zip(sampled.seats.tolist(), sampled.tokens.tolist(), strict=True):
            output = seats[seat]
            if output is not None and seat not in sampled.failed:
                tokens += output.steady_until > 0
                self._append(output, token, sampled)
        for seat, (code, message) in sampled.failed.items():
            if (output := seats.get(seat)) is not None:
                self._fail(output, code, message)
        for seat, reason in plan.ends:
            if (output := seats.pop(seat, None)) is not None:
                self._end(output, reason)
        batch = self._batch
        batch.steps += 1
        batch.step = plan.step
        batch.executed = executed
        batch.exec_us += sampled.exec_us
        batch.idle_us += idle_us
        return tokens

    def _drop(self, drops: Drops, dropped: list[int], failed: dict[int, tuple[str, str]]) -> None:
        """End here, without a word to the client, what is to be placed anew; the hint tells of all that is dropped."""
        batch = self._batch
        batch.dropped += sorted(drops.others.union(dropped))
        batch.spoiled += drops.blocks
        for seat in drops.others.union(set(dropped).difference(failed)):
            self._seats[seat] = None

    def take(self) -> Batch | None:
        """Everything since the last call, for one commit; None if no step was executed."""
        if not self._batch.steps:
            return None
        batch, self._batch = self._batch, Batch()
        batch.rows = [row for row in batch.rows if not row.output.dropped]
        for row in batch.rows:
            row.output.row = None
        return batch

    def settle(self, batch: Batch, verdicts: str) -> None:
        """Learn what became of a commit's rows: what did not land ends here, with all that follows it."""
        for row, verdict in zip(batch.rows, verdicts, strict=True):
            if verdict != LANDED:
                row.output.dropped = True
                self._empty(row.output)

    def _append(self, output: Output, token: int, sampled: Sampled) -> None:
        if not output.steady_until:  # the prompt was all that was asked for
            self._end(output, "length")
            return
        output.count += 1
        if output.plain and output.count < output.steady_until and token not in output.end_ids and output.cursor:
            text = output.stream.push(token)
            held = output.stream.held
            self._add(output, token, encode((token, text, None, {"held": held} if held else None)))
            return
        text, finish, stop = self._advance(output, token)
        extra = self._logprobs(output, token, sampled)
        extra |= self._of_prompt(output)
        if stop is not None:
            extra["stop"] = stop
        if finish is None and (held := output.held):
            extra["held"] = held
        self._add(output, token, encode((token, text, finish, extra or None)))
        if finish is not None:
            self._close(output, finish)

    def _advance(self, output: Output, token: int) -> tuple[str, str | None, str | int | None]:
        """(text, finish reason, stop string or id that matched) of one more token."""
        sampling, stop = output.new.sampling, None
        if token in output.end_ids and output.count > output.min_tokens:
            shown = not sampling.skip_special_tokens if token in output.eos else sampling.include_stop_str_in_output
            text, found = output._show(token, output.stream.push(token) if shown else "", output.count)
            if token not in output.eos:
                stop = token
            rest, late = self._rest(output)
            return text + rest, "stop", next((one for one in (found, late, stop) if one is not None), None)
        text, found = output._show(token, output.stream.push(token), output.count)
        output._await(token)
        if found is not None:
            return text, "stop", found
        if output.count >= output.steady_until:
            rest, found = self._rest(output)
            return text + rest, "length" if found is None else "stop", found
        return text, None, None

    def _rest(self, output: Output) -> tuple[str, str | None]:
        """What was held, at the end, up to a stop string in it."""
        text, found = output.settle()
        return (text, found) if found is not None else (text + self._flush(output), None)

    def _flush(self, output: Output) -> str:
        held = output.held
        if output.shown is not None:
            output.shown.append((None, held))
        return held

    def _end(self, output: Output, reason: str) -> None:
        """The terminal frame of a sequence that the scheduler ends: cancelled, or past its deadline."""
        self._add(output, None, encode((None, self._flush(output), reason, self._of_prompt(output) or None)))
        self._close(output, reason)

    def _fail(self, output: Output, code: str, message: str) -> None:
        """The terminal frame of a sequence that its own request made impossible to continue."""
        error = {"code": code, "message": message, "param": None}
        self._add(output, None, encode((None, self._flush(output), "error", error | self._of_prompt(output))))
        self._close(output, "error", error)

    def _add(self, output: Output, token: int | None, frame: bytes) -> None:
        row = output.row
        if row is None:
            row = output.row = OutputRow(output, output.cursor)
            self._batch.rows.append(row)
        row.frames.append(frame)
        if token is not None:
            row.tokens.append(token)
        output.cursor += len(frame)

    def _close(self, output: Output, finish: str, error: dict[str, Any] | None = None) -> None:
        row = output.row
        assert row is not None
        row.finish = finish
        if output.shown is not None:
            row.result = encode(_terminal(output, output.shown, finish, error))
        self._empty(output)

    def _empty(self, output: Output) -> None:
        if self._seats.get(output.seat) is output:
            self._seats[output.seat] = None

    def _logprobs(self, output: Output, token: int, sampled: Sampled) -> dict[str, Any]:
        if output.new.sampling.logprobs is None or (found := sampled.logprobs.get(output.seat)) is None:
            return {}
        logprob, ids, values = found
        token_bytes = self._vocabulary.token_bytes
        top = zip(ids.tolist(), _finite(values), strict=True)
        return {
            "lp": max(float(logprob), LOGPROB_FLOOR),
            "tok": token_bytes(token),
            "top": [[i, token_bytes(i), value] for i, value in top],
        }

    def _of_prompt(self, output: Output) -> dict[str, Any]:
        """What the first frame of a journal says of the prompt: how much of it the prefix cache had, and logprobs."""
        if output.cursor:
            return {}
        told: dict[str, Any] = {"cached": output.new.cached_tokens} if output.new.cached_tokens else {}
        if output.scores is not None and (scores := self._prompt_logprobs(output, output.scores)) is not None:
            told["plp"] = scores.asdict()
        return told

    def _prompt_logprobs(self, output: Output, parts: list[Scores]) -> PromptLogprobs | None:
        """All of a prompt's; None where it has been ended before it was computed."""
        ids, k = unpack_ids(output.new.token_ids)[: output.new.prompt_len], output.new.sampling.prompt_logprobs or 0
        if sum(len(part.logprobs) for part in parts) != len(ids) - 1:
            return None
        empty = Scores(np.zeros(0), np.zeros(0), np.zeros((0, k)), np.zeros((0, k)))
        ranks, top = (np.concatenate([getattr(part, n) for part in (empty, *parts)]) for n in ("ranks", "top_ids"))
        own, best = (np.concatenate([getattr(part, n) for part in (empty, *parts)]) for n in ("logprobs", "top"))
        named = np.unique(np.concatenate([np.array(ids), top.reshape(-1)]).astype(np.int64)).tolist()
        token_bytes = self._vocabulary.token_bytes
        return PromptLogprobs(
            k, pack_ids(ids), _packed(own), ranks.astype("<i4").tobytes(), top.astype("<i4").tobytes(), _packed(best),
            [(token, token_bytes(token)) for token in named],
        )  # fmt: skip


def _packed(logprobs: np.ndarray) -> bytes:
    """float32 bytes of what JSON can say."""
    floor = LOGPROB_FLOOR
    packed: bytes = np.maximum(np.nan_to_num(logprobs, nan=floor, posinf=0.0), floor).astype("<f4").tobytes()
    return packed


def _terminal(
    output: Output, shown: list[tuple[int | None, str]], finish: str, error: dict[str, Any] | None
) -> Terminal:
    """The entry of the results stream: the text, and what its format tells of it."""
    new, read = output.new, output.new.sampling.content
    message = ParsedMessage()
    if read is not None:
        functions = dict(zip(read.functions, read.schemas or [None] * len(read.functions), strict=True))
        ruled = new.sampling.ruled
        message = parsed_message(new.rid, new.choice, read.format, functions, read.thinking, shown, eager=ruled)
    return Terminal(
        rid=new.rid, id=new.id, choice=new.choice, finish_reason=message.finish(finish) or finish,
        text="".join(text for _, text in shown), prompt_tokens=new.prompt_len, completion_tokens=output.count,
        cached_tokens=new.cached_tokens, error=error, **message.fields,
    )  # fmt: skip


def _finite(values: np.ndarray) -> list[float]:
    return [max(value, LOGPROB_FLOOR) for value in values.tolist()]
