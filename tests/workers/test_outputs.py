"""Outputs: stop checks, frames, rows and results, without an engine or a server.

Over 400 lines: a test for each rule of one module.
"""

from __future__ import annotations

from array import array

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.formats.families import REASONING, TOOLS
from protocol.formats.spec import FormatSpec
from protocol.messages import Frame, NewSequence, Plan, Terminal, decode_frames, pack_ids, unpack_ids
from protocol.sampling import Content, SamplingParams
from protocol.structures.structure import Structure
from workers.engines.base import Sampled
from workers.engines.simulated import EOS, byte_vocabulary
from workers.outputs import Batch, Outputs, StopStrings

PROMPT = b"Once upon"


def sequence(seat: int = 0, output: bytes | list[int] = b"", **fields: object) -> NewSequence:
    """A sequence whose ids are bytes; ``sampling`` fields by name, others are NewSequence's."""
    ours = set(NewSequence.__struct_fields__)
    sampling = {"max_tokens": 1000, **{k: v for k, v in fields.items() if k not in ours}}
    ids = [*PROMPT, *output]
    return NewSequence(**{
        "seat": seat, "rid": f"r{seat}", "choice": 0, "placement": 1, "token_ids": pack_ids(ids),
        "prompt_len": len(PROMPT), "sampling": SamplingParams(**sampling), "seed": 0, "cursor": 0, "block_table": b"",
        "computed": 0, **{k: v for k, v in fields.items() if k in ours},
    })  # type: ignore[arg-type]  # fmt: skip


class Steps:
    """Feeds steps by hand and takes what a commit would."""

    def __init__(self, **fields: object) -> None:
        self.outputs = Outputs(byte_vocabulary(), frozenset([EOS]))
        self.number = 0
        if fields.pop("start", True):
            self.step({}, new=[sequence(**fields)])  # type: ignore[arg-type]

    def step(
        self, tokens: dict[int, int], logprobs: dict | None = None, failed: dict | None = None, **fields: object
    ) -> int:
        self.number += 1
        plan = Plan(1, 1, self.number, seats=array("H", tokens).tobytes(), **fields)  # type: ignore[arg-type]
        drawn = np.array(list(tokens.values()), np.int32)
        sampled = Sampled(np.array(list(tokens), np.int32), drawn, logprobs or {}, 100, failed or {})
        return self.outputs.step(plan, sampled, f"{self.number}-0", 7)

    def take(self) -> Batch:
        batch = self.outputs.take()
        assert batch is not None
        return batch

    def frames(self, text: bytes | list[int], seat: int = 0) -> list[Frame]:
        for token in text:
            self.step({seat: token})
        rows = self.take().commit_rows()
        return decode_frames(rows[0].frames) if rows else []


def text_of(frames: list[Frame]) -> str:
    return "".join(frame.text for frame in frames)


def extra_of(frame: Frame) -> dict:
    return frame.extra or {}


# ---------------------------------------------------------------- what could not be computed


def result(tokens: dict[int, int], dropped: list[int], failed: dict | None = None) -> Sampled:
    drawn = np.array(list(tokens.values()), np.int32)
    return Sampled(np.array(list(tokens), np.int32), drawn, {}, 0, failed or {}, dropped)


def test_a_dropped_sequence_keeps_what_it_had_says_nothing_more_and_is_told_once() -> None:
    steps = Steps(block_table=pack_ids([4, 5]))
    steps.step({0: 97})
    for number in (3, 4):  # plans ahead have further rows of it
        steps.outputs.step(Plan(1, 1, number), result({0: 98}, [0]), "x")
    batch = steps.take()
    assert [(row.tokens, row.finish) for row in batch.rows] == [([97], None)]
    assert (batch.dropped, list(unpack_ids(batch.spoiled))) == ([0], [4, 5])
    steps.step({}, ends=[(0, "abort")])
    assert steps.take().rows == [], "the scheduler ends it"


def test_an_error_ends_its_own_choice_and_what_shares_its_blocks_is_dropped_in_silence() -> None:
    steps = Steps(start=False)
    new = [sequence(0, block_table=pack_ids([4])), sequence(1, block_table=pack_ids([4, 5]), computed=1)]
    failed = dict.fromkeys((0, 1), ("non_finite_logits", "no number"))  # both: the second read what the first left
    steps.outputs.step(Plan(1, 1, 1, new=new), result({0: 97, 1: 97}, [0, 1], failed), "x")
    batch = steps.take()
    assert [(row.output.seat, row.finish) for row in batch.rows] == [(0, "error")]
    assert batch.dropped == [0, 1]


def test_a_new_sequence_that_is_no_sequence_is_dropped_unread() -> None:
    steps = Steps(start=False)
    broken = sequence(0)
    broken.token_ids = b"\1"
    steps.outputs.step(Plan(1, 1, 1, new=[broken]), result({}, [0, 7]), "x")
    assert steps.take().dropped == [0, 7], "an empty seat that a row named is told too"


def test_rows_after_an_end_are_nobody_s_concern() -> None:
    steps = Steps(max_tokens=1)
    steps.step({0: 97})
    steps.outputs.step(Plan(1, 1, 3), result({0: 98}, [0], {0: ("non_finite_logits", "no number")}), "x")
    batch = steps.take()
    assert ([row.finish for row in batch.rows], batch.dropped) == (["length"], [])


def test_a_token_that_had_no_mask_in_time_counts_for_nothing_nor_what_follows() -> None:
    steps = Steps()
    steps.step({0: 97})
    late = result({0: 98}, [])
    late.late = [0]
    assert steps.outputs.step(Plan(1, 1, 3), late, "x") == 0
    steps.step({0: 99})  # a plan ahead
    batch = steps.take()
    assert [(row.tokens, row.finish) for row in batch.rows] == [([97], None)]
    assert batch.dropped == []
    assert [unpack_ids(row.tokens).tolist() for row in batch.hint_rows()] == [[97]]


# ---------------------------------------------------------------- frames and ends


def test_one_frame_a_token_and_length_at_the_last() -> None:
    frames = Steps(max_tokens=3).frames(b"abcdef")
    assert [(f.token, f.text, f.finish) for f in frames] == [(97, "a", None), (98, "b", None), (99, "c", "length")]
    assert all(f.extra is None for f in frames)


def test_half_a_character_is_held_and_an_end_gives_it_up() -> None:
    frames = Steps(max_tokens=4).frames([*"é".encode(), 0xE2, 0x82])
    assert [(f.text, extra_of(f).get("held")) for f in frames] == [("", "�"), ("é", None), ("", "�"), ("�", None)]
    assert frames[-1].finish == "length"


def test_eos_ends_and_says_nothing_more() -> None:
    frames = Steps().frames([*b"ab", EOS, *b"cd"])
    assert [(f.token, f.text, f.finish, f.extra) for f in frames][2:] == [(EOS, "", "stop", None)]


def test_ignored_eos_goes_on_and_a_stop_id_still_ends() -> None:
    frames = Steps(ignore_eos=True, stop_token_ids=[99]).frames([EOS, *b"bcd"])
    assert [f.token for f in frames] == [EOS, 98, 99]
    assert (frames[-1].finish, frames[-1].text, frames[-1].extra) == ("stop", "", {"stop": 99})


def test_a_stop_id_is_shown_where_the_client_wants_stops_in_its_output() -> None:
    frames = Steps(stop_token_ids=[99], include_stop_str_in_output=True).frames(b"bc")
    assert (text_of(frames), frames[-1].finish) == ("bc", "stop")


def test_min_tokens_keeps_ids_and_strings_from_ending() -> None:
    frames = Steps(min_tokens=3, stop=["b"], stop_token_ids=[99]).frames([98, 99, EOS, 98])
    assert [(f.text, f.finish) for f in frames] == [("b", None), ("c", None), ("", None), ("", "stop")]
    assert frames[-1].extra == {"stop": "b"}


def test_cached_tokens_stand_in_the_first_frame_of_the_journal_only() -> None:
    assert [f.extra for f in Steps(cached_tokens=5).frames(b"ab")] == [{"cached": 5}, None]
    assert [f.extra for f in Steps(cached_tokens=5, cursor=9, output=b"x").frames(b"ab")] == [None, None]


def test_logprobs() -> None:
    steps = Steps(logprobs=2)
    values = np.array([-0.5, -np.inf], np.float32)
    steps.step({0: 97}, {0: (-0.5, np.array([97, 0xE4], np.int32), values)})
    (frame,) = decode_frames(steps.take().commit_rows()[0].frames)
    assert frame.extra == {"lp": -0.5, "tok": b"a", "top": [[97, b"a", -0.5], [0xE4, b"\xe4", -9999.0]]}


def test_the_scheduler_ends_a_sequence_and_held_text_comes_out() -> None:
    steps = Steps(stop=["xyz"])
    steps.step({0: ord("a")})
    steps.step({0: ord("x")}, ends=[(0, "deadline")])
    row = steps.take().commit_rows()[0]
    frames = decode_frames(row.frames)
    assert [(f.token, f.text, f.finish) for f in frames] == [
        (97, "a", None), (120, "", None), (None, "x", "deadline")
    ]  # fmt: skip
    assert frames[1].extra == {"held": "x"}
    assert row.finish == "deadline"
    steps.step({}, ends=[(0, "abort")])
    assert steps.take().rows == []  # it had ended


# ---------------------------------------------------------------- stop strings


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_over_several_tokens(include: bool) -> None:
    frames = Steps(stop=["END"], include_stop_str_in_output=include).frames(b"aEENDz")
    assert text_of(frames) == ("aEEND" if include else "aE")
    assert (frames[-1].finish, frames[-1].extra) == ("stop", {"stop": "END"})
    assert [extra_of(f).get("held") for f in frames] == [None, "E", "E", "EN", None]


THINKER = Content(FormatSpec(name="hermes", tools=TOOLS["hermes"], reasoning=REASONING["think"]), ["f"], thinking=True)


@pytest.mark.parametrize("replayed", [0, 7, 40, 70])
def test_stop_strings_are_looked_for_in_plain_content_alone(replayed: int) -> None:
    """Not in a thought, not in a call; what one of them might begin is not held back at the border."""
    thought = b"no END here E</think>"
    call = b'<tool_call>{"name": "f", "arguments": {"a": "END"}}</tool_call>'
    text = thought + b"see E" + call + b" aENDz"
    frames = Steps(stop=["END"], content=THINKER, output=text[:replayed], cursor=replayed).frames(text[replayed:])
    assert (frames[-1].finish, frames[-1].extra) == ("stop", {"stop": "END"})
    assert text_of(frames) == text[replayed : text.index(b"ENDz")].decode()


def test_a_grammar_leaves_stop_strings_to_plain_content() -> None:
    structure = Structure(grammar="start: /.*/", field="tools")
    frames = Steps(stop=["END"], structure=structure).frames(b"aENDb")
    assert text_of(frames) == "aENDb"
    content = Content(FormatSpec(name="hermes", tools=TOOLS["hermes"]), ["f"], thinking=False)
    frames = Steps(stop=["END"], structure=structure, content=content).frames(b"aENDb")
    assert (text_of(frames), frames[-1].finish) == ("a", "stop")


MARKED = Content(FormatSpec(name="hermes", tools=TOOLS["hermes"]), ["f"], thinking=False)


@pytest.mark.parametrize("replayed", [0, 4, 9, 30])
def test_a_marker_that_is_no_single_token_is_not_searched(replayed: int) -> None:
    """Its letters are no content, once it is whole: until then none of them may end the answer."""
    text = b'<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    frames = Steps(stop=["a", "<t"], content=MARKED, output=text[:replayed], cursor=replayed).frames(text[replayed:])
    assert [frame.finish for frame in frames if frame.finish] == []
    begun = text[:replayed] if replayed >= len(b"<tool_call>") else b""  # what was held when it moved comes after
    assert text_of(frames) == text[len(begun) :].decode()


def test_what_turns_out_to_be_no_marker_is_searched() -> None:
    frames = Steps(stop=["a"], content=MARKED).frames(b"<tool_bag>")
    assert (text_of(frames), frames[-1].finish, frames[-1].extra) == ("<tool_b", "stop", {"stop": "a"})
    assert [extra_of(f).get("held") for f in frames[:3]] == ["<", "<t", "<to"]


@pytest.mark.parametrize(("stop", "shown", "found"), [("l_", "<too", {"stop": "l_"}), ("x", "<tool_", None)])
def test_an_answer_that_ends_in_half_a_marker(stop: str, shown: str, found: dict[str, str] | None) -> None:
    for fields, more in (({}, [EOS]), ({"max_tokens": 6}, [])):
        frames = Steps(stop=[stop], content=MARKED, **fields).frames([*b"<tool_", *more])
        assert (text_of(frames), frames[-1].extra) == (shown, found)
        assert frames[-1].finish == ("stop" if found or more else "length")


def brute_force(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The first end of any stop string, then the longest one that ends there."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.text("abc", max_size=4), max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4),
)
def test_stop_strings_are_found_wherever_they_lie(parts: list[str], stops: list[str]) -> None:
    search, shown, stop = StopStrings(stops, include=False), "", None
    for part in parts:
        text, stop = search.feed(part)
        shown += text
        if stop is not None:
            break
    assert (shown + search.held, stop) == brute_force("".join(parts), stops)


@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=24), st.integers(0, 24), st.lists(st.sampled_from(["ab", "é", "\x00b", "aab"]), max_size=3),
    st.integers(0, 5), st.sampled_from([b"", b"<tool_b", b'x<tool_call>{"name": "f"}'])
)  # fmt: skip
def test_a_move_at_any_token_changes_nothing(
    output: bytes, at: int, stops: list[str], min_tokens: int, first_text: bytes
) -> None:
    """The journal of a sequence that moved equals that of one that stayed, byte for byte; the result as well."""
    output = first_text + output
    fields = {"stop": stops, "min_tokens": min_tokens, "max_tokens": 30, "wants_result": True, "id": "x"}
    fields |= {"content": MARKED} if first_text else {}
    stayed = Steps(**fields)
    for token in output:
        stayed.step({0: token})
    (whole,) = stayed.take().commit_rows() or [None]

    before = Steps(**fields)
    for token in output[:at]:
        before.step({0: token})
    (first,) = before.take().commit_rows() or [None]
    if first is None or first.finish:
        return
    after = Steps(output=output[:at], cursor=len(first.frames), **fields)
    for token in output[at:]:
        after.step({0: token})
    (second,) = after.take().commit_rows() or [None]
    assert whole is not None
    assert first.frames + (second.frames if second else b"") == whole.frames
    assert (second.result if second else None) == whole.result


# ---------------------------------------------------------------- results


def test_a_result_has_the_whole_text_and_the_counts() -> None:
    steps = Steps(wants_result=True, stop=["."], output=b"He", cursor=20, cached_tokens=4, id="job-1", choice=2)
    steps.frames(b"")
    for token in b"llo.":
        steps.step({0: token})
    result = msgspec.msgpack.decode(steps.take().commit_rows()[0].result or b"", type=Terminal)
    assert result == Terminal(
        rid="r0", id="job-1", choice=2, finish_reason="stop", text="Hello", prompt_tokens=len(PROMPT),
        completion_tokens=6, cached_tokens=4,
    )  # fmt: skip


@pytest.mark.parametrize(("tokens", "text"), [([*b"ab", 0xC3], "ab�"), ([*b"ab", EOS], "ab"), (b"axy", "axy")])
def test_results_hold_the_text_of_the_frames(tokens: list[int], text: str) -> None:
    steps = Steps(wants_result=True, stop=["xyz"], max_tokens=3)
    for token in tokens:
        steps.step({0: token})
    row = steps.take().commit_rows()[0]
    assert msgspec.msgpack.decode(row.result or b"", type=Terminal).text == text == text_of(decode_frames(row.frames))


# ---------------------------------------------------------------- rows, hints, verdicts


def test_several_steps_make_one_row_and_one_hint_row_per_sequence() -> None:
    steps = Steps(start=False)
    steps.step({}, new=[sequence(0), sequence(1, cursor=50, output=b"x")])
    for a, b in zip(b"abc", b"xyz", strict=True):
        steps.step({0: a, 1: b})
    batch = steps.take()
    assert (batch.steps, batch.step, batch.executed, batch.exec_us, batch.idle_us) == (4, 4, "4-0", 400, 28)
    rows, hints = batch.commit_rows(), batch.hint_rows()
    assert [(r.rid, r.cursor, [f.token for f in decode_frames(r.frames)]) for r in rows] == [
        ("r0", 0, [*b"abc"]), ("r1", 50, [*b"xyz"])
    ]  # fmt: skip
    ends = [row.cursor + len(row.frames) for row in rows]
    assert [(h.seat, list(unpack_ids(h.tokens)), h.cursor) for h in hints] == [
        (0, [*b"abc"], ends[0]), (1, [*b"xyz"], ends[1])
    ]  # fmt: skip
    assert steps.outputs.take() is None
    steps.step({})
    assert steps.take().rows == []  # a step without rows is committed too: its hint counts


def test_rows_past_the_end_are_thrown_away_until_the_seat_is_used_again() -> None:
    steps = Steps(max_tokens=1)
    assert [steps.step({0: 97}), steps.step({0: 98}), steps.step({0: 99})] == [1, 0, 0]
    assert steps.outputs.live == 0
    steps.step({0: 100}, frees=[0], new=[sequence(0, rid="next")])
    rows = steps.take().commit_rows()
    assert [(r.rid, [f.token for f in decode_frames(r.frames)]) for r in rows] == [("r0", [97]), ("next", [100])]
    with pytest.raises(KeyError):
        steps.step({9: 1})  # a seat that no plan named: a fault of ours, never silent


@pytest.mark.parametrize("verdict", ["s", "c"])
def test_what_did_not_land_is_dropped_with_all_that_follows(verdict: str) -> None:
    steps = Steps(start=False)
    steps.step({0: 97, 1: 98}, new=[sequence(0), sequence(1)])
    batch = steps.take()
    steps.step({0: 97, 1: 98})  # while the commit runs
    steps.outputs.settle(batch, verdict + "l")
    steps.step({0: 97, 1: 98})
    rows = steps.take().commit_rows()
    assert [(r.rid, len(decode_frames(r.frames))) for r in rows] == [("r1", 2)]


def test_a_verdict_does_not_touch_the_next_sequence_in_the_seat() -> None:
    steps = Steps()
    steps.step({0: 97})
    batch = steps.take()
    steps.step({0: 98}, frees=[0], new=[sequence(0, rid="next", placement=7)])
    steps.outputs.settle(batch, "s")
    steps.step({0: 99})
    rows = steps.take().commit_rows()
    assert [(r.rid, r.placement, len(decode_frames(r.frames))) for r in rows] == [("next", 7, 2)]


# ---------------------------------------------------------------- structure


def test_a_grammar_says_where_it_ends_and_nothing_else_does() -> None:
    """Stop strings are not looked for in it, and it wins over min_tokens and ignore_eos."""
    steps = Steps(structure=Structure(json_object=True), stop=["a"], min_tokens=50, ignore_eos=True)
    frames = steps.frames([*b'{"a":1}', EOS])
    assert text_of(frames) == '{"a":1}'
    assert [frame.finish for frame in frames] == [None] * 7 + ["stop"]


def test_a_grammar_that_meets_max_tokens_is_told_as_length() -> None:
    frames = Steps(structure=Structure(json_object=True), max_tokens=3).frames(b'{"a')
    assert (text_of(frames), frames[-1].finish) == ('{"a', "length")


@pytest.mark.parametrize("journaled", [b"", b"a", b"a#1#", b"a#1#2"])
def test_stop_strings_are_looked_for_where_content_begins(journaled: bytes) -> None:
    steps = Steps(structure=Structure(after=[ord("#"), ord("2")]), stop=["1"], output=journaled)
    frames = steps.frames(b"a#1#2b1c"[len(journaled) :])
    assert text_of(frames) == "a#1#2b"[len(journaled) :]
    assert frames[-1].finish == "stop"


def test_a_ruled_call_that_meets_max_tokens_is_one_as_far_as_it_came() -> None:
    """In a result as in a stream; one that no grammar rules is text until it is whole."""
    content = Content(FormatSpec(name="hermes", tools=TOOLS["hermes"]), ["f"], thinking=False, schemas=[{}])
    text = b'<tool_call>\n{"name": "f", "arguments": {"a": "x'
    told = {}
    for structure in (Structure(grammar="start: /.*/", field="tools"), None):
        steps = Steps(structure=structure, content=content, wants_result=True, max_tokens=len(text))
        for token in text:
            steps.step({0: token})
        (row,) = steps.take().commit_rows()
        assert row.result is not None
        told[structure is not None] = msgspec.msgpack.decode(row.result, type=Terminal)
    assert (told[True].finish_reason, told[True].content) == ("length", None)
    assert told[True].tool_calls is not None
    assert told[True].tool_calls[0]["function"] == {"name": "f", "arguments": '{"a": "x'}
    assert (told[False].content, told[False].tool_calls) == (text.decode(), None)


def test_stop_strings_in_an_answer_whose_thought_has_a_budget_and_did_not_come() -> None:
    structure = Structure(after=[ord("#")], after_limit=5, opened_by=[ord("<")])
    content = Content(FormatSpec(name="think", reasoning=REASONING["think"]), [], thinking=False)
    frames = Steps(structure=structure, content=content, stop=["b"]).frames(b"abc")
    assert (text_of(frames), frames[-1].finish) == ("a", "stop")


def test_a_sequence_whose_grammar_failed_ends_with_an_error_and_its_last_token_counts_for_nothing() -> None:
    steps = Steps(structure=Structure(json_object=True), wants_result=True)
    steps.step({0: ord("{")})
    assert steps.step({0: ord("x")}, failed={0: ("grammar_failed", "why")}) == 0
    steps.step({0: ord("y")}, failed={0: ("grammar_failed", "why")})  # a row past the end
    batch = steps.take()
    frames = decode_frames(batch.commit_rows()[0].frames)
    assert [frame.token for frame in frames] == [ord("{"), None]
    assert frames[1].finish == "error"
    assert extra_of(frames[1]) == {"code": "grammar_failed", "message": "why", "param": None}
    assert unpack_ids(batch.hint_rows()[0].tokens).tolist() == [ord("{")]
    assert batch.hint_rows()[0].finish == "error"
    result = batch.commit_rows()[0].result
    assert result is not None
    terminal = msgspec.msgpack.decode(result, type=Terminal)
    assert terminal.error == {"code": "grammar_failed", "message": "why", "param": None}
    assert terminal.text == "{"
