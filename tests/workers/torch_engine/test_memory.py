"""What a worker may take of a GPU: checked before loading, measured again at load, one start at a time."""

from __future__ import annotations

import threading

import pytest
import torch

from protocol.errors import StartError
from tests.models import tiny_model
from workers.torch_engine import loader, memory
from workers.torch_engine.memory import (
    SPARE,
    Card,
    check_room,
    host_blocks,
    one_at_a_time,
    token_bytes,
    weight_bytes,
)

GIB = 1 << 30


def test_a_share_is_of_the_whole_card_less_what_this_worker_holds():
    card = Card(80 * GIB, 79 * GIB, 0.5)
    assert card.left(free=63 * GIB, peak=2 * GIB) == (40 - 16 - 2) * GIB
    beside = Card(80 * GIB, 39 * GIB, 0.5)  # another worker holds its half
    assert beside.left(free=23 * GIB, peak=2 * GIB) == 23 * GIB - SPARE - 2 * GIB
    assert beside.left(free=1 * GIB, peak=2 * GIB) == 0


def test_what_cannot_fit_is_said_before_loading():
    card, token = Card(24 * GIB, 23 * GIB, 0.9), 128 << 10
    check_room(card, 16 * GIB, token, 32768, None)
    check_room(card, 16 * GIB, token, None, 4 * GIB)
    with pytest.raises(StartError, match=r"0\.9 of 24\.00 GiB grants 21\.60 GiB.*16\.00 GiB.*--max-model-len.*8\.00"):
        check_room(card, 16 * GIB, token, 65536, None)
    with pytest.raises(StartError, match=r"--kv-cache-memory asks for 6\.00 GiB"):
        check_room(card, 16 * GIB, token, 65536, 6 * GIB)
    with pytest.raises(StartError, match=r"8\.00 GiB of the GPU's 24\.00 GiB are free.*other processes"):
        check_room(Card(24 * GIB, 8 * GIB, 0.9), 16 * GIB, token, 1024, None)


def test_what_the_config_and_the_files_tell(tmp_path_factory):
    path = tiny_model(tmp_path_factory, "llama")
    config = loader.load_config(str(path))
    text = config.get_text_config()
    heads = (text.num_key_value_heads, text.hidden_size // text.num_attention_heads)
    assert token_bytes(text, torch.bfloat16) == 2 * 2 * text.num_hidden_layers * heads[0] * heads[1]
    stored = loader.stored_dtype(config)
    files = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    assert weight_bytes(str(path), stored, stored) == files > 0
    assert weight_bytes("nobody/nothing", stored, stored) == 0


def test_starts_wait_for_each_other(tmp_path):
    order, waited, inside = [], threading.Event(), threading.Event()

    def second():
        inside.wait()
        with one_at_a_time(tmp_path / "card.lock", waited.set):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with one_at_a_time(tmp_path / "card.lock", lambda: None):
        inside.set()
        assert waited.wait(30)
        order.append("first")
    thread.join(30)
    assert order == ["first", "second"]


def test_bytes_that_cannot_be_had_or_hold_no_block_are_refused(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: 1 << 30)
    assert host_blocks(None, 1 << 20, 1) == 0
    assert host_blocks(64 << 20, 1 << 20, 2) == 32, "of each rank"
    with pytest.raises(StartError, match=r"--kv-offload asks for 2\.00 GiB of host memory, and 1\.00 GiB are free"):
        host_blocks(2 << 30, 1 << 20, 1)
    with pytest.raises(StartError, match="hold no block"):
        host_blocks(100, 1 << 20, 1)
