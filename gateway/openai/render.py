"""From journal frames to OpenAI's shapes: the chunks of a stream, and the whole answer. Pure: no I/O, no clock.

One event per frame; several, or none, of a frame whose answer is parsed (parsed.py). Every event's id says how far
each choice's journal has been shown, with a check of the bytes before: ``c0.c1...-CHECK`` (byte cursors of the choices
opened so far, then eight hex digits), ``.CHOICE.EVENTS`` where more events of a frame follow, and a last letter ``u``
after the usage chunk or ``d`` after [DONE]. Ids are written for readers that ask for them: some clients take an event
apart by its first line. A stream is a function of the request's record and its journals, so any gateway that replays
the journals up to an id continues with the same bytes.

A little over 400 lines: chunks and whole answers show the same things, and stay alike where they stand together.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import msgspec

from gateway.edge import encode_json, error_object
from gateway.openai.logprobs import (
    chat_logprob,
    completion_logprobs,
    echoed_logprobs,
    joined,
    token_text,
    told_of_prompt,
)
from gateway.openai.parsed import ParsedAnswer, parsed_answer
from gateway.openai.view import View
from protocol.errors import InvalidRequest, StreamDiverged, http_status
from protocol.messages import Frame, Job, split_stream, unpack_ids
from protocol.prompt_logprobs import prompt_logprobs_of

decode_frame = msgspec.msgpack.Decoder(Frame).decode
DONE = b"data: [DONE]\n\n"
_EVENT_ID = re.compile(
    r"((?:\d{1,12}(?:\.\d{1,12}){0,255})?)-([0-9a-f]{8})(?:\.(\d{1,3})\.(\d{1,6}))?([ud]?)", re.ASCII
)


@dataclass(frozen=True)
class EventId:
    """How far a client has read: ``cursors`` of the choices opened, ``check`` of the bytes before, ``tail`` u or d. Of
    the last frame of ``choice`` (-1: no frame is shown in part) only ``events`` events were shown."""

    cursors: tuple[int, ...]
    check: int
    tail: str = ""
    choice: int = -1
    events: int = 0

    @classmethod
    def parse(cls, text: str) -> EventId:
        found = _EVENT_ID.fullmatch(text.strip())
        if found is None:
            raise InvalidRequest("Last-Event-ID is not an event id of this service", param="Last-Event-ID")
        cursors = tuple(int(c) for c in found.group(1).split(".")) if found.group(1) else ()
        partial = (int(found.group(3)), int(found.group(4))) if found.group(3) else (-1, 0)
        return cls(cursors, int(found.group(2), 16), found.group(5), *partial)


def check_of(checks: list[int]) -> int:
    """One check for all choices: a lone choice's CRC-32 of its journal bytes, else the CRC of these."""
    return checks[0] if len(checks) == 1 else crc32(struct.pack(f"<{len(checks)}I", *checks))


def split_frames(raw: bytes) -> list[tuple[bytes, Frame]]:
    """The frames of ``raw`` with the bytes of each. One frame, the usual case, needs no splitting."""
    try:
        return [(raw, decode_frame(raw))]
    except msgspec.DecodeError:
        return [(piece, decode_frame(piece)) for piece in split_stream(raw)]


class Tally:
    """How far the journals of one request have been read, and their totals.

    ``choices`` journals; ``n`` of them share a prompt. ``error`` is the first error frame's extra.
    """

    def __init__(self, choices: int, n: int = 1) -> None:
        self.choices = choices
        self.n = n
        self.cursors = [0] * choices
        self.checks = [0] * choices
        self.ends: list[str | None] = [None] * choices
        self.open = choices
        self.tokens = [0] * choices  # of each choice
        self.prompt_tokens: int | None = None  # None: not admitted yet
        self.completion_tokens = 0
        self.replayed_tokens = 0  # of these, tokens that the client had seen before
        self.cached_tokens = 0
        self.error: dict[str, Any] | None = None
        self.thinking = False  # the prompt has opened a thought
        self.parsed: ParsedAnswer | None = None  # made with the first frame
        self.reads_prompt = False  # no frame can be shown before it is known how the prompt ends
        self.awaits_admission = False  # no frame can be shown before the notice of admission
        self.awaits_record = False  # nor before the record: its prompts are shown
        self.prompts_of_record: list[bytes] = []  # ids of each prompt, once the record was read
        self.cache = ""  # what the cache of answers said

    def count(self, choice: int, piece: bytes, frame: Frame) -> None:
        self.cursors[choice] += len(piece)
        self.checks[choice] = crc32(piece, self.checks[choice])
        if frame.token is not None:
            self.completion_tokens += 1
            self.tokens[choice] += 1
        extra = frame.extra
        if extra is not None and choice % self.n == 0:
            self.cached_tokens += extra.get("cached", 0)
        if frame.finish is not None and self.ends[choice] is None:
            self.ends[choice] = frame.finish
            self.open -= 1
            if frame.finish == "error" and self.error is None:
                self.error = extra or {}

    def failure(self) -> dict[str, Any] | None:
        """The error object of a request that failed: an error frame, or a deadline before any token."""
        if self.error is not None:
            code = str(self.error.get("code") or "engine_failed")
            kind = "invalid_request_error" if http_status(code) < 500 else "server_error"
            message = str(self.error.get("message") or "the request failed")
            return error_object(message, kind, self.error.get("param"), code)
        if not self.open and not self.completion_tokens and all(end == "deadline" for end in self.ends):
            return error_object(
                "the deadline passed before the first token", "timeout_error", "timeout_s", "deadline_exceeded"
            )
        return None

    def prompt_ids(self, choice: int) -> list[int] | None:
        """The ids of the prompt of ``choice``; None where the record was not read."""
        if not self.prompts_of_record:
            return None
        return list(unpack_ids(self.prompts_of_record[choice // self.n]))

    def usage(self) -> dict[str, Any]:
        prompt = self.prompt_tokens or 0
        usage: dict[str, Any] = {
            "prompt_tokens": prompt,
            "completion_tokens": self.completion_tokens,
            "total_tokens": prompt + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
        if self.parsed is not None:
            usage["completion_tokens_details"] = {"reasoning_tokens": self.parsed.reasoning_tokens}
        return usage


class Chunks(Tally):
    """The events of one stream, as bytes. ``prompts`` are the texts to echo, one per prompt."""

    def __init__(
        self,
        rid: str,
        model: str,
        view: View,
        choices: int,
        n: int,
        prompts: list[str] | None = None,
        job: Job | None = None,
        numbered: bool = True,
    ) -> None:
        """``job``: for answers that are parsed. ``numbered``: events have ids."""
        super().__init__(choices, n)
        self.rid = rid
        self.job = job
        self.view = view
        self.numbered = numbered
        self.reads_prompt = view.kind == "chat" and job is not None and job.format is not None
        self.awaits_record = view.ids
        self.awaits_admission = self.reads_prompt or view.usage_so_far or view.ids
        self._unshown: list[bytes] = []  # events of a frame that was shown in part
        self.prompts = prompts
        chat = view.kind == "chat"
        self._late_echo = view.echo_logprobs
        self._opening = chat or (prompts is not None and not self._late_echo) or view.ids
        self.opened = 0 if self._opening else choices
        kind = "chat.completion.chunk" if chat else "text_completion"
        head = {"id": view.public_id(rid), "object": kind, "created": view.created, "model": model}
        if view.fingerprint:
            head["system_fingerprint"] = view.fingerprint
        self._head = encode_json(head)[:-1] + b',"choices":['
        self._heads = [self._head + b'{"index":%d,"%s":' % (i, b"delta" if chat else b"text") for i in range(choices)]
        self._foot = b',"usage":null}\n\n' if view.usage else b"}\n\n"
        self._plain = b',"logprobs":null,"finish_reason":null}]' + self._foot
        if chat:
            self._heads = [h + b'{"content":' for h in self._heads]
            self._plain = b"}" + self._plain
        self._simple = view.logprobs is None and not view.ids and not view.usage_so_far
        self._offsets = [len(self._prompt_of(i)) for i in range(choices)]

    # -------------------------------------------------------------- events

    def openings(self) -> bytes:
        """What comes before any token: the role of each choice's message, or its echoed prompt, and the prompt's ids.
        Empty if they were sent."""
        out: list[bytes] = []
        while self.opened < self.choices:
            choice = self.opened
            self.opened += 1
            if self.view.kind == "chat":
                body = b'{"index":%d,"delta":{"role":"assistant","content":""}' % choice
            else:
                echoed = self._prompt_of(choice) if not self._late_echo else ""
                body = self._heads[choice][len(self._head) :] + encode_json(echoed)
            tail = b',"logprobs":null,"finish_reason":null' + self._prompt_ids(choice) + self._foot_of(choice)
            out += (self._id(), self._head, body, tail)
        return b"".join(out)

    def events(self, choice: int, raw: bytes) -> bytes:
        """The events of the frames ``raw``, which begin at this choice's cursor. What follows an end is ignored."""
        out: list[bytes] = [self.openings()] if self.opened < self.choices else []
        for piece, frame in split_frames(raw):
            if self.ends[choice] is not None:
                break
            self.count(choice, piece, frame)
            if self.reads_prompt:
                out += self._parsed_events(choice, frame)
            elif self._simple and frame.finish is None:
                out += (self._id(), self._heads[choice], encode_json(frame.text), self._plain)
            elif frame.finish != "error" or frame.text:
                out += (self._id(), self._heads[choice], self._rest(choice, frame))
        return b"".join(out)

    def closing(self, tail: str = "") -> bytes:
        """The last events of the stream, less those that ``tail`` says were sent already."""
        if failure := self.failure():
            return b"data: " + encode_json(failure) + b"\n\n"
        out = b""
        if self.view.usage and tail != "u":
            out = self._id(b"u") + self._head + b'],"usage":' + encode_json(self.usage()) + b"}\n\n"
        return out + self._id(b"d")[: -len(b"data: ")] + DONE

    def replay(self, shown: EventId, journals: list[bytes]) -> None:
        """Count what a client has seen, without events: ``journals`` hold each opened choice's bytes up to its cursor.
        StreamDiverged if these are not the bytes that the reader was shown."""
        if len(shown.cursors) > self.choices or (not self._opening and len(shown.cursors) != self.choices):
            raise StreamDiverged("the event id belongs to another stream")
        checks = [crc32(raw) for raw in journals] + [0] * (self.choices - len(journals))
        if [len(raw) for raw in journals] != list(shown.cursors) or check_of(checks) != shown.check:
            raise StreamDiverged("the journal is not the one that this event id was taken from")
        last: list[tuple[Frame, list[bytes]] | None] = [None] * self.choices
        for choice, raw in enumerate(journals):
            for piece, frame in split_frames(raw) if raw else ():
                self.count(choice, piece, frame)
                self._advance(choice, frame)
                if self.reads_prompt:
                    last[choice] = frame, self._parse(choice, frame)
        self.opened = max(self.opened, len(shown.cursors))
        self.replayed_tokens = self.completion_tokens
        if shown.choice >= 0:
            found = last[shown.choice] if shown.choice < self.choices else None
            if found is None or shown.events >= len(found[1]):
                raise StreamDiverged("the event id belongs to another stream")
            self._unshown = self._numbered(shown.choice, *found)[shown.events :]

    def unshown(self) -> bytes:
        """The events that were left over of the frame that the reader was shown in part."""
        events, self._unshown = self._unshown, []
        return b"".join(events)

    # -------------------------------------------------------------- parts

    def _prompt_of(self, choice: int) -> str:
        """The text that is echoed before ``choice``."""
        return self.prompts[choice // self.n] if self.prompts else ""

    def _parsed_events(self, choice: int, frame: Frame) -> list[bytes]:
        return self._numbered(choice, frame, self._parse(choice, frame))

    def _parse(self, choice: int, frame: Frame) -> list[bytes]:
        """The deltas of one more frame, the last one without text for the end of the choice."""
        if self.parsed is None:
            self.parsed = parsed_answer(self.rid, self.job, self.view, self.choices, self.thinking)
            assert self.parsed is not None
        deltas = self.parsed.deltas(choice, frame)
        told = self.view.ids or (self.view.logprobs is not None and "lp" in (frame.extra or {}))
        if frame.finish not in (None, "error") or (told and not deltas):
            deltas.append(b"{}")
        return deltas

    def _numbered(self, choice: int, frame: Frame, deltas: list[bytes]) -> list[bytes]:
        """One event for each delta. The last one tells the frame's logprobs and ids, and the end."""
        events = []
        for shown, delta in enumerate(deltas, 1):
            last = shown == len(deltas)
            logprobs = finish = None
            foot = tail = self._foot_of(choice)
            if last:
                if self.view.logprobs is not None and frame.extra is not None and "lp" in frame.extra:
                    logprobs = self._logprobs(choice, frame)
                if self.parsed is not None and frame.finish != "error":
                    finish = self.parsed.finish(choice, frame.finish)
                if self.view.ids:
                    ids = [] if frame.token is None else [frame.token]
                    tail = b',"token_ids":' + encode_json(ids) + b"}]" + foot
            event = self._id(b"" if last else b".%d.%d" % (choice, shown)) + self._head
            event += b'{"index":%d,"delta":' % choice + delta + b',"logprobs":' + encode_json(logprobs)
            event += b',"finish_reason":' + encode_json(finish)
            events.append(event + (tail if last and self.view.ids else b"}]" + foot))
        return events

    def _id(self, tail: bytes = b"") -> bytes:
        if not self.numbered:
            return b"data: "
        if self.choices == 1 and self.opened:
            return b"id: %d-%08x%b\ndata: " % (self.cursors[0], self.checks[0], tail)
        cursors = ".".join(map(str, self.cursors[: self.opened])).encode()
        return b"id: %b-%08x%b\ndata: " % (cursors, check_of(self.checks), tail)

    def _prompt_ids(self, choice: int) -> bytes:
        """The end of an opening: of the choice in completions, of the chunk in chats, as vLLM has it."""
        if not self.view.ids:
            return b"}]"
        ids = b',"prompt_token_ids":' + encode_json(self.prompt_ids(choice))
        return b"}]" + ids if self.view.kind == "chat" else b',"token_ids":[]' + ids + b"}]"

    def _foot_of(self, choice: int) -> bytes:
        """What ends a chunk of ``choice``. Its usage counts this choice alone: so every reader gets the same."""
        if not self.view.usage_so_far:
            return self._foot
        prompt, made = self.prompt_tokens or 0, self.tokens[choice]
        usage = {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
        return b',"usage":' + encode_json(usage) + b"}\n\n"

    def _rest(self, choice: int, frame: Frame) -> bytes:
        """A choice after its head: text, logprobs, end, ids."""
        logprobs, text = None, frame.text
        if self.view.logprobs is not None and frame.extra is not None and "lp" in frame.extra:
            logprobs = self._logprobs(choice, frame)
        if self._late_echo and (prompt := prompt_logprobs_of(frame.extra)) is not None:
            logprobs = joined(echoed_logprobs(prompt, self.view.logprobs or 0, len(self._prompt_of(choice))), logprobs)
            text = self._prompt_of(choice) + text
        self._advance(choice, frame)
        finish = None if frame.finish == "error" else frame.finish
        out = encode_json(text) + (b"}" if self.view.kind == "chat" else b"")
        out += b',"logprobs":' + encode_json(logprobs) + b',"finish_reason":' + encode_json(finish)
        if self.view.ids:
            out += b',"token_ids":' + encode_json([] if frame.token is None else [frame.token])
        return out + b"}]" + self._foot_of(choice)

    def _logprobs(self, choice: int, frame: Frame) -> dict[str, Any]:
        if self.view.kind == "chat":
            return {"content": [chat_logprob(frame)], "refusal": None}
        return completion_logprobs([frame], self._offsets[choice])

    def _advance(self, choice: int, frame: Frame) -> None:
        if self.view.logprobs is not None and frame.extra is not None and "tok" in frame.extra:
            self._offsets[choice] += len(token_text(frame.extra["tok"]))


# ------------------------------------------------------------------ the whole answer


def whole_answer(
    rid: str,
    model: str,
    view: View,
    n: int,
    journals: list[bytes],
    prompt_tokens: int,
    prompts: list[str] | None = None,
    job: Job | None = None,
    thinking: bool = False,
    prompts_of_record: list[bytes] | None = None,
) -> tuple[dict[str, Any], Tally]:
    """The body of a response that is not streamed, from complete journals. ``job``: for answers that are parsed;
    ``thinking``: its prompt has opened a thought; ``prompts_of_record``: ids, where they are shown."""
    tally = Tally(len(journals), n)
    tally.prompts_of_record = prompts_of_record or []
    tally.prompt_tokens = prompt_tokens
    tally.parsed = parsed_answer(rid, job, view, len(journals), thinking)
    choices = []
    first_frames: list[Frame] = []
    for i, raw in enumerate(journals):
        frames = []
        for piece, frame in split_frames(raw) if raw else ():
            tally.count(i, piece, frame)
            frames.append(frame)
        choice = _whole_choice(i, view, frames, tally.ends[i], prompts[i // n] if prompts else "")
        if tally.parsed is not None:
            choice["message"] = tally.parsed.message(i, frames)
            choice["finish_reason"] = tally.parsed.finish(i, tally.ends[i])
        if view.ids and view.kind != "chat":
            choice["prompt_token_ids"] = tally.prompt_ids(i)
        if view.prompt_logprobs is not None and view.kind != "chat":
            choice["prompt_logprobs"] = told_of_prompt(frames, view.prompt_logprobs)
        choices.append(choice)
        first_frames = first_frames or frames[:1]
    body: dict[str, Any] = {
        "id": view.public_id(rid),
        "object": "chat.completion" if view.kind == "chat" else "text_completion",
        "created": view.created,
        "model": model,
        **({"system_fingerprint": view.fingerprint} if view.fingerprint else {}),
        "choices": choices,
        **({"prompt_token_ids": tally.prompt_ids(0)} if view.ids and view.kind == "chat" else {}),
        "usage": tally.usage(),
    }
    if view.prompt_logprobs is not None and view.kind == "chat":
        body["prompt_logprobs"] = told_of_prompt(first_frames, view.prompt_logprobs)
    return body, tally


def _whole_choice(index: int, view: View, frames: list[Frame], end: str | None, echoed: str) -> dict[str, Any]:
    text = "".join(frame.text for frame in frames)
    told = [f for f in frames if view.logprobs is not None and f.extra is not None and "lp" in f.extra]
    choice: dict[str, Any] = {"index": index}
    if view.kind == "chat":
        choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        choice["logprobs"] = (
            None if view.logprobs is None else {"content": list(map(chat_logprob, told)), "refusal": None}
        )
    else:
        choice["text"] = echoed + text
        choice["logprobs"] = None if view.logprobs is None else completion_logprobs(told, len(echoed))
        if view.echo_logprobs and frames and (prompt := prompt_logprobs_of(frames[0].extra)) is not None:
            choice["logprobs"] = joined(echoed_logprobs(prompt, view.logprobs or 0, len(echoed)), choice["logprobs"])
    choice["finish_reason"] = end
    if view.ids:
        choice["token_ids"] = [frame.token for frame in frames if frame.token is not None]
    return choice
