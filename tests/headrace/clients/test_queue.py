"""Clients of the queue against the whole stack: streaming, resuming, idempotency, cancelling, errors."""

from __future__ import annotations

import pytest

from headrace import AsyncClient
from protocol.errors import Conflict, InvalidRequest, NotFound, RequestError
from protocol.messages import Row, decode_frames
from tests.bus import Bus


async def test_a_stream_has_every_token_once(queue_url: str) -> None:
    async with AsyncClient(queue_url) as client:  # the only model is found
        assert client.model == "org/tiny"
        request = await client.submit("def add(a, b):", max_tokens=40, ignore_eos=True, n=2, seed=5)
        pieces = [p async for p in client.stream(request)]
        for choice in (0, 1):
            own = [p for p in pieces if p.choice == choice]
            assert len([p for p in own if p.token_id is not None]) == 40
            assert [p.finish_reason for p in own if p.finish_reason] == ["length"]
        again = await client.result(request)  # the journal is kept: it can be read as often as one likes
        for choice in (0, 1):
            assert again.choices[choice].text == "".join(p.text for p in pieces if p.choice == choice)
            assert again.choices[choice].token_ids == [p.token_id for p in pieces if p.choice == choice]
        assert again.text == again.choices[0].text


class Forgetful(AsyncClient):
    """Loses every second publication on its way."""

    lost = 0
    kept = True

    def _deliver(self, rows: list[Row]) -> None:
        self.kept = not self.kept
        if self.kept:
            super()._deliver(rows)
        else:
            self.lost += len(rows)


async def test_another_client_reads_along_and_lost_publications_cost_nothing(queue_url: str) -> None:
    async with AsyncClient(queue_url) as sender, Forgetful(queue_url) as reader:
        request = await sender.submit("x", max_tokens=300, ignore_eos=True)
        read = [p.token_id async for p in reader.stream(request) if p.token_id is not None]
        assert reader.lost > 0
        assert read == (await sender.result(request)).choices[0].token_ids
        assert len(read) == 300


async def test_the_same_id_is_the_same_request(queue_url: str) -> None:
    async with AsyncClient(queue_url) as client:
        first = await client.submit("once", id="job-1", max_tokens=5, ignore_eos=True)
        assert await client.submit("once", id="job-1", max_tokens=5, ignore_eos=True) == first
        await client.result(first)
        assert await client.submit("once", id="job-1", max_tokens=5, ignore_eos=True) == first
        with pytest.raises(Conflict):
            await client.submit("otherwise", id="job-1", max_tokens=5, ignore_eos=True)


async def test_cancel(queue_url: str) -> None:
    async with AsyncClient(queue_url) as client:
        request = await client.submit("x", max_tokens=20_000, ignore_eos=True)
        stream = client.stream(request)
        await anext(stream)
        assert await client.cancel(request)
        assert [p.finish_reason async for p in stream][-1] == "abort"
        assert not await client.cancel(request)


async def test_what_is_wrong_is_said(queue_url: str) -> None:
    async with AsyncClient(queue_url, "org/tiny") as client:
        with pytest.raises(InvalidRequest, match="temperature"):
            await client.submit("x", temperature=9.0)
        with pytest.raises(InvalidRequest, match="either prompt or messages"):
            await client.submit()
        with pytest.raises(InvalidRequest, match="temprature"):
            await client.submit("x", temprature=0)
        with pytest.raises(NotFound):
            await client.result("0" * 32)
        too_long = await client.submit([1] * 30_000, max_tokens=5, ignore_eos=True)
        ended = (await client.result(too_long)).choices[0]
        assert ended.finish_reason == "error"
        assert isinstance(ended.error, RequestError)
        assert ended.error.wire_code == "context_length_exceeded"
    async with AsyncClient(queue_url, "org/tiny", tenant="other") as stranger:
        with pytest.raises(NotFound):
            await stranger.result(too_long)


async def test_results_entries_are_written_where_asked(queue_url: str) -> None:
    async with AsyncClient(queue_url, "org/tiny") as client:
        request = await client.submit("x", id="wanted", max_tokens=4, ignore_eos=True, results="mine")
        result = await client.result(request)
    bus = Bus(queue_url, "org/tiny")
    try:
        (entry,) = [t for _, t in await bus.read_results("mine") if t.rid == request]
        assert (entry.id, entry.text, entry.completion_tokens) == ("wanted", result.text, 4)
        frames = decode_frames(await bus.read_journal(request, 0))
        assert "".join(f.text for f in frames) == result.text
    finally:
        await bus.close()
