"""The wire as another implementation sees it: plain `redis`, plain `msgpack`, none of our structs on its side."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import msgpack
import msgspec
import pytest

from protocol import messages
from protocol.jobs import decode_job
from protocol.messages import (
    Admitted,
    Capacity,
    CommitRow,
    Frame,
    Hint,
    HintRow,
    Job,
    NewSequence,
    Plan,
    PoolCapacity,
    Row,
    Terminal,
    pack_ids,
    unpack_ids,
)
from protocol.sampling import SamplingParams
from tests.protocol.stage import Stage, frame, terminal

PREFIX = "headrace:{test/model}:"


async def serve_one(stage: Stage) -> tuple[str, list[bytes]]:
    """What the services do for the one push in the inbox: two tokens and an end."""
    (entry,) = await stage.bus.read_jobs("term", 10, 0)
    assert entry.payload is not None
    job = decode_job(entry.payload)
    rid = messages.new_rid()
    verdict, rid = await stage.bus.admit(
        stage.epoch, entry.entry_id, rid=rid, prompts=[pack_ids([1, 2, 3])], seed=1, job=job
    )
    assert verdict == "new"
    await stage.place(rid)
    frames = [frame(11, "é"), frame(12, " wörld"), messages.encode(Frame(None, "", "stop", {"stop": "\n"}))]
    cursor = 0
    for number, one in enumerate(frames):
        last = number == len(frames) - 1
        result = (
            terminal(rid, "stop", id=job.id, text="é wörld", prompt_tokens=3, completion_tokens=2) if last else None
        )
        row = CommitRow(rid, 0, 1, cursor, one, "stop" if last else None, result, job.id)
        assert await stage.commit(row) == "l"
        cursor += len(one)
    return rid, frames


@pytest.mark.parametrize("dumps", [msgpack.packb, lambda job: json.dumps(job).encode()], ids=["msgpack", "json"])
async def test_a_bare_producer(stage: Stage, dumps) -> None:
    raw = stage.raw
    live = raw.pubsub(ignore_subscribe_messages=True)
    live.subscribe(PREFIX + "out:me")
    live.get_message(timeout=5)
    job = {"v": 1, "id": "mine", "prompt": "hello", "sampling": {"max_tokens": 5}, "reply_to": "me", "results": "me"}
    raw.xadd(PREFIX + "jobs", {"job": dumps(job)})

    rid, frames = await serve_one(stage)

    # the journal, from any byte cursor
    assert raw.get(PREFIX + "idem:default:mine").split()[0].decode() == rid
    for cursor, expected in [(0, frames), (len(frames[0]), frames[1:])]:
        unpacker = msgpack.Unpacker(raw=False)
        unpacker.feed(raw.getrange(f"{PREFIX}j:{rid}:0", cursor, -1))
        assert list(unpacker) == [msgpack.unpackb(one) for one in expected]
    assert msgpack.unpackb(frames[0]) == [11, "é", None, None]
    assert msgpack.unpackb(frames[2]) == [None, "", "stop", {"stop": "\n"}]

    # the live tail
    rows = []
    while len(rows) < 4:
        message = live.get_message(timeout=10)
        assert message is not None
        unpacker = msgpack.Unpacker(raw=False)
        unpacker.feed(message["data"])
        rows += list(unpacker)
    assert rows[0][:3] + rows[0][4:] == [rid, -1, 0, "mine"]
    assert msgpack.unpackb(rows[0][3]) == [3]
    assert [row[2] for row in rows[1:]] == [0, len(frames[0]), len(frames[0] + frames[1])]
    assert [row[3] for row in rows[1:]] == frames
    live.close()

    # the result
    ((_, entry),) = raw.xrange(PREFIX + "results:me")
    assert msgpack.unpackb(entry[b"result"]) == {
        "rid": rid, "id": "mine", "finish_reason": "stop", "text": "é wörld",
        "prompt_tokens": 3, "completion_tokens": 2,
    }  # fmt: skip


async def test_redis_cli_pushes_and_reads(stage: Stage) -> None:
    cli = shutil.which("redis-cli") or shutil.which("valkey-cli")
    if cli is None:
        pytest.skip("no redis-cli or valkey-cli on PATH")
    socket = stage.bus.url.removeprefix("unix://")

    def run(*args: str) -> str:
        return subprocess.run([cli, "-s", socket, *args], capture_output=True, check=True, timeout=60).stdout.decode(
            errors="replace"
        )

    run("XADD", PREFIX + "jobs", "*", "job", '{"v":1,"id":"mine","prompt":"hello","results":"me"}')
    rid, frames = await serve_one(stage)
    assert run("GET", PREFIX + "idem:default:mine").split()[0] == rid
    assert run("STRLEN", f"{PREFIX}j:{rid}:0").strip() == str(len(b"".join(frames)))
    assert "wörld" in run("--raw", "GETRANGE", f"{PREFIX}j:{rid}:0", "0", "-1")
    assert "finish_reason" in run("XRANGE", PREFIX + "results:me", "-", "+")


SAMPLING = SamplingParams(max_tokens=5, stop=["x"], logit_bias={3: 1.5})
NEW = NewSequence(1, "r", 0, 1, pack_ids([1, 2]), 2, SAMPLING, -5, 0, pack_ids([9]), 0, 0, "id", True)
ARRAYS = [
    Frame(5, "text", None, {"held": "x"}),
    Frame(None, "", "error", {"code": "c", "message": "m", "param": None}),
    Row("r", 0, 10, b"\x00\xff", "id"),
    Row("r", 0, 10, b"\x00\xff", None),
    Admitted(7),
    Hint("w0", 3, 9, [HintRow(1, pack_ids([4]), 20), HintRow(2, b"", 30, "stop")], 100, 5),
    Plan(1, 2, 3, b"\x01\x00", pack_ids([4]), b"\x01", [NEW], [(1, pack_ids([2]))], [(1, "abort")], [5]),
    Capacity("m", 10, 2, 20, [PoolCapacity("full", 16, 4)], 100, "torch", "float32", "cpu"),
]


@pytest.mark.parametrize("value", ARRAYS, ids=lambda v: type(v).__name__)
def test_our_arrays_and_the_other_implementations(value: msgspec.Struct) -> None:
    """What we write it reads; what it writes we read; further fields at the end are passed over."""
    plain = msgpack.unpackb(messages.encode(value), strict_map_key=False)
    assert isinstance(plain, list)
    again = msgpack.packb(plain)
    assert msgspec.msgpack.decode(again, type=type(value)) == value
    longer = msgpack.packb([*plain, "a later field", {"another": [1]}])
    assert msgspec.msgpack.decode(longer, type=type(value)) == value


@pytest.mark.parametrize(
    "value",
    [Terminal(rid="r", finish_reason="error", error={"code": "c"}), Job(prompt="x", sampling=SAMPLING, id="a")],
    ids=["Terminal", "Job"],
)
def test_our_maps_and_the_other_implementations(value: msgspec.Struct) -> None:
    plain = msgpack.unpackb(messages.encode(value), strict_map_key=False)
    assert isinstance(plain, dict)
    assert msgspec.msgpack.decode(msgpack.packb(plain), type=type(value)) == value


def test_a_result_has_its_text_though_it_be_empty() -> None:
    """The first token may be the end: who reads results by their keys must not fall over that."""
    result = Terminal(rid="r", finish_reason="stop", text="", completion_tokens=0)
    assert {"text": "", "completion_tokens": 0}.items() <= msgpack.unpackb(messages.encode(result)).items()


def test_a_terminal_of_a_later_version_is_read() -> None:
    later = msgpack.packb({"v": 2, "rid": "r", "finish_reason": "stop", "colour": "red"})
    assert msgspec.msgpack.decode(later, type=Terminal).rid == "r"


@pytest.mark.parametrize("size", [0, 1, 255, 256, 65_535, 65_536])
@pytest.mark.parametrize("producer_id", [None, "mine"])
def test_row_edges_make_whole_rows(size: int, producer_id: str | None) -> None:
    frames = bytes(size)
    head, tail = messages.row_edges("r" * 32, 127, 2**40, size, producer_id)
    assert msgpack.unpackb(head + frames + tail) == ["r" * 32, 127, 2**40, frames, producer_id]


def test_ids_travel_as_little_endian_int32() -> None:
    assert pack_ids([1, 2**31 - 1, 258]) == b"\x01\0\0\0\xff\xff\xff\x7f\x02\x01\0\0"
    assert list(unpack_ids(pack_ids(range(1000)))) == list(range(1000))


def test_torn_streams_are_told() -> None:
    whole = b"".join(frame(token, "text") for token in range(20))
    assert [f.token for f in messages.decode_frames(whole)] == list(range(20))
    for cut in range(1, len(whole)):
        try:
            count = len(messages.decode_frames(whole[:cut]))
        except msgspec.DecodeError:
            continue
        assert len(b"".join(frame(token, "text") for token in range(count))) == cut


def test_the_protocol_is_light() -> None:
    """A gateway starts in under a second: nothing here pulls in torch, transformers or numpy."""
    code = (
        "import sys, protocol.bus, protocol.jobs; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout
    assert out.strip() == "[]"
