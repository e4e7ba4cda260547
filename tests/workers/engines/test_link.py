"""What crosses between an engine's process and its parent comes out as it went in, whatever a machine's byte order."""

from __future__ import annotations

import socket

import numpy as np
import pytest

from workers.engines.base import Sampled, Scores
from workers.engines.link import Channel, pack_result, unpack_result

FULL = Sampled(
    np.array([3, 0], np.int32), np.array([70_000, 5], np.int32),
    {3: (-0.5, np.array([1, 2], np.int32), np.array([-0.5, -1.5], np.float32))}, 1234,
    {7: ("invalid_request", "it is wrong")}, [7, 9], [8], 11, 12,
    {0: Scores(np.zeros(2, np.float32), np.array([1, 4], np.int64), np.array([[5, 6], [7, 8]]), np.ones((2, 2)))},
)  # fmt: skip
BARE = Sampled(np.zeros(0, np.int32), np.zeros(0, np.int32), {}, 0)


@pytest.fixture
def ends():
    ours, theirs = socket.socketpair()
    pair = Channel(ours), Channel(theirs)
    yield pair
    for channel in pair:
        channel.close()


@pytest.mark.parametrize("sampled", [FULL, BARE], ids=["all there is", "no rows"])
def test_a_result_is_what_was_sent(ends, sampled):
    sender, receiver = ends
    sender.send(*pack_result(sampled))
    found = unpack_result(receiver.receive())
    assert (found.seats.tolist(), found.tokens.tolist()) == (sampled.seats.tolist(), sampled.tokens.tolist())
    for name in ("exec_us", "failed", "dropped", "late", "mask_us", "mask_wait_us"):
        assert getattr(found, name) == getattr(sampled, name)
    assert found.logprobs.keys() == sampled.logprobs.keys()
    for seat, (drawn, ids, values) in sampled.logprobs.items():
        assert found.logprobs[seat][0] == drawn
        assert [column.tolist() for column in found.logprobs[seat][1:]] == [ids.tolist(), values.tolist()]
    for seat, scores in sampled.prompts.items():
        for name in ("logprobs", "ranks", "top_ids", "top"):
            assert getattr(found.prompts[seat], name).tolist() == getattr(scores, name).tolist()


def test_ids_are_little_endian():
    message = pack_result(FULL)
    assert message[2][:4] == (70_000).to_bytes(4, "little")


def test_a_message_in_pieces_is_whole_and_an_end_in_its_middle_is_an_end():
    ours, theirs = socket.socketpair()
    channel = Channel(theirs)
    whole = (4).to_bytes(4, "little") + b"\x93\x01\x02\x03"
    for byte in whole + whole[:6]:
        ours.sendall(bytes([byte]))
    ours.close()
    assert channel.receive() == [1, 2, 3]
    assert channel.receive() is None
    channel.close()
