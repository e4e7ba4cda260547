"""Whatever happens to publications (lost, repeated, late, reordered, cut), a reader gets its journals once, in order.

The follower and the renderer alone, against journals in memory; hypothesis deals the faults.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.openai.render import Chunks, EventId, whole_answer
from gateway.openai.view import View
from gateway.sse import EventReader
from gateway.streams import Collector
from protocol.errors import HeadraceError, InvalidRequest, StreamDiverged
from protocol.messages import Frame, Row, encode
from tests.gateway.front import event_id, split_events

RID = "0" * 32


class Journals:
    """The reads that a follower makes, of journals that grow."""

    def __init__(self, choices: int) -> None:
        self.journals = [b""] * choices

    async def read_request(self, rid: str) -> Any:
        """Its record says nothing yet that these answers need."""
        return SimpleNamespace(moved=None, prompts=[], open=len(self.journals))

    async def journal_lengths(self, asked: Sequence[tuple[str, int]]) -> list[int]:
        return [len(self.journals[choice]) for _, choice in asked]

    async def read_journal(self, rid: str, choice: int, cursor: int = 0) -> bytes:
        return self.journals[choice][cursor:]


def frames_of(choice: int, texts: list[str], finish: str) -> list[bytes]:
    extra: dict[str, Any] = {"lp": -1.5, "tok": b"\xc3"}
    frames = [Frame(i, f"{choice}{text}", None, extra if i % 2 else None) for i, text in enumerate(texts)]
    return [*map(encode, frames), encode(Frame(None, "", finish))]


requests = st.lists(st.lists(st.text(max_size=3), max_size=6), min_size=1, max_size=3)
views = st.builds(
    View,
    kind=st.sampled_from(["chat", "completion"]),
    usage=st.booleans(),
    logprobs=st.sampled_from([None, 0]),
    ids=st.booleans(),
)
fates = st.lists(st.sampled_from(["seen", "lost", "twice", "late"]), min_size=30, max_size=30)


@settings(max_examples=150, deadline=None)
@given(texts=requests, view=views, fates=fates, whole=st.booleans(), data=st.data())
def test_every_token_once_and_in_order(
    texts: list[list[str]], view: View, fates: list[str], whole: bool, data: st.DataObject
) -> None:
    journals = Journals(len(texts))
    frames = [frames_of(choice, part, "stop") for choice, part in enumerate(texts)]
    order = data.draw(st.permutations([c for c, part in enumerate(frames) for _ in part]))

    async def run() -> tuple[Any, list[bytes]]:
        if whole:
            follower: Any = Collector(RID, len(texts))
        else:
            follower = EventReader(RID, Chunks(RID, "m", view, len(texts), len(texts)), "m", 0.0)
        follower.admit(3)
        late: list[Row] = []
        taken = [0] * len(texts)
        for step, choice in enumerate(order):
            raw = frames[choice][taken[choice]]
            taken[choice] += 1
            row = Row(RID, choice, len(journals.journals[choice]), raw)
            journals.journals[choice] += raw
            fate = fates[step % len(fates)]
            rows = {"seen": [row], "lost": [], "twice": [row, row], "late": []}[fate]
            late += [row] if fate == "late" else []
            for one in (*rows, *(late if fate == "seen" else ())):
                follower.feed(one)
            if follower.behind and step % 3 == 0:
                await follower.catch_up(journals)
        await follower.catch_up(journals)
        for row in late:  # stragglers change nothing
            follower.feed(row)
        follower.flush()
        return follower, getattr(follower, "_out", [])

    follower, out = asyncio.run(run())
    assert follower.failed is None
    assert follower.cursors == [len(j) for j in journals.journals]
    if whole:
        assert [b"".join(pieces) for pieces in follower.journals] == journals.journals
        return
    reference = Chunks(RID, "m", view, len(texts), len(texts))
    reference.prompt_tokens = 3
    plain = b"".join(reference.events(c, j) for c, j in enumerate(journals.journals))
    events = split_events(b"".join(out))
    payloads = [e.split(b"data: ", 1)[1] for e in events]
    wanted = [e.split(b"data: ", 1)[1] for e in split_events(plain + reference.closing())]
    assert sorted(payloads) == sorted(wanted)
    shown = [EventId.parse(event_id(event) or "") for event in events]
    openings = len(texts) if view.kind == "chat" or view.ids else 0
    assert [len(id.cursors) for id in shown] == [
        *range(1, openings + 1),
        *[len(texts)] * (len(events) - openings),
    ]
    for choice in range(len(texts)):
        mark = b'"index":%d,' % choice
        assert [p for p in payloads if mark in p] == [p for p in wanted if mark in p]


@settings(max_examples=100, deadline=None)
@given(texts=requests, view=views, data=st.data())
def test_a_resumed_stream_is_the_rest_of_it(texts: list[list[str]], view: View, data: st.DataObject) -> None:
    """From any event id on, with choices interleaved in any order before."""
    frames = [frames_of(choice, part, "length") for choice, part in enumerate(texts)]
    journals = [b"".join(part) for part in frames]
    count = len(texts)
    first = Chunks(RID, "m", view, count, 1)
    first.prompt_tokens = 3
    raw = first.openings()
    left = [list(part) for part in frames]
    for choice in data.draw(st.permutations([c for c, part in enumerate(frames) for _ in part])):
        raw += first.events(choice, left[choice].pop(0))
    events = split_events(raw + first.closing())
    at = data.draw(st.integers(0, len(events) - 1))
    shown = EventId.parse(event_id(events[at]) or "")
    if shown.tail == "d":
        return
    second = Chunks(RID, "m", view, count, 1)
    second.prompt_tokens = 3
    second.replay(shown, [j[:cursor] for j, cursor in zip(journals, shown.cursors, strict=False)])
    rest = second.openings()
    for choice, journal in enumerate(journals):
        if position := journal[second.cursors[choice] :]:
            rest += second.events(choice, position)
    rest += second.closing(shown.tail)
    payloads = [e.split(b"data: ", 1)[1] for e in split_events(rest)]
    wanted = [e.split(b"data: ", 1)[1] for e in events[at + 1 :]]
    assert sorted(payloads) == sorted(wanted)
    if count == 1:
        assert split_events(rest) == events[at + 1 :]


@settings(max_examples=100, deadline=None)
@given(texts=requests, cut=st.integers(0, 60), changed=st.booleans(), data=st.data())
def test_other_bytes_are_never_continued(texts: list[list[str]], cut: int, changed: bool, data: st.DataObject) -> None:
    """An id taken from one journal is refused by any other: shorter, or with one byte changed."""
    view = View()
    journals = [b"".join(frames_of(choice, part, "stop")) for choice, part in enumerate(texts)]
    chunks = Chunks(RID, "m", view, len(texts), 1)
    for choice, journal in enumerate(journals):
        chunks.events(choice, journal)
    shown = EventId(tuple(chunks.cursors), EventId.parse(event_id(chunks.closing()) or "").check)
    choice = data.draw(st.integers(0, len(texts) - 1))
    other = bytearray(journals[choice])
    at = data.draw(st.integers(0, len(other) - 1))
    if changed:
        other[at] ^= 1 + cut
    else:
        del other[at:]
    read = [bytes(other) if c == choice else j for c, j in enumerate(journals)]
    again = Chunks(RID, "m", view, len(texts), 1)
    with pytest.raises(StreamDiverged):
        again.replay(shown, read)


@given(text=st.text(max_size=20) | st.from_regex(r"[0-9.]{0,12}-[0-9a-f]{7,9}[udx]?", fullmatch=True))
def test_event_ids_are_parsed_or_refused(text: str) -> None:
    parsed: EventId | None = None
    try:
        parsed = EventId.parse(text)
    except HeadraceError as error:
        assert isinstance(error, InvalidRequest)  # noqa: PT017 (nothing else may be raised)
    if parsed is not None:
        assert all(cursor >= 0 for cursor in parsed.cursors)


def test_a_whole_answer_of_nothing_but_an_end() -> None:
    body, tally = whole_answer(RID, "m", View(kind="chat"), 1, [encode(Frame(None, "", "abort"))], 4)
    assert body["choices"][0]["message"]["content"] == ""
    assert body["choices"][0]["finish_reason"] == "abort"
    assert body["usage"]["completion_tokens"] == 0
    assert tally.failure() is None
