"""Wire structs, one section per direction. MessagePack everywhere.

Structs between our own services are arrays: they grow only at their end, and readers ignore extras.
What producers write or read (Job, Terminal) are maps, so that they can be written by hand.
Token ids and block ids travel as little-endian int32 bytes (``pack_ids`` / ``unpack_ids``).

A little over 400 lines: it is the table of what is on the wire, and holds no algorithm but the packing.
"""

from __future__ import annotations

import hashlib
import secrets
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import msgspec
from msgspec import Struct

from protocol.formats.spec import FormatSpec
from protocol.sampling import SamplingParams

WIRE = 1  # version of the wire between our services; no plans between different ones

Priority = Literal["interactive", "standard", "batch"]
PRIORITIES: tuple[Priority, ...] = ("interactive", "standard", "batch")
DEFAULT_TENANT = "default"

encode = msgspec.msgpack.Encoder().encode


def new_rid(shard: int = 0) -> str:
    """128 random bits, 32 hex digits; of another shard than the first followed by `s` and its number."""
    return secrets.token_hex(16) + (f"s{shard}" if shard else "")


def shard_of(rid: str) -> int:
    """The shard that this request lies in, if a request has this rid."""
    _, _, number = rid[32:].partition("s")
    return int(number) if number.isascii() and number.isdigit() else 0


LOGPROB_FLOOR = -9999.0  # stands for minus infinity, which JSON cannot say
ID_BYTES = 4  # of one packed token or block id


def pack_ids(ids: Iterable[int]) -> bytes:
    """Token or block ids as little-endian int32 bytes."""
    packed = array("i", ids)
    if _BIG_ENDIAN:
        packed.byteswap()
    return packed.tobytes()


def unpack_ids(raw: bytes) -> array[int]:
    """The inverse of pack_ids: an array('i')."""
    ids = array("i")
    ids.frombytes(raw)
    if _BIG_ENDIAN:
        ids.byteswap()
    return ids


PAIR_BYTES = 2 * ID_BYTES  # of two packed ids


def unpack_pairs(raw: bytes) -> Iterator[tuple[int, int]]:
    """Pairs of ids that follow each other, packed by pack_ids."""
    ids = iter(unpack_ids(raw))
    return zip(ids, ids, strict=True)


SEAT_BYTES = 2  # of one packed seat


def pack_seats(seats: Iterable[int]) -> bytes:
    """Seats of a plan's rows as little-endian uint16 bytes."""
    packed = array("H", seats)
    if _BIG_ENDIAN:
        packed.byteswap()
    return packed.tobytes()


def unpack_seats(raw: bytes) -> array[int]:
    """The inverse of pack_seats: an array('H')."""
    seats = array("H")
    seats.frombytes(raw)
    if _BIG_ENDIAN:
        seats.byteswap()
    return seats


_BIG_ENDIAN = array("i", [1]).tobytes()[0] == 0


# ---------------------------------------------------------------- producer or gateway -> scheduler

MAX_JOB_BYTES = 1 << 20
MAX_PROMPTS = 64  # prompts in one request
MAX_REQUEST_CHOICES = 128  # prompts times n
MAX_MESSAGES = 1024


class Job(Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One request as it stands in the inbox and, normalised, under ``body`` of its ``r:`` hash.

    ``prompt`` is a text, token ids, or a list of either; choice i of the request continues prompt
    i // n. ``view`` is the gateway's description of how to render the answer (endpoint, created, ...); the
    scheduler never reads it, and nothing in it changes what is generated.
    """

    v: int = 1
    id: str | None = None  # the producer's id: makes a push idempotent within its tenant
    prompt: str | list[Any] | None = None  # list: of ids, of texts, or of lists of ids (protocol.jobs checks)
    messages: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    sampling: SamplingParams = SamplingParams()
    tenant: str = DEFAULT_TENANT
    priority: Priority = "standard"
    timeout_s: float | None = None
    reply_to: str | None = None  # rows arrive live on out:<reply_to>
    results: str | None = None  # one terminal entry per choice on results:<results>
    cache_salt: str | None = None  # further salt of the prefix cache, within the tenant's own
    view: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None  # as the chat template is to tell them
    format: FormatSpec | None = None  # how the model writes calls and thoughts: pinned at accept, for all readers
    default_max_tokens: int | None = None  # the model's own where none are asked for; gives way to the context
    trace: str | None = None  # a W3C traceparent (and after a space a tracestate): the span that this one stands under
    cache: Literal["on", "refresh", "off"] | None = (
        None  # of answers: on: with a seed too; refresh: kept, not looked up
    )
    suffix: str | None = None  # the text that follows what is to be generated (fill in the middle)
    tokenize: bool = False  # ends at admission: only the prompt's ids are asked for
    add_special_tokens: bool = True  # a text gets what the tokenizer adds by default, a bos often
    truncate_prompt_tokens: int | None = None  # only so many last tokens are kept; -1: as many as fit
    continue_final_message: bool = False  # the last message is gone on with, not answered
    # Of a push, as OpenAI's: protocol/formats/tool_use.py makes rules of them before the job is stored.
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as a list, one per prompt; [] for a chat."""
        if self.prompt is None:
            return []
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt

    def thinking(self, prompt: Sequence[int]) -> bool:
        """Whether the answer to ``prompt``, ids made of this job, begins within a thought."""
        last = self.messages[-1].get("content") if self.messages and self.continue_final_message else None
        return self.format is not None and self.format.thinking(prompt, last if isinstance(last, str) else "")

    @property
    def choices(self) -> int:
        """Number of sequences that this request makes."""
        return max(1, len(self.prompts())) * self.sampling.n


def body_hash(body: bytes) -> str:
    """SHA-256 of a body: what may be kept after the body is deleted."""
    return hashlib.sha256(body).hexdigest()


def choice_seed(seed: int, choice: int) -> int:
    """The 64-bit sampling key of one choice; with the token's position it fixes every draw."""
    digest = hashlib.blake2b(seed.to_bytes(8, "little", signed=True) + choice.to_bytes(4, "little"), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


class ModelCard(Struct, kw_only=True, omit_defaults=True):
    """A served model in the registry (a map; written by the leader)."""

    model: str
    created: int  # Unix seconds
    max_model_len: int
    vocab_size: int
    eos_token_ids: list[int] = []
    wire: int = WIRE
    chat: bool = True  # whether there is a chat template
    format: FormatSpec | None = None  # how the model writes tool calls and thoughts
    sampling: dict[str, float] = {}  # defaults of this model, as its generation_config.json states them
    fingerprint: str = ""  # what all serving workers run; "": none serves, or they differ (an update is under way)

    @property
    def defaults(self) -> dict[str, Any]:
        """Of sampling, but for the length: a default is never the reason why a request is refused."""
        return {name: value for name, value in self.sampling.items() if name != "max_tokens"}

    def default_max_tokens(self, sampling: SamplingParams) -> int | None:
        """What a job with this sampling has as its ``default_max_tokens``."""
        most = self.sampling.get("max_tokens")
        return None if most is None or sampling.max_tokens is not None else int(most)


# ---------------------------------------------------------------- scheduler -> worker


class NewSequence(Struct, array_like=True):
    """A sequence that is new to a worker under this placement.

    ``token_ids`` are all known ids (prompt, then what the journal holds); ``computed`` of them have
    their KV in the blocks of ``block_table`` already (prefix-cache hits). ``cursor`` is the journal's
    length in bytes: the next frame is appended there.
    """

    seat: int  # below 2 * Capacity.max_num_seqs: a seat is reused only after its last planned step's hint
    rid: str
    choice: int
    placement: int
    token_ids: bytes
    prompt_len: int  # in tokens; token_ids beyond it are outputs
    sampling: SamplingParams  # max_tokens resolved to a number
    seed: int  # the request's; the worker keys draws by choice_seed(seed, choice) and the position
    cursor: int
    block_table: bytes
    computed: int
    cached_tokens: int = 0  # prefix-cache hits at the first placement, for usage
    id: str | None = None  # the producer's id, repeated in every row
    wants_result: bool = False  # a terminal entry is to be written to results:<name>


class Plan(Struct, array_like=True):
    """The batch of one step.

    Rows are parallel arrays: row k computes the next ``counts[k]`` tokens of seat ``seats[k]`` and,
    where ``samples[k]``, samples one more. A plan has no positions: the worker keeps, by seat, how many tokens
    are computed and the last id. Empty ``counts`` means 1 for every row, empty ``samples`` means
    every row samples (a steady decode step).
    """

    epoch: int
    gen: int
    step: int  # 1, 2, 3, ... within (epoch, gen)
    seats: bytes = b""  # uint16, little-endian
    counts: bytes = b""  # int32 per row, or empty
    samples: bytes = b""  # one byte 0/1 per row, or empty
    new: list[NewSequence] = []
    blocks: list[tuple[int, bytes]] = []  # (seat, ids of blocks appended to its table), for known seats
    ends: list[tuple[int, str]] = []  # (seat, finish reason): write a terminal frame, then empty the seat
    frees: list[int] = []  # seats whose sequences ended or were preempted: drop their state. Applied before `new`
    # Pairs of int32, made before the rows are computed, all copies out before all copies in. What is written by a copy
    # or by a row is written after every earlier copy of it, and read after it.
    copies_out: bytes = b""  # (block, host block)
    copies_in: bytes = b""  # (host block, block)

    @property
    def tokens(self) -> int:
        """Scheduled tokens of the step."""
        return sum(unpack_ids(self.counts)) if self.counts else len(self.seats) // SEAT_BYTES


class PoolCapacity(Struct, array_like=True):
    kind: str  # "full", the pool that rows are computed in, comes first; "host": memory for blocks that are not in it
    unit_tokens: int  # tokens per block
    units: int  # blocks
    copy_us: float = 0.0  # of a host pool: what a block takes to be copied in beside steps; 0: steps wait for copies


class Capacity(Struct, array_like=True):
    """What a worker offers; constant during one gen."""

    model: str
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    pools: list[PoolCapacity]
    vocab_size: int
    engine: str = "torch"
    dtype: str = ""
    device: str = ""
    step_us: list[tuple[int, int]] = []  # (tokens, least microseconds) of the steps that the engine recorded and timed
    level: int = 0  # protocol.levels: sequences that need more are not placed here
    stages: int = 1  # of its pipeline: so many steps are computed at once, best of sequences that have none in common
    fingerprint: str = ""  # of weights, tokenizer and precision (workers/fingerprint.py); "": an older worker's


# ---------------------------------------------------------------- worker -> journal and subscribers


class Frame(Struct, array_like=True):
    """One token's record in a journal. ``token`` is None in a frame that only ends the choice.

    ``extra`` keys: ``held`` (text held back so far: an incomplete character, or what may become a stop string),
    ``lp`` (the token's logprob), ``tok`` (the token's own bytes), ``top`` ([[id, bytes, logprob], ...]),
    ``cached`` (prefix-cache tokens, first frame only), ``plp`` (logprobs of the prompt, first frame only:
    protocol/prompt_logprobs.py), ``stop`` (the stop string or id that matched), and for
    finish reason ``error``: ``code``, ``message``, ``param``.
    """

    token: int | None
    text: str
    finish: str | None = None
    extra: dict[str, Any] | None = None


class Row(Struct, array_like=True):
    """One row of a publication. ``choice`` -1 is the notice of admission, its frames an Admitted."""

    rid: str
    choice: int
    cursor: int  # journal length in bytes before these frames
    frames: bytes
    id: str | None = None


class Admitted(Struct, array_like=True):
    """Published once a request is admitted: prompt tokens, in all, whether the prompt has opened a thought, and what
    the cache of answers said ("hit", "joined", "miss"; "": it was not asked)."""

    prompt_tokens: int
    thinking: bool = False
    cache: str = ""


class Terminal(Struct, kw_only=True, omit_defaults=True):
    """The entry of a results stream (field ``result``): one per choice, a map.

    ``text`` and ``completion_tokens`` are there, empty or not, wherever the request ran at all. ``text`` is all that
    was generated. Where the model's format of calls and thoughts is read (a chat with tools, or a model that thinks),
    ``content``, ``reasoning_content`` and ``tool_calls`` tell what it holds, as over HTTP, and ``finish_reason`` may
    be "tool_calls".
    """

    v: int = 1
    rid: str
    id: str | None = None
    choice: int = 0
    finish_reason: str
    text: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int | None = None
    cached_tokens: int = 0
    error: dict[str, Any] | None = None  # code, message, param
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None  # OpenAI's


_frame_decoder = msgspec.msgpack.Decoder(Frame)
_row_decoder = msgspec.msgpack.Decoder(Row)
_ONE_FRAME_BYTES = 40


def split_stream(raw: bytes) -> Iterator[bytes]:
    """Split concatenated MessagePack values into the bytes of each. msgspec.DecodeError if one is incomplete.

    msgspec has no streaming reader; the msgpack package's Unpacker finds where each value ends.
    """
    import msgpack  # a direct dependency; imported here since only readers of streams need it

    unpacker = msgpack.Unpacker(raw=True, strict_map_key=False, max_buffer_size=len(raw) or 1)
    unpacker.feed(raw)
    start = 0
    while start < len(raw):
        try:
            unpacker.skip()
        except (msgpack.UnpackException, ValueError):
            raise msgspec.DecodeError("a MessagePack value is torn") from None
        end = unpacker.tell()
        yield raw[start:end]
        start = end


def decode_frames(raw: bytes) -> list[Frame]:
    """The frames of a journal or of a row, in order. msgspec.DecodeError if one is incomplete."""
    if len(raw) <= _ONE_FRAME_BYTES:  # likely one frame, as in most rows: no need to split
        try:
            return [_frame_decoder.decode(raw)]
        except msgspec.DecodeError:
            pass
    return [_frame_decoder.decode(piece) for piece in split_stream(raw)]


def decode_rows(raw: bytes) -> list[Row]:
    """The rows of one publication."""
    return [_row_decoder.decode(piece) for piece in split_stream(raw)]


def row_edges(rid: str, choice: int, cursor: int, size: int, producer_id: str | None) -> tuple[bytes, bytes]:
    """The bytes around ``size`` bytes of frames that make them a Row: Lua only concatenates."""
    head = b"\x95" + encode(rid) + encode(choice) + encode(cursor)
    if size < 1 << 8:
        head += b"\xc4" + size.to_bytes(1, "big")
    elif size < 1 << 16:
        head += b"\xc5" + size.to_bytes(2, "big")
    else:
        head += b"\xc6" + size.to_bytes(4, "big")
    return head, encode(producer_id)


# ---------------------------------------------------------------- worker -> scheduler


class HintRow(Struct, array_like=True):
    """What one row of a commit did. ``tokens`` are int32 bytes of the ids that were journaled."""

    seat: int
    tokens: bytes
    cursor: int  # journal length in bytes after the row
    finish: str | None = None


class Hint(Struct, array_like=True):
    """Steps up to ``step`` are done. Rows in the order of the commit; rows without a token or an end are left out."""

    wid: str
    gen: int
    step: int
    rows: list[HintRow] = []
    exec_us: int = 0  # device time of these steps
    idle_us: int = 0  # time the device waited for a plan before them
    dropped: list[int] = []  # seats whose sequences could not be computed here: no more of them will come
    spoiled: bytes = b""  # blocks of these (int32, little-endian): none may be found by its hash any more


LANDED, CLOSED, STALE = "l", "c", "s"  # verdict on one row of a commit


class CommitRow(msgspec.Struct, frozen=True):  # a Struct: one is made per token
    """One row to journal: ``frames`` end to end, appended if the journal is ``cursor`` bytes long."""

    rid: str
    choice: int
    placement: int
    cursor: int
    frames: bytes
    finish: str | None = None
    result: bytes | None = None  # encoded Terminal, written to results:<name> when the row ends the choice
    id: str | None = None


def commit_arguments(rows: Sequence[CommitRow]) -> list[str | bytes | int | float]:
    """Rows as the flat arguments of the scripts: rid, choice, placement, cursor, finish, result, head, frames, tail."""
    args: list[str | bytes | int | float] = []
    for row in rows:
        head, tail = row_edges(row.rid, row.choice, row.cursor, len(row.frames), row.id)
        args += (
            row.rid,
            row.choice,
            row.placement,
            row.cursor,
            row.finish or b"",
            row.result or b"",
            head,
            row.frames,
            tail,
        )
    return args


def next_id(stream_id: str) -> str:
    """The smallest stream id above ``stream_id``: for trims that include it."""
    ms, _, seq = stream_id.partition("-")
    return f"{ms}-{int(seq or 0) + 1}"
