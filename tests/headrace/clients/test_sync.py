"""The queue's client without await, against the whole stack."""

from __future__ import annotations

import threading

import pytest

from headrace import Client
from protocol.errors import HeadraceError, NotFound


def test_without_await(queue_url: str) -> None:
    with Client(queue_url, "org/tiny") as client:
        request = client.submit("def f():", max_tokens=12, ignore_eos=True)
        text = "".join(piece.text for piece in client.stream(request))
        assert client.result(request).text == text
        assert not client.cancel(request)
        for _ in client.stream(request):  # a stream that is left early is closed
            break


def test_no_server_is_said() -> None:
    with pytest.raises(HeadraceError), Client("redis://127.0.0.1:1/0", "m"):
        pass


def test_it_is_connected_once_made_and_closes_more_than_once(queue_url: str) -> None:
    client = Client(queue_url, "org/tiny")
    with pytest.raises(NotFound):
        client.result("0" * 32)
    client.close()
    client.close()


def test_several_threads_share_one_client(queue_url: str) -> None:
    counts: list[int] = []

    def ask(client: Client, tokens: int) -> None:
        request = client.submit("x", max_tokens=tokens, ignore_eos=True)
        counts.append(len(client.result(request).choices[0].token_ids))

    with Client(queue_url, "org/tiny") as client:
        threads = [threading.Thread(target=ask, args=(client, n)) for n in (3, 5, 8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(counts) == [3, 5, 8]
